""" Where kernels take the place of the tensor steps

On a CUDA device, where nobody wants more of a step than its result. What is left out, the tensor steps do, with the
same result up to rounding:

- gradients, of either mode, and transforms of `torch.func`, which a kernel has no rule for;
- traces, scripts and exports, which are to run where there is no Triton;
- tensors that are no plain ones, as shards;
- other numbers than float32, float16 and bfloat16.

`TIMM_EVO_KERNELS` in the environment changes that: `0` for never; `1` for wherever they can, on a CPU by Triton's
interpreter, too, if `TRITON_INTERPRET=1` was set before the start.
"""
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..torch_private import is_plain, is_transformed

__all__ = ['can_run', 'is_differentiated', 'is_exporting', 'is_wanted', 'launch']

VARIABLE = 'TIMM_EVO_KERNELS'
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def can_run(x: Tensor) -> bool:
    """Whether kernels may compute what comes of a tensor."""
    if not isinstance(x, Tensor) or not is_wanted(x):  # symbolic tracing has other objects
        return False
    return (
        x.dtype in _DTYPES
        and not is_differentiated(x)
        and not torch.jit.is_tracing()
        and not is_exporting()
        and is_plain(x)
        and not is_transformed()
        and _is_available(x.device)
    )


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient of what comes of tensors may be asked for."""
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # a list, for torch 2.5 to compile


def is_wanted(x: Tensor) -> bool:
    """Whether what takes other steps on a GPU is to do so for a tensor, as far as its device and the user say."""
    return _setting() != '0' if x.is_cuda else _setting() == '1'


def launch(name: str, *args: Any) -> Any:
    """Call an operator of this package, where it `can_run`.

    Args:
        name: Its name.
        *args: Its arguments.

    Raises:
        RuntimeError: A kernel could not be compiled or launched; the message says how to do without.
    """
    try:
        return getattr(torch.ops.timm_evo, name)(*args)
    except torch.OutOfMemoryError:  # which says enough
        raise
    except Exception as error:
        raise RuntimeError(
            f'A Triton kernel of timm_evo failed, {name}: {error}. Set {VARIABLE}=0 in the environment to do without '
            'kernels; the results are the same, up to rounding.') from error


@torch.compiler.assume_constant_result  # because torch 2.11 takes all that it compiles for exported
def is_exporting() -> bool:
    """Whether what runs is exported, to run elsewhere."""
    return torch.compiler.is_exporting() if hasattr(torch.compiler, 'is_exporting') else torch.compiler.is_compiling()


@torch.compiler.assume_constant_result
def _setting() -> str:
    return os.environ.get(VARIABLE, '')


@torch.compiler.assume_constant_result
def _is_available(device: torch.device) -> bool:
    return _can_launch(device)


@functools.cache
def _can_launch(device: torch.device) -> bool:
    """Whether there is Triton, a torch that takes its kernels as operators, and a device that they are made for."""
    if not hasattr(torch.library, 'triton_op') or importlib.util.find_spec('triton') is None:
        return False
    has_values = device.type != 'cuda' or torch.cuda.is_available()  # else it is only asked what would be computed
    if os.environ.get('TRITON_INTERPRET') == '1':
        if not has_values:
            return False
    elif device.type != 'cuda' or has_values and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from . import attention, levit, published, similarity  # noqa: F401  # now, because Triton takes its time to import
    return True
