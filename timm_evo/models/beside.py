""" Class attention that is computed separately from a block

The modules of the block project its tokens a second time. This is slower than a tap (see `taps`), and is used where a
tap does not work: in TorchScript, whose threads are not visible to Python; in compiled code with checkpointing, which
must have no other effect than its result; and for attentions that do not call their norms.
"""
from typing import Any

import torch
from torch import Tensor, nn

from ..method import class_attention, published
from ..method.class_attention import Layout

__all__ = ['class_attention_beside', 'is_sharded', 'is_sharded_weight']


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values side by side (B, L, 3 * H * d) to queries and keys (B, H, L, d)."""
    qkv = qkv.view(qkv.shape[0], qkv.shape[1], 3, num_heads, qkv.shape[2] // (3 * num_heads))
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)


def _by_heads(query: Tensor, key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, L, H * d) to (B, H, L, d); in grouped-query attention, keys have fewer heads."""
    head_dim = query.shape[2] // num_heads
    query = query.view(query.shape[0], query.shape[1], num_heads, head_dim)
    key = key.view(key.shape[0], key.shape[1], key.shape[2] // head_dim, head_dim)
    return query.transpose(1, 2), key.transpose(1, 2)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are complete only while it is called, as with FSDP2."""
    return any(map(is_sharded_weight, module.parameters()))


def is_sharded_weight(weight: Any) -> bool:
    """Whether a weight is a `DTensor`, without an import of that class."""
    return isinstance(weight, Tensor) and hasattr(weight, 'device_mesh')  # a proxy of tracing has every attribute


def class_attention_beside(self: Any, index: int, x: Tensor, layout: Layout, rotation: Tensor | None) -> Tensor:
    """Class attention of a block.

    Args:
        self: A model whose `blocks` can be evolved. TorchScript compiles this function as a method of the model.
        index: Index of the block.
        x: Tokens that enter it (B, L, C).
        layout: Kinds of these tokens.
        rotation: Rotations of these tokens without the prefix, if any.

    Returns:
        Attention (B, L), see `method.published.class_attention`.
    """
    attention: Tensor | None = None
    for i, block in enumerate(self.blocks):  # TorchScript cannot index modules by a variable
        if i == index:
            if hasattr(block, 'attns'):  # ParallelThingsBlock
                for part in block.attns:
                    q, k = _split_heads(part.attn.qkv(part.norm(x)), part.attn.num_heads)
                    paid = _pay(part.attn.q_norm(q), part.attn.k_norm(k), part.attn.scale, layout)
                    attention = paid if attention is None else attention + paid
            elif hasattr(block, 'in_proj'):  # ParallelScalingBlock
                y = block.in_proj(block.in_norm(x))
                if hasattr(block, 'qkv_bias') and block.mlp_bias is not None:
                    # an older timm adds the biases in this order, though the features of the MLP come first
                    y = y + torch.cat([block.qkv_bias, block.mlp_bias])
                q, k = _split_heads(y[:, :, block.in_split[0]:], block.num_heads)
                attention = _pay(block.q_norm(q), block.k_norm(k), block.scale, layout)
            elif hasattr(block.attn, 'rotate_half'):  # EvaBlock, or EvaBlockPostNorm without a norm before attention
                y = block.norm1(x) if hasattr(block, 'gamma_1') else x
                if block.attn.qkv is None:
                    q, k = _by_heads(block.attn.q_proj(y), block.attn.k_proj(y), block.attn.num_heads)
                else:
                    qkv = block.attn.qkv(y)
                    if hasattr(block.attn, 'q_bias'):
                        if block.attn.q_bias is not None:
                            qkv = qkv + torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
                    q, k = _split_heads(qkv, block.attn.num_heads)
                attention = _pay(
                    block.attn.q_norm(q), block.attn.k_norm(k), block.attn.scale, layout, rotation,
                    block.attn.rotate_half)
            else:  # Block, or ResPostBlock without a norm before attention
                y = x if hasattr(block, 'init_values') else block.norm1(x)
                q, k = _split_heads(block.attn.qkv(y), block.attn.num_heads)
                attention = _pay(block.attn.q_norm(q), block.attn.k_norm(k), block.attn.scale, layout)
    assert attention is not None
    return attention


def _pay(
        query: Tensor,
        key: Tensor,
        scale: float,
        layout: Layout,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Class attention (B, L) from queries and keys (B, H, L, d)."""
    query = class_attention.class_query(query, layout, rotation, rotate_half)
    return published.class_attention(query, key, scale, layout.num_prefix_tokens, rotation, rotate_half)
