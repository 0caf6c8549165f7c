""" Arguments of evolution among those of timm's models """
import inspect
from collections.abc import Callable
from typing import Any


def split_arguments(function: Callable, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those that `function` takes and the others."""
    names = inspect.signature(function).parameters
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}
