""" LeViT with token evolution

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390, for timm's
LeViT. No token is dropped, so the grid is complete wherever a stage downsamples it.
"""
import math
from collections.abc import Collection
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.layers.trace_utils import _assert
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.levit import Attention, AttentionDownsample, LevitDistilled, NormLinear
from torch import Tensor, nn

from ..config import ARGUMENTS, EvolutionConfig
from ..kernels.choice import can_run
from ..method.schedule import Schedule, check_slow_tokens, cut_schedule, make_pyramid_schedule
from ..method.sequences import patches
from .base import EvolvedModel, architecture
from .classes import attribute_names, change_class
from .levit_attention import ScoringAttention
from .levit_blocks import EvoLevitStage, dense_class_of, evolved_class_of
from .scripting import scriptable

__all__ = ['EvoLevit', 'LevitEvolution']


class LevitEvolution(EvolvedModel):
    """Token evolution for timm's `Levit`, which follows it in the bases of a class.

    Scores are the mean attention of the patch tokens, because the head reads the mean of these tokens.

    The arguments are those of the timm class and of `EvolutionConfig`.
    """
    ARGUMENTS = tuple(name for name in ARGUMENTS if name != 'stage_depth')
    ABSENT_ARGUMENTS = {'stage_depth': 'each of its stages is a segment'}
    DEFAULT_SELECTION = 'stage'

    def __init__(self, img_size: int | tuple[int, int] = 224, **kwargs) -> None:
        arguments, kwargs = self.split_arguments(kwargs)
        super().__init__(img_size, **kwargs)
        stride = self.feature_info[0]['reduction']
        sides = to_2tuple(img_size)
        if any(size % stride for size in sides):
            raise ValueError(
                f'img_size={sides} is not allowed. Height and width must be multiples of {stride}, because the stages '
                f'expect a grid of {" x ".join(str(size // stride) for size in sides)} patches from the stem.')
        self.init_evolution(EvolutionConfig(**arguments))
        self.img_size = sides

    def init_evolution(self, config: EvolutionConfig) -> None:
        if self.use_conv:
            name = architecture(self)
            linear = name.replace('levit_conv_', 'levit_') if name.startswith('levit_conv_') else 'levit_*'
            raise ValueError(
                f'{name or "A LeViT"} cannot be evolved, because its projections are convolutions (use_conv=True), '
                f"which need the whole grid. Use timm's linear LeViT, {linear}.")
        if config.class_head and not (config.class_token and self.global_pool == 'avg'):
            raise ValueError(
                f'class_head=True is not allowed with class_token={config.class_token} and '
                f"global_pool={self.global_pool!r}. It needs class_token=True and global_pool='avg'.")
        dense = attribute_names(self)
        attentions = self._attentions()
        self._depths = [len(stage.blocks) for stage in self.stages]  # also of stages that pruning removes
        self._num_patches = [attn.attention_bias_idxs.shape[1] for attn in attentions]  # of each grid
        config = self._resolve(config)
        schedule = self._make_schedule(config)
        self.num_prefix_tokens = 1 if config.class_token else 0
        self.img_size = self._find_img_size()

        self.cls_token = self.pos_embed = None
        if config.class_token:
            weight = next(self.parameters())
            num_patches = attentions[0].attention_bias_idxs.shape[0]
            self.cls_token = nn.Parameter(weight.new_zeros(1, 1, self.embed_dim[0]))
            self.pos_embed = nn.Parameter(weight.new_empty(1, 1 + num_patches, self.embed_dim[0]))
            trunc_normal_(self.pos_embed, std=.02)
        for module in self.stages.modules():
            change_class(module, evolved_class_of)
        for attn, alpha in zip(attentions, schedule.tradeoff, strict=True):
            attn.init_evolution(alpha, config.learn_tradeoff, config.class_token)
        self.stages.__class__ = nn.ModuleList  # not `nn.Sequential`, as stages and blocks return several tensors
        for stage in self.stages:
            stage.num_prefix_tokens = self.num_prefix_tokens
            stage.blocks.__class__ = nn.ModuleList
        self._set_config(config)
        self._init_class_heads(config.class_head)
        self._added = attribute_names(self) - dense | {'_added', 'dense_architecture'}

    def _make_schedule(self, config: EvolutionConfig) -> Schedule:
        schedule = make_pyramid_schedule(
            self._depths, config.keep_ratio, config.start_block, config.selection, config.tradeoff)
        check_slow_tokens(schedule.keep_ratio, self._num_patches)
        attentions = self._attentions()
        schedule = cut_schedule(schedule, len(attentions))
        if config.learn_tradeoff and hasattr(self, 'schedule') and (
                schedule.tradeoff != [attn.tradeoff for attn in attentions]):
            raise ValueError(f'tradeoff={config.tradeoff!r} cannot be set, because learn_tradeoff=True.')
        return schedule

    def _set_config(self, config: EvolutionConfig) -> None:
        super()._set_config(config)
        # a learned trade-off is a parameter if any phase of the training trains it
        stagewise = getattr(self, '_stagewise', self.schedule)
        has_scores = False  # the first scored attention sets the scores, whatever its alpha
        for attn, is_scored in zip(self._attentions(), stagewise.scored, strict=True):
            attn.train_tradeoff(is_scored and has_scores)
            has_scores = has_scores or is_scored

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def _check_restorable(self) -> None:
        if self.cls_token is not None:
            raise ValueError(
                f'{type(self).__name__} with class_token=True cannot be restored, because it has position embeddings '
                "instead of timm's attention biases.")

    def _restore_modules(self) -> None:
        for module in self.stages.modules():
            if isinstance(module, ScoringAttention):
                module.leave_evolution()
            if isinstance(module, EvoLevitStage):
                module.blocks.__class__ = nn.Sequential
                for name in attribute_names(module) & {'schedule', 'fast_update', 'num_prefix_tokens', '_record'}:
                    delattr(module, name)
            change_class(module, dense_class_of)
        self.stages.__class__ = nn.Sequential

    def _attentions(self) -> list[Any]:
        """All attentions in the order of the schedule."""
        # before `init_evolution` they are dense; in a stage, the attention that downsamples comes first
        return [module for module in self.stages.modules() if isinstance(module, (Attention, AttentionDownsample))]

    def _find_img_size(self) -> tuple[int, int]:
        """Height and width of the images whose grid the attentions expect."""
        stride = self.feature_info[0]['reduction']
        attn = self.stages[1].downsample.attn_downsample if len(self.stages) > 1 else self.stages[0].blocks[0].attn
        side = math.isqrt(self._num_patches[0])  # an older timm stores no size if nothing downsamples
        height, width = getattr(attn, 'resolution', (side, side))
        return height * stride, width * stride

    def _apply_schedule(self, schedule: Schedule) -> None:
        """Give each stage and attention its part of the schedule."""
        super()._apply_schedule(schedule)
        begin = 0
        for stage in self.stages:
            begin += not isinstance(stage.downsample, nn.Identity)
            end = begin + len(stage.blocks)
            stage.schedule = schedule.part(begin, end)
            stage.fast_update = self.evolution_config.fast_update
            begin = end
        is_held = schedule is not getattr(self, '_stagewise', schedule)
        for attn, alpha, is_scored in zip(self._attentions(), schedule.tradeoff, schedule.scored, strict=True):
            attn.tradeoff, attn.scored, attn.is_tradeoff_held = alpha, is_scored, is_held

    def _init_class_heads(self, class_head: bool) -> None:
        if class_head:
            raise ValueError(f'class_head=True is not allowed for {type(self).__name__}. Only EvoLevit has it.')

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: attention biases, position embeddings, class token, learned trade-offs."""
        names = ('attention_biases', 'pos_embed', 'cls_token', 'learn_tradeoff')
        return {name for name, _ in self.named_parameters() if name.endswith(names)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups, as timm's. Class token and position embeddings at the input belong to the stem."""
        return dict(super().group_matcher(coarse), stem=r'^stem|^cls_token|^pos_embed')

    def _forward_stem(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the feature map that enters the first stage."""
        _assert(x.shape[2] == self.img_size[0], f'Input height ({x.shape[2]}) must be {self.img_size[0]}.')
        _assert(x.shape[3] == self.img_size[1], f'Input width ({x.shape[3]}) must be {self.img_size[1]}.')
        return self.stem(x)

    def _embed(self, x: Tensor) -> Tensor:
        """Feature map of the stem (B, C, H, W) to the sequence that enters the first stage (B, P + N, C)."""
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None and self.pos_embed is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to the full, ordered sequence after the last stage (B, P + N, C)."""
        return self._forward_stages(x)[0]

    def _forward_stages(
            self,
            x: Tensor,
            take_indices: Collection[int] = (),
            stop: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Images (B, C, H, W) to the full, ordered sequence after the last stage (B, P + N, C), and feature maps.

        Args:
            x: Images.
            take_indices: Indices of the stages whose feature maps (B, C, H, W) are returned.
            stop: Number of stages to run; None for all.
        """
        x = self._forward_stem(x)
        self._follow_count()
        if self._record is None:
            return self._run_stages(x, take_indices, stop)
        with self._record.forward_pass(self._grids(x)):
            return self._run_stages(x, take_indices, stop)

    def _run_stages(
            self,
            x: Tensor,
            take_indices: Collection[int],
            stop: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the stages after the stem, see `_forward_stages`."""
        grids = list(self._grids(x).values()) if take_indices else []
        intermediates = []
        x = self._embed(x)
        if can_run(x):
            x = x.contiguous()  # the memory order of feature maps is slow for linear layers and sums
        scores: Tensor | None = None
        for i, stage in enumerate(self.stages if stop is None else self.stages[:stop]):
            x, scores = checkpoint(stage, x, scores) if self.grad_checkpointing else stage(x, scores)
            if i in take_indices:
                grid = patches(x, self.num_prefix_tokens)
                intermediates.append(grid.reshape(grid.shape[0], *grids[i], -1).permute(0, 3, 1, 2))
        return x, intermediates

    def _grids(self, x: Tensor) -> dict[int, tuple[int, int]]:
        """Height and width of each stage's grid, by the index of its first block, from the feature map of the stem."""
        grids: dict[int, tuple[int, int]] = {}
        block = 0
        height, width = x.shape[2:]
        for stage in self.stages:
            grids[block] = height, width
            block += len(stage.blocks)
            height, width = (height + 1) // 2, (width + 1) // 2
        return grids

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and intermediates, as timm's `Levit.forward_intermediates`: a whole grid of each stage.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Not used, because LeViT has no final norm.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            The final sequence (B, P + N, C) and feature maps (B, C, H, W), or these alone.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x, intermediates = self._forward_stages(x, take_indices, max_index + 1 if stop_early else None)
        if intermediates_only:
            return intermediates
        return x, intermediates


class EvoLevit(LevitEvolution, LevitDistilled):
    """timm's distilled LeViT with token evolution, in two schemes.

    * The scheme of timm has attention biases and takes timm's weights, see `LevitEvolution`.
    * The scheme of the authors has a class token (`class_token=True`), whose attention gives the scores. Absolute
      position embeddings replace the attention biases, at the input and wherever the grid is downsampled.

    The arguments are those of timm's `LevitDistilled` and of `EvolutionConfig`.
    """

    def _init_class_heads(self, class_head: bool) -> None:
        self.class_head = class_head
        self.head_cls, self.head_cls_dist = self._make_class_head(), self._make_class_head()

    def _make_class_head(self) -> nn.Module:
        if not self.class_head or self.num_classes == 0:
            return nn.Identity().train(self.training)
        head = NormLinear(self.num_features, self.num_classes, drop=self.drop_rate)
        return head.to(next(self.head.parameters())).train(self.training)

    def get_classifier(self) -> tuple[nn.Module, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The heads: `head`, `head_dist`, and with `class_head=True` `head_cls`, `head_cls_dist`."""
        heads = (self.head, self.head_dist)
        return (*heads, self.head_cls, self.head_cls_dist) if self.class_head else heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier heads, as timm's; those on the class token are removed unless global_pool='avg'."""
        super().reset_classifier(num_classes, global_pool)
        self._init_class_heads(self.class_head and self.global_pool == 'avg')

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Sequence (B, P + N, C) to logits (B, num_classes), or to pooled features if `pre_logits`.

        In distilled training, it returns the logits of `head` and of `head_dist`, otherwise their mean, as timm does.
        """
        logits, logits_dist = self._heads(x, pre_logits)
        if logits_dist is None:
            return logits
        if self.distilled_training and self.training:
            return logits, logits_dist  # pyright: ignore[reportReturnType]  # as timm's, whose annotation is this, too
        return (logits + logits_dist) / 2

    def _heads(self, x: Tensor, pre_logits: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of `head` and `head_dist`; pooled features, and None, if `pre_logits`."""
        tokens = x
        if self.global_pool == 'avg':
            x = patches(tokens, self.num_prefix_tokens).mean(dim=1)
        if pre_logits:
            return (x + tokens[:, 0]) / 2 if self.class_head else x, None
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.class_head:
            x_cls = tokens[:, 0]
            logits = (logits + self.head_cls(x_cls)) / 2
            logits_dist = (logits_dist + self.head_cls_dist(x_cls)) / 2
        return logits, logits_dist
