""" LeViT with token evolution

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390, over timm's
LeViT. Because no token is dropped, the grid is whole wherever the pyramid halves it.

timm's modules are built by timm and then change their class: an attention has to evolve the scores by its matrix, and
to find the biases of the tokens it is given. Weights and all other modules stay as they are.
"""
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import to_2tuple, trunc_normal_
from timm.layers.trace_utils import _assert
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.levit import (
    Attention,
    AttentionDownsample,
    Levit,
    LevitBlock,
    LevitDistilled,
    LevitDownsample,
    LevitStage,
    NormLinear,
)
from torch import Tensor, nn

from . import evolution
from .arguments import split_arguments
from .evolved_model import Evolved, architecture, attribute_names, change_class, combined_class
from .schedule import (
    Schedule,
    check_flag,
    check_layerwise_updates,
    check_slow_tokens,
    cut_schedule,
    make_pyramid_schedule,
)

__all__ = ['EvoLevit', 'LevitEvolution']

if TYPE_CHECKING:
    _Dense = Levit  # which stands behind `LevitEvolution` in the bases of a model

    class _DenseAttention(nn.Module):
        """What the two attentions have in common, which stand behind `_ScoringAttention`."""
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def reset_parameters(self) -> None: ...
        def init_non_persistent_buffers(self) -> None: ...
else:
    _Dense, _DenseAttention = object, nn.Module


@torch.fx.wrap
def _split_heads(x: Tensor, num_heads: int, dims: list[int]) -> list[Tensor]:
    """Projections of all heads (B, L, H * sum of dims) to one tensor (H * B, L, d) for each of `dims`, copied once."""
    batch_size, length, _ = x.shape
    if evolution.is_one_image(batch_size):
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
    if evolution.is_one_image(num_shared):
        return torch.baddbmm(biases, query, key, alpha=scale).softmax(dim=-1)
    query = (query * scale).view(biases.shape[0], num_shared, query.shape[1], query.shape[2])
    logits = query.matmul(key.view(biases.shape[0], num_shared, key.shape[1], key.shape[2]))
    logits.add_(biases.unsqueeze(1))  # in place, because another matrix takes its time
    return logits.softmax(dim=-1).flatten(0, 1)


