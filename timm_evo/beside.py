""" Class attention computed beside a block

Its tokens are projected once more, by its own modules. That takes longer than a tap and is for where none can be:
TorchScript, whose threads Python knows nothing of; checkpointing in compiled code, which may leave nothing behind but
its result; attentions that do not call their norms.
"""
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import evolution

__all__ = ['ClassAttentionBeside', 'is_sharded', 'is_sharded_weight']


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values side by side (B, L, 3 * H * d) to queries and keys (B, H, L, d)."""
    qkv = qkv.view(qkv.shape[0], qkv.shape[1], 3, num_heads, qkv.shape[2] // (3 * num_heads))
    return qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)


def _by_heads(query: Tensor, key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, L, H * d) to (B, H, L, d); of fewer heads for the keys in grouped-query attention."""
    head_dim = query.shape[2] // num_heads
    query = query.view(query.shape[0], query.shape[1], num_heads, head_dim)
    key = key.view(key.shape[0], key.shape[1], key.shape[2] // head_dim, head_dim)
    return query.transpose(1, 2), key.transpose(1, 2)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are whole only while it is called, as with FSDP2."""
    return any(map(is_sharded_weight, module.parameters()))


def is_sharded_weight(weight: Any) -> bool:
    """Whether a weight is a `DTensor`, whose module is not imported to know it."""
    return isinstance(weight, Tensor) and hasattr(weight, 'device_mesh')  # a proxy of tracing has any attribute


class ClassAttentionBeside:
    """For a model with `blocks` of the kinds that can be evolved, as TorchScript takes it."""
    if TYPE_CHECKING:  # what the model has
        blocks: Any
        has_class_token: bool
        num_prefix_tokens: int

    def _class_attention_beside(self, index: int, x: Tensor, slow: Tensor | None, rotation: Tensor | None) -> Tensor:
        """Class attention of a block.

        Args:
            index: Which block it is.
            x: Tokens that enter it (B, L, C).
            slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
            rotation: Rotations of the tokens present but the prefix, if any.

        Returns:
            Attention (B, L), see `evolution.class_attention`.
        """
        attention: Tensor | None = None
        for i, block in enumerate(self.blocks):  # TorchScript can't pick a module by its number
            if i == index:
                if hasattr(block, 'attns'):  # ParallelThingsBlock
                    for part in block.attns:
                        q, k = _split_heads(part.attn.qkv(part.norm(x)), part.attn.num_heads)
                        paid = self._pay(part.attn.q_norm(q), part.attn.k_norm(k), part.attn.scale, slow)
                        attention = paid if attention is None else attention + paid
                elif hasattr(block, 'in_proj'):  # ParallelScalingBlock
                    y = block.in_proj(block.in_norm(x))
                    if hasattr(block, 'qkv_bias') and block.mlp_bias is not None:
                        # an older timm adds the bias of its MLP to the last of all features, whatever they are
                        y = y + torch.cat([block.qkv_bias, block.mlp_bias])
                    q, k = _split_heads(y[:, :, block.in_split[0]:], block.num_heads)
                    attention = self._pay(block.q_norm(q), block.k_norm(k), block.scale, slow)
                elif hasattr(block.attn, 'rotate_half'):  # EvaBlock, and EvaBlockPostNorm, which has no norm before it
                    y = block.norm1(x) if hasattr(block, 'gamma_1') else x
                    if block.attn.qkv is None:
                        q, k = _by_heads(block.attn.q_proj(y), block.attn.k_proj(y), block.attn.num_heads)
                    else:
                        qkv = block.attn.qkv(y)
                        if hasattr(block.attn, 'q_bias'):
                            if block.attn.q_bias is not None:
                                qkv = qkv + torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
                        q, k = _split_heads(qkv, block.attn.num_heads)
                    attention = self._pay(
                        block.attn.q_norm(q), block.attn.k_norm(k), block.attn.scale, slow, rotation,
                        block.attn.rotate_half)
                else:  # ResPostBlock has no norm before the attention, Block has
                    y = x if hasattr(block, 'init_values') else block.norm1(x)
                    q, k = _split_heads(block.attn.qkv(y), block.attn.num_heads)
                    attention = self._pay(block.attn.q_norm(q), block.attn.k_norm(k), block.attn.scale, slow)
        assert attention is not None
        return attention

    def _pay(
            self,
            query: Tensor,
            key: Tensor,
            scale: float,
            slow: Tensor | None,
            rotation: Tensor | None = None,
            rotate_half: bool = False,
    ) -> Tensor:
        """Class attention (B, L) by queries and keys (B, H, L, d)."""
        query = evolution.class_query(
            query, self.has_class_token, self.num_prefix_tokens, slow, rotation, rotate_half)
        return evolution.class_attention(query, key, scale, self.num_prefix_tokens, rotation, rotate_half)
