""" Changing the class of a module """
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..torch_private import own_names

__all__ = ['attribute_names', 'change_class', 'combined_class']


def attribute_names(module: nn.Module) -> frozenset[str]:
    """Names of a module's own attributes, parameters, buffers and submodules."""
    return frozenset([*vars(module), *own_names(module)])


def change_class(module: nn.Module, new_class: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Change the class of a module.

    For parametrizations, PyTorch derives a class from the module's class, and removes it with the last parametrization.
    Such a class is derived from the new class instead.

    Args:
        module: The module, whose class is changed in place.
        new_class: Function from the class without parametrizations to the new class.
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
    """The evolved class for a class of timm or of a user."""
    return type(f'Evo{dense_cls.__name__}', (evolved_cls, dense_cls), {
        '__doc__': f'`{dense_cls.__name__}` with token evolution.',
        '__module__': dense_cls.__module__,
        # copying and pickling cannot find the class by its name
        '__reduce__': lambda self: (_new, (evolved_cls, dense_cls), self.__getstate__()),
    })


def _new(evolved_cls: type, dense_cls: type) -> nn.Module:
    cls = combined_class(evolved_cls, dense_cls)
    return cls.__new__(cls)
