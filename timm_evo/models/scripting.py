""" TorchScript

`torch.jit.script` calls `__prepare_scriptable__` of a module, and compiles the object that it returns. Here this is
another object with the state of the model. Its class has plain loops over the blocks, because TorchScript cannot use
selectors. The steps are those of `method`.

If a module that contains the model is scripted, this object remains in the place of the model. It shares all state with
the model, and passes all calls from Python to it.
"""
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..method import similarity
from ..method.class_attention import Layout, gather_rotations
from ..method.published import follow, global_class_attention, representative_token, select_tokens
from ..method.sequences import gather_tokens, patches
from .beside import class_attention_beside
from .levit_attention import ScoringAttention, gather_biases
from .taps import Tapped

__all__ = ['scriptable']

_IGNORED = ['_taps', 'evolution_config', '_count', 'evolution', '_record']
_OWN_MODULES = [f'{__package__}.flat', f'{__package__}.levit', 'timm.models.levit']  # their methods are replaced
# methods that remain in Python, as in timm's models
_KEPT_METHODS = ('get_classifier', 'set_distilled_training', 'no_weight_decay', 'group_matcher')


def scriptable(model: Any) -> nn.Module:
    """The object that TorchScript compiles instead of an evolved model."""
    cls = type(model)
    if hasattr(model, 'stages'):
        loops: type = _ScriptedLevit
        for stage in model.stages:
            torch.jit.unused(type(stage).forward)  # its blocks are called one by one
    else:
        loops = _ScriptedSimilarity if model.evolution_config.selection == 'similarity' else _ScriptedPublished
    for module in model.modules():
        if isinstance(module, (Tapped, ScoringAttention)):
            part_cls: Any = type(module)
            part_cls.__annotations__ = _dense_annotations(part_cls)
            part_cls.__jit_ignored_attributes__ = ['tap', 'attention', 'has_kernels']
    for name in _KEPT_METHODS:
        if hasattr(cls, name):
            torch.jit.ignore(getattr(cls, name))
    methods = {name: value for base in loops.__mro__[:-1] for name, value in vars(base).items() if callable(value)}
    for name in ('forward', 'forward_features', 'forward_intermediates'):
        if _defining_class(cls, name).__module__ not in _OWN_MODULES:  # a method of a user's class is compiled as it is
            methods.pop(name, None)
    if '_heads' in vars(_defining_class(cls, 'forward_head')):
        methods['forward_head'] = forward_head
    scripted_cls: Any = type(cls.__name__, (_Scripted, cls), methods | {
        '__module__': cls.__module__,
        '__annotations__': _dense_annotations(cls),
        '__constants__': [*getattr(cls, '__constants__', ()), 'fast_update'],
        '__jit_ignored_attributes__': [*getattr(cls, '__jit_ignored_attributes__', ()), *_IGNORED],
        '__jit_unused_properties__': [*getattr(cls, '__jit_unused_properties__', ()), 'evolution'],
        'fast_update': model.evolution_config.fast_update,
        'model': staticmethod(lambda: model),
    })
    scripted = object.__new__(scripted_cls)
    object.__setattr__(scripted, '__dict__', model.__dict__)
    return scripted


def _defining_class(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base))


def _dense_annotations(cls: type) -> dict[str, Any]:
    """Annotations of timm's class in the bases of a class, because TorchScript does not read those of base classes."""
    dense = (base for base in cls.__mro__ if not base.__module__.startswith('timm_evo.'))
    return next((found for base in dense if (found := vars(base).get('__annotations__'))), {})


