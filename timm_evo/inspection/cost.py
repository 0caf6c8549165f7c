""" Arithmetic cost of a model """
import threading
from math import prod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['count_gmacs']

# of counts: PyTorch notes for the whole process that a mode is on, which would stay so if two ended out of order, and
# Dynamo of torch 2.5 to 2.8 would compile nothing from then on
_turn = threading.RLock()


class _FlopCounter(TorchDispatchMode):
    """PyTorch's formulas without the hooks of its `FlopCounterMode`, for which a last block would not be short.

    Like every such mode it sees what its own thread computes, and changes nothing for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.__name__.startswith('_scaled_dot_product'):  # PyTorch has no formula for some of these, as on a CPU
            query, key, value = args[:3]
            self.flops += 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out


@torch.inference_mode(False)  # in inference mode, linear layers are not taken apart into products
@torch.no_grad()
def count_gmacs(model: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of a model for one image, in billions, by PyTorch's formulas.

    Args:
        model: Any model, dense or evolved, in evaluation mode. Hooks that watch it, as most counters of FLOPs set them,
            make an evolved model compute its last block as a whole; this counter sets none.
        image: A batch of one image (1, C, H, W).
    """
    with _turn, _FlopCounter() as counter:
        model(image)
    return counter.flops / 2e9
