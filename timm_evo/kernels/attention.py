""" Attention with sizes

The result is that of `scaled_dot_product_attention` with a mask of one row for all queries. By the mask, each key
counts as several equal keys: one for each token that it represents. PyTorch's fastest kernel takes no mask, and the
kernel with a mask takes two to three times as long. The softmax is summed block by block, as in
`FlashAttention` - https://arxiv.org/abs/2205.14135.

Shapes: B images, H heads of d channels, G heads of keys and values, L tokens.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in Triton's language, which pyright does not know)
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from .blocks import divide_up, dot, power_of_2, wrap_triton

__all__ = ['attend']

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
        q, k, v, log_size, out,
        q_image, q_head, q_token, q_channel,
        k_image, k_head, k_token, k_channel,
        v_image, v_head, v_token, v_channel,
        size_image, size_token,
        num_queries, num_keys, scale,
        H: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One block of queries of a head. `SHARING` heads have the same keys and values."""
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_query = (i < num_queries)[:, None] & (d < D)[None]
    query = tl.load(
        q + image * q_image + head * q_head + i[:, None] * q_token + d[None] * q_channel, mask=is_query, other=0.)
    k += image * k_image + head // SHARING * k_head
    v += image * v_image + head // SHARING * v_head
    log_size += image * size_image

    values = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, num_keys, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        key = tl.load(
            k + j[None] * k_token + d[:, None] * k_channel, mask=(j < num_keys)[None] & (d < D)[:, None], other=0.)
        logits = dot(query, key, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * (scale * LOG2_E)
        log_sizes = tl.load(log_size + j * size_token, mask=j < num_keys, other=0.).to(tl.float32)
        logits = tl.where((j < num_keys)[None], logits + (log_sizes * LOG2_E)[None], -1e30)
        larger = tl.maximum(largest, tl.max(logits, 1))
        share = tl.exp2(logits - larger[:, None])
        shrunk = tl.exp2(largest - larger)
        total = total * shrunk + tl.sum(share, 1)
        value = tl.load(
            v + j[:, None] * v_token + d[None] * v_channel, mask=(j < num_keys)[:, None] & (d < D)[None], other=0.)
        values = dot(share.to(value.dtype), value, values * shrunk[:, None])
        largest = larger
    values = values / total[:, None]
    out += (image * num_queries + i[:, None]) * (H * D) + head * D + d[None]
    tl.store(out, values.to(out.dtype.element_ty), mask=is_query)


@triton_op('timm_evo::attend', mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, scale: float) -> Tensor:
    """Attention to keys of different sizes.

    Args:
        query: Queries (B, H, T, d), of any strides.
        key: Keys (B, G, L, d); G divides H.
        value: Values (B, G, L, d).
        log_size: Log of the number of tokens that each key represents (B, L).
        scale: Factor on the products.

    Returns:
        Output of the attention (B, H, T, d), in memory as (B, T, H, d), which the next projection reads.
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    out = query.new_empty(batch_size, num_queries, num_heads, head_dim)
    # the fastest sizes on an H200, or smaller ones where these do not fit into the memory of a smaller GPU
    block_d = max(16, power_of_2(head_dim))
    block_n = 64 if num_keys >= 700 and block_d <= 64 else 32
    num_stages = 1 if query.dtype == torch.float32 else 3
    wrap_triton(_attend)[(divide_up(num_queries, 64), batch_size * num_heads)](
        query, key, value, log_size, out,
        *query.stride(), *key.stride(), *value.stride(), *log_size.stride(),
        num_queries, num_keys, scale,
        H=num_heads, SHARING=num_heads // key.shape[1], D=head_dim,
        BLOCK_D=block_d, BLOCK_M=64, BLOCK_N=block_n, num_warps=4, num_stages=num_stages)
    return out.transpose(1, 2)


@register_flop_formula(torch.ops.timm_evo.attend)
def _attend_flops(query_shape, key_shape, *args, out_shape=None, **kwargs) -> int:
    batch_size, num_heads, num_queries, head_dim = query_shape
    return 4 * batch_size * num_heads * num_queries * key_shape[2] * head_dim
