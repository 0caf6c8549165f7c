""" Whether nobody can tell how a module computes what it computes """
from typing import Any

from torch import Tensor, nn

from ..torch_private import children, has_hooks, is_compiled

__all__ = ['has_plain_weights', 'is_plain', 'is_watched']

# A module of another origin may compute anything: an adapter, one that is quantized, or somebody's own.
_KNOWN_ORIGINS = ('timm.', 'torch.nn.modules.')


def is_plain(module: nn.Module) -> bool:
    """Whether a module and those within are timm's or PyTorch's own, and nobody watches them."""
    cls = type(module)
    return (
        cls.__module__.startswith(_KNOWN_ORIGINS)
        and cls.forward.__module__.startswith(_KNOWN_ORIGINS)  # which may have been replaced in a class of timm
        and not is_watched(module)
        and all(map(is_plain, children(module)))
    )


def is_watched(module: nn.Module) -> bool:
    """Whether anything but the class of the module says what happens when it is called."""
    return has_hooks(module) or is_compiled(module) or 'forward' in module.__dict__


def has_plain_weights(layer: Any) -> bool:
    """Whether the weight of a layer is a plain one: not quantized, no shard."""
    return type(layer.weight) in (nn.Parameter, Tensor)
