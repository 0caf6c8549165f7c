""" Token evolution over the blocks of timm's flat vision transformers

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390. These are the
common parts of evolved models of timm's `VisionTransformer` and `Eva`. Blocks, embeddings, heads and weights are timm's
and unchanged. Only the tokens that go through a block are different.
"""
import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx
from timm.layers import to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..config import ARGUMENTS, EvolutionConfig
from ..method.class_attention import Layout
from ..method.published import ByClassAttention
from ..method.schedule import Schedule, check_slow_tokens, cut_schedule, make_schedule, make_similarity_schedule
from ..method.selector import Selector
from ..method.similarity import BySimilarity
from . import patch_embedding, short_block, taps
from .base import EvolvedModel
from .beside import class_attention_beside, is_sharded
from .calling import call_block, check_takes_mask
from .classes import attribute_names
from .likeness import NormedLikeness
from .scripting import scriptable

__all__ = ['FlatModel']


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if isinstance(attn_mask, Tensor) or (isinstance(is_causal, bool) and is_causal):
        raise ValueError('Token evolution takes no attention mask. attn_mask must be None and is_causal must be False.')


class FlatModel(EvolvedModel):
    """Token evolution for a timm model with one sequence of blocks; timm's class follows it in the bases of a class.

    The blocks are timm's own. Class attention is taken from their calls, and only if a later selection reads it. In a
    model without a class token, the attention of the mean patch query gives the scores.

    The arguments are those of the timm class and of `EvolutionConfig`. A family of models provides the methods that are
    not implemented here.
    """
    ARGUMENTS = tuple(name for name in ARGUMENTS if name not in ('class_token', 'learn_tradeoff'))
    ABSENT_ARGUMENTS = {'learn_tradeoff': "only a LeViT learns its trade-offs, as in the authors' code"}

    def __init__(self, *args, **kwargs) -> None:
        arguments, kwargs = self.split_arguments(kwargs)
        super().__init__(*args, **kwargs)
        self.init_evolution(EvolutionConfig(**arguments))

    def init_evolution(self, config: EvolutionConfig) -> None:
        for block in self.blocks:
            taps.check_block(block)
        dense = attribute_names(self)
        self.has_class_token = self.cls_token is not None  # timm's `VisionTransformer` has this attribute already
        self._depth = len(self.blocks)  # depth of the schedule; pruning removes blocks
        self._set_config(self._resolve(config))
        self._init_class_head(config.class_head)
        self._taps = [taps.Tap.place(block) for block in self.blocks]
        self._added = attribute_names(self) - dense | {'_added', 'dense_architecture'}

    def _restore_modules(self) -> None:
        for block in self.blocks:
            taps.Tap.remove(block)

    def _make_schedule(self, config: EvolutionConfig) -> Schedule:
        if config.selection == 'similarity':
            for block in self.blocks:
                check_takes_mask(block)
            schedule = make_similarity_schedule(self._depth, config.keep_ratio, config.start_block)
        else:
            schedule = make_schedule(
                self._depth, config.keep_ratio, config.start_block, config.stage_depth, config.selection,
                config.tradeoff)
        schedule = cut_schedule(schedule, len(self.blocks))
        if self.patch_embed.num_patches is not None:  # without an image size it is known only from an image
            check_slow_tokens(schedule.keep_ratio, [self.patch_embed.num_patches] * len(schedule.keep_ratio))
        return schedule

    def _init_class_head(self, class_head: bool) -> None:
        if class_head:
            raise ValueError(f'class_head=True is not allowed, because {type(self).__name__} has its own heads.')

    def set_input_size(
            self,
            img_size: tuple[int, int] | None = None,
            patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Update the input image resolution and patch size, as timm's."""
        embed = self.patch_embed
        img_size_after = img_size or embed.img_size
        if img_size_after is not None:
            grid = [
                size // (reduction // old_patch * new_patch)  # a hybrid reduces the image before it makes patches
                for size, reduction, old_patch, new_patch in zip(
                    to_2tuple(img_size_after), embed.feat_ratio(as_scalar=False), embed.patch_size,
                    to_2tuple(patch_size or embed.patch_size), strict=True)
            ]
            check_slow_tokens(self.schedule.keep_ratio, [math.prod(grid)] * len(self.schedule.keep_ratio))
        super().set_input_size(img_size=img_size, patch_size=patch_size)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable(self)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input of the first block.

        Args:
            x: Images (B, C, H, W).

        Returns:
            Sequence (B, P + N, C).
            Rotations of the patch tokens, as timm's `Eva._pos_embed` returns them; None if the model has none.
        """
        raise NotImplementedError

    def _embed_patches(self, images: Tensor) -> Tensor:
        """Output of timm's `patch_embed`."""
        if patch_embedding.is_product_faster(images) and self._patches_can_be_product():
            return patch_embedding.embed_by_product(self.patch_embed, images)
        return self.patch_embed(images)

    @torch.compiler.assume_constant_result  # as in `_can_be_short`
    def _patches_can_be_product(self) -> bool:
        return patch_embedding.can_be_product(self.patch_embed)

    def _grid_width(self, images: Tensor) -> int | None:
        """Width of the grid of patch tokens; None if some are dropped in training."""
        raise NotImplementedError

    def _forward_blocks(
            self,
            x: Tensor,
            rope: Tensor | None,
            grid_width: int | None,
            take_indices: Collection[int] = (),
            stop: int | None = None,
            num_read: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks with token evolution.

        Args:
            x: Sequence (B, P + N, C).
            rope: Rotations of the patch tokens, see `_embed`.
            grid_width: Width of the grid of patch tokens, if they are a whole grid.
            take_indices: Indices of the blocks whose outputs are returned.
            stop: Number of blocks to run; None for all.
            num_read: Number of tokens of the last block that are returned; None for the whole sequence.

        Returns:
            Sequence after the last block, (B, P + N, C) or (B, num_read, C).
            Full sequence after each block of `take_indices`, (B, P + N, C) each.
        """
        self._follow_count()
        num_patches = x.shape[1] - self.num_prefix_tokens
        if self.evolution_config.selection == 'similarity':
            selector = BySimilarity(
                self.schedule, self.num_prefix_tokens, num_patches, grid_width,
                NormedLikeness(self.norm),
                # not with a dynamic image size, which a comparison would fix in an export
                is_aligned=not self.dynamic_img_size, is_whole_wanted=num_read is None)
        else:
            selector = ByClassAttention(self.schedule, self.num_prefix_tokens, self.evolution_config.fast_update)
        selector.record = self._record
        if rope is not None:
            selector.rotate(rope, self.rope_mixed)
        blocks = self.blocks if stop is None else self.blocks[:stop]
        if torch.compiler.is_dynamo_compiling() and self._record is None:
            return self._run_blocks(blocks, x, selector, take_indices, num_read)
        recorded = nullcontext() if self._record is None else self._record.forward_pass(self._grids(x, grid_width))
        with taps.in_model(), recorded:
            return self._run_blocks(blocks, x, selector, take_indices, num_read)

    def _grids(self, x: Tensor, grid_width: int | None) -> dict[int, tuple[int, int]]:
        """Height and width of the grid of patches, by the first block that has it."""
        if grid_width is None:
            raise RuntimeError(
                'Some patches are dropped in training, so there is no whole grid. Create the model with '
                'patch_drop_rate=0, or call model.eval().')
        return {0: ((x.shape[1] - self.num_prefix_tokens) // grid_width, grid_width)}

    def _run_blocks(
            self,
            blocks: Sequence[nn.Module],
            x: Tensor,
            selector: Selector,
            take_indices: Collection[int],
            num_read: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `_forward_blocks`."""
        last = len(self.blocks) - 1
        intermediates: list[Tensor] = []
        for i, block in enumerate(blocks):
            x = selector.enter(i, x)
            if selector.needs_attention(i):
                x, attention = self._call_and_score(i, block, x, selector)
                selector.update_scores(i, attention)
            elif i == last and num_read is not None:
                return short_block.forward_first(block, x, num_read, selector.rotation, selector.attn_mask), []
            else:
                x = call_block(block, x, selector.rotation, selector.attn_mask, self.grad_checkpointing)
            if i in take_indices:
                intermediates.append(selector.whole(x))
        return selector.whole(x), intermediates

    def _call_and_score(
            self,
            index: int,
            block: nn.Module,
            x: Tensor,
            selector: Selector,
    ) -> tuple[Tensor, Tensor]:
        """Call a block, and take its class attention.

        Args:
            index: Index of the block.
            block: The block.
            x: Tokens present (B, L, C).
            selector: Selector of this forward pass.

        Returns:
            Output of the block (B, L, C).
            Class attention (B, L).

        Raises:
            RuntimeError: The class attention of a sharded block is not available.
        """
        rotation = selector.rotation
        layout = Layout(self.has_class_token, self.num_prefix_tokens, selector.present)
        if not self.grad_checkpointing:
            out, attention = taps.call_and_score(block, x, self._taps[index], layout, rotation)
        elif not torch.compiler.is_dynamo_compiling() or is_sharded(block):
            out, attention = checkpoint(taps.call_and_score, block, x, self._taps[index], layout, rotation)
        else:  # in compiled code, checkpointing allows no other effects than the result
            out, attention = call_block(block, x, rotation, None, True), None
        if attention is None:
            if is_sharded(block):
                raise RuntimeError(
                    f'Block {index} cannot be scored, because its queries and keys are not available: its attention '
                    'does not call q_norm and k_norm, or a reentrant checkpoint hides them. They cannot be computed '
                    'outside the block either, because its weights are sharded. Use checkpoints with '
                    'use_reentrant=False, or do not shard this block.')
            attention = class_attention_beside(self, index, x, layout, rotation)
        return out, attention

    def _num_read(self) -> int | None:
        """Number of tokens at the beginning of the sequence that the head reads; None if it may read others."""
        return None

    @torch.compiler.assume_constant_result  # compiled code ignores hooks that are set later, as in any model
    def _can_be_short(self) -> bool:  # a method, because in torch 2.8 to 2.11 such a function takes no module
        return short_block.can_be_short(self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to logits, as timm's: `forward_features`, then `forward_head`.

        If the head reads only the first tokens and the difference is not visible, the last block computes only these.

        Args:
            x: Images (B, C, H, W).
            attn_mask: Must be None, because a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False for the same reason.

        Returns:
            Logits (B, num_classes), or another output of the head.

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        num_read = self._num_read()
        # symbolic tracing gives every node a name, so it needs all blocks whole
        if num_read is None or isinstance(x, torch.fx.Proxy) or not self._can_be_short():
            return self.forward_head(self.forward_features(x))
        grid_width = self._grid_width(x)
        x, _ = self._forward_blocks(*self._embed(x), grid_width, num_read=num_read)
        return self.forward_head(self.norm(x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Pass images through embedding, blocks and norm.

        Args:
            x: Images (B, C, H, W).
            attn_mask: Must be None, because a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False for the same reason.

        Returns:
            Full, ordered sequence (B, P + N, C).

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        grid_width = self._grid_width(x)
        return self.norm(self._forward_all_blocks(*self._embed(x), grid_width))

    def _forward_all_blocks(self, x: Tensor, rope: Tensor | None, grid_width: int | None) -> Tensor:
        """Full sequence after all blocks (B, P + N, C), see `_forward_blocks`."""
        return self._forward_blocks(x, rope, grid_width)[0]

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Features that return intermediates, as timm's `VisionTransformer.forward_intermediates`.

        Every intermediate is a whole grid in order. In the middle of a segment, placeholders have the change of the
        representative token so far.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and spatial intermediate tokens.
            norm: Apply norm layer to all intermediates.
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: 'NCHW' for feature maps (B, C, H / patch, W / patch) or 'NLC' for tokens (B, N, C).
            intermediates_only: Only return intermediate features.
            output_dict: Return a dictionary with timm's keys.
            attn_mask: Must be None, because a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False for the same reason.

        Returns:
            The final sequence (B, P + N, C) and the intermediates, the intermediates alone, or a dictionary of them.

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        batch_size, _, height, width = x.shape

        grid_width = self._grid_width(x)
        x, rope = self._embed(x)
        x, intermediates = self._forward_blocks(
            x, rope, grid_width, take_indices, max_index + 1 if stop_early else None)
        if norm:
            intermediates = [self.norm(y) for y in intermediates]
        prefix_tokens = [y[:, :self.num_prefix_tokens] for y in intermediates]
        intermediates = [y[:, self.num_prefix_tokens:] for y in intermediates]
        if output_fmt == 'NCHW':
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            intermediates = [
                y.reshape(batch_size, H, W, -1).permute(0, 3, 1, 2).contiguous() for y in intermediates]

        if output_dict:
            result = {'image_intermediates': intermediates}
            if self.num_prefix_tokens and return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result

        if self.num_prefix_tokens and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates
