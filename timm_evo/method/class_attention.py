""" Class attention, from the queries and keys of timm's attentions

Rotations are timm's rotary position embeddings of all tokens but the prefix, as sines and then cosines: (N, 2d), one
per head (H, N, 2d), or one per image (B, 1 or H, N, 2d). Other shapes are those of `published`.
"""
from typing import NamedTuple

import torch
import torch.fx
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from .sequences import patches


class Layout(NamedTuple):
    """Kinds of the tokens that enter a block. Their order is prefix, patches, and maybe a representative token.

    Attributes:
        has_class_token: Whether the first token is the class token.
        num_prefix_tokens: Number of prefix tokens P.
        slow: Positions of prefix and slow tokens in the whole sequence (B, P + K); None if all enter the block.
    """
    has_class_token: bool
    num_prefix_tokens: int
    slow: Tensor | None


@torch.fx.wrap
def class_query(query: Tensor, layout: Layout, rotation: Tensor | None = None, rotate_half: bool = False) -> Tensor:
    """Query of the class token; without a class token, the mean query of the patch tokens.

    Args:
        query: Queries of all tokens present, not yet rotated (B, H, L, d).
        layout: Kinds of these tokens.
        rotation: Rotations of the tokens present without the prefix, if they are rotated.
        rotate_half: Whether a rotation pairs channels of the two halves, or else neighbouring channels.

    Returns:
        One query per head, as the attention uses it (B, H, d).
    """
    if layout.has_class_token:
        return query[:, :, 0]
    slow = layout.slow
    query = query[:, :, layout.num_prefix_tokens:query.shape[2] if slow is None else slow.shape[1]]
    if rotation is not None:
        query = apply_rot_embed_cat(query, rotation[..., :query.shape[2], :], half=rotate_half)
    return query.mean(dim=2)


def class_products(
        query: Tensor,
        key: Tensor,
        scale: float,
        num_prefix_tokens: int = 0,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Products of the query of the class token with the keys of all tokens.

    Half precision is converted to float32, because large products would overflow in it.

    Args:
        query: Query of the class token, one per head (B, H, d).
        key: Keys of all tokens present, not yet rotated (B, H, L, d); with fewer heads in grouped-query attention.
        scale: Factor on the products, 1 / sqrt(d) of the attention.
        num_prefix_tokens: Number of prefix tokens P, which are never rotated.
        rotation: Rotations of the tokens present without the prefix, if they are rotated.
        rotate_half: Whether a rotation pairs channels of the two halves, or else neighbouring channels.

    Returns:
        Products (B, H, L) in float32 or wider.
    """
    query = (query if query.dtype == torch.float64 else query.float()).unsqueeze(2) * scale
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if rotation is None:
        return (key * query).sum(dim=3)  # matmul copies the keys, which takes three times as long
    # rotating the query back by the position of each token takes fewer steps than rotating the keys
    sin, cos = rotation.chunk(2, dim=-1)
    turned = apply_rot_embed_cat(query, torch.cat([-sin, cos], dim=-1), half=rotate_half)
    return torch.cat([
        (key[:, :, :num_prefix_tokens] * query).sum(dim=3),
        (key[:, :, num_prefix_tokens:] * turned).sum(dim=3),
    ], dim=2)


@torch.fx.wrap
def gather_rotations(rotation: Tensor, positions: Tensor, num_prefix_tokens: int, representative: bool) -> Tensor:
    """Rotations of the tokens that go through the blocks.

    A token keeps the rotation of its position. The representative token has no position and is not rotated.

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


@torch.fx.wrap
def mean_attention(attention: Tensor, num_heads: int, num_tokens: int, class_token: bool) -> Tensor:
    """Class attention from an attention matrix, averaged over the heads.

    Without a class token it is the mean attention of the patch tokens, because the head reads the mean of these tokens.
    Half precision is converted to float32.

    Args:
        attention: Attention (H * B, T, L) of all tokens present, or of those that remain after downsampling.
        num_heads: Number of heads H.
        num_tokens: Number of tokens K without a representative token, which is the last.
        class_token: Whether the first token is the class token.

    Returns:
        Attention (B, K).
    """
    dtype = torch.float64 if attention.dtype == torch.float64 else torch.float32
    if attention.shape[2] > num_tokens:  # there is a representative token, the last in rows and columns
        attention = attention[:, :num_tokens, :num_tokens]
    num_queries = 1 if class_token else attention.shape[1]
    # one dimension at a time, because both at once take eight times as long on a CPU
    paid = attention[:, 0] if class_token else attention.sum(dim=1, dtype=dtype)
    paid = paid.view(num_heads, paid.shape[0] // num_heads, num_tokens).sum(dim=0, dtype=dtype)
    return paid / (num_queries * num_heads)


@torch.fx.wrap
def downsampled_class_attention(
        scores: Tensor,
        evolved: Tensor,
        grid_size: tuple[int, int],
        stride: int,
        num_prefix_tokens: int,
) -> Tensor:
    """Scores of the tokens that remain after an attention has downsampled the grid.

    As in the authors' LeViT, the remaining patch tokens get the sum that all patch tokens had, so that new attention
    keeps its weight relative to the old.

    Args:
        scores: Scores before that attention (B, P + N).
        evolved: Scores updated with that attention (B, P + N).
        grid_size: Height and width of the grid of the N patch tokens.
        stride: Step between the rows and columns that remain.
        num_prefix_tokens: Number of prefix tokens P, which all remain.

    Returns:
        Scores (B, P + M).
    """
    grid = patches(evolved, num_prefix_tokens).reshape(-1, grid_size[0], grid_size[1])
    left = grid[:, ::stride, ::stride].flatten(1)
    rescale = patches(scores, num_prefix_tokens).sum(dim=1, keepdim=True) / left.sum(dim=1, keepdim=True)
    if num_prefix_tokens > 0:
        left = torch.cat([evolved[:, :num_prefix_tokens], left], dim=1)
    return left * rescale
