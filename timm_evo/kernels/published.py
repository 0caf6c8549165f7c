""" The steps of `method.published` in few launches

Class attention takes one launch, or two for many tokens. These take one launch each: selection with scores and weights;
slow tokens and the representative token; restoring the full sequence; rotations.

Shapes: B images, P prefix tokens, N patch tokens, K of them slow, L tokens present, C channels, H heads of d channels,
G heads of keys.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in Triton's language, which pyright does not know)
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from .blocks import divide_up, power_of_2, wrap_triton

__all__ = ['class_attention', 'follow', 'gather_rotations', 'gather_with_representative', 'select_tokens']


@triton.jit
def _class_attention_kernel(
        query, key, rotation, logits, largest, total, attention,
        query_image, query_head, query_channel, key_image, key_head, key_token, key_channel,
        rotation_image, rotation_head, rotation_token, num_tokens, num_prefix, scale,
        H: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr, HAS_ROTATION: tl.constexpr, HALF: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr,
        IS_WHOLE: tl.constexpr,
):
    """Logits of a chunk of tokens, their maximum and sum of exponentials; attention, too, if the chunk has all tokens.

    Logits are (B, L, BLOCK_H), largest and total (B, chunks, BLOCK_H).
    """
    image = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_channel = (head < H)[:, None] & (d < D)[None]
    query += image * query_image
    looking = tl.load(
        query + head[:, None] * query_head + d[None] * query_channel, mask=is_channel, other=0.).to(tl.float32) * scale
    if HAS_ROTATION:  # the query is rotated back by a token's position, which equals rotating the token's key
        if HALF:
            partner = (d + D // 2) % D
            sign = tl.where(d < D // 2, 1., -1.)
        else:
            partner = d + 1 - d % 2 * 2
            sign = 1. - 2. * (d % 2).to(tl.float32)
        turned = tl.load(
            query + head[:, None] * query_head + partner[None] * query_channel, mask=is_channel & (partner < D)[None],
            other=0.).to(tl.float32) * scale * sign[None]
        rotation += image * rotation_image
    key += image * key_image
    logits += image * num_tokens * BLOCK_H
    begin = tl.program_id(0) * CHUNK
    highest = tl.full((BLOCK_H,), float('-inf'), tl.float32)
    summed = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(begin, tl.minimum(begin + CHUNK, num_tokens), BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        is_token = t < num_tokens
        looked_at = tl.load(
            key + t[:, None, None] * key_token + (head // SHARING)[None, :, None] * key_head
            + d[None, None] * key_channel, mask=is_token[:, None, None] & is_channel[None], other=0.).to(tl.float32)
        if HAS_ROTATION:
            place = (
                (t - num_prefix)[:, None, None] * rotation_token + head[None, :, None] * rotation_head + d[None, None])
            is_rotated = (is_token & (t >= num_prefix))[:, None, None] & is_channel[None]
            sine = tl.load(rotation + place, mask=is_rotated, other=0.).to(tl.float32)
            cosine = tl.load(rotation + place + D, mask=is_rotated, other=1.).to(tl.float32)
            products = tl.sum(looked_at * (looking[None] * cosine + turned[None] * sine), 2)
        else:
            products = tl.sum(looked_at * looking[None], 2)
        tl.store(logits + t[:, None] * BLOCK_H + head[None], products, mask=is_token[:, None])
        products = tl.where(is_token[:, None], products, float('-inf'))
        higher = tl.maximum(highest, tl.max(products, 0))
        summed = summed * tl.exp(highest - higher) + tl.sum(tl.exp(products - higher[None]), 0)
        highest = higher
    if IS_WHOLE:
        tl.debug_barrier()
        for first in range(0, num_tokens, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            products = tl.load(logits + t[:, None] * BLOCK_H + head[None], mask=(t < num_tokens)[:, None], other=0.)
            paid = tl.where((head < H)[None], tl.exp(products - highest[None]) / summed[None], 0.)
            tl.store(attention + image * num_tokens + t, tl.sum(paid, 1), mask=t < num_tokens)
    else:
        chunk = (image * tl.num_programs(0) + tl.program_id(0)) * BLOCK_H
        tl.store(largest + chunk + head, highest)
        tl.store(total + chunk + head, summed)


@triton.jit
def _class_softmax_kernel(
        logits, largest, total, attention, num_tokens, num_chunks,
        H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):
    """Sum over the heads of the softmax over all chunks, for a block of tokens."""
    image = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    place = (image * num_chunks + chunk[:, None]) * BLOCK_H + head[None]
    is_chunk = (chunk < num_chunks)[:, None]
    highest = tl.load(largest + place, mask=is_chunk, other=float('-inf'))
    summed = tl.load(total + place, mask=is_chunk, other=0.)
    higher = tl.max(highest, 0)
    summed = tl.sum(summed * tl.exp(highest - higher[None]), 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < num_tokens
    products = tl.load(
        logits + (image * num_tokens + t[:, None]) * BLOCK_H + head[None], mask=is_token[:, None], other=0.)
    paid = tl.where((head < H)[None], tl.exp(products - higher[None]) / summed[None], 0.)
    tl.store(attention + image * num_tokens + t, tl.sum(paid, 1), mask=is_token)


@triton_op('timm_evo::class_attention', mutates_args=())
def class_attention(
        query: Tensor,
        key: Tensor,
        scale: float,
        num_prefix_tokens: int,
        rotation: Tensor | None,
        rotate_half: bool,
) -> Tensor:
    """Attention that the class token pays to every token, summed over the heads: `method.published.class_attention`.

    Args:
        query: Query of the class token, one per head (B, H, d), of any strides.
        key: Keys of all tokens present, not yet rotated (B, G, L, d), of any strides; G divides H.
        scale: Factor on the products.
        num_prefix_tokens: Number of prefix tokens P, which are never rotated.
        rotation: Rotations of the tokens present without the prefix, (L - P, 2d), (H, L - P, 2d) or
            (B, 1 or H, L - P, 2d), if they are rotated.
        rotate_half: Whether a rotation pairs channels of the two halves, or else neighbouring channels.

    Returns:
        Attention (B, L) in float32; every row sums to H.
    """
    batch_size, num_heads, head_dim = query.shape
    num_tokens = key.shape[2]
    block_h, block_d = power_of_2(num_heads), max(2, power_of_2(head_dim))
    block_t = max(1, 16384 // (block_h * block_d))
    num_chunks = 1 if num_tokens <= 256 else divide_up(num_tokens, 64)
    chunk = num_tokens if num_chunks == 1 else 64
    block_t = min(block_t, power_of_2(chunk))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    logits, attention = empty(batch_size, num_tokens, block_h), empty(batch_size, num_tokens)
    largest, total = empty(batch_size, num_chunks, block_h), empty(batch_size, num_chunks, block_h)
    rotation_strides = (0, 0, 0)
    if rotation is not None:
        rotation = rotation if rotation.stride(-1) == 1 else rotation.contiguous()
        rotation_strides = (
            rotation.stride(0) if rotation.dim() == 4 else 0,
            rotation.stride(-3) if rotation.dim() > 2 and rotation.shape[-3] > 1 else 0,
            rotation.stride(-2))
    wrap_triton(_class_attention_kernel)[(num_chunks, batch_size)](
        query, key, logits if rotation is None else rotation, logits, largest, total, attention,
        *query.stride(), *key.stride(), *rotation_strides, num_tokens, num_prefix_tokens, scale,
        H=num_heads, SHARING=num_heads // key.shape[1], D=head_dim, HAS_ROTATION=rotation is not None,
        HALF=rotate_half, BLOCK_H=block_h, BLOCK_D=block_d, BLOCK_T=block_t, CHUNK=chunk, IS_WHOLE=num_chunks == 1,
        num_warps=8 if block_t * block_h * block_d >= 8192 else 4)
    if num_chunks > 1:
        wrap_triton(_class_softmax_kernel)[(divide_up(num_tokens, 64), batch_size)](
            logits, largest, total, attention, num_tokens, num_chunks, H=num_heads, BLOCK_H=block_h, BLOCK_T=64,
            BLOCK_CHUNKS=power_of_2(num_chunks), num_warps=4)
    return attention


@triton.jit
def _select_kernel(
        scores, present, place, weight, present_scores, num_tokens, num_prefix, num_slow,
        BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """Select the tokens of an image with the highest scores; of equal scores, the first."""
    image = tl.program_id(0).to(tl.int64)
    num_patches = num_tokens - num_prefix
    num_present = num_prefix + num_slow
    scores += image * num_tokens
    token = tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_patch = is_token & (token >= num_prefix)
    mine = tl.load(scores + token, mask=is_token, other=0.)
    known = tl.where(mine == mine, mine, float('-inf'))  # a NaN is never selected before a number
    rank = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, num_patches, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(scores + num_prefix + j, mask=j < num_patches, other=0.)
        other = tl.where(other == other, other, float('-inf'))
        is_before = (other[None] > known[:, None]) | (
            (other[None] == known[:, None]) & ((num_prefix + j)[None] < token[:, None]))
        rank += tl.sum((is_before & (j < num_patches)[None]).to(tl.int32), 1)
    is_present = is_token & ((token < num_prefix) | (rank < num_slow))
    position = tl.cumsum(is_present.to(tl.int32), 0) - 1
    tl.store(present + image * num_present + position, token.to(tl.int64), mask=is_present)
    tl.store(present_scores + image * num_present + position, mine, mask=is_present)
    # the representative token comes after all tokens present
    tl.store(place + image * num_tokens + token, tl.where(is_present, position, num_present), mask=is_token)
    summarised = tl.where(is_patch & (is_present == 0), mine, 0.)
    share = summarised / tl.maximum(tl.sum(summarised, 0), 1e-37)
    tl.store(weight + image * num_tokens + token, share, mask=is_token)


@triton_op('timm_evo::select_tokens', mutates_args=())
def select_tokens(
        scores: Tensor,
        num_slow: int,
        num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the tokens with the highest scores: `method.published.select_tokens`, and what the next steps need.

    Args:
        scores: Global class attention (B, P + N) in float32.
        num_slow: Number of slow tokens K.
        num_prefix_tokens: Number of prefix tokens P.

    Returns:
        Positions of prefix and slow tokens, in order (B, P + K).
        Position of each token among these, P + K for placeholders (B, P + N), in int32.
        Weights of the placeholders in the representative token, 0 for other tokens (B, P + N).
        Scores of prefix and slow tokens (B, P + K).
    """
    batch_size, num_tokens = scores.shape
    num_present = num_prefix_tokens + num_slow
    scores = scores.contiguous()
    present = torch.empty(batch_size, num_present, dtype=torch.int64, device=scores.device)
    place = torch.empty(batch_size, num_tokens, dtype=torch.int32, device=scores.device)
    weight, present_scores = torch.empty_like(scores), scores.new_empty(batch_size, num_present)
    block_n = power_of_2(num_tokens)
    wrap_triton(_select_kernel)[(batch_size,)](
        scores, present, place, weight, present_scores, num_tokens, num_prefix_tokens, num_slow,
        BLOCK_N=block_n, BLOCK_J=64 if block_n <= 256 else 16, num_warps=8)
    return present, place, weight, present_scores


