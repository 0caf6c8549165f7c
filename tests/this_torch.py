"""What the torch at hand can do, alone and with the libraries beside it: tests of anything else are skipped.

Found out by trying, because a library seldom says which torch it needs.
"""
import copy
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from timm_evo import restore

# A dimension of any size. An older torch knows only a form that may take the size for a constant, which is seen when a
# program runs with another one.
ANY_SIZE = getattr(torch.export.Dim, 'DYNAMIC', None) or torch.export.Dim.AUTO


def library(name: str, *modules: str) -> ModuleType:
    """Import a library and some of its modules, or skip the test.

    Args:
        name: The library.
        modules: Names of modules that the test needs, which it may import later.
    """
    try:
        found = importlib.import_module(name)
        for module in modules:
            importlib.import_module(f'{name}.{module}')
    except Exception as error:  # of whatever kind it is that an old torch causes
        pytest.skip(f'{name} cannot be imported with torch {torch.__version__}: {type(error).__name__}: {error}')
    return found


def if_dense_can(act: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What `act` makes of an evolved model; the test is skipped where it fails for the dense model, too."""
    try:
        return act(model)
    except Exception:
        try:
            act(restore(copy.deepcopy(model)))
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            pytest.skip(f'torch {torch.__version__} cannot do this with the dense model: {reason}')
        raise
