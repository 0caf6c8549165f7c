""" The last block, computed only for the tokens that the head reads

A head on the class token reads no other token after the last block. In this block, the other tokens are needed for keys
and values, but need no update: attention has one query, and projection and MLP have one token. The projections of keys
and values can then be applied to the query and to the weighted sum, instead of to every token. This is not possible for
keys that are rotated or normalised, as in timm's `Eva`.

The short block is used only where the difference is not visible: no module of the block is replaced, and no hook or
overridden method would get fewer tokens than with the whole block.
"""
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ..method.class_attention import class_products
from ..torch_private import has_global_hooks
from .plain import has_plain_weights, is_plain, is_watched

__all__ = ['can_be_short', 'forward_first']


def can_be_short(model: Any) -> bool:
    """Whether `forward_first` may replace the last block of a model without a visible difference."""
    block = model.blocks[-1]
    return (
        (_is_known_block(block) or _is_known_eva_block(block))
        and not has_global_hooks()
        and not is_watched(model.blocks)
        and is_plain(model.norm)
        and is_plain(block)
        and not _has_own_methods(model)
    )


def _is_known_block(block: Any) -> bool:
    """Whether it is a `Block` that `forward_first` can compute."""
    if not (type(block) is Block and type(block.attn) is Attention):
        return False
    attn = block.attn
    return (
        _is_plain_projection(attn.qkv)
        and isinstance(attn.q_norm, nn.Identity)
        and isinstance(attn.k_norm, nn.Identity)
        and isinstance(getattr(attn, 'norm', None), (nn.Identity, type(None)))
        and getattr(attn, 'gate', None) is None
    )


def _is_known_eva_block(block: Any) -> bool:
    """Whether it is an `EvaBlock` that `forward_first` can compute."""
    if not (type(block) is EvaBlock and type(block.attn) in (EvaAttention, AttentionRope)):
        return False
    attn = block.attn
    projections = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]
    return all(_is_plain_projection(projection) for projection in projections)


def _is_plain_projection(projection: Any) -> bool:
    """Whether it is a linear layer with plain weights."""
    return type(projection) is nn.Linear and has_plain_weights(projection)


def _has_own_methods(model: nn.Module) -> bool:
    """Whether the model overrides a method of the class whose `_num_read` it has."""
    known_cls = next(cls for cls in type(model).__mro__ if '_num_read' in vars(cls))
    return any(
        name in vars(model) or getattr(type(model), name) is not getattr(known_cls, name)
        for name in ('forward_features', 'forward_head', 'pool')
    )


def forward_first(
        block: Any,
        x: Tensor,
        num_tokens: int,
        rotation: Tensor | None = None,
        attn_mask: Tensor | None = None,
) -> Tensor:
    """Output of timm's `Block.forward` or `EvaBlock.forward` for the first tokens.

    Args:
        block: A block.
        x: Tokens present (B, L, C).
        num_tokens: Number of tokens in the output; must be 1 for an `EvaBlock`.
        rotation: Rotations of the tokens without the prefix, if any.
        attn_mask: Mask that attention adds to its logits (B, 1, 1, L), if any.

    Returns:
        The first tokens after the block (B, num_tokens, C).
    """
    attn: Any = block.attn
    y = block.norm1(x)
    if isinstance(block, EvaBlock):
        x_attn = _eva_attention_of_first(attn, y, rotation, attn_mask)
        x = x[:, :1] + block.drop_path1(x_attn if block.gamma_1 is None else block.gamma_1 * x_attn)
        x_mlp = block.mlp(block.norm2(x))
        return x + block.drop_path2(x_mlp if block.gamma_2 is None else block.gamma_2 * x_mlp)
    attention = folded_attention(
        y[:, :num_tokens], y, attn.qkv.weight, attn.qkv.bias, attn.num_heads, attn.scale, attn_mask)
    bias = None if attn.qkv.bias is None else attn.qkv.bias.chunk(3)[2]
    values = folded_values(attn.attn_drop(attention), y, attn.qkv.weight.chunk(3)[2], bias, attn.head_dim)
    x = x[:, :num_tokens] + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(values))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def folded_attention(
        query_tokens: Tensor,
        tokens: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        num_heads: int,
        scale: float,
        attn_mask: Tensor | None = None,
) -> Tensor:
    """Attention of a few tokens to all tokens, without computing keys.

    The key projection can be applied to the few queries instead of to every token:
    q . (W_k x + b_k) = (W_k^T q) . x + q . b_k. The last term is equal for all tokens, so the softmax does not depend
    on it. This takes H * T * L * C multiplications instead of L * C * C.

    Args:
        query_tokens: Normalised tokens with queries (B, T, C).
        tokens: Normalised tokens present (B, L, C).
        qkv_weight: Stacked query, key and value projections (3 * H * d, C).
        qkv_bias: Their bias (3 * H * d,), if any.
        num_heads: Number of heads H.
        scale: Factor on the products.
        attn_mask: Mask that is added to the products (B, 1, 1, L), if any.

    Returns:
        Attention (B, H, T, L) in float32 or wider; every row sums to 1.
    """
    batch_size, num_queries = query_tokens.shape[:2]
    head_dim = qkv_weight.shape[0] // (3 * num_heads)
    query_weight, key_weight, _ = qkv_weight.chunk(3)
    query_bias = None if qkv_bias is None else qkv_bias.chunk(3)[0]
    query = nn.functional.linear(query_tokens.flatten(0, 1), query_weight, query_bias) * scale
    query = query.view(batch_size * num_queries, num_heads, head_dim)
    query = query.transpose(0, 1).bmm(key_weight.unflatten(0, (num_heads, head_dim)))  # (H, B * T, C)
    query = query.view(num_heads, batch_size, num_queries, tokens.shape[2])
    query = query.transpose(0, 1).flatten(1, 2)  # (B, H * T, C)
    logits = query.bmm(tokens.transpose(1, 2))
    if logits.dtype != torch.float64:
        logits = logits.float()
    if attn_mask is not None:
        logits = logits + attn_mask.squeeze(1)
    return logits.softmax(dim=-1).view(batch_size, num_heads, num_queries, tokens.shape[1])


