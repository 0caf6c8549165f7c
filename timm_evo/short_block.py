""" The last block, for no more tokens than the head reads

A head on the class token reads nothing else of the last block, so every other token is looked at there, but need not be
updated. What is left is attention with one query, and a projection and an MLP on one token.
"""
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from . import evolution


def can_be_short(block: nn.Module) -> bool:
    """Whether `forward_first` computes what the block does.

    Not for other blocks and attentions, normalised or gated ones, or a projection that was replaced, as by low-rank
    adapters. Nor where hooks are on the block or within: whoever placed them, expects every module to be called.
    """
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.attn.qkv) is nn.Linear
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.attn.k_norm, nn.Identity)
        and isinstance(getattr(block.attn, 'norm', None), (nn.Identity, type(None)))
        and getattr(block.attn, 'gate', None) is None
        and not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    )


def forward_first(block: Block, x: Tensor, num_tokens: int) -> Tensor:
    """What timm's `Block.forward` returns for the first tokens: (B, L, C) to (B, num_tokens, C)."""
    attn = block.attn
    y = block.norm1(x)
    attention = evolution.folded_attention(
        y[:, :num_tokens], y, attn.qkv.weight, attn.qkv.bias, attn.num_heads, attn.scale)
    values = evolution.folded_values(attn.attn_drop(attention), y, attn.qkv.weight, attn.qkv.bias)
    x = x[:, :num_tokens] + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(values))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
