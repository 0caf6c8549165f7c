""" Where kernels replace the tensor steps

Kernels run on CUDA devices. In the following cases, the tensor steps run instead, with the same results up to rounding:

- gradients, in either mode, and transforms of `torch.func`, for which kernels have no rules;
- traces, scripts and exports, which must run without Triton;
- tensors of subclasses, such as shards;
- other dtypes than float32, float16 and bfloat16.

The environment variable `TIMM_EVO_KERNELS` changes this. With `0`, kernels never run. With `1`, they run wherever they
can: also on a CPU in Triton's interpreter, if `TRITON_INTERPRET=1` was set before Python started.
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
    """Whether kernels may compute with a tensor."""
    if not isinstance(x, Tensor) or not is_wanted(x):  # in symbolic tracing it is not a tensor
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
    """Whether results computed from these tensors may need a gradient."""
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # a list, for torch 2.5 to compile


def is_wanted(x: Tensor) -> bool:
    """Whether a tensor's device and `TIMM_EVO_KERNELS` allow steps that are made for GPUs."""
    return _setting() != '0' if x.is_cuda else _setting() == '1'


def launch(name: str, *args: Any) -> Any:
    """Call an operator of this package; `can_run` must be true.

    Args:
        name: Name of the operator.
        *args: Its arguments.

    Raises:
        RuntimeError: A kernel could not be compiled or launched. The message says how to run without kernels.
    """
    try:
        return getattr(torch.ops.timm_evo, name)(*args)
    except torch.OutOfMemoryError:  # its message is clear
        raise
    except Exception as error:
        raise RuntimeError(
            f'The Triton kernel {name} of timm_evo failed: {error}. Set {VARIABLE}=0 in the environment to run without '
            'kernels; the results are the same, up to rounding.') from error


@torch.compiler.assume_constant_result  # because torch 2.11 reports an export whenever it compiles
def is_exporting() -> bool:
    """Whether the model is being exported, to run elsewhere."""
    return torch.compiler.is_exporting() if hasattr(torch.compiler, 'is_exporting') else torch.compiler.is_compiling()


@torch.compiler.assume_constant_result
def _setting() -> str:
    return os.environ.get(VARIABLE, '')


@torch.compiler.assume_constant_result
def _is_available(device: torch.device) -> bool:
    return _can_launch(device)


@functools.cache
def _can_launch(device: torch.device) -> bool:
    """Whether Triton is installed, torch can make operators of its kernels, and the device can run them."""
    if not hasattr(torch.library, 'triton_op') or importlib.util.find_spec('triton') is None:
        return False
    has_values = device.type != 'cuda' or torch.cuda.is_available()  # otherwise tensors on a CUDA device are fake
    if os.environ.get('TRITON_INTERPRET') == '1':
        if not has_values:
            return False
    elif device.type != 'cuda' or has_values and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from . import attention, levit, published, similarity  # noqa: F401  # late, because importing Triton is slow
    return True
