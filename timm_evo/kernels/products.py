""" Products of blocks """
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in the language of Triton, in which more can be indexed than in Python)
import os

import triton
import triton.language as tl

__all__ = ['dot']

_IS_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def dot(a, b, summed):
    """Add the product of two blocks to what is `summed` in float32."""
    if _IS_INTERPRETED:  # which knows no products of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, summed, input_precision='ieee')