def folded_values(
        attention: Tensor,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head_dim: int,
) -> Tensor:
    """Values of a few tokens after attention, without computing the values of all tokens.

    As in `folded_attention`, the projection is applied to the few results: sum_j a_j (W_v x_j + b_v) is
    W_v (sum_j a_j x_j) + b_v sum_j a_j, where the last sum is 1 unless attention was dropped.

    Args:
        attention: Attention of few tokens to all (B, H, T, L).
        tokens: Normalised tokens present (B, L, C).
        weight: Value projection (H * d, C); with fewer heads in grouped-query attention.
        bias: Its bias, if any.
        head_dim: Channels of a head d.

    Returns:
        Values of all heads, concatenated (B, T, H * d), as the output projection takes them.
    """
    batch_size, num_heads, num_queries, _ = attention.shape
    gathered = attention.flatten(1, 2).to(tokens.dtype).bmm(tokens)
    gathered = gathered.view(batch_size, num_heads, num_queries, tokens.shape[2])
    weight = weight.unflatten(0, (-1, head_dim))  # (H, d, C)
    num_shared = num_heads // weight.shape[0]  # heads that share values
    if num_shared > 1:
        weight = weight.repeat_interleave(num_shared, dim=0)
    values = torch.einsum('bhtc,hdc->bthd', gathered, weight)
    if bias is not None:
        bias = bias.view(-1, head_dim)
        if num_shared > 1:
            bias = bias.repeat_interleave(num_shared, dim=0)
        values = values + attention.sum(dim=3).transpose(1, 2).unsqueeze(3).to(values.dtype) * bias
    return values.flatten(2)


def _eva_projections(attn: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the projections to queries, keys and values of an attention of timm's `Eva`."""
    if attn.qkv is None:
        return [(projection.weight, projection.bias) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)]
    if isinstance(attn, EvaAttention):
        biases = attn.q_bias, attn.k_bias, attn.v_bias
    else:
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    return list(zip(attn.qkv.weight.chunk(3), biases, strict=True))


def _eva_attention_of_first(attn: Any, y: Tensor, rotation: Tensor | None, attn_mask: Tensor | None) -> Tensor:
    """Output of an attention of timm's `Eva` for the first token (B, 1, C), from normalised tokens (B, L, C)."""
    (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias) = _eva_projections(attn)
    head_dim = q_weight.shape[0] // attn.num_heads
    query, key = (
        projected.unflatten(2, (-1, head_dim)).transpose(1, 2)
        for projected in (nn.functional.linear(y[:, :1], q_weight, q_bias), nn.functional.linear(y, k_weight, k_bias))
    )
    query, key = attn.q_norm(query), attn.k_norm(key)
    products = class_products(
        query[:, :, 0], key, attn.scale, attn.num_prefix_tokens, rotation, attn.rotate_half)
    if attn_mask is not None:
        products = products + attn_mask.squeeze(1)
    attention = attn.attn_drop(products.softmax(dim=-1)).unsqueeze(2)
    values = attn.norm(folded_values(attention, y, v_weight, v_bias, head_dim))
    if getattr(attn, 'gate', None) is not None:
        values = values * attn.gate(y[:, :1]).sigmoid()
    return attn.proj_drop(attn.proj(values))
