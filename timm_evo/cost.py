""" Arithmetic cost of a model """
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['count_gmacs']


class _FlopCounter(TorchDispatchMode):
    """PyTorch's formulas without the hooks of its `FlopCounterMode`, for which a last block would not be short."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
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
    with sdpa_kernel(SDPBackend.MATH), _FlopCounter() as counter:  # not all fused attentions have a formula
        model(image)
    return counter.flops / 2e9
