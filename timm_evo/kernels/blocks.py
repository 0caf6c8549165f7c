""" Common parts of the kernels: their wrapper; number, size and products of blocks """
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in Triton's language, which pyright does not know)
import os
from typing import Any

import torch.library
import triton
import triton.language as tl

__all__ = ['divide_up', 'dot', 'power_of_2', 'wrap_triton']

_IS_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def dot(a, b, summed):
    """Add the product of two blocks to `summed`, in float32."""
    if _IS_INTERPRETED:  # the interpreter has no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, summed, input_precision='ieee')


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which does not take interpreted kernels in an older torch."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


# Triton has both functions, but a call of them in Python takes longer than an operator of PyTorch


def power_of_2(number: int) -> int:
    """The next power of two, which the length of a block must be."""
    return 1 << (number - 1).bit_length()


def divide_up(number: int, size: int) -> int:
    """Number of blocks of this size that cover the number."""
    return -(-number // size)
