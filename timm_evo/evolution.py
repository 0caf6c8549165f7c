""" Token evolution on tensors

The steps of `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390, in
the order of the paper, one function each. Nothing here knows a model: a model runs its own blocks between
`begin_segment` and `follow`, and evolves the scores by what it takes of their attention.

Each step is one node to symbolic tracing (`torch.fx.wrap`): how many tokens are slow follows from the shape of the
input, which tracing does not know. Batches are reshaped by `view`, because `unflatten` would fix their size in a traced
ONNX graph.

Shapes: B images, P prefix tokens (class, distillation, registers), N patch tokens, K of them slow, C channels, H heads
of d channels. Sequences are laid out as timm's: prefix first, then the patches in grid order. While a selection is
open, the blocks see [prefix, slow tokens, representative token].

Rotations are those of timm's rotary position embeddings: sines and cosines side by side, for all tokens but the prefix,
(N, 2d), one per head (H, N, 2d), or of each image (B, 1 or H, N, 2d).
"""

import torch
import torch.fx
from timm.layers import apply_rot_embed_cat
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

if hasattr(symbolic_shapes, 'guard_or_false'):
    _is_known_true = symbolic_shapes.statically_known_true
else:  # before torch 2.8 compiled code cannot call it
    _is_known_true = symbolic_shapes.guard_size_oblivious


