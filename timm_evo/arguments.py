""" Arguments of evolution among those of timm's models """
import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
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


def argument_names(model_class: type, methods: Sequence[str] = ('__init__', 'init_evolution')) -> list[str]:
    """Names of the arguments that these methods of a class and of its bases take; by default those of a model."""
    functions = [vars(base)[name] for base in model_class.__mro__ for name in methods if name in vars(base)]
    parameters = [parameter for function in functions for parameter in inspect.signature(function).parameters.values()]
    return sorted({p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {'self'})


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that a misspelt one is meant for, if there is one."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def refuse_unknown(names: Collection[str], known: Collection[str], whose: str) -> None:
    """Refuse names of arguments that are not known, and name the nearest one.

    Raises:
        TypeError: One is not known.
    """
    for name in names:
        if name not in known:
            meant = nearest(name, known)
            hint = f'Did you mean {meant}?' if meant else f'There are {", ".join(known)}.'
            raise TypeError(f'{name} is not an argument of {whose}. {hint}')