@torch.fx.wrap
def _gather_values(attention: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Values (H * B, L, d) by attention (H * B, Q, L), all heads side by side (B, Q, H * d)."""
    if attention.dtype != value.dtype:
        attention = attention.to(value.dtype)
    gathered = attention.bmm(value)
    num_matrices, num_queries, dim = gathered.shape
    batch_size = num_matrices // num_heads
    if evolution.is_one_image(batch_size):
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
    """Scores of the tokens present evolved by an attention matrix, see `evolution.global_class_attention`.

    Args:
        scores: Scores so far (B, P + K) of all tokens but a representative one, which has none; None if there are none.
        attention: Attention (H * B, Q, L), of Q = L tokens, or of those that are left by downsampling.
        num_heads: Number of heads H.
        class_token: Whether the first token is the class token.
        tradeoff: alpha.
        learned: Learned trade-off (1,), if any.

    Returns:
        Scores (B, P + K).
    """
    num_tokens = attention.shape[2] if scores is None else scores.shape[1]
    paid = evolution.mean_attention(attention, num_heads, num_tokens, class_token)
    return evolution.global_class_attention(scores, paid, tradeoff, None, learned)


@torch.fx.wrap
def _take_scores(scores: Tensor | None, slow: Tensor | None) -> Tensor | None:
    """Scores (B, P + K) of what is at the positions of a selection; all scores without one."""
    return scores if scores is None or slow is None else scores.gather(1, slow)


@torch.fx.wrap
def _return_scores(scores: Tensor | None, present: Tensor | None, slow: Tensor | None) -> Tensor | None:
    """All scores (B, P + N), after some blocks have evolved those that `_take_scores` gave them."""
    if slow is None:
        return present
    return scores if scores is None or present is None else scores.scatter(1, slow, present)


@torch.fx.wrap
def _gather_biases(
        tables: list[Tensor],
        index: Tensor,
        slow: Tensor,
        representative: Tensor | None,
) -> list[Tensor]:
    """Attention biases of the tokens of a selection, for all blocks of its segment at once: that takes fewer calls.

    Args:
        tables: Biases by relative position, one table (H, R) per block.
        index: Entry of the tables for each query and key of the whole grid (N, N).
        slow: Positions of the slow tokens (B, K); there are no prefix tokens where there are biases.
        representative: Representative token, if any. It has no position, its biases are zero.

    Returns:
        Biases of each block (H * B, K, K), or (H * B, K + 1, K + 1) with a representative token.
    """
    entries = torch.add(slow.unsqueeze(1), slow.unsqueeze(2), alpha=index.shape[0])
    positions = index.view(-1).index_select(0, entries.view(-1))
    biases = torch.cat(tables).index_select(1, positions)
    biases = biases.view(len(tables), -1, slow.shape[1], slow.shape[1])
    if representative is not None:
        biases = torch.constant_pad_nd(biases, [0, 1, 0, 1])
    return biases.unbind(0)  # pyright: ignore[reportReturnType]  # a list to TorchScript


@torch.fx.wrap
def _take_biases(biases: list[Tensor] | None, block: int) -> Tensor | None:
    """Biases (H * B, L, L) of a block of the segment, counted from its first."""
    return None if biases is None else biases[block]


class _ScoringAttention(_DenseAttention):
    """What both attentions have beside timm's: alpha, and maybe no biases.

    Attributes:
        scored: Whether a later selection reads the scores of this attention.
        tradeoff: alpha, the share of this attention in the scores, or the initial value of a learned one.
        is_tradeoff_held: Whether alpha stays where it starts for now, though it is learned.
        class_token: Whether the first token is the class token; then there are no biases.
    """

    def init_evolution(self, tradeoff: float, learn_tradeoff: bool, class_token: bool) -> None:
        """Set up an attention that is dense so far.

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
            del self.attention_biases, self.attention_bias_idxs
            self.register_parameter('attention_biases', None)
            self.register_buffer('attention_bias_idxs', None, persistent=False)

    def leave_evolution(self) -> None:
        """Take away what `init_evolution` has set up, but the class."""
        del self.scored, self.is_tradeoff_held, self.tradeoff, self.class_token, self.learn_tradeoff
        self.attention_bias_cache = {}

    def train_tradeoff(self, trained: bool) -> None:
        """Say whether a gradient reaches a learned trade-off, because its scores weight a representative token.

        Then it is a parameter. Otherwise it is a buffer, so that the state dict is the same.
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

        One that is held is where it started, with a gradient of zero: a parameter without any would stop a
        `DistributedDataParallel`.
        """
        learned = self.learn_tradeoff
        if learned is None or not self.is_tradeoff_held:
            return learned
        return learned * 0 + math.log(self.tradeoff / (1 - self.tradeoff))

    def train(self, mode: bool = True) -> nn.Module:
        """Set training or evaluation mode, as timm's, and compute biases anew: an averaged copy is never trained."""
        self.attention_bias_cache = {}
        return super().train(mode)

    def _apply(self, fn, *args, **kwargs):
        self.attention_bias_cache = {}  # an older timm keeps it when the model moves
        return super()._apply(fn, *args, **kwargs)

    def reset_parameters(self) -> None:
        """Initialize parameters and buffers, as timm's."""
        if self.attention_biases is not None:
            super().reset_parameters()

    def init_non_persistent_buffers(self) -> None:
        """Initialize non-persistent buffers, as timm's."""
        if self.attention_biases is not None:
            super().init_non_persistent_buffers()


class EvoAttention(_ScoringAttention, Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """timm's LeViT `Attention`, over the tokens of a selection."""
    attention_bias_cache: dict[str, Tensor]  # TorchScript does not look at base classes

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            x: Tensor,
            scores: Tensor | None,
            biases: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, and evolve the scores.

        Args:
            x: Tokens present (B, L, C): the full sequence, or those of a selection.
            scores: Scores so far (B, P + K) of these tokens but a representative one, if any.
            biases: Biases of the tokens of a selection (H * B, L, L); None without a selection, or without biases.

        Returns:
            What the attention adds to the tokens (B, L, C).
            Scores (B, P + K).
        """
        q, k, v = _split_heads(self.qkv(x), self.num_heads, [self.key_dim, self.key_dim, self.val_dim])
        if biases is None and self.attention_biases is not None:
            biases = self.get_attention_biases(x.device)
        attn = _attend(q, k, self.scale, biases)
        if self.scored:
            scores = _score(scores, attn, self.num_heads, self.class_token, self.tradeoff, self.learned())
        return self.proj(_gather_values(attn, v, self.num_heads)), scores


class EvoAttentionDownsample(  # pyright: ignore[reportIncompatibleMethodOverride]
        _ScoringAttention, AttentionDownsample):
    """timm's LeViT `AttentionDownsample`, with a class token that goes along, and scores that are downsampled, too."""
    if TYPE_CHECKING:
        q: Any
        resolution: tuple[int, int]
    attention_bias_cache: dict[str, Tensor]  # TorchScript does not look at base classes

    def init_evolution(self, tradeoff: float, learn_tradeoff: bool, class_token: bool) -> None:
        """Set up an attention that is dense so far, see `_ScoringAttention`."""
        num_patches = self.attention_bias_idxs.shape[1]
        super().init_evolution(tradeoff, learn_tradeoff, class_token)
        self.pos_embed = None
        if class_token:
            weight = next(self.kv.parameters())
            self.pos_embed = nn.Parameter(weight.new_empty(1, 1 + num_patches, weight.shape[1]))
            trunc_normal_(self.pos_embed, std=.02)

    def leave_evolution(self) -> None:
        """Take away what `init_evolution` has set up, but the class."""
        super().leave_evolution()
        del self.pos_embed

    def downsample(self, x: Tensor) -> Tensor:
        """Keep the prefix and every second row and column: (B, P + N, C) to (B, P + M, C)."""
        if not self.class_token:
            return self.q.down(x)
        return torch.cat([x[:, :1], self.q.down(x[:, 1:])], dim=1)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend with the tokens that are left to all, and evolve the scores.

        Args:
            x: Full sequence (B, P + N, C).
            scores: Scores so far (B, P + N), if any.

        Returns:
            Full sequence of the smaller grid (B, P + M, C).
            Its scores (B, P + M).
        """
        if self.pos_embed is not None:
            x = x + self.pos_embed
        k, v = _split_heads(self.kv(x), self.num_heads, [self.key_dim, self.val_dim])
        q, = _split_heads(self.q.ln(self.downsample(x)), self.num_heads, [self.key_dim])
        biases: Tensor | None = None
        if self.attention_biases is not None:
            biases = self.get_attention_biases(x.device)
        attn = _attend(q, k, self.scale, biases)
        if self.scored:
            assert scores is not None
            evolved = _score(scores, attn, self.num_heads, self.class_token, self.tradeoff, self.learned())
            scores = evolution.downsampled_class_attention(
                scores, evolved, self.resolution, self.stride, 1 if self.class_token else 0)
        return self.proj(_gather_values(attn, v, self.num_heads)), scores


class EvoLevitBlock(LevitBlock):
    """timm's `LevitBlock` around `EvoAttention`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            x: Tensor,
            scores: Tensor | None,
            biases: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and scores after attention and MLP, see `EvoAttention.forward`."""
        y, scores = self.attn(x, scores, biases)
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(x)), scores


class EvoLevitDownsample(LevitDownsample):
    """timm's `LevitDownsample` around `EvoAttentionDownsample`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sequence and scores of the smaller grid, see `EvoAttentionDownsample.forward`."""
        x, scores = self.attn_downsample(x, scores)
        return x + self.drop_path(self.mlp(x)), scores


class EvoLevitStage(LevitStage):
    """timm's `LevitStage`, whose blocks run the slow tokens of a selection."""
    if TYPE_CHECKING:
        begins: list[bool]
        keep_ratio: list[float]
        num_prefix_tokens: int
        fast_update: bool
        blocks: Any

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Downsample, if this is not the first stage, and run the blocks.

        Args:
            x: Full sequence (B, P + N, C).
            scores: Scores so far (B, P + N), if any.

        Returns:
            Full, ordered sequence after the stage.
            Its scores.
        """
        if hasattr(self.downsample, 'attn_downsample'):
            x, scores = self.downsample(x, scores)

        tokens, present = x, scores  # what goes through the blocks, and its scores
        slow: Tensor | None = None  # positions of the slow tokens, None while every token goes through the blocks
        representative: Tensor | None = None
        biases: list[Tensor] | None = None  # of the blocks of the segment
        first = 0  # of these blocks
        for i, block in enumerate(self.blocks):
            if self.begins[i]:
                x = evolution.follow(x, tokens, slow, representative)
                scores = _return_scores(scores, present, slow)
                tokens, slow, representative = self._begin_segment(i, x, scores, self.keep_ratio[i])
                present = _take_scores(scores, slow) if block.attn.scored else None
                biases, first = self._gather_biases(i, slow, representative), i
            tokens, present = block(tokens, present, _take_biases(biases, i - first))
        return evolution.follow(x, tokens, slow, representative), _return_scores(scores, present, slow)

    def _begin_segment(
            self,
            index: int,
            x: Tensor,
            scores: Tensor | None,
            keep_ratio: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Select the tokens for the blocks from here on, see `evolution.begin_segment`; `recording` listens here."""
        return evolution.begin_segment(x, scores, keep_ratio, self.num_prefix_tokens, self.fast_update)

    def _gather_biases(self, begin: int, slow: Tensor | None, representative: Tensor | None) -> list[Tensor] | None:
        """Attention biases of the tokens of a selection for the blocks of the segment that begins with this one.

        None without a selection, or without biases.
        """
        if slow is None:
            return None
        end = begin + 1
        while end < len(self.begins) and not self.begins[end]:
            end += 1
        tables: list[Tensor] = []
        index: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if begin <= i and i < end:
                table = block.attn.attention_biases
                if table is not None:
                    tables.append(table)
            if begin == i:
                index = block.attn.attention_bias_idxs  # the same in all of them
        return None if index is None else _gather_biases(tables, index, slow, representative)


_EVOLVED: dict[type[nn.Module], type[nn.Module]] = {  # timm's class, and the one in its place
    Attention: EvoAttention,
    AttentionDownsample: EvoAttentionDownsample,
    LevitBlock: EvoLevitBlock,
    LevitDownsample: EvoLevitDownsample,
    LevitStage: EvoLevitStage,
}


def _evolved_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    return next(evolved for dense, evolved in _EVOLVED.items() if issubclass(cls, dense))


def _dense_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    return next((dense for dense, evolved in _EVOLVED.items() if issubclass(cls, evolved)), cls)


class LevitEvolution(Evolved, _Dense):
    """Token evolution for a timm `Levit`, to stand before it in the bases of a class.

    The attention that the average of the patch tokens pays gives the scores, because the head reads that average.

    Takes the arguments of the timm class and those of `init_evolution`.
    """
    WEIGHTED_ARGUMENTS = frozenset(['learn_tradeoff', 'class_token', 'class_head'])
    ABSENT_ARGUMENTS = {'stage_depth': 'each of its stages is a segment'}
    if TYPE_CHECKING:
        stages: Any
        img_size: tuple[int, int]
        cls_token: Any
        pos_embed: Any

    def __init__(self, img_size: int | tuple[int, int] = 224, **kwargs) -> None:
        evolution_args, kwargs = split_arguments(self.init_evolution, kwargs)
        super().__init__(img_size, **kwargs)
        stride = self.feature_info[0]['reduction']
        sides = to_2tuple(img_size)
        if any(size % stride for size in sides):
            raise ValueError(
                f'img_size={sides} is not allowed, height and width must be multiples of {stride}: the stages halve '
                f'a grid of {" x ".join(str(size // stride) for size in sides)}, the stem would give another.')
        self.init_evolution(**evolution_args)
        self.img_size = sides  # pyright: ignore[reportAttributeAccessIssue]  # two of them

    def init_evolution(
            self,
            keep_ratio: float | Sequence[float] = 0.5,
            start_block: int | None = None,
            selection: str = 'stage',
            tradeoff: float | Sequence[float] | None = None,
            learn_tradeoff: bool = False,
            fast_update: bool = True,
            class_token: bool = False,
            class_head: bool = False,
            layerwise_updates: int = 0,
    ) -> None:
        """Set up token evolution in a model that is dense so far.

        Args:
            keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number or one per segment. 1.0 is
                exactly the dense model.
            start_block: First block that evolves, counted through the stages; at least 1. None for 2.
            selection: 'stage', one selection per stage, or 'layer', one per block.
            tradeoff: Share alpha in [0, 1] of an attention in the scores; one number, or one per attention, those
                that downsample included. None for 0.5.
            learn_tradeoff: Learn alpha, one scalar per attention, as the authors do; `tradeoff` is where it starts.
            fast_update: Update placeholder tokens through the representative token. If False they are only preserved.
            class_token: Class token and absolute position embeddings instead of attention biases.
            class_head: Two more heads on the class token, as the authors train. Every head's logits then are the mean
                of those of the patch mean and those of the class token.
            layerwise_updates: Select in every block until this number of optimizer updates have been made, and once
                per stage from then on, see `LayerToStage`. Learned trade-offs are held until then, as the authors do.

        Raises:
            ValueError: An argument is outside what is allowed, or leaves no patch token to select.
        """
        for name, value in dict(
            learn_tradeoff=learn_tradeoff, class_token=class_token, class_head=class_head,
        ).items():
            check_flag(name, value)
        if self.use_conv:
            name = architecture(self)
            linear = name.replace('levit_conv_', 'levit_') if name.startswith('levit_conv_') else 'levit_*'
            raise ValueError(
                f'{name or "A LeViT"} cannot be evolved, its projections are convolutions (use_conv=True), which need '
                f"the whole grid. Take timm's linear LeViT, {linear}.")
        if class_head and not (class_token and self.global_pool == 'avg'):
            raise ValueError(
                "class_head=True is not allowed, it needs class_token=True and global_pool='avg', "
                f'not class_token={class_token} and global_pool={self.global_pool!r}.')
        dense = attribute_names(self)
        attentions = self._attentions()
        self._depths = [len(stage.blocks) for stage in self.stages]  # of the schedule; pruning leaves fewer stages
        self._num_patches = [attn.attention_bias_idxs.shape[1] for attn in attentions]  # that each selects from
        self.learn_tradeoff = learn_tradeoff
        arguments: dict[str, Any] = dict(
            keep_ratio=keep_ratio, start_block=start_block, selection=selection, tradeoff=tradeoff,
            fast_update=fast_update, layerwise_updates=layerwise_updates)
        schedule = self._check_evolution(**arguments)
        self.num_prefix_tokens = 1 if class_token else 0
        self.img_size = self._find_img_size()

        self.cls_token = self.pos_embed = None
        if class_token:
            weight = next(self.parameters())
            num_patches = attentions[0].attention_bias_idxs.shape[0]
            self.cls_token = nn.Parameter(weight.new_zeros(1, 1, self.embed_dim[0]))
            self.pos_embed = nn.Parameter(weight.new_empty(1, 1 + num_patches, self.embed_dim[0]))
            trunc_normal_(self.pos_embed, std=.02)
        for attn, alpha in zip(attentions, schedule.tradeoff, strict=True):
            change_class(attn, _evolved_class_of)
            attn.init_evolution(alpha, learn_tradeoff, class_token)
        self.stages.__class__ = nn.ModuleList  # no nn.Sequential, stages and blocks pass more than one tensor on
        for stage in self.stages:
            change_class(stage, _evolved_class_of)
            stage.num_prefix_tokens = self.num_prefix_tokens
            stage.blocks.__class__ = nn.ModuleList
            if not isinstance(stage.downsample, nn.Identity):
                change_class(stage.downsample, _evolved_class_of)
            for block in stage.blocks:
                change_class(block, _evolved_class_of)
        self._set_evolution(**arguments)
        self._init_class_heads(class_head)
        self._added = attribute_names(self) - dense | {'_added', 'dense_architecture'}

    def _check_evolution(
            self,
            keep_ratio: float | Sequence[float],
            start_block: int | None,
            selection: str,
            tradeoff: float | Sequence[float] | None,
            fast_update: bool,
            layerwise_updates: int,
    ) -> Schedule:
        """The schedule of these arguments; refuses them where they are outside what is allowed."""
        check_flag('fast_update', fast_update)
        check_layerwise_updates(layerwise_updates, selection)
        schedule = make_pyramid_schedule(self._depths, keep_ratio, start_block, selection, tradeoff)
        if self.learn_tradeoff and not fast_update:
            raise ValueError('learn_tradeoff=True is not allowed with fast_update=False, nothing would train it.')
        if self.learn_tradeoff and not all(0 < alpha < 1 for alpha in schedule.tradeoff):
            raise ValueError(f'tradeoff={tradeoff!r} is not allowed with learn_tradeoff=True, it must be in (0, 1).')
        check_slow_tokens(schedule.keep_ratio, self._num_patches)
        attentions = self._attentions()
        schedule = cut_schedule(schedule, len(attentions))
        if self.learn_tradeoff and self.evolution and schedule.tradeoff != [attn.tradeoff for attn in attentions]:
            raise ValueError(f'tradeoff={tradeoff!r} cannot be set, it is learned.')
        return schedule

    def _set_evolution(self, **arguments) -> None:
        schedule = self._check_evolution(**arguments)
        self.evolution = arguments
        self.fast_update = arguments['fast_update']
        for attn, alpha in zip(self._attentions(), schedule.tradeoff, strict=True):
            attn.tradeoff = alpha
        for stage in self.stages:
            stage.fast_update = self.fast_update
        self._init_schedule(schedule, arguments['layerwise_updates'])
        self._train_tradeoffs()

    def _check_restorable(self) -> None:
        if self.cls_token is not None:
            raise ValueError(
                f'{type(self).__name__} with class_token=True cannot be restored, its position embeddings stand in the '
                "place of timm's biases.")

    def _restore_modules(self) -> None:
        for module in self.stages.modules():
            if isinstance(module, _ScoringAttention):
                module.leave_evolution()
            if isinstance(module, EvoLevitStage):
                module.blocks.__class__ = nn.Sequential
                for name in attribute_names(module) & {'begins', 'keep_ratio', 'fast_update', 'num_prefix_tokens'}:
                    delattr(module, name)
            change_class(module, _dense_class_of)
        self.stages.__class__ = nn.Sequential

    def _attentions(self) -> 'list[EvoAttention | EvoAttentionDownsample]':
        """All attentions in the order of the schedule."""
        attentions = []  # dense ones before `init_evolution`
        for stage in self.stages:
            if not isinstance(stage.downsample, nn.Identity):
                attentions.append(stage.downsample.attn_downsample)
            attentions += [block.attn for block in stage.blocks]
        return attentions

    def _find_img_size(self) -> tuple[int, int]:
        """Height and width of the images that the attentions expect the grid of."""
        stride = self.feature_info[0]['reduction']
        attn = self.stages[1].downsample.attn_downsample if len(self.stages) > 1 else self.stages[0].blocks[0].attn
        side = math.isqrt(self._num_patches[0])  # an older timm notes no size where nothing downsamples
        height, width = getattr(attn, 'resolution', (side, side))
        return height * stride, width * stride

    def _set_schedule(self, schedule: Schedule) -> None:
        """Tell each stage and attention its part of the schedule."""
        super()._set_schedule(schedule)
        begin = 0
        for stage in self.stages:
            begin += not isinstance(stage.downsample, nn.Identity)
            end = begin + len(stage.blocks)
            stage.begins, stage.keep_ratio = schedule.begins[begin:end], schedule.keep_ratio[begin:end]
            begin = end
        for attn, is_scored in zip(self._attentions(), schedule.scored, strict=True):
            attn.scored = is_scored
            attn.is_tradeoff_held = schedule is not self._stagewise

    def _train_tradeoffs(self) -> None:
        """Make learned trade-offs parameters where they are trained, once for all phases of a training."""
        has_scores = False  # to mix with: the first attention that is scored sets them, whatever its alpha
        for attn, is_scored in zip(self._attentions(), self._stagewise.scored, strict=True):
            attn.train_tradeoff(is_scored and has_scores)
            has_scores = has_scores or is_scored

    def _init_class_heads(self, class_head: bool) -> None:
        if class_head:
            raise ValueError(f'class_head=True is not allowed, {type(self).__name__} has one head of its own.')

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: position embeddings in whatever form, class token, learned trade-offs."""
        names = ('attention_biases', 'pos_embed', 'cls_token', 'learn_tradeoff')
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups, as timm's; class token and position embeddings at the input are of the stem."""
        return dict(super().group_matcher(coarse), stem=r'^stem|^cls_token|^pos_embed')

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Prune stages not required for specified intermediates, as timm's."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self._cut_schedule(len(self._attentions()))
        self._train_tradeoffs()
        return take_indices

    def _forward_stem(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the feature map that enters the first stage."""
        if not torch.jit.is_scripting():
            self._follow_count()
        _assert(x.shape[2] == self.img_size[0], f'Input height ({x.shape[2]}) must be {self.img_size[0]}.')
        _assert(x.shape[3] == self.img_size[1], f'Input width ({x.shape[3]}) must be {self.img_size[1]}.')
        return self.stem(x)

    def _embed(self, x: Tensor) -> Tensor:
        """Feature map of the stem (B, C, H, W) to the sequence that enters the first stage (B, P + N, C)."""
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the full, ordered sequence after the last stage (B, P + N, C)."""
        x = self._embed(self._forward_stem(x))
        scores: Tensor | None = None
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, scores = checkpoint(stage, x, scores)
            else:
                x, scores = stage(x, scores)
        return x

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features that return intermediates, as timm's `Levit.forward_intermediates`: a whole grid of each stage.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Not used, LeViT has no final norm.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            The final sequence (B, P + N, C) and feature maps (B, C, H, W), or these alone.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)

        x = self._forward_stem(x)
        B, _, H, W = x.shape
        x = self._embed(x)
        scores: Tensor | None = None
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice stages
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        for i, stage in enumerate(stages):
            if i > 0:
                H, W = (H + 1) // 2, (W + 1) // 2
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, scores = checkpoint(stage, x, scores)
            else:
                x, scores = stage(x, scores)
            if i in take_indices:
                intermediates.append(x[:, self.num_prefix_tokens:].reshape(B, H, W, -1).permute(0, 3, 1, 2))

        if intermediates_only:
            return intermediates
        return x, intermediates


class EvoLevit(LevitEvolution, LevitDistilled):
    """timm's distilled LeViT with token evolution, in two schemes.

    * As timm's, with attention biases and timm's weights, see `LevitEvolution`.
    * With a class token, as the authors publish it (`class_token=True`): its attention gives the scores, and absolute
      position embeddings, at the input and wherever the grid is halved, take the place of the biases.

    Takes the arguments of timm's `LevitDistilled` and those of `init_evolution`.
    """

    def _init_class_heads(self, class_head: bool) -> None:
        self.class_head = class_head
        self.head_cls, self.head_cls_dist = self._make_class_head(), self._make_class_head()

    def _make_class_head(self) -> nn.Module:
        if not self.class_head or self.num_classes == 0:
            return nn.Identity().train(self.training)
        head = NormLinear(self.num_features, self.num_classes, drop=self.drop_rate)
        return head.to(next(self.head.parameters())).train(self.training)

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def get_classifier(self) -> tuple[nn.Module, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The heads: `head`, `head_dist`, and with `class_head=True` `head_cls`, `head_cls_dist`."""
        heads = (self.head, self.head_dist)
        return (*heads, self.head_cls, self.head_cls_dist) if self.class_head else heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier heads, as timm's; those on the class token go with the patch-mean pooling."""
        super().reset_classifier(num_classes, global_pool)
        self._init_class_heads(self.class_head and self.global_pool == 'avg')

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Sequence (B, P + N, C) to logits (B, num_classes), or to pooled features if `pre_logits`.

        In distilled training, the pair of logits of `head` and `head_dist`; otherwise their mean, as timm's.
        """
        tokens = x
        if self.global_pool == 'avg':
            x = evolution.patches(tokens, self.num_prefix_tokens).mean(dim=1)
        if pre_logits:
            return (x + tokens[:, 0]) / 2 if self.class_head else x
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.class_head:
            x_cls = tokens[:, 0]
            logits = (logits + self.head_cls(x_cls)) / 2
            logits_dist = (logits_dist + self.head_cls_dist(x_cls)) / 2
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return logits, logits_dist  # pyright: ignore[reportReturnType]  # TorchScript leaves this branch out
        return (logits + logits_dist) / 2


def evolved_class(dense_cls: type[Levit]) -> type[Evolved]:
    """The evolved class of timm's class, or of a subclass of it.

    Raises:
        TypeError: The class has a forward pass of its own.
    """
    for method in ('forward', 'forward_features', 'forward_intermediates'):
        if getattr(dense_cls, method) is not getattr(Levit, method):
            raise TypeError(
                f"{dense_cls.__name__} cannot be evolved, its {method} is its own and not that of timm's Levit.")
    return EvoLevit if dense_cls is LevitDistilled else combined_class(LevitEvolution, dense_cls)
