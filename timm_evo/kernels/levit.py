""" LeViT's attention in one launch, and its scores in another

The kernel reads projections in the layout of their linear layers, and looks up the bias of a query and a key by their
positions. So no tensor of all queries and keys is in memory, neither for biases nor for attention. For scores, each
program writes the sum over its queries, and a second launch adds these sums in a fixed order.

Shapes: B images, H heads with keys of d channels and values of v, L tokens present, K of them without a representative
one, Q queries, N patch tokens of the grid, M of them after downsampling, R relative positions, P prefix tokens.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in Triton's language, which pyright does not know)
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula

from .blocks import divide_up, dot, power_of_2, wrap_triton

__all__ = ['levit_attention', 'levit_scores']

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits(
        query, key, table, index, positions, place, is_placed, j, num_keys, num_placed, num_indexed, scale,
        TOKEN: tl.constexpr, D: tl.constexpr, HAS_BIASES: tl.constexpr, HAS_POSITIONS: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Logits, to the base of two, of a block of queries and the keys j; `place` has positions where `is_placed`."""
    d = tl.arange(0, BLOCK_D)
    keys = tl.load(key + j[None] * TOKEN + d[:, None], mask=(j < num_keys)[None] & (d < D)[:, None], other=0.)
    logits = dot(query, keys, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * (scale * LOG2_E)
    if HAS_BIASES:
        key_place = tl.load(positions + j, mask=j < num_placed, other=0).to(tl.int32) if HAS_POSITIONS else j
        both = is_placed[:, None] & (j < num_placed)[None]
        entry = tl.load(index + (place * num_indexed)[:, None] + key_place[None], mask=both, other=0).to(tl.int32)
        logits += tl.load(table + entry, mask=both, other=0.).to(tl.float32) * LOG2_E
    return tl.where((j < num_keys)[None], logits, -1e30)


@triton.jit
def _attention_kernel(
        query, key_value, table, index, positions, out, paid,
        num_queries, num_keys, num_placed, num_indexed, num_relative, num_scored, num_paying, scale,
        H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, QUERY_WIDTH: tl.constexpr, KEY_WIDTH: tl.constexpr,
        HAS_BIASES: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SCORES: tl.constexpr, IS_WHOLE: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One block of queries of a head. Its logits are computed once if all keys fit into one block, otherwise twice."""
    TOKEN: tl.constexpr = H * KEY_WIDTH
    image = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_query = i < num_queries
    queries = tl.load(
        query + image * num_queries * (H * QUERY_WIDTH) + i[:, None] * (H * QUERY_WIDTH) + head * QUERY_WIDTH + d[None],
        mask=is_query[:, None] & (d < D)[None], other=0.)
    key = key_value + image * num_keys * TOKEN + head * KEY_WIDTH + (KEY_WIDTH - D - V)
    value = key + D
    out += image * num_queries * (H * V) + i[:, None] * (H * V) + head * V
    is_placed = is_query & (i < num_placed)
    place = i
    if HAS_BIASES:
        table += head * num_relative
        if HAS_POSITIONS:
            positions += image * num_placed
            place = tl.load(positions + i, mask=is_placed, other=0).to(tl.int32)
    if HAS_SCORES:
        num_sums = tl.cdiv(num_paying, BLOCK_M)  # per head; the queries of later programs do not count
        paid += ((image * H + head) * num_sums + tl.program_id(0)) * num_scored
        is_stored = tl.program_id(0) < num_sums
    v = tl.arange(0, BLOCK_V)

    if IS_WHOLE:
        j = tl.arange(0, BLOCK_N)
        logits = _logits(
            queries, key, table, index, positions, place, is_placed, j, num_keys, num_placed, num_indexed, scale,
            TOKEN, D, HAS_BIASES, HAS_POSITIONS, BLOCK_D, BLOCK_M, BLOCK_N)
        share = tl.exp2(logits - tl.max(logits, 1)[:, None])
        share = share / tl.sum(share, 1)[:, None]
        if HAS_SCORES:
            summed = tl.sum(tl.where((i < num_paying)[:, None], share, 0.), 0)
            tl.store(paid + j, summed, mask=(j < num_scored) & is_stored)
        share = share.to(out.dtype.element_ty)
        for first in tl.static_range(0, V, BLOCK_V):
            values = tl.load(
                value + j[:, None] * TOKEN + (first + v)[None],
                mask=(j < num_keys)[:, None] & (first + v < V)[None], other=0.)
            attended = dot(share, values, tl.zeros((BLOCK_M, BLOCK_V), tl.float32))
            tl.store(
                out + (first + v)[None], attended.to(out.dtype.element_ty),
                mask=is_query[:, None] & (first + v < V)[None])
    else:
        largest = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, num_keys, BLOCK_N):
            j = begin + tl.arange(0, BLOCK_N)
            logits = _logits(
                queries, key, table, index, positions, place, is_placed, j, num_keys, num_placed, num_indexed, scale,
                TOKEN, D, HAS_BIASES, HAS_POSITIONS, BLOCK_D, BLOCK_M, BLOCK_N)
            larger = tl.maximum(largest, tl.max(logits, 1))
            total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
            largest = larger
        attended = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for begin in range(0, num_keys, BLOCK_N):
            j = begin + tl.arange(0, BLOCK_N)
            logits = _logits(
                queries, key, table, index, positions, place, is_placed, j, num_keys, num_placed, num_indexed, scale,
                TOKEN, D, HAS_BIASES, HAS_POSITIONS, BLOCK_D, BLOCK_M, BLOCK_N)
            share = tl.exp2(logits - largest[:, None]) / total[:, None]
            if HAS_SCORES:
                summed = tl.sum(tl.where((i < num_paying)[:, None], share, 0.), 0)
                tl.store(paid + j, summed, mask=(j < num_scored) & is_stored)
            values = tl.load(
                value + j[:, None] * TOKEN + v[None], mask=(j < num_keys)[:, None] & (v < V)[None], other=0.)
            attended = dot(share.to(out.dtype.element_ty), values, attended)
        tl.store(out + v[None], attended.to(out.dtype.element_ty), mask=is_query[:, None] & (v < V)[None])


@triton_op('timm_evo::levit_attention', mutates_args=())
def levit_attention(
        query: Tensor,
        key_value: Tensor,
        num_heads: int,
        key_dim: int,
        val_dim: int,
        scale: float,
        biases: Tensor | None,
        index: Tensor | None,
        positions: Tensor | None,
        num_scored: int,
        num_paying: int,
) -> tuple[Tensor, Tensor]:
    """Attention with biases by relative position.

    Args:
        query: Projection of the tokens with queries (B, Q, H * w). The w channels of a head begin with its query.
        key_value: Projection of the tokens present (B, L, H * w). The w channels of a head end with its key and its
            value. It may be the same tensor as `query`.
        num_heads: Number of heads H.
        key_dim: Channels of queries and keys d.
        val_dim: Channels of values v.
        scale: Factor on the products.
        biases: Biases by relative position (H, R), if there are any.
        index: Entry of `biases` for each query and key of the whole grid (N or M, N).
        positions: Positions of the tokens present (B, K), without a representative one, which has no bias; None if
            these are the whole grid, in its order.
        num_scored: Number K of tokens, from the first, that get scores; 0 for no scores.
        num_paying: Number of queries, from the first, whose attention counts in the scores.

    Returns:
        Output of the attention, with the heads concatenated (B, Q, H * v).
        Sums of attention (B, S, K) in float32, over the queries of each program of each head, see `levit_scores`.
    """
    batch_size, num_queries, query_width = query.shape
    num_keys = key_value.shape[1]
    # sizes with which several programs fit into the registers; products of long rows in float32 would not
    is_half = query.dtype != torch.float32
    is_whole = is_half and num_keys <= 256
    block_m, block_d, block_v = 16, max(16, power_of_2(key_dim)), max(16, power_of_2(val_dim))
    if is_whole:
        block_n = max(16, power_of_2(num_keys))
        block_v = min(block_v, 8192 // block_n)
        num_warps = max(1, min(4, block_n // 32))
    else:
        block_n, num_warps = (64, 4) if is_half else (32, 8)
    num_sums = num_heads * divide_up(num_paying, block_m) if num_scored else 0
    out = query.new_empty(batch_size, num_queries, num_heads * val_dim)
    paid = torch.empty(batch_size, num_sums, num_scored, dtype=torch.float32, device=query.device)
    has_biases = biases is not None
    if biases is None or index is None:
        biases = index = query  # not read
    wrap_triton(_attention_kernel)[(divide_up(num_queries, block_m), batch_size * num_heads)](
        query.contiguous(), key_value.contiguous(), biases.contiguous(), index.contiguous(),
        query if positions is None else positions.contiguous(), out, paid,
        num_queries, num_keys, num_keys if positions is None else positions.shape[1], index.shape[1], biases.shape[1],
        num_scored, num_paying, scale,
        H=num_heads, D=key_dim, V=val_dim, QUERY_WIDTH=query_width // num_heads,
        KEY_WIDTH=key_value.shape[2] // num_heads, HAS_BIASES=has_biases, HAS_POSITIONS=positions is not None,
        HAS_SCORES=num_scored > 0, IS_WHOLE=is_whole, BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_M=block_m,
        BLOCK_N=block_n, num_warps=num_warps, num_stages=1)
    return out, paid


@register_flop_formula(torch.ops.timm_evo.levit_attention)
def _attention_flops(
        query_shape, key_value_shape, num_heads, key_dim, val_dim, *args, out_shape=None, **kwargs) -> int:
    return 2 * query_shape[0] * num_heads * query_shape[1] * key_value_shape[1] * (key_dim + val_dim)


@triton.jit
def _scores_kernel(
        paid, scores, learned, out, num_sums, num_tokens, num_out, num_prefix, grid_width, left_width, factor, tradeoff,
        HAS_SCORES: tl.constexpr, IS_LEARNED: tl.constexpr, STRIDE: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """The scores of an image."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    is_token = t < num_tokens
    paid += image * num_sums * num_tokens
    evolved = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, num_sums, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        evolved += tl.sum(tl.load(
            paid + s[:, None] * num_tokens + t[None], mask=(s < num_sums)[:, None] & is_token[None], other=0.), 0)
    evolved *= factor
    if HAS_SCORES:
        before = tl.load(scores + image * num_tokens + t, mask=is_token, other=0.)
        alpha = tradeoff
        if IS_LEARNED:
            alpha = tl.sigmoid(tl.load(learned).to(tl.float32))
        step = evolved - before
        evolved = tl.where(alpha < 0.5, before + alpha * step, evolved - (1. - alpha) * step)  # as torch.lerp
    is_left = is_token
    place = t
    if STRIDE > 1:
        patch = t - num_prefix
        is_patch = is_token & (patch >= 0)
        row, column = patch // grid_width, patch % grid_width
        is_left_patch = is_patch & (row % STRIDE == 0) & (column % STRIDE == 0)
        all_before = tl.sum(tl.where(is_patch, before, 0.), 0)
        evolved *= all_before / tl.sum(tl.where(is_left_patch, evolved, 0.), 0)
        place = tl.where(is_patch, num_prefix + row // STRIDE * left_width + column // STRIDE, t)
        is_left = is_left_patch | (t < num_prefix)
    tl.store(out + image * num_out + place, evolved, mask=is_left)


@triton_op('timm_evo::levit_scores', mutates_args=())
def levit_scores(
        paid: Tensor,
        scores: Tensor | None,
        num_summed: int,
        tradeoff: float,
        learned: Tensor | None,
        num_prefix_tokens: int,
        grid_width: int,
        stride: int,
) -> Tensor:
    """Update the scores by `mean_attention`, `global_class_attention` and, with downsampling,
    `downsampled_class_attention` of `method` in one launch.

    Args:
        paid: Sums of attention (B, S, K), see `levit_attention`.
        scores: Scores before the update (B, K) in float32, if any.
        num_summed: Number of queries of all heads in these sums.
        tradeoff: alpha.
        learned: Learned trade-off (1,) before its sigmoid, which replaces `tradeoff`.
        num_prefix_tokens: Number of prefix tokens P.
        grid_width: Width of the grid that is downsampled.
        stride: Step between the rows and columns that remain; 1 without downsampling.

    Returns:
        Scores (B, K), or those of the remaining tokens (B, P + M), in float32.
    """
    batch_size, num_sums, num_tokens = paid.shape
    num_left, left_width = num_tokens, grid_width
    if stride > 1:
        left_width = divide_up(grid_width, stride)
        num_rows = (num_tokens - num_prefix_tokens) // grid_width
        num_left = num_prefix_tokens + divide_up(num_rows, stride) * left_width
    out = paid.new_empty(batch_size, num_left)
    block_t = power_of_2(num_tokens)
    wrap_triton(_scores_kernel)[(batch_size,)](
        paid, paid if scores is None else scores.contiguous(), paid if learned is None else learned, out,
        num_sums, num_tokens, num_left, num_prefix_tokens, grid_width, left_width, 1 / num_summed, tradeoff,
        HAS_SCORES=scores is not None, IS_LEARNED=learned is not None, STRIDE=stride,
        BLOCK_S=max(1, min(power_of_2(num_sums), 4096 // block_t)), BLOCK_T=block_t, num_warps=4)
    return out
