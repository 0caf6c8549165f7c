""" Arguments of evolution among those of timm's models """
import inspect
from collections.abc import Callable
from typing import Any


def split_arguments(function: Callable, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those that `function` takes and the others, all of them `plain`."""
    names = inspect.signature(function).parameters
    kwargs = plain(kwargs)
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}


def plain(value: Any) -> Any:
    """The value with numbers and arrays of numpy or torch as Python's own, which type checks know and JSON can hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def argument_names(model_class: type) -> list[str]:
    """Names of the arguments that a model takes: those of its class and the bases of that, and those of evolution."""
    names = ('__init__', 'init_evolution')
    functions = [vars(base)[name] for base in model_class.__mro__ for name in names if name in vars(base)]
    parameters = [parameter for function in functions for parameter in inspect.signature(function).parameters.values()]
    return sorted({p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {'self'})
