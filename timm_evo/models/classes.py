""" Classes of modules that change while these live """
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..torch_private import own_names

__all__ = ['attribute_names', 'change_class', 'combined_class']


def attribute_names(module: nn.Module) -> frozenset[str]:
    """Names of all that a module has of its own."""
    return frozenset([*vars(module), *own_names(module)])


def change_class(module: nn.Module, new_class: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Give a module another class in the place of its own.

    PyTorch's parametrizations of a module are in a class that it derives from the module's own, and rolls back when the
    last one is removed. That class stays, derived from the new one.

    Args:
        module: The module, whose class is changed in place.
        new_class: From the class without parametrizations to the new one.
    """
    old_cls = parametrize.type_before_parametrizations(module)
    cls = new_class(old_cls)
    if cls is old_cls:
        return
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name not in ('__dict__', '__weakref__')}
        cls = type(type(module).__name__, (cls,), own)
    module.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def combined_class(evolved_cls: type, dense_cls: type) -> Any:
    """The evolved class of a family for a class of timm or of its user."""
    return type(f'Evo{dense_cls.__name__}', (evolved_cls, dense_cls), {
        '__doc__': f'`{dense_cls.__name__}` with token evolution.',
        '__module__': dense_cls.__module__,
        # a copy or a file can't find it by its name
        '__reduce__': lambda self: (_new, (evolved_cls, dense_cls), self.__getstate__()),
    })


def _new(evolved_cls: type, dense_cls: type) -> nn.Module:
    cls = combined_class(evolved_cls, dense_cls)
    return cls.__new__(cls)