@torch.fx.wrap
def class_query(
        query: Tensor,
        class_token: bool,
        num_prefix_tokens: int,
        slow: Tensor | None,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Query that looks at the tokens: that of the class token, or without one the mean of those of the patch tokens.

    Args:
        query: Queries of all tokens present, not yet rotated (B, H, L, d).
        class_token: Whether the first token is the class token.
        num_prefix_tokens: Number of prefix tokens P.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
        rotation: Rotations of the tokens present but the prefix, if they are rotated.
        rotate_half: Whether a rotation turns the two halves of the channels, or pairs of neighbours.

    Returns:
        One query per head, as the attention uses it (B, H, d).
    """
    if class_token:
        return query[:, :, 0]
    query = query[:, :, num_prefix_tokens:query.shape[2] if slow is None else slow.shape[1]]
    if rotation is not None:
        query = apply_rot_embed_cat(query, rotation[..., :query.shape[2], :], half=rotate_half)
    return query.mean(dim=2)


@torch.fx.wrap
def gather_rotations(rotation: Tensor, positions: Tensor, num_prefix_tokens: int, representative: bool) -> Tensor:
    """Rotations of the tokens that go through the blocks.

    A token keeps the rotation of its place. The representative token stands for no place and is not rotated.

    Args:
        rotation: Rotations of all patch tokens (N, 2d), (H, N, 2d) or (B, 1 or H, N, 2d).
        positions: Positions in the sequence of the prefix tokens and of K patch tokens (B, P + K).
        num_prefix_tokens: Number of prefix tokens P.
        representative: Whether a representative token comes last.

    Returns:
        Rotations (B, 1 or H, K, 2d), or (B, 1 or H, K + 1, 2d) with that of the representative token.
    """
    places = positions[:, num_prefix_tokens:] - num_prefix_tokens
    if rotation.dim() == 4:
        rotation = rotation.take_along_dim(places.unsqueeze(1).unsqueeze(3), dim=2)
    else:  # whole rows at once
        row = places.unsqueeze(1)
        if rotation.dim() == 3:  # the tables of all heads, one below the other
            table = torch.arange(rotation.shape[0], device=row.device).unsqueeze(1)
            row = row + table * rotation.shape[1]
        rotation = rotation.flatten(0, -2).index_select(0, row.view(-1))
        rotation = rotation.view(row.shape[0], row.shape[1], row.shape[2], rotation.shape[1])
    if not representative:
        return rotation
    shape = [rotation.shape[0], rotation.shape[1], 1, rotation.shape[3] // 2]
    unrotated = torch.cat([rotation.new_zeros(shape), rotation.new_ones(shape)], dim=3)  # sines and cosines
    return torch.cat([rotation, unrotated], dim=2)


def class_products(
        query: Tensor,
        key: Tensor,
        scale: float,
        num_prefix_tokens: int = 0,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Products of the query of the class token with the keys of all tokens.

    Half precision is raised to float32, because large products would overflow.

    Args:
        query: Query of the class token, one per head (B, H, d).
        key: Keys of all tokens present, not yet rotated (B, H, L, d); of fewer heads in grouped-query attention.
        scale: Factor on the products, 1 / sqrt(d) of the attention.
        num_prefix_tokens: Number of prefix tokens P, which are never rotated.
        rotation: Rotations of the tokens present but the prefix, if they are rotated.
        rotate_half: Whether a rotation turns the two halves of the channels, or pairs of neighbours.

    Returns:
        Products (B, H, L) in float32 or wider.
    """
    query = (query if query.dtype == torch.float64 else query.float()).unsqueeze(2) * scale
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if rotation is None:
        return (key * query).sum(dim=3)  # matmul copies the keys, which takes three times as long
    # the query turned back by the place of a token, which takes fewer steps than to turn the token's key
    sin, cos = rotation.chunk(2, dim=-1)
    turned = apply_rot_embed_cat(query, torch.cat([-sin, cos], dim=-1), half=rotate_half)
    return torch.cat([
        (key[:, :, :num_prefix_tokens] * query).sum(dim=3),
        (key[:, :, num_prefix_tokens:] * turned).sum(dim=3),
    ], dim=2)


@torch.fx.wrap
def class_attention(
        query: Tensor,
        key: Tensor,
        scale: float,
        num_prefix_tokens: int = 0,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Attention that the class token pays to every token, summed over the heads.

    Paper: class attention, section "Structure preserving token selection". The arguments are those of `class_products`.

    Returns:
        Attention (B, L) in float32 or wider, because small shares tie in ranks; every row sums to H.
    """
    products = class_products(query, key, scale, num_prefix_tokens, rotation, rotate_half)
    return products.softmax(dim=-1).sum(dim=1)


@torch.fx.wrap
def mean_attention(attention: Tensor, num_heads: int, num_tokens: int, class_token: bool) -> Tensor:
    """Class attention from an attention matrix at hand, averaged over the heads.

    Without a class token, the average of the patch tokens takes its place, as the head that averages them reads it.
    Half precision is raised to float32, as in `class_attention`.

    Args:
        attention: Attention of all tokens present (H * B, T, L), or of those that are left by downsampling.
        num_heads: Number of heads H.
        num_tokens: Number of tokens K that look and are looked at, the first ones: all but a representative token.
        class_token: Whether the first token is the class token.

    Returns:
        Attention (B, K).
    """
    dtype = torch.float64 if attention.dtype == torch.float64 else torch.float32
    if attention.shape[2] > num_tokens:  # there is a representative token, the last in rows and columns
        attention = attention[:, :num_tokens, :num_tokens]
    num_queries = 1 if class_token else attention.shape[1]
    # one dimension at a time: both at once take eight times as long on a CPU
    paid = attention[:, 0] if class_token else attention.sum(dim=1, dtype=dtype)
    paid = paid.view(num_heads, paid.shape[0] // num_heads, num_tokens).sum(dim=0, dtype=dtype)
    return paid / (num_queries * num_heads)


def _mix(scores: Tensor, attention: Tensor, tradeoff: float, learned: Tensor | None) -> Tensor:
    if learned is None:
        return torch.lerp(scores, attention, tradeoff)
    return torch.lerp(scores, attention, learned.to(scores.dtype).sigmoid())


@torch.fx.wrap
def global_class_attention(
        scores: Tensor | None,
        attention: Tensor,
        tradeoff: float,
        slow: Tensor | None,
        learned: Tensor | None = None,
) -> Tensor:
    """Evolve the scores by one block: A <- (1 - alpha) A + alpha a for the tokens that went through it.

    Paper: global class attention, section "Structure preserving token selection". Prefix tokens have scores, too, which
    nothing reads; so one index serves tokens and scores.

    Args:
        scores: Scores so far (B, P + N); None before the first block, which sets them.
        attention: Class attention of the tokens that went through the block (B, P + N), or (B, P + K) and more where a
            selection is open.
        tradeoff: alpha, the share of the new attention.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
        learned: Learned trade-off (1,), whose sigmoid takes the place of `tradeoff`.

    Returns:
        Scores (B, P + N).
    """
    if scores is None:
        return attention
    if slow is None:
        return _mix(scores, attention, tradeoff, learned)
    attention = attention[:, :slow.shape[1]]  # without the representative token
    return scores.scatter(1, slow, _mix(scores.gather(1, slow), attention, tradeoff, learned))


def is_one_image(batch_size: int) -> bool:
    """Whether a batch is known to hold one image, which takes fewer steps.

    A size that a trace, an export or a compiler leaves open is not known: a plain comparison would fix it.
    """
    if torch.jit.is_scripting():
        return batch_size == 1
    else:
        return not torch.jit.is_tracing() and _is_known_true(batch_size == 1)


def patches(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """What a sequence (B, P + N, ...) holds of the patch tokens (B, N, ...)."""
    return x if num_prefix_tokens == 0 else x[:, num_prefix_tokens:]  # a slice of all takes its time, too


@torch.fx.wrap
def downsampled_class_attention(
        scores: Tensor,
        evolved: Tensor,
        grid_size: tuple[int, int],
        stride: int,
        num_prefix_tokens: int,
) -> Tensor:
    """Scores of the tokens that are left where an attention downsamples the grid.

    As in the authors' LeViT, the patch tokens that are left share the sum that all had, so the new attention keeps its
    weight against the old.

    Args:
        scores: Scores before that attention (B, P + N).
        evolved: Scores evolved by that attention (B, P + N).
        grid_size: Height and width of the grid of the N patch tokens.
        stride: Step between the rows and columns that are left.
        num_prefix_tokens: Number of prefix tokens P, which are all left.

    Returns:
        Scores (B, P + M).
    """
    grid = patches(evolved, num_prefix_tokens).reshape(-1, grid_size[0], grid_size[1])
    left = grid[:, ::stride, ::stride].flatten(1)
    rescale = patches(scores, num_prefix_tokens).sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True)
    if num_prefix_tokens > 0:
        left = torch.cat([evolved[:, :num_prefix_tokens], left], dim=1)
    return left * rescale


def count_slow(keep_ratio: float, num_patches: int) -> int:
    """Number of patch tokens on the slow path.

    Args:
        keep_ratio: Share of the patch tokens.
        num_patches: Number of patch tokens of the image N.

    Raises:
        ValueError: No patch token would be left on the slow path.
    """
    if torch.jit.is_scripting():
        num_slow = int(keep_ratio * num_patches)
    else:
        num_slow = torch.sym_int(keep_ratio * num_patches)  # stays a symbol where an export leaves the image size open
    if num_slow < 1:
        raise ValueError(
            f'keep_ratio={keep_ratio} of {num_patches} patch tokens leaves none on the slow path, '
            'use a larger keep_ratio or a larger image.')
    return num_slow


@torch.fx.wrap
def select_tokens(scores: Tensor, keep_ratio: float, num_prefix_tokens: int) -> Tensor:
    """Choose the informative tokens of each image, those with the highest scores.

    Paper: section "Structure preserving token selection".

    Args:
        scores: Global class attention (B, P + N).
        keep_ratio: Share of the patch tokens on the slow path.
        num_prefix_tokens: Number of prefix tokens P, which are always on it.

    Returns:
        Positions in the sequence of the prefix tokens and K = int(keep_ratio * N) slow tokens (B, P + K).

    Raises:
        ValueError: No patch token would be left on the slow path.
    """
    num_slow = count_slow(keep_ratio, scores.shape[1] - num_prefix_tokens)
    slow = patches(scores, num_prefix_tokens).topk(num_slow, dim=1, sorted=False)[1]  # their order has no meaning
    if num_prefix_tokens == 0:
        return slow
    slow = slow + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=slow.device).expand(slow.shape[0], num_prefix_tokens)
    return torch.cat([prefix, slow], dim=1)


@torch.fx.wrap
def representative_token(x: Tensor, scores: Tensor, slow: Tensor) -> Tensor:
    """Summarise the placeholder tokens in one, weighted by their share of the scores.

    Paper: representative token, section "Slow-fast token updating".

    Args:
        x: Full sequence (B, P + N, C).
        scores: Global class attention (B, P + N).
        slow: Positions of prefix and slow tokens (B, P + K), which take no part.

    Returns:
        Representative token (B, 1, C).
    """
    weight = scores.scatter(1, slow, 0.)
    # a floor of about the smallest float32, because the scores of all placeholders can underflow to zero together
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-37)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return weight.unsqueeze(1).bmm(x)


def rows(positions: Tensor, num_tokens: int) -> Tensor:
    """Positions (B, K) in sequences of a length as rows of the whole batch (B * K,), to copy whole rows at once."""
    if is_one_image(positions.shape[0]):
        return positions.view(-1)
    sequence = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
    return (positions + sequence * num_tokens).view(-1)  # no `alpha`, of which torch 2.8 exports no open size to ONNX


@torch.fx.wrap
def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Tokens of a sequence (B, L, C) at positions (B, K): (B, K, C)."""
    tokens = x.flatten(0, 1).index_select(0, rows(positions, x.shape[1]))
    return tokens.view(positions.shape[0], positions.shape[1], x.shape[2])


def begin_segment(
        x: Tensor,
        scores: Tensor | None,
        keep_ratio: float,
        num_prefix_tokens: int,
        fast_update: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Select tokens for the blocks of a segment.

    No node of its own to symbolic tracing, which could not tell that a node returns None.

    Args:
        x: Full sequence (B, P + N, C).
        scores: Global class attention (B, P + N).
        keep_ratio: Share of the patch tokens on the slow path; 1 selects nothing.
        num_prefix_tokens: Number of prefix tokens P.
        fast_update: Whether a representative token goes through the blocks for the placeholders.

    Returns:
        What goes through the blocks: [prefix, slow tokens, representative token] (B, P + K + 1, C), without the last if
            not `fast_update`, or the full sequence.
        Positions of prefix and slow tokens (B, P + K), or None.
        Representative token (B, 1, C), or None.
    """
    if keep_ratio == 1:
        return x, None, None
    assert scores is not None
    slow = select_tokens(scores, keep_ratio, num_prefix_tokens)
    tokens = gather_tokens(x, slow)
    if not fast_update:
        return tokens, slow, None
    representative = representative_token(x, scores, slow)
    return torch.cat([tokens, representative], dim=1), slow, representative


@torch.fx.wrap
def follow(x: Tensor, tokens: Tensor, slow: Tensor | None, representative: Tensor | None) -> Tensor:
    """Give the full sequence back after some blocks of a segment.

    Paper: section "Slow-fast token updating". One rule for all: a token is what it was when the blocks began, moved by
    what the token that it follows was moved by since. Prefix and slow tokens follow themselves, so they get exactly
    what the blocks gave. Every placeholder follows the representative token; without one it follows none, and stays.

    Args:
        x: Full sequence at the beginning of the segment (B, P + N, C).
        tokens: What came out of the blocks, laid out as by `begin_segment`.
        slow: Positions of prefix and slow tokens (B, P + K); None where `tokens` is the full sequence.
        representative: Representative token that went into the blocks (B, 1, C), if any.

    Returns:
        Full sequence (B, P + N, C).
    """
    if slow is None:
        return tokens
    # added to all, because the copy overwrites the others: the placeholders need no index of their own
    moved = x.clone() if representative is None else x + (tokens[:, -1:] - representative)
    moved = moved.contiguous()  # which it is not where the patches come as columns of a feature map
    image = torch.arange(slow.shape[0], device=slow.device).unsqueeze(1)
    return moved.index_put_((image, slow), tokens[:, :slow.shape[1]])