@triton.jit
def _gather_kernel(
        x, present, weight, out, num_tokens, num_present, num_out, num_channels, num_gathering,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Copy some of the tokens present, or sum some channels of the placeholders."""
    image = tl.program_id(1).to(tl.int64)
    x += image * num_tokens * num_channels
    out += image * num_out * num_channels
    if tl.program_id(0) < num_gathering:
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        channel = tl.arange(0, BLOCK_C)
        mask = (row < num_present)[:, None] & (channel < num_channels)[None]
        token = tl.load(present + image * num_present + row, mask=row < num_present, other=0)
        values = tl.load(x + token[:, None] * num_channels + channel[None], mask=mask, other=0.)
        tl.store(out + row[:, None] * num_channels + channel[None], values, mask=mask)
    else:
        some_channels = (tl.program_id(0) - num_gathering) * BLOCK_D + tl.arange(0, BLOCK_D)
        is_channel = some_channels < num_channels
        summed = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(0, num_tokens, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            share = tl.load(weight + image * num_tokens + t, mask=t < num_tokens, other=0.)
            summarised = tl.load(
                x + t[:, None] * num_channels + some_channels[None], mask=(t < num_tokens)[:, None] & is_channel[None],
                other=0.).to(tl.float32)
            summed += tl.sum(summarised * share[:, None], 0)
        tl.store(out + num_present * num_channels + some_channels, summed.to(out.dtype.element_ty), mask=is_channel)


@triton_op('timm_evo::gather_with_representative', mutates_args=())
def gather_with_representative(x: Tensor, present: Tensor, weight: Tensor, with_representative: bool) -> Tensor:
    """The tokens for the blocks: `gather_tokens` and `representative_token` of `method` in one launch.

    Args:
        x: Full sequence (B, P + N, C).
        present: Positions of prefix and slow tokens (B, P + K).
        weight: Weight of each token in the representative token (B, P + N) in float32.
        with_representative: Whether a representative token is computed.

    Returns:
        Prefix, slow tokens and the representative token (B, P + K + 1, C), or (B, P + K, C) without it.
    """
    batch_size, num_tokens, num_channels = x.shape
    num_present = present.shape[1]
    num_out = num_present + with_representative
    out = torch.empty(batch_size, num_out, num_channels, dtype=x.dtype, device=x.device)
    block_c = power_of_2(num_channels)
    block_r = max(1, 4096 // block_c)
    num_gathering = divide_up(num_present, block_r)
    block_d = min(32, block_c)
    num_summing = divide_up(num_channels, block_d) if with_representative else 0
    wrap_triton(_gather_kernel)[(num_gathering + num_summing, batch_size)](
        x.contiguous(), present, weight, out, num_tokens, num_present, num_out, num_channels, num_gathering,
        BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_T=64, BLOCK_D=block_d, num_warps=4)
    return out


@triton.jit
def _follow_kernel(
        x, tokens, place, begun, out, num_rows, num_tokens, num_present, num_now, num_channels,
        HAS_REPRESENTATIVE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    is_row = row < num_rows
    is_channel = channel < num_channels
    mask = is_row[:, None] & is_channel[None]
    image = (row // num_tokens).to(tl.int64)
    position = tl.load(place + row, mask=is_row, other=0)
    is_present = position < num_present
    here = row[:, None].to(tl.int64) * num_channels + channel[None]
    now = tl.load(
        tokens + (image * num_now + position)[:, None] * num_channels + channel[None],
        mask=mask & is_present[:, None], other=0.)
    stood = tl.load(x + here, mask=mask & (is_present == 0)[:, None], other=0.)
    if HAS_REPRESENTATIVE:
        follows = mask & (is_present == 0)[:, None]
        last = (image * num_now + num_present)[:, None] * num_channels + channel[None]
        moved = tl.load(tokens + last, mask=follows, other=0.).to(tl.float32)
        moved -= tl.load(begun + last, mask=follows, other=0.).to(tl.float32)
        stood = (stood.to(tl.float32) + moved).to(stood.dtype)
    tl.store(out + here, tl.where(is_present[:, None], now, stood), mask=mask)


@triton_op('timm_evo::follow', mutates_args=())
def follow(x: Tensor, tokens: Tensor, place: Tensor, begun: Tensor, num_present: int) -> Tensor:
    """Restore the full sequence after some blocks of a segment, as `method.published.follow`.

    Args:
        x: Full sequence at the beginning of the segment (B, P + N, C).
        tokens: Output of the blocks (B, P + K, C), or (B, P + K + 1, C) with a representative token.
        place: Position of each token among these, P + K for placeholders (B, P + N), in int32.
        begun: Input of the blocks, with the shape of `tokens`.
        num_present: Number of prefix and slow tokens P + K.

    Returns:
        Full sequence (B, P + N, C).
    """
    batch_size, num_tokens, num_channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block_c = power_of_2(num_channels)
    block_r = max(1, 4096 // block_c)
    num_rows = batch_size * num_tokens
    wrap_triton(_follow_kernel)[(divide_up(num_rows, block_r),)](
        x.contiguous(), tokens.contiguous(), place, begun, out, num_rows, num_tokens, num_present, tokens.shape[1],
        num_channels, HAS_REPRESENTATIVE=tokens.shape[1] > num_present, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)
    return out


@triton.jit
def _rotation_kernel(
        rotation, positions, out, rotation_image, rotation_head, rotation_token, num_prefix, num_present, num_out,
        num_channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.arange(0, BLOCK_C)
    is_placed = t < num_present - num_prefix
    place = tl.load(positions + image * num_present + num_prefix + t, mask=is_placed, other=0) - num_prefix
    values = tl.load(
        rotation + image * rotation_image + head * rotation_head + place[:, None] * rotation_token + channel[None],
        mask=is_placed[:, None] & (channel < num_channels)[None], other=0.)
    unrotated = tl.where(channel < num_channels // 2, 0., 1.).to(values.dtype)  # sines and cosines
    values = tl.where(is_placed[:, None], values, unrotated[None])
    out += (image * tl.num_programs(1) + head) * num_out * num_channels
    tl.store(
        out + t[:, None] * num_channels + channel[None], values,
        mask=(t < num_out)[:, None] & (channel < num_channels)[None])


@triton_op('timm_evo::gather_rotations', mutates_args=())
def gather_rotations(rotation: Tensor, positions: Tensor, num_prefix_tokens: int, representative: bool) -> Tensor:
    """Rotations of the tokens that go through the blocks, as `method.class_attention.gather_rotations`.

    Args:
        rotation: Rotations of all patch tokens (N, 2d), (H, N, 2d) or (B, 1 or H, N, 2d).
        positions: Positions in the sequence of the prefix tokens and of K patch tokens (B, P + K).
        num_prefix_tokens: Number of prefix tokens P.
        representative: Whether a representative token comes last, which is not rotated.

    Returns:
        Rotations (B, 1 or H, K, 2d), or (B, 1 or H, K + 1, 2d) with a representative token.
    """
    batch_size, num_present = positions.shape
    num_channels = rotation.shape[-1]
    num_heads = rotation.shape[-3] if rotation.dim() > 2 else 1
    num_out = num_present - num_prefix_tokens + representative
    rotation = rotation if rotation.stride(-1) == 1 else rotation.contiguous()
    out = torch.empty(batch_size, num_heads, num_out, num_channels, dtype=rotation.dtype, device=rotation.device)
    wrap_triton(_rotation_kernel)[(divide_up(num_out, 16), num_heads, batch_size)](
        rotation, positions, out, rotation.stride(0) if rotation.dim() == 4 else 0,
        rotation.stride(-3) if rotation.dim() > 2 else 0, rotation.stride(-2), num_prefix_tokens, num_present, num_out,
        num_channels, BLOCK_T=16, BLOCK_C=power_of_2(num_channels), num_warps=4)
    return out
