""" The steps of `method.similarity` in four launches, or in one for one small image, and the return to the whole grid

Shapes: B images, P prefix tokens, N patch tokens present, L = P + N, C channels, S = ceil(N / 2) tokens that may be
averaged into others, R tokens that are, K = L - R tokens that remain.
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

from .blocks import divide_up, power_of_2, wrap_triton
from .similarity_steps import averages_of, best_matches, decide, unit_features

__all__ = ['average_alike', 'follow_averages', 'is_small']


@triton.jit
def _feature_kernel(
        x, weight, bias, features, num_rows, num_channels, eps,
        HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    unit_features(
        x, weight, bias, features, tl.program_id(0) * BLOCK_R, num_rows, num_channels, eps,
        HAS_NORM, HAS_WEIGHT, HAS_BIAS, BLOCK_R, BLOCK_C)


@triton.jit
def _match_kernel(
        features, size, least, nearest, num_tokens, num_patches, num_channels, num_prefix, width,
        HAS_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    num_sources = (num_patches + 1) // 2
    best_matches(
        features + image * num_tokens * num_channels, size + image * num_tokens, least + image * num_sources,
        nearest + image * num_sources, tl.program_id(0) * BLOCK_M, num_patches, num_channels, num_prefix, width,
        HAS_SIZE, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def _decide_kernel(
        least, nearest, present, is_going, stays, place, left, present_after, follows, goes, goes_into,
        num_tokens, num_patches, num_prefix, num_gone, width,
        HAS_PRESENT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    of_sources = image * ((num_patches + 1) // 2)
    of_tokens = image * num_tokens
    of_left = image * (num_tokens - num_gone)
    decide(
        least + of_sources, nearest + of_sources, present + of_tokens, is_going + of_sources, stays + of_tokens,
        place + of_tokens, left + of_left, present_after + of_left, follows + of_tokens,
        goes + image * num_gone, goes_into + image * num_gone,
        num_tokens, num_patches, num_prefix, num_gone, width, HAS_PRESENT, BLOCK_S, BLOCK_L, BLOCK_J)


@triton.jit
def _average_kernel(
        x, size, nearest, is_going, left, averages, size_after, log_size_after,
        num_tokens, num_left, num_patches, num_channels, num_prefix, width,
        HAS_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    of_sources = image * ((num_patches + 1) // 2)
    of_left = image * num_left
    averages_of(
        x + image * num_tokens * num_channels, size + image * num_tokens, nearest + of_sources, is_going + of_sources,
        left + of_left, averages + of_left * num_channels, size_after + of_left, log_size_after + of_left,
        tl.program_id(0) * BLOCK_T, num_left, num_patches, num_channels, num_prefix, width,
        HAS_SIZE, BLOCK_T, BLOCK_S, BLOCK_C)


@triton.jit
def _one_launch_kernel(
        x, of, weight, bias, features, size, least, nearest, present, is_going, stays, place, left, present_after,
        follows, goes, goes_into, averages, size_after, log_size_after,
        num_tokens, num_patches, num_channels, num_prefix, num_gone, width, eps,
        HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SIZE: tl.constexpr,
        HAS_PRESENT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
        BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """All steps for one image."""
    for first in range(0, num_tokens, BLOCK_R):
        unit_features(
            of, weight, bias, features, first, num_tokens, num_channels, eps,
            HAS_NORM, HAS_WEIGHT, HAS_BIAS, BLOCK_R, BLOCK_C)
    tl.debug_barrier()
    for first in range(0, (num_patches + 1) // 2, BLOCK_M):
        best_matches(
            features, size, least, nearest, first, num_patches, num_channels, num_prefix, width,
            HAS_SIZE, BLOCK_M, BLOCK_N, BLOCK_K)
    tl.debug_barrier()
    decide(
        least, nearest, present, is_going, stays, place, left, present_after, follows, goes, goes_into,
        num_tokens, num_patches, num_prefix, num_gone, width, HAS_PRESENT, BLOCK_S, BLOCK_L, BLOCK_J)
    tl.debug_barrier()
    for first in range(0, num_tokens - num_gone, BLOCK_T):
        averages_of(
            x, size, nearest, is_going, left, averages, size_after, log_size_after, first,
            num_tokens - num_gone, num_patches, num_channels, num_prefix, width,
            HAS_SIZE, BLOCK_T, BLOCK_S, BLOCK_C)


def is_small(batch_size: int, num_patches: int, num_channels: int) -> bool:
    """Whether an event takes one launch. For larger images or batches, one program is slower than many in parallel."""
    return batch_size == 1 and num_patches <= 256 and num_channels <= 1024


@triton_op('timm_evo::average_alike', mutates_args=())
def average_alike(
        x: Tensor,
        features: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        feature_dtype: torch.dtype,
        size: Tensor | None,
        present: Tensor | None,
        num_gone: int,
        num_prefix: int,
        width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Average the most similar patch tokens: from `match_tokens` to `average_tokens` of `method.similarity`.

    Args:
        x: Tokens present (B, L, C).
        features: Features of the tokens, which are compared (B, L, C); None for the output of a LayerNorm.
        weight: Weight of this LayerNorm (C,), if it has one.
        bias: Bias of this LayerNorm (C,), if it has one.
        eps: Epsilon of this LayerNorm.
        feature_dtype: Dtype in which features are compared.
        size: Number of tokens that each token represents (B, L) in float32; None for one each.
        present: Positions of the tokens in the whole sequence (B, L); None for the whole sequence.
        num_gone: Number R of patch tokens that are averaged into others, at most S.
        num_prefix: Number of prefix tokens P.
        width: Width of the grid, if the patch tokens are a whole grid, otherwise 0.

    Returns:
        Tokens that remain (B, K, C).
        Number of tokens that each of these represents (B, K) in float32.
        Log of this number (B, K), in the dtype of the tokens.
        Positions of the remaining tokens in the whole sequence, in order (B, K).
        For each token before, the position among the remaining tokens of the token that it follows (B, L), in int32.
        Positions of the tokens that are averaged into others (B, R).
        Positions of the tokens that they are averaged into (B, R).
    """
    batch_size, num_tokens, num_channels = x.shape
    num_patches = num_tokens - num_prefix
    num_sources = (num_patches + 1) // 2
    num_left = num_tokens - num_gone
    x = x.contiguous()
    has_norm = features is None
    of = x if features is None else features.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    unit = empty(batch_size, num_tokens, num_channels, dtype=feature_dtype)
    least, nearest = empty(batch_size, num_sources, dtype=torch.float32), empty(batch_size, num_sources)
    is_going, stays = empty(batch_size, num_sources), empty(batch_size, num_tokens)
    goes, into = (empty(batch_size, num_gone, dtype=torch.int64) for _ in range(2))
    place, follows = empty(batch_size, num_tokens), empty(batch_size, num_tokens)
    left, present_after = empty(batch_size, num_left), empty(batch_size, num_left, dtype=torch.int64)
    averages = empty(batch_size, num_left, num_channels, dtype=x.dtype)
    size_after = empty(batch_size, num_left, dtype=torch.float32)
    log_size = empty(batch_size, num_left, dtype=x.dtype)

    # kernels need an address for each argument; one that is absent is not read
    weight_or, bias_or = (unit if part is None else part for part in (weight, bias))
    size_or = least if size is None else size.contiguous()
    present_or = present_after if present is None else present.contiguous()
    norm = dict(HAS_NORM=has_norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None)
    block_c, block_s = power_of_2(num_channels), power_of_2(num_sources)
    block_l, block_j = power_of_2(num_tokens), 64 if block_s <= 256 else 16
    block_m = 64 if num_sources <= 512 else 128
    tiles = dict(BLOCK_M=block_m, BLOCK_N=block_m, BLOCK_K=64)
    if is_small(batch_size, num_patches, num_channels):
        wrap_triton(_one_launch_kernel)[(1,)](
            x, of, weight_or, bias_or, unit, size_or, least, nearest, present_or, is_going, stays, place, left,
            present_after, follows, goes, into, averages, size_after, log_size,
            num_tokens, num_patches, num_channels, num_prefix, num_gone, width, eps,
            **norm, HAS_SIZE=size is not None, HAS_PRESENT=present is not None, BLOCK_R=max(1, 8192 // block_c),
            BLOCK_T=max(1, 8192 // block_c), BLOCK_C=block_c, **tiles, BLOCK_S=block_s, BLOCK_L=block_l,
            BLOCK_J=block_j, num_warps=8)
        return averages, size_after, log_size, present_after, follows, goes, into
    block_r = max(1, 2048 // block_c)
    wrap_triton(_feature_kernel)[(divide_up(batch_size * num_tokens, block_r),)](
        of, weight_or, bias_or, unit, batch_size * num_tokens, num_channels, eps, **norm, BLOCK_R=block_r,
        BLOCK_C=block_c, num_warps=4)
    wrap_triton(_match_kernel)[(divide_up(num_sources, block_m), batch_size)](
        unit, size_or, least, nearest, num_tokens, num_patches, num_channels, num_prefix, width,
        HAS_SIZE=size is not None, **tiles, num_warps=4 if block_m == 64 else 8)
    wrap_triton(_decide_kernel)[(batch_size,)](
        least, nearest, present_or, is_going, stays, place, left, present_after, follows, goes, into, num_tokens,
        num_patches, num_prefix, num_gone, width, HAS_PRESENT=present is not None, BLOCK_S=block_s, BLOCK_L=block_l,
        BLOCK_J=block_j, num_warps=8)
    block_t = max(1, 2048 // max(block_c, block_s))
    wrap_triton(_average_kernel)[(divide_up(num_left, block_t), batch_size)](
        x, size_or, nearest, is_going, left, averages, size_after, log_size, num_tokens, num_left, num_patches,
        num_channels, num_prefix, width, HAS_SIZE=size is not None, BLOCK_T=block_t, BLOCK_S=block_s, BLOCK_C=block_c,
        num_warps=4)
    return averages, size_after, log_size, present_after, follows, goes, into


@register_flop_formula(torch.ops.timm_evo.average_alike)
def _average_alike_flops(x_shape, *args, **kwargs) -> int:
    num_patches = x_shape[1] - args[-2]
    return 2 * x_shape[0] * ((num_patches + 1) // 2) * (num_patches // 2) * x_shape[2]


@triton.jit
def _follow_kernel(
        before, averages, tokens, follows, out, num_rows, num_before, num_after, num_channels,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    is_row = row < num_rows
    mask = is_row[:, None] & (channel < num_channels)[None]
    followed = (row // num_before).to(tl.int64) * num_after + tl.load(follows + row, mask=is_row, other=0)
    place = row[:, None].to(tl.int64) * num_channels + channel[None]
    followed = followed[:, None] * num_channels + channel[None]
    moved = tl.load(tokens + followed, mask=mask, other=0.).to(tl.float32)
    moved -= tl.load(averages + followed, mask=mask, other=0.).to(tl.float32)
    moved += tl.load(before + place, mask=mask, other=0.).to(tl.float32)
    tl.store(out + place, moved.to(out.dtype.element_ty), mask=mask)


@triton_op('timm_evo::follow_averages', mutates_args=())
def follow_averages(before: Tensor, averages: Tensor, tokens: Tensor, follows: Tensor) -> Tensor:
    """Restore the tokens that were averaged into others, as `method.similarity.follow_averages`.

    Args:
        before: Tokens before they were averaged (B, L, C).
        averages: Tokens right after that (B, K, C).
        tokens: Tokens after some blocks (B, K, C).
        follows: Position of the token that each token follows (B, L), in int32.

    Returns:
        All tokens after these blocks (B, L, C).
    """
    batch_size, num_before, num_channels = before.shape
    out = torch.empty_like(before, memory_format=torch.contiguous_format)
    block_c = power_of_2(num_channels)
    block_r = max(1, 4096 // block_c)
    num_rows = batch_size * num_before
    wrap_triton(_follow_kernel)[(divide_up(num_rows, block_r),)](
        before.contiguous(), averages, tokens.contiguous(), follows, out, num_rows, num_before, averages.shape[1],
        num_channels, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)
    return out
