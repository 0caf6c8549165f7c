""" The steps of `method.similarity` on blocks of tokens, for the kernels of `similarity`

They compute `match_tokens`, `places_after` and `average_tokens` in this order: features of length one; the best match
of each token that may be averaged into another; which tokens are averaged, and the positions after that; the averages.
Results are in memory between the steps. So there can be one kernel for each step, or one kernel with all steps for an
image. Of equal losses, the first is the least; a NaN counts as infinite.

Shapes are those of `similarity`.
"""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (kernels are in Triton's language, which pyright does not know)
import triton
import triton.language as tl

from .blocks import dot

__all__ = ['averages_of', 'best_matches', 'decide', 'unit_features']


@triton.jit
def _place(i, width):
    """Every second patch token, and its shift to a checkerboard if the width of the grid is not 0."""
    even = 2 * i
    return even, tl.where(width > 0, (even // tl.maximum(width, 1)) % 2 * (1 - width % 2), 0)


@triton.jit
def unit_features(
        x, weight, bias, features, first, num_rows, num_channels, eps,
        HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Apply a LayerNorm, if there is one, to some rows (rows, C), and scale them to length one."""
    row = first + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mask = (row < num_rows)[:, None] & is_channel[None]
    place = row[:, None].to(tl.int64) * num_channels + channel[None]
    values = tl.load(x + place, mask=mask, other=0.).to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(values, 1) / num_channels
        values = tl.where(mask, values - mean[:, None], 0.)
        values = values * tl.rsqrt(tl.sum(values * values, 1) / num_channels + eps)[:, None]
        if HAS_WEIGHT:
            values = values * tl.load(weight + channel, mask=is_channel, other=0.).to(tl.float32)[None]
        if HAS_BIAS:
            values = values + tl.load(bias + channel, mask=is_channel, other=0.).to(tl.float32)[None]
    length = tl.sqrt(tl.sum(values * values, 1))
    values = values / tl.maximum(length, 1e-12)[:, None]
    tl.store(features + place, values.to(features.dtype.element_ty), mask=mask)


@triton.jit
def best_matches(
        features, size, least, nearest, first, num_patches, num_channels, num_prefix, width,
        HAS_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Find the best match of some tokens of an image that may be averaged into others, and the loss of each."""
    num_sources = (num_patches + 1) // 2
    num_targets = num_patches // 2
    i = first + tl.arange(0, BLOCK_M)
    even, shift = _place(i, width)
    source = num_prefix + even + shift
    best = tl.full((BLOCK_M,), float('inf'), tl.float32)
    best_target = tl.zeros((BLOCK_M,), tl.int32)
    if HAS_SIZE:
        inverse_source = 1. / tl.load(size + source, mask=i < num_sources, other=1.)
    for first_target in range(0, num_targets, BLOCK_N):
        j = first_target + tl.arange(0, BLOCK_N)
        even, shift = _place(j, width)
        target = num_prefix + even + 1 - shift
        likeness = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_channel in range(0, num_channels, BLOCK_K):
            channel = first_channel + tl.arange(0, BLOCK_K)
            of_sources = tl.load(
                features + source[:, None] * num_channels + channel[None],
                mask=(i < num_sources)[:, None] & (channel < num_channels)[None], other=0.)
            of_targets = tl.load(
                features + target[None] * num_channels + channel[:, None],
                mask=(j < num_targets)[None] & (channel < num_channels)[:, None], other=0.)
            likeness = dot(of_sources, of_targets, likeness)
        loss = 1. - likeness
        if HAS_SIZE:
            inverse_target = 1. / tl.load(size + target, mask=j < num_targets, other=1.)
            loss = loss / (inverse_source[:, None] + inverse_target[None])
        loss = tl.where((j < num_targets)[None] & (loss == loss), loss, float('inf'))
        lowest = tl.min(loss, 1)
        lowest_target = tl.argmin(loss, 1).to(tl.int32) + first_target
        best_target = tl.where(lowest < best, lowest_target, best_target)
        best = tl.minimum(lowest, best)
    tl.store(least + i, best, mask=i < num_sources)
    tl.store(nearest + i, best_target, mask=i < num_sources)


@triton.jit
def decide(
        least, nearest, present, is_going, stays, place, left, present_after, follows, goes, goes_into,
        num_tokens, num_patches, num_prefix, num_gone, width,
        HAS_PRESENT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_J: tl.constexpr,
):
    """Choose the tokens of an image that are averaged into others, and find all positions after that."""
    num_sources = (num_patches + 1) // 2
    i = tl.arange(0, BLOCK_S)
    is_source = i < num_sources
    mine = tl.load(least + i, mask=is_source, other=float('inf'))
    rank = tl.zeros((BLOCK_S,), tl.int32)
    for first in range(0, num_sources, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(least + j, mask=j < num_sources, other=float('inf'))
        is_before = (other[None] < mine[:, None]) | ((other[None] == mine[:, None]) & (j[None] < i[:, None]))
        rank += tl.sum((is_before & (j < num_sources)[None]).to(tl.int32), 1)
    is_gone = (rank < num_gone) & is_source
    even, shift = _place(i, width)
    source = num_prefix + even + shift
    token = tl.arange(0, BLOCK_L)
    is_token = token < num_tokens
    tl.store(is_going + i, is_gone.to(tl.int32), mask=is_source)
    tl.store(stays + token, tl.full((BLOCK_L,), 1, tl.int32), mask=is_token)
    tl.debug_barrier()
    tl.store(stays + source, (is_gone == 0).to(tl.int32), mask=is_source)
    tl.debug_barrier()
    is_left = tl.load(stays + token, mask=is_token, other=0)
    place_after = tl.cumsum(is_left, 0) - 1
    is_left = is_token & (is_left == 1)
    tl.store(place + token, place_after, mask=is_token)
    tl.store(left + place_after, token, mask=is_left)
    tl.store(follows + token, place_after, mask=is_left)
    if HAS_PRESENT:
        tl.store(present_after + place_after, tl.load(present + token, mask=is_left, other=0), mask=is_left)
    else:
        tl.store(present_after + place_after, token.to(tl.int64), mask=is_left)
    tl.debug_barrier()
    even, shift = _place(tl.load(nearest + i, mask=is_source, other=0), width)
    into = num_prefix + even + 1 - shift
    tl.store(follows + source, tl.load(place + into, mask=is_gone, other=0), mask=is_gone)
    number = tl.cumsum(is_gone.to(tl.int32), 0) - 1
    tl.store(goes + number, source.to(tl.int64), mask=is_gone)
    tl.store(goes_into + number, into.to(tl.int64), mask=is_gone)


@triton.jit
def averages_of(
        x, size, nearest, is_going, left, averages, size_after, log_size_after, first,
        num_left, num_patches, num_channels, num_prefix, width,
        HAS_SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Average tokens into some of the remaining tokens of an image, in the order of the grid."""
    num_sources = (num_patches + 1) // 2
    t = first + tl.arange(0, BLOCK_T)
    is_left = t < num_left
    token = tl.load(left + t, mask=is_left, other=0)
    channel = tl.arange(0, BLOCK_C)
    is_channel = channel < num_channels
    mask = is_left[:, None] & is_channel[None]
    own = tl.load(x + token[:, None] * num_channels + channel[None], mask=mask, other=0.).to(tl.float32)
    if HAS_SIZE:
        own_size = tl.load(size + token, mask=is_left, other=1.)
    else:
        own_size = tl.full((BLOCK_T,), 1., tl.float32)
    patch = token - num_prefix
    even, shift = _place(patch // 2, width)
    is_target = (patch >= 0) & (patch - even != shift) & is_left
    i = tl.arange(0, BLOCK_S)
    is_gone = tl.load(is_going + i, mask=i < num_sources, other=0) == 1
    into = tl.load(nearest + i, mask=i < num_sources, other=-1)
    is_member = is_gone[None] & (into[None] == (patch // 2)[:, None]) & is_target[:, None]
    num_members = tl.sum(is_member.to(tl.int32), 1)

    total = own_size
    summed = own * own_size[:, None]
    lengths = own_size * tl.sqrt(tl.sum(own * own, 1))
    for _ in range(tl.max(num_members, 0)):
        member = tl.min(tl.where(is_member, i[None], BLOCK_S), 1)
        is_some = member < BLOCK_S
        is_member = is_member & (i[None] != member[:, None])
        even, shift = _place(member, width)
        source = num_prefix + even + shift
        values = tl.load(
            x + source[:, None] * num_channels + channel[None], mask=is_some[:, None] & is_channel[None],
            other=0.).to(tl.float32)
        if HAS_SIZE:
            weight = tl.load(size + source, mask=is_some, other=0.)
        else:
            weight = is_some.to(tl.float32)
        total += weight
        summed += values * weight[:, None]
        lengths += weight * tl.sqrt(tl.sum(values * values, 1))
    mean = summed / total[:, None]
    kept = tl.sqrt(tl.sum(mean * mean, 1)) / tl.maximum(lengths / total, 1e-12)
    kept = tl.maximum(kept, 0.01)  # limit for opposite tokens, whose mean is small
    is_average = num_members > 0
    values = tl.where(is_average[:, None], mean / kept[:, None], own)
    size_now = tl.where(is_average, total * kept, own_size)
    tl.store(
        averages + t[:, None] * num_channels + channel[None], values.to(averages.dtype.element_ty), mask=mask)
    tl.store(size_after + t, size_now, mask=is_left)
    tl.store(log_size_after + t, tl.log(size_now).to(log_size_after.dtype.element_ty), mask=is_left)
