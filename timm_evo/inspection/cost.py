""" Arithmetic cost of a model """
import threading
from math import prod

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['count_gmacs']

# One count at a time: PyTorch stores for the whole process that a mode is on. If two modes ended out of order, this
# would stay stored, and Dynamo of torch 2.5 to 2.8 would no longer compile anything.
_turn = threading.RLock()


class _FlopCounter(TorchDispatchMode):
    """Count by PyTorch's formulas, without the hooks of its `FlopCounterMode`, which prevent a short last block.

    Like every dispatch mode, it acts only on its own thread.
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


@torch.inference_mode(False)  # in inference mode, linear layers are not split into products
@torch.no_grad()
def count_gmacs(model: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of a model for one image, in billions, by PyTorch's formulas.

    Args:
        model: Any model, dense or evolved, in evaluation mode. Hooks make an evolved model compute the whole last
            block. Most counters of FLOPs set hooks; this one sets none.
        image: A batch of one image (1, C, H, W).
    """
    with _turn, _FlopCounter() as counter:
        model(image)
    return counter.flops / 2e9
