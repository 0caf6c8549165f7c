""" What the kernels share: how they are wrapped; blocks of numbers, how many, how large, and their products """
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in the language of Triton, in which more can be indexed than in Python)
import os
from typing import Any

import torch.library
import triton
import triton.language as tl

__all__ = ['divide_up', 'dot', 'power_of_2', 'wrap_triton']

_IS_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def dot(a, b, summed):
    """Add the product of two blocks to what is `summed` in float32."""
    if _IS_INTERPRETED:  # which knows no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, summed, input_precision='ieee')


def wrap_triton(kernel: Any) -> Any:
    """As `torch.library.wrap_triton`, which in an older torch takes no kernel that is interpreted."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


# Triton has both, but they take longer in Python than PyTorch takes for an operator


def power_of_2(number: int) -> int:
    """The next power of two, such as the length of a block has to be."""
    return 1 << (number - 1).bit_length()


def divide_up(number: int, size: int) -> int:
    """How many blocks of a size there are to a number."""
    return -(-number // size)