class _Scripted:
    """First base of the class of a scripted object. Calls from Python go to the model."""
    model: Any

    def __call__(self, *args, **kwargs):
        return self.model()(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return self.model().__reduce_ex__(protocol)

    def train(self, mode: bool = True):
        self.model().train(mode)
        return self

    def set_evolution(self, **arguments: Any) -> None:
        self.model().set_evolution(**arguments)

    def _take_evolution_away(self, names: frozenset[str]) -> None:
        self.model()._take_evolution_away(names)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.model()._load_from_state_dict(*args, **kwargs)


# Methods of the scripted object. Each has a part for Python, which TorchScript ignores and which calls the model.


def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
    """The mean of the logits of `_heads`, because a scripted method has one return type."""
    if not torch.jit.is_scripting():
        return self.model().forward_head(x, pre_logits)
    logits, other = self._heads(x, pre_logits)
    return logits if other is None else (logits + other) / 2


class _ScriptedFlat:
    """Methods of `FlatModel`. Subclasses provide `_scripted_blocks` for a kind of selection."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not torch.jit.is_scripting():
            return self.model().forward(x, attn_mask, is_causal)
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not torch.jit.is_scripting():
            return self.model().forward_features(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise ValueError(
                'Token evolution takes no attention mask. attn_mask must be None and is_causal must be False.')
        grid_width = self._grid_width(x)
        x, rope = self._embed(x)
        return self.norm(self._scripted_blocks(x, rope, grid_width))

    def _embed_patches(self: Any, images: Tensor) -> Tensor:
        return self.patch_embed(images)

    def _scripted_rotation(
            self: Any,
            block: int,
            begins: bool,
            rope: Tensor | None,
            before: Tensor | None,
            positions: Tensor | None,
            representative: bool,
    ) -> Tensor | None:
        """Rotations of the tokens that enter a block, from all rotations and those of the block before."""
        if rope is None:
            return None
        if hasattr(self, 'rope_mixed'):
            if self.rope_mixed:
                rope = rope[block]
            elif before is not None and not begins:
                return before
        if positions is None:
            return rope
        return gather_rotations(rope, positions, self.num_prefix_tokens, representative)


def _begin_segment(
        x: Tensor,
        scores: Tensor | None,
        keep_ratio: float,
        num_prefix_tokens: int,
        fast_update: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tokens for the blocks, positions of prefix and slow tokens, and the representative token."""
    if keep_ratio == 1:
        return x, None, None
    assert scores is not None
    slow = select_tokens(scores, keep_ratio, num_prefix_tokens)
    tokens = gather_tokens(x, slow)
    if not fast_update:
        return tokens, slow, None
    representative = representative_token(x, scores, slow)
    return torch.cat([tokens, representative], dim=1), slow, representative


def _follow(x: Tensor, tokens: Tensor, slow: Tensor | None, representative: Tensor | None) -> Tensor:
    """All tokens, from the output of the blocks."""
    return tokens if slow is None else follow(x, tokens, slow, representative)


def _take_scores(scores: Tensor | None, slow: Tensor | None, are_read: bool) -> Tensor | None:
    """Scores of the tokens present."""
    if scores is None or slow is None:
        return scores
    return scores.gather(1, slow) if are_read else None


def _return_scores(scores: Tensor | None, present: Tensor | None, slow: Tensor | None) -> Tensor | None:
    """Scores of all tokens, from the scores of the tokens present."""
    if slow is None:
        return present
    return scores if scores is None or present is None else scores.scatter(1, slow, present)


class _ScriptedPublished(_ScriptedFlat):
    """The steps of `ByClassAttention`. Scores are computed outside the blocks, because taps need Python's threads."""
    class_attention_beside = class_attention_beside

    def _scripted_blocks(self: Any, x: Tensor, rope: Tensor | None, grid_width: int | None) -> Tensor:
        begins, keep_ratio, scored, tradeoff = self.schedule  # by position, because TorchScript loses the names
        tokens = x  # input of the next block
        scores: Tensor | None = None
        slow: Tensor | None = None
        representative: Tensor | None = None
        rotation: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if begins[i]:
                x = _follow(x, tokens, slow, representative)
                tokens, slow, representative = _begin_segment(
                    x, scores, keep_ratio[i], self.num_prefix_tokens, self.fast_update)
            rotation = self._scripted_rotation(i, begins[i], rope, rotation, slow, representative is not None)
            if scored[i]:
                layout = Layout(self.has_class_token, self.num_prefix_tokens, slow)
                attention = self.class_attention_beside(i, tokens, layout, rotation)
                if slow is None:
                    scores = global_class_attention(scores, attention, tradeoff[i])
                else:
                    assert scores is not None
                    mixed = global_class_attention(scores.gather(1, slow), attention[:, :slow.shape[1]], tradeoff[i])
                    scores = scores.scatter(1, slow, mixed)
            if hasattr(self, 'rope'):
                tokens = block(tokens, rope=rotation)
            else:
                tokens = block(tokens)
        return _follow(x, tokens, slow, representative)


class _ScriptedSimilarity(_ScriptedFlat):
    """The steps of `BySimilarity`."""

    def _scripted_blocks(self: Any, x: Tensor, rope: Tensor | None, grid_width: int | None) -> Tensor:
        begins, keep_ratio, _, _ = self.schedule
        num_patches = x.shape[1] - self.num_prefix_tokens
        size: Tensor | None = None
        attn_mask: Tensor | None = None
        present: Tensor | None = None
        rotation: Tensor | None = None
        handed_over: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            if begins[i]:
                with torch.no_grad():
                    features = self.norm.forward(x)
                goes, into = similarity.match_tokens(
                    features, size, keep_ratio[i], num_patches, self.num_prefix_tokens,
                    grid_width if size is None else None, not self.dynamic_img_size)
                left, follows = similarity.places_after(goes, into, x.shape[1])
                averages, size = similarity.average_tokens(x, size, goes, into, left)
                attn_mask = similarity.size_mask(size, x.dtype)
                handed_over.append((x, averages, follows))
                present = left if present is None else present.gather(1, left)
                x = averages
            rotation = self._scripted_rotation(i, begins[i], rope, rotation, present, False)
            if hasattr(self, 'rope'):
                x = block(x, rope=rotation, attn_mask=attn_mask)
            else:
                x = block(x, attn_mask=attn_mask)
        for i in range(len(handed_over)):
            before, averages, follows = handed_over[len(handed_over) - 1 - i]
            x = similarity.follow_averages(before, averages, x, follows)
        return x


class _ScriptedLevit:
    """Methods of `LevitEvolution`, with the steps of `ByClassAttention` in each stage."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.model().forward(x)
        return self.forward_head(self.forward_features(x))

    def forward_features(self: Any, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.model().forward_features(x)
        x, _ = self._scripted_stages(self._forward_stem(x), [])
        return x

    def forward_intermediates(
            self: Any,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        if not torch.jit.is_scripting():
            return self.model().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, _ = feature_take_indices(len(self.stages), indices)
        x, intermediates = self._scripted_stages(self._forward_stem(x), take_indices)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def _scripted_stages(self: Any, x: Tensor, take_indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        intermediates: list[Tensor] = []
        height, width = x.shape[2], x.shape[3]
        x = self._embed(x)
        scores: Tensor | None = None
        for number, stage in enumerate(self.stages):
            if number > 0:
                height, width = (height + 1) // 2, (width + 1) // 2
            if hasattr(stage.downsample, 'attn_downsample'):
                x, scores = stage.downsample(x, scores)
            tokens, slow, representative = _begin_segment(x, scores, 1., self.num_prefix_tokens, self.fast_update)
            present = scores  # of the tokens present
            begins, keep_ratio, scored, _ = stage.schedule
            for i, block in enumerate(stage.blocks):
                if begins[i]:
                    x, scores = _follow(x, tokens, slow, representative), _return_scores(scores, present, slow)
                    tokens, slow, representative = _begin_segment(
                        x, scores, keep_ratio[i], self.num_prefix_tokens, self.fast_update)
                    present = _take_scores(scores, slow, scored[i])
                tables, index = block.attn.attention_biases, block.attn.attention_bias_idxs
                if slow is None or tables is None or index is None:
                    tokens, present = block(tokens, present, None)
                else:
                    biases = gather_biases([tables], index, slow, self.fast_update)
                    tokens, present = block(tokens, present, biases[0])
            x, scores = _follow(x, tokens, slow, representative), _return_scores(scores, present, slow)
            if number in take_indices:
                grid = patches(x, self.num_prefix_tokens)
                intermediates.append(grid.reshape(grid.shape[0], height, width, -1).permute(0, 3, 1, 2))
        return x, intermediates
