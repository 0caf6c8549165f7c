""" Checks whether a module can be computed in another way without a visible difference """
from typing import Any

from torch import Tensor, nn

from ..torch_private import children, has_hooks, is_compiled

__all__ = ['has_plain_weights', 'is_plain', 'is_watched']

# Modules of other origins may compute anything: adapters, quantized layers, classes of users.
_KNOWN_ORIGINS = ('timm.', 'torch.nn.modules.')


def is_plain(module: nn.Module) -> bool:
    """Whether a module and its submodules are timm's or PyTorch's, and not `is_watched`."""
    cls = type(module)
    return (
        cls.__module__.startswith(_KNOWN_ORIGINS)
        and cls.forward.__module__.startswith(_KNOWN_ORIGINS)  # a user may have replaced it in a class of timm
        and not is_watched(module)
        and all(map(is_plain, children(module)))
    )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, compiled code or a replaced `forward` take part in a call of the module."""
    return has_hooks(module) or is_compiled(module) or 'forward' in module.__dict__


def has_plain_weights(layer: Any) -> bool:
    """Whether the weight of a layer is a plain tensor, not quantized and not sharded."""
    return type(layer.weight) in (nn.Parameter, Tensor)
