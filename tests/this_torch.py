"""Checks of what the installed torch, timm and other libraries can do. Tests of other things are skipped.

The checks try it, because few libraries declare which torch they need.
"""
import copy
import functools
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from timm_evo import restore
from timm_evo.kernels.choice import can_run, launch

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


def run_without_interpreter(script: str, *args: str, **environment: str) -> list[list[str]]:
    """Run a script of this folder in a process of its own, where kernels are compiled or asked for shapes alone.

    Args:
        script: Its name.
        args: Its arguments.
        environment: What else to set.

    Returns:
        The words of each line that it prints.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ('TRITON_INTERPRET', 'TIMM_EVO_KERNELS')}
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *args], env=kept | environment, capture_output=True,
        text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [line.split() for line in run.stdout.splitlines()]


def skip_without_kernels() -> None:
    """Skip the test where no kernel can run: without a GPU, in Triton's interpreter."""
    error = _error_of_kernels()
    if error is not None:
        pytest.skip(f'no kernel can run here, with torch {torch.__version__} and numpy {numpy.__version__}: {error}')


@functools.cache
def _error_of_kernels() -> str | None:
    """An older torch takes no Triton operators, and an older Triton cannot interpret loops with the newest NumPy."""
    x = torch.zeros(1, 1, 1, 16, device='cuda' if torch.cuda.is_available() else 'cpu')
    if not can_run(x):
        return 'there are no Triton operators'
    try:
        launch('attend', x, x, x, x[0, :, :, 0], 1.)
    except RuntimeError as error:
        if 'only 0-dimensional arrays' in str(error):
            return str(error.__cause__)
        raise
    return None


def load_folder(folder: Path | str) -> nn.Module:
    """timm's model of a folder. The test is skipped if timm cannot load one."""
    skip_without_folders()
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


def skip_without_folders() -> None:
    """Skip the test where timm loads no model from a folder, dense ones neither."""
    error = _error_of_folders()
    if error is not None:
        pytest.skip(f'timm {timm.__version__} loads no folder with torch {torch.__version__}: {error}')


@functools.cache
def _error_of_folders() -> Exception | None:
    """An older timm has torch read the safetensors of a folder, and an older torch can't."""
    with TemporaryDirectory() as folder:
        save_for_hf(timm.create_model('test_vit'), folder, safe_serialization=True)
        try:
            timm.create_model(f'local-dir:{folder}', pretrained=True)
        except pickle.UnpicklingError as error:
            return error
    return None
