""" Token evolution over the blocks of timm's flat vision transformers

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390. What timm's
`VisionTransformer` and `Eva` have in common when they evolve: blocks, embeddings, heads and weights are timm's, used as
they are; what changes is which tokens go through a block.
"""
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import to_2tuple
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.func import functional_call

from . import evolution, short_block, similarity, taps
from .arguments import split_arguments
from .beside import ClassAttentionBeside, is_sharded, is_sharded_weight
from .evolved_model import Evolved, attribute_names, combined_class
from .schedule import (
    check_flag,
    check_layerwise_updates,
    check_similarity,
    check_slow_tokens,
    cut_schedule,
    make_schedule,
    make_similarity_schedule,
)

__all__ = ['TokenEvolution', 'evolved_class']

if TYPE_CHECKING:
    class _Dense(nn.Module):
        """timm's class, which stands behind `TokenEvolution` in the bases of a model."""
        set_input_size: Callable[..., None]
        prune_intermediate_layers: Callable[..., list[int]]
        reset_classifier: Callable[..., None]
else:
    _Dense = object


class _PastHooks(nn.Module):
    """A norm without the hooks on it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


def _call_by_name(block: nn.Module, names: tuple[str, ...], x: Tensor, *values: Tensor) -> Tensor:
    """Call a block with the tokens and, by these names, these values."""
    return block(x, **dict(zip(names, values, strict=True)))


def _check_takes_mask(block: nn.Module) -> None:
    """Refuse a block that cannot be told how many tokens each one counts, which selection by similarity needs.

    Raises:
        TypeError: Its forward takes no `attn_mask`.
    """
    parameters = inspect.signature(block.forward).parameters
    if 'attn_mask' not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{type(block).__name__} is not allowed as a block with selection='similarity', its forward takes no "
            "attn_mask. Let it take one, as timm's blocks do, or use selection='stage' or 'layer'.")


def _refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if isinstance(attn_mask, Tensor) or (isinstance(is_causal, bool) and is_causal):
        raise ValueError('Token evolution takes no attention mask, attn_mask must be None and is_causal False.')


class TokenEvolution(ClassAttentionBeside, Evolved, _Dense):
    """Token evolution for a timm model that is one sequence of blocks, to stand before its class in the bases.

    The blocks stay timm's own. Class attention is taken from their own calls, and only where a later selection reads
    it. A model without class token is scored by the attention of its mean patch query.

    Takes the arguments of the timm class and those of `init_evolution`. A family of models provides the methods that
    are not implemented here.
    """
    WEIGHTED_ARGUMENTS = frozenset(['class_head'])
    ABSENT_ARGUMENTS = {'learn_tradeoff': 'only a LeViT learns its trade-offs, as the authors have it'}
    __jit_ignored_attributes__ = ['_taps']

    def __init__(self, *args, **kwargs) -> None:
        evolution_args, kwargs = split_arguments(self.init_evolution, kwargs)
        super().__init__(*args, **kwargs)
        self.init_evolution(**evolution_args)

    def init_evolution(
            self,
            keep_ratio: float | Sequence[float] = 0.5,
            start_block: int | None = None,
            stage_depth: int | None = None,
            selection: str = 'similarity',
            tradeoff: float | Sequence[float] | None = None,
            fast_update: bool = True,
            class_head: bool = False,
            layerwise_updates: int = 0,
    ) -> None:
        """Set up token evolution in a model that is dense so far.

        Args:
            keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment. In
                'similarity' the mean share over the evolved blocks, or one per block; see
                `schedule.make_similarity_schedule`. One number costs about the same in each selection, and 1.0 is
                exactly the dense model.
            start_block: First block that evolves, at least 1. None for a third of the depth, rounded: 4 of 12 blocks;
                in 'similarity' for 1.
            stage_depth: Blocks per segment, for selection='stage'. None for half of the blocks that evolve, rounded
                up: two segments of 4 for 12 blocks.
            selection: 'similarity': tokens that are alike are averaged, for weights that were trained without token
                evolution. Or as published, for weights that were trained with it: 'stage', one selection by class
                attention per segment of `stage_depth` blocks, or 'layer', one per block.
            tradeoff: Share alpha in [0, 1] of a block's class attention in the scores, for a published selection; one
                number for all evolved blocks or one per block. None for 0.5.
            fast_update: Update placeholder tokens through the representative token. If False they are only
                preserved, as in the authors' DeiT; for a published selection.
            class_head: Second head on the class token beside a patch-mean head (`global_pool='avg'`), as the authors
                train. Logits are the mean of both heads, or the pair of them in distilled training.
            layerwise_updates: For selection='stage': select in every block until this number of optimizer updates
                have been made, and once per segment from then on, see `LayerToStage`.

        Raises:
            ValueError: An argument is outside what is allowed, or leaves no patch token to select.
            TypeError: The model has blocks that cannot be evolved.
        """
        check_flag('class_head', class_head)
        for block in self.blocks:
            taps.check_block(block)
        dense = attribute_names(self)
        self.has_class_token = self.cls_token is not None  # which timm's `VisionTransformer` has already
        self._depth = len(self.blocks)  # of the schedule; pruning leaves fewer blocks
        self._set_evolution(
            keep_ratio, start_block, stage_depth, selection, tradeoff, fast_update, layerwise_updates)
        self._init_class_head(class_head)
        self._taps = [taps.Tap.place(block) for block in self.blocks]
        self._added = attribute_names(self) - dense | {'_added', 'dense_architecture'}

    def _restore_modules(self) -> None:
        for block in self.blocks:
            taps.Tap.remove(block)

    def _set_evolution(  # pyright: ignore[reportIncompatibleMethodOverride]  # they come by name
            self,
            keep_ratio: float | Sequence[float],
            start_block: int | None,
            stage_depth: int | None,
            selection: str,
            tradeoff: float | Sequence[float] | None,
            fast_update: bool,
            layerwise_updates: int,
    ) -> None:
        check_flag('fast_update', fast_update)
        check_layerwise_updates(layerwise_updates, selection)
        if selection == 'similarity':
            for block in self.blocks:
                _check_takes_mask(block)
            check_similarity(
                stage_depth=stage_depth, tradeoff=tradeoff, fast_update=None if fast_update else fast_update)
            schedule = make_similarity_schedule(self._depth, keep_ratio, start_block)
        else:
            schedule = make_schedule(self._depth, keep_ratio, start_block, stage_depth, selection, tradeoff)
        schedule = cut_schedule(schedule, len(self.blocks))
        if self.patch_embed.num_patches is not None:  # known only with an image, if no size was given
            check_slow_tokens(schedule.keep_ratio, [self.patch_embed.num_patches] * len(schedule.keep_ratio))
        self.averages = selection == 'similarity'
        self.fast_update = fast_update
        self.evolution = dict(
            keep_ratio=keep_ratio, start_block=start_block, stage_depth=stage_depth, selection=selection,
            tradeoff=tradeoff, fast_update=fast_update, layerwise_updates=layerwise_updates)
        self._init_schedule(schedule, layerwise_updates)

    def _init_class_head(self, class_head: bool) -> None:
        if class_head:
            raise ValueError(f'class_head=True is not allowed, {type(self).__name__} has its own heads.')

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

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Prune layers not required for specified intermediates, as timm's."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        self._cut_schedule(len(self.blocks))
        return take_indices

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the first block.

        Args:
            x: Images (B, C, H, W).

        Returns:
            Sequence (B, P + N, C).
            Rotations of the patch tokens, as timm's `Eva._pos_embed` returns them; None where there are none.
        """
        raise NotImplementedError

    def _grid_width(self, images: Tensor) -> int | None:
        """Width of the grid of patch tokens; None where some are dropped in training."""
        raise NotImplementedError

    def _rotations(
            self,
            index: int,
            begins: bool,
            rope: Tensor | None,
            rotation: Tensor | None,
            positions: Tensor | None,
            representative: bool,
    ) -> Tensor | None:
        """Rotations of the tokens that enter a block.

        Args:
            index: Which block it is.
            begins: Whether other tokens enter it than the block before it.
            rope: Those of all patch tokens, see `_embed`.
            rotation: Those of the tokens that entered the block before it.
            positions: Positions in the whole sequence of the tokens present but the representative (B, P + K); None
                where all are.
            representative: Whether a representative token is the last one.

        Returns:
            As timm's blocks take them, see `evolution.gather_rotations`; None where there are none, as here.
        """
        return None

    def _forward_blocks(
            self,
            x: Tensor,
            rope: Tensor | None,
            grid_width: int | None,
            take_indices: list[int],
            stop: int | None = None,
            num_read: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks with token evolution.

        Args:
            x: Sequence (B, P + N, C).
            rope: Rotations of the patch tokens, see `_embed`.
            grid_width: Width of the grid of patch tokens, if they are a whole one.
            take_indices: Blocks whose outputs are wanted.
            stop: Number of blocks to run, all if None.
            num_read: Number of tokens that are wanted of the last block, the whole sequence if None.

        Returns:
            Sequence after the last block, (B, P + N, C) or (B, num_read, C).
            Full sequence after each of the wanted blocks, (B, P + N, C) each.
        """
        if torch.jit.is_scripting() or torch.compiler.is_dynamo_compiling():
            return self._select_and_run_blocks(x, rope, grid_width, take_indices, stop, num_read)
        with taps.in_model():
            self._follow_count()
            return self._select_and_run_blocks(x, rope, grid_width, take_indices, stop, num_read)

    def _select_and_run_blocks(
            self,
            x: Tensor,
            rope: Tensor | None,
            grid_width: int | None,
            take_indices: list[int],
            stop: int | None,
            num_read: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `_forward_blocks`."""
        if self.averages:
            return self._forward_averages(x, rope, grid_width, take_indices, stop, num_read)
        begins, keep_ratio, scored, tradeoff = self.schedule  # by position, because TorchScript forgets the names
        intermediates: list[Tensor] = []
        tokens = x  # what the next block sees
        scores: Tensor | None = None
        slow: Tensor | None = None  # positions of the slow tokens, None while every token goes through the blocks
        representative: Tensor | None = None
        rotation: Tensor | None = None

        if torch.jit.is_scripting() or stop is None:  # TorchScript can't slice blocks
            blocks = self.blocks
        else:
            blocks = self.blocks[:stop]
        for i, block in enumerate(blocks):
            if begins[i]:
                x = evolution.follow(x, tokens, slow, representative)
                tokens, slow, representative = self._begin_segment(i, x, scores, keep_ratio[i])
            rotation = self._rotations(i, begins[i], rope, rotation, slow, representative is not None)

            if torch.jit.is_scripting():  # which takes no keyword arguments as a dictionary
                if scored[i]:
                    attention = self._class_attention_beside(i, tokens, slow, rotation)
                    scores = evolution.global_class_attention(scores, attention, tradeoff[i], slow)
                if hasattr(self, 'rope'):
                    tokens = block(tokens, rope=rotation)
                else:
                    tokens = block(tokens)
            elif scored[i]:
                tokens, attention = self._call_and_score(i, block, tokens, slow, rotation)
                scores = evolution.global_class_attention(scores, attention, tradeoff[i], slow)
            elif num_read is not None and i == len(self.blocks) - 1:
                return short_block.forward_first(block, tokens, num_read, rotation), intermediates
            else:
                tokens = self._call_block(block, tokens, rotation)
            if i in take_indices:
                intermediates.append(evolution.follow(x, tokens, slow, representative))

        return evolution.follow(x, tokens, slow, representative), intermediates

    def _forward_averages(
            self,
            x: Tensor,
            rope: Tensor | None,
            grid_width: int | None,
            take_indices: list[int],
            stop: int | None,
            num_read: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the blocks with selection by similarity, see `_forward_blocks`."""
        begins, keep_ratio, _, _ = self.schedule
        intermediates: list[Tensor] = []
        num_patches = x.shape[1] - self.num_prefix_tokens
        size: Tensor | None = None  # how many tokens each one counts
        attn_mask: Tensor | None = None
        present: Tensor | None = None  # positions in the whole sequence of the tokens that are left
        rotation: Tensor | None = None
        handed_over: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens before, right after, and who follows whom

        if torch.jit.is_scripting() or stop is None:  # TorchScript can't slice blocks
            blocks = self.blocks
        else:
            blocks = self.blocks[:stop]
        for i, block in enumerate(blocks):
            if begins[i]:
                goes, into = self._match_tokens(i, x, size, keep_ratio[i], num_patches, grid_width)
                left, follows = similarity.places_after(goes, into, x.shape[1])
                averages, size = similarity.average_tokens(x, size, goes, into, left)
                attn_mask = similarity.size_mask(size, x.dtype)
                if num_read is None:
                    handed_over.append((x, averages, follows))
                if rope is not None:
                    present = left if present is None else present.gather(1, left)
                x = averages
            rotation = self._rotations(i, begins[i], rope, rotation, present, False)

            if torch.jit.is_scripting():  # which takes no keyword arguments as a dictionary
                if hasattr(self, 'rope'):
                    x = block(x, rope=rotation, attn_mask=attn_mask)
                else:
                    x = block(x, attn_mask=attn_mask)
            elif num_read is not None and i == len(self.blocks) - 1:
                return short_block.forward_first(block, x, num_read, rotation, attn_mask), intermediates
            else:
                x = self._call_block(block, x, rotation, attn_mask)
            if i in take_indices:
                intermediates.append(self._give_back(x, handed_over))

        return self._give_back(x, handed_over), intermediates

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def _call_block(
            self,
            block: nn.Module,
            x: Tensor,
            rotation: Tensor | None,
            attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Call a block with no more than it needs, as blocks of a user may know nothing of rotations or masks."""
        arguments: dict[str, Any] = {'rope': rotation, 'attn_mask': attn_mask}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        try:
            if not self.grad_checkpointing:
                return block(x, **arguments)
            # by position, because a reentrant checkpoint takes no names
            return checkpoint(partial(_call_by_name, block, tuple(arguments)), x, *arguments.values())
        except TypeError:
            if attn_mask is not None:  # it may have been put in after the model was evolved
                _check_takes_mask(block)
            raise

    def _begin_segment(
            self,
            index: int,
            x: Tensor,
            scores: Tensor | None,
            keep_ratio: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Select the tokens for the blocks from here on, see `evolution.begin_segment`; `recording` listens here."""
        return evolution.begin_segment(x, scores, keep_ratio, self.num_prefix_tokens, self.fast_update)

    def _match_tokens(
            self,
            index: int,
            x: Tensor,
            size: Tensor | None,
            keep_ratio: float,
            num_patches: int,
            grid_width: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens that go before this block, see `similarity.match_tokens`; `recording` listens here."""
        return similarity.match_tokens(
            self._likeness_features(x), size, keep_ratio, num_patches, self.num_prefix_tokens,
            grid_width if size is None else None)

    def _likeness_features(self, x: Tensor) -> Tensor:
        """What tells which tokens are alike: the tokens as they would leave the model's last norm, (B, L, C).

        Where it has none, as a backbone of `features_only=True`, or one behind the pooling, which pruning takes away:
        the tokens as they are.
        """
        with torch.no_grad():  # positions come of it, which have no gradient
            if not torch.jit.is_scripting():
                if is_sharded_weight(getattr(self.norm, 'weight', None)):
                    return self._gathered_likeness_features(x)
            return self.norm.forward(x)  # not by a call, which hooks on it would take for that of the final tokens

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def _gathered_likeness_features(self, x: Tensor) -> Tensor:
        """See `_likeness_features`, for a norm whose weights are whole only while it is called."""
        weights = {
            f'norm.{name}': weight.full_tensor().to(x)  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor
            for name, weight in self.norm.named_parameters()}
        return functional_call(_PastHooks(self.norm), weights, x)

    def _give_back(self, x: Tensor, handed_over: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """All tokens (B, P + N, C), from those that are left (B, L, C) back through every time that some went."""
        for i in range(len(handed_over)):
            before, averages, follows = handed_over[len(handed_over) - 1 - i]
            x = similarity.follow_averages(before, averages, x, follows)
        return x

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def _call_and_score(
            self,
            index: int,
            block: nn.Module,
            tokens: Tensor,
            slow: Tensor | None,
            rotation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Call a block, and take its class attention.

        Args:
            index: Which block it is.
            block: The block.
            tokens: Tokens present (B, L, C).
            slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
            rotation: Rotations of the tokens present but the prefix, if any.

        Returns:
            What the block returns (B, L, C).
            Class attention (B, L).
        """
        heard_with = (self._taps[index], self.has_class_token, self.num_prefix_tokens, slow, rotation)
        if not self.grad_checkpointing:
            out, attention = taps.call_and_score(block, tokens, *heard_with)
        elif not torch.compiler.is_dynamo_compiling() or is_sharded(block):
            out, attention = checkpoint(taps.call_and_score, block, tokens, *heard_with)
        else:  # what is checkpointed in compiled code may leave nothing behind but its result
            out, attention = self._call_block(block, tokens, rotation), None
        if attention is None:
            if is_sharded(block):
                raise RuntimeError(
                    f'Block {index} cannot be scored. Its queries and keys were not heard, because its attention does '
                    'not call q_norm and k_norm, or a reentrant checkpoint hides them; and its weights are sharded, so '
                    'they cannot be projected beside it. Checkpoint without reentrance, or leave this block unsharded.')
            attention = self._class_attention_beside(index, tokens, slow, rotation)
        return out, attention

    def _num_read(self) -> int | None:
        """Number of tokens at the beginning of the sequence that the head reads, None if it may read any."""
        return None

    @torch.compiler.assume_constant_result  # what is compiled does not see hooks that come later, as everywhere
    def _can_be_short(self) -> bool:  # a method, because torch 2.8 to 2.11 let such a function take no module
        return short_block.can_be_short(self)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to logits, as timm's: `forward_features`, then `forward_head`.

        Where the head reads the class token alone, and nobody can tell, the last block computes nothing else.

        Args:
            x: Images (B, C, H, W).
            attn_mask: Must be None, a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False, likewise.

        Returns:
            Logits (B, num_classes), or what else the head gives.

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        if not torch.jit.is_scripting():  # TorchScript can't pass modules on, and symbolic tracing names every node
            num_read = self._num_read()
            if num_read is not None and not isinstance(x, torch.fx.Proxy) and self._can_be_short():
                grid_width = self._grid_width(x)
                x, rope = self._embed(x)
                x, _ = self._forward_blocks(x, rope, grid_width, [], num_read=num_read)
                return self.forward_head(self.norm(x))
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Pass images through embedding, blocks and norm.

        Args:
            x: Images (B, C, H, W).
            attn_mask: Must be None, a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False, likewise.

        Returns:
            Full, ordered sequence (B, P + N, C).

        Raises:
            ValueError: A mask is given.
        """
        _refuse_mask(attn_mask, is_causal)
        grid_width = self._grid_width(x)
        x, rope = self._embed(x)
        return self.norm(self._forward_all_blocks(x, rope, grid_width))

    def _forward_all_blocks(self, x: Tensor, rope: Tensor | None, grid_width: int | None) -> Tensor:
        """Full sequence after all blocks (B, P + N, C), see `_forward_blocks`."""
        x, _ = self._forward_blocks(x, rope, grid_width, [])
        return x

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

        Every intermediate is a whole grid in order: in the middle of a segment, the placeholders are where the
        representative token has moved them so far.

        Args:
            x: Images (B, C, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and spatial intermediate tokens.
            norm: Apply norm layer to all intermediates.
            stop_early: Stop iterating over blocks when last desired intermediate hit.
            output_fmt: 'NCHW' for feature maps (B, C, H / patch, W / patch) or 'NLC' for tokens (B, N, C).
            intermediates_only: Only return intermediate features.
            output_dict: Return a dictionary with timm's keys.
            attn_mask: Must be None, a mask over the grid has no meaning for the tokens of a selection.
            is_causal: Must be False, likewise.

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
            x, rope, grid_width, take_indices, stop=max_index + 1 if stop_early else None)
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

        if not torch.jit.is_scripting() and self.num_prefix_tokens and return_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates


# What evolution replaces of a model. A class with an own one of these is another model than timm's.
_REPLACED = ('forward', 'forward_features', 'forward_intermediates', 'get_intermediate_layers')


def evolved_class(
        dense_cls: type[nn.Module],
        known: dict[type[nn.Module], type[Evolved]],
        family: type[Evolved],
) -> type[Evolved]:
    """The evolved class of a class of timm, or of a subclass of it.

    Args:
        dense_cls: The dense class.
        known: Evolved classes of timm's own, subclasses before their bases. The last is the base of all.
        family: What stands before a class with a head of its own, of which nothing is known.

    Raises:
        TypeError: The class has a forward pass of its own.
    """
    base = list(known)[-1]
    for method in _REPLACED:
        if getattr(dense_cls, method, None) is not getattr(base, method, None):
            raise TypeError(
                f"{dense_cls.__name__} cannot be evolved, its {method} is its own and not that of timm's "
                f'{base.__name__}.')
    if dense_cls in known:
        return known[dense_cls]
    for timm_cls, evolved_cls in known.items():
        # what the head reads is known of timm's own heads
        is_known = all(getattr(dense_cls, name) is getattr(timm_cls, name) for name in ('forward_head', 'pool'))
        if issubclass(dense_cls, timm_cls) and is_known:
            return combined_class(evolved_cls, dense_cls)
    return combined_class(family, dense_cls)
