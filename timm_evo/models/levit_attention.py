""" timm's LeViT attentions, for selected tokens

They update the scores with their attention matrix, and use the attention biases of the selected tokens.
"""
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import trunc_normal_
from timm.models.levit import Attention, AttentionDownsample
from torch import Tensor, nn

from ..kernels.choice import can_run, launch
from ..method import class_attention, published
from ..method.sequences import is_one_image

__all__ = ['EvoAttention', 'EvoAttentionDownsample', 'ScoringAttention', 'gather_biases']

if TYPE_CHECKING:
    class _DenseAttention(nn.Module):
        """Common parts of timm's two attentions, which follow `ScoringAttention` in the bases."""
        attention_biases: Any
        attention_bias_idxs: Any

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def reset_parameters(self) -> None: ...
        def init_non_persistent_buffers(self) -> None: ...
else:
    _DenseAttention = nn.Module


@torch.fx.wrap
def _split_heads(x: Tensor, num_heads: int, dims: list[int]) -> list[Tensor]:
    """Split projections (B, L, H * sum(dims)) into one tensor (H * B, L, d) for each d of `dims`, with one copy."""
    batch_size, length, _ = x.shape
    if is_one_image(batch_size):
        heads = x.view(length, num_heads, sum(dims)).transpose(0, 1)
    else:
        heads = x.view(batch_size, length, num_heads, sum(dims)).permute(2, 0, 1, 3)
        heads = heads.reshape(num_heads * batch_size, length, sum(dims))
    return heads.split_with_sizes(dims, 2)  # pyright: ignore[reportReturnType]  # a list to TorchScript


@torch.fx.wrap
def _attend(query: Tensor, key: Tensor, scale: float, biases: Tensor | None) -> Tensor:
    """Attention matrix.

    Args:
        query: Queries (H * B, Q, d).
        key: Keys (H * B, L, d).
        scale: Factor on the products.
        biases: Biases (H * B, Q, L), or (H, Q, L) for all images.

    Returns:
        Attention (H * B, Q, L).
    """
    key = key.transpose(1, 2)
    if biases is None:
        return (query * scale).bmm(key).softmax(dim=-1)
    num_shared = query.shape[0] // biases.shape[0]  # images that share the biases
    if is_one_image(num_shared):
        return torch.baddbmm(biases, query, key, alpha=scale).softmax(dim=-1)
    query = (query * scale).view(biases.shape[0], num_shared, query.shape[1], query.shape[2])
    logits = query.matmul(key.view(biases.shape[0], num_shared, key.shape[1], key.shape[2]))
    logits.add_(biases.unsqueeze(1))  # in place, because a new matrix takes more time
    return logits.softmax(dim=-1).flatten(0, 1)


@torch.fx.wrap
def _gather_values(attention: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Sum values (H * B, L, d) by attention (H * B, Q, L), and concatenate the heads to (B, Q, H * d)."""
    if attention.dtype != value.dtype:
        attention = attention.to(value.dtype)
    gathered = attention.bmm(value)
    num_matrices, num_queries, dim = gathered.shape
    batch_size = num_matrices // num_heads
    if is_one_image(batch_size):
        return gathered.transpose(0, 1).reshape(1, num_queries, num_heads * dim)
    gathered = gathered.view(num_heads, batch_size, num_queries, dim)
    return gathered.permute(1, 2, 0, 3).reshape(batch_size, num_queries, num_heads * dim)


@torch.fx.wrap
def _score(
        scores: Tensor | None,
        attention: Tensor,
        num_heads: int,
        class_token: bool,
        tradeoff: float,
        learned: Tensor | None,
) -> Tensor:
    """Update the scores of the tokens present with an attention matrix, see `published.global_class_attention`.

    Args:
        scores: Scores before the update (B, P + K), without a representative token; None if there are none yet.
        attention: Attention (H * B, Q, L) of Q = L tokens, or of those that remain after downsampling.
        num_heads: Number of heads H.
        class_token: Whether the first token is the class token.
        tradeoff: alpha.
        learned: Learned trade-off (1,), if any.

    Returns:
        Scores (B, P + K).
    """
    num_tokens = attention.shape[2] if scores is None else scores.shape[1]
    paid = class_attention.mean_attention(attention, num_heads, num_tokens, class_token)
    return published.global_class_attention(scores, paid, tradeoff, learned)


@torch.fx.wrap
def gather_biases(
        tables: list[Tensor],
        index: Tensor,
        slow: Tensor,
        has_representative: bool,
) -> list[Tensor]:
    """Attention biases of the selected tokens, for all blocks of the segment at once, which takes fewer calls.

    Args:
        tables: Biases by relative position, one table (H, R) per block.
        index: Entry of the tables for each query and key of the whole grid (N, N).
        slow: Positions of the slow tokens (B, K). A model with biases has no prefix tokens.
        has_representative: Whether a representative token comes last. It has no position, so its biases are zero.

    Returns:
        Biases of each block (H * B, K, K), or (H * B, K + 1, K + 1) with a representative token.
    """
    entries = torch.add(slow.unsqueeze(1), slow.unsqueeze(2), alpha=index.shape[0])
    positions = index.view(-1).index_select(0, entries.view(-1))
    biases = torch.cat(tables).index_select(1, positions)
    biases = biases.view(len(tables), -1, slow.shape[1], slow.shape[1])
    if has_representative:
        biases = torch.constant_pad_nd(biases, [0, 1, 0, 1])
    return biases.unbind(0)  # pyright: ignore[reportReturnType]  # a list to TorchScript


class ScoringAttention(_DenseAttention):
    """Additions to both of timm's attentions: the trade-off alpha, and attention without biases.

    Attributes:
        scored: Whether a later selection reads the scores of this attention.
        tradeoff: alpha, the share of this attention in the scores, or the initial value of a learned one.
        is_tradeoff_held: Whether a learned alpha keeps its initial value for now.
        class_token: Whether the first token is the class token. Then there are no biases.
        has_kernels: If this attribute exists, kernels may replace the tensor steps. `scripting` hides it.
    """
    has_kernels = True

    def init_evolution(self, tradeoff: float, learn_tradeoff: bool, class_token: bool) -> None:
        """Set up evolution in a dense attention.

        Args:
            tradeoff: alpha.
            learn_tradeoff: Whether alpha is the sigmoid of an entry in the state dict.
            class_token: Whether the first token is the class token.
        """
        self.scored = self.is_tradeoff_held = False
        self.tradeoff = tradeoff
        self.class_token = class_token
        weight = self.attention_biases
        self.register_buffer(
            'learn_tradeoff', torch.full_like(weight[0, :1], tradeoff).logit() if learn_tradeoff else None)
        if class_token:
            self.attention_biases = self.attention_bias_idxs = None

    def leave_evolution(self) -> None:
        """Remove what `init_evolution` has added. The class is not changed."""
        del self.scored, self.is_tradeoff_held, self.tradeoff, self.class_token, self.learn_tradeoff
        self.attention_bias_cache = {}

    def train_tradeoff(self, trained: bool) -> None:
        """Make a learned trade-off a parameter if it is trained, otherwise a buffer. The state dict is the same.

        It is trained if its scores are weights in a representative token, because only then it gets a gradient.
        """
        if self.learn_tradeoff is None or isinstance(self.learn_tradeoff, nn.Parameter) == trained:
            return
        value = self.learn_tradeoff.detach()
        del self.learn_tradeoff
        if trained:
            self.learn_tradeoff = nn.Parameter(value)
        else:
            self.register_buffer('learn_tradeoff', value)

    def learned(self) -> Tensor | None:
        """Learned trade-off (1,) before its sigmoid, if any.

        While it is held, it has its initial value and a gradient of zero, because `DistributedDataParallel` fails for a
        parameter without a gradient.
        """
        learned = self.learn_tradeoff
        if learned is None or not self.is_tradeoff_held:
            return learned
        return learned * 0 + math.log(self.tradeoff / (1 - self.tradeoff))

    def _can_launch(self, query: Tensor, scores: Tensor | None) -> bool:
        """Whether kernels may compute with a projection, the scores, and the weights of the attention."""
        if not can_run(query) or scores is not None and not can_run(scores):
            return False
        weights = [weight for weight in (self.attention_biases, self.learn_tradeoff) if weight is not None]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return False
        return all(can_run(weight.detach()) for weight in weights)  # detached, because a parameter is no plain tensor

    def _launch(
            self,
            query: Tensor,
            key_value: Tensor,
            scores: Tensor | None,
            positions: Tensor | None,
            grid_width: int = 0,
            stride: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention with one kernel, and update the scores with another.

        Args:
            query: Projection of the tokens with queries (B, Q, H * w), see `kernels.levit`.
            key_value: Projection of the tokens present (B, L, H * w).
            scores: Scores of these tokens without a representative one (B, P + K), if any.
            positions: Positions of the selected tokens (B, K); None without a selection.
            grid_width: Width of the grid that is downsampled.
            stride: Step between the rows and columns that remain; 1 without downsampling.

        Returns:
            Output of the attention (B, Q, H * val_dim).
            Scores (B, P + K), or those of the remaining tokens (B, P + M).
        """
        num_scored = num_paying = 0
        if self.scored:
            num_scored = key_value.shape[1] if scores is None else scores.shape[1]
            num_paying = 1 if self.class_token else num_scored if stride == 1 else query.shape[1]
        out, paid = launch(
            'levit_attention', query, key_value, self.num_heads, self.key_dim, self.val_dim, self.scale,
            self.attention_biases, self.attention_bias_idxs, positions, num_scored, num_paying)
        if self.scored:
            scores = launch(
                'levit_scores', paid, scores, num_paying * self.num_heads, self.tradeoff, self.learned(),
                1 if self.class_token else 0, grid_width, stride)
        return out, scores

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, as timm's, and clear cached biases in both modes, because an averaged copy is never trained."""
        self.attention_bias_cache = {}
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.attention_bias_cache = {}  # an older timm keeps the cache when the model moves to another device
        return super()._apply(fn, *args, **kwargs)

    def reset_parameters(self) -> None:
        """Initialize parameters and buffers, as timm's."""
        if self.attention_biases is not None:
            super().reset_parameters()

    def init_non_persistent_buffers(self) -> None:
        """Initialize non-persistent buffers, as timm's."""
        if self.attention_biases is not None:
            super().init_non_persistent_buffers()


class EvoAttention(ScoringAttention, Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """timm's LeViT `Attention`, for selected tokens."""
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            x: Tensor,
            scores: Tensor | None,
            biases: Tensor | None,
            positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the attention and update the scores.

        Args:
            x: Tokens present (B, L, C): the full sequence, or the selected tokens.
            scores: Scores of these tokens without a representative one (B, P + K), if any.
            biases: Biases of the selected tokens (H * B, L, L); None without a selection, or without biases.
            positions: Positions of the selected tokens (B, K), to look up the biases. It is given instead of `biases`.

        Returns:
            Output of the attention (B, L, C).
            Scores (B, P + K).
        """
        qkv = self.qkv(x)
        if hasattr(self, 'has_kernels'):
            if biases is None and self._can_launch(qkv, scores):
                out, scores = self._launch(qkv, qkv, scores, positions)
                return self.proj(out), scores
            if biases is None and positions is not None:
                has_representative = qkv.shape[1] > positions.shape[1]
                biases, = gather_biases(
                    [self.attention_biases], self.attention_bias_idxs, positions, has_representative)
        q, k, v = _split_heads(qkv, self.num_heads, [self.key_dim, self.key_dim, self.val_dim])
        if biases is None and self.attention_biases is not None:
            biases = self.get_attention_biases(x.device)
        attn = _attend(q, k, self.scale, biases)
        if self.scored:
            scores = _score(scores, attn, self.num_heads, self.class_token, self.tradeoff, self.learned())
        return self.proj(_gather_values(attn, v, self.num_heads)), scores


class EvoAttentionDownsample(  # pyright: ignore[reportIncompatibleMethodOverride]
        ScoringAttention, AttentionDownsample):
    """timm's LeViT `AttentionDownsample`, which also takes a class token and downsamples the scores."""
    if TYPE_CHECKING:
        q: Any
        resolution: tuple[int, int]

    def init_evolution(self, tradeoff: float, learn_tradeoff: bool, class_token: bool) -> None:
        """Set up evolution in a dense attention, see `ScoringAttention`."""
        num_patches = self.attention_bias_idxs.shape[1]
        super().init_evolution(tradeoff, learn_tradeoff, class_token)
        self.pos_embed = None
        if class_token:
            weight = next(self.kv.parameters())
            self.pos_embed = nn.Parameter(weight.new_empty(1, 1 + num_patches, weight.shape[1]))
            trunc_normal_(self.pos_embed, std=.02)

    def leave_evolution(self) -> None:
        """Remove what `init_evolution` has added. The class is not changed."""
        super().leave_evolution()
        del self.pos_embed

    def downsample(self, x: Tensor) -> Tensor:
        """Keep the prefix and every second row and column: (B, P + N, C) to (B, P + M, C)."""
        if not self.class_token:
            return self.q.down(x)
        return torch.cat([x[:, :1], self.q.down(x[:, 1:])], dim=1)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of the remaining tokens to all tokens, and update the scores.

        Args:
            x: Full sequence (B, P + N, C).
            scores: Scores (B, P + N), if any.

        Returns:
            Full sequence of the smaller grid (B, P + M, C).
            Its scores (B, P + M).
        """
        if self.pos_embed is not None:
            x = x + self.pos_embed
        kv = self.kv(x)
        q = self.q.ln(self.downsample(x))
        if hasattr(self, 'has_kernels'):
            if self._can_launch(kv, scores):
                out, scores = self._launch(q, kv, scores, None, self.resolution[1], self.stride)
                return self.proj(out), scores
        k, v = _split_heads(kv, self.num_heads, [self.key_dim, self.val_dim])
        q, = _split_heads(q, self.num_heads, [self.key_dim])
        biases = None if self.attention_biases is None else self.get_attention_biases(x.device)
        attn = _attend(q, k, self.scale, biases)
        if self.scored:
            assert scores is not None
            evolved = _score(scores, attn, self.num_heads, self.class_token, self.tradeoff, self.learned())
            scores = class_attention.downsampled_class_attention(
                scores, evolved, self.resolution, self.stride, 1 if self.class_token else 0)
        return self.proj(_gather_values(attn, v, self.num_heads)), scores
