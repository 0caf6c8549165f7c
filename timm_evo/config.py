""" The arguments of token evolution, each declared once

`evolve`, `evolved`, `set_evolution`, `timm.create_model('evo_*')`, model cards, representations and schedules take them
from `EvolutionConfig`.
"""
import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ['EvolutionConfig', 'nearest', 'plain', 'takes_evolution_arguments', 'takes_evolution_changes']

_First = TypeVar('_First')
_Returned = TypeVar('_Returned')
_Arguments = ParamSpec('_Arguments')


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """How the tokens of a model are selected, and what becomes of the others.

    Args:
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment. In
            'similarity' the mean share over the evolved blocks, or one per block; see
            `method.schedule.make_similarity_schedule`. One number costs about the same in each selection, and 1.0 is
            exactly the dense model.
        start_block: First block that evolves, at least 1. None for a third of the depth, rounded: 4 of 12 blocks. In
            'similarity' for a quarter, 3 of 12, or for 1 if `keep_ratio` has one number per block; in a LeViT, whose
            blocks are counted through the stages, for 2.
        stage_depth: Blocks per segment of a ViT, for selection='stage'. None for half of the blocks that evolve,
            rounded up: two segments of 4 for 12 blocks. Each stage of a LeViT is a segment.
        selection: 'similarity': tokens that are alike are averaged, for weights that were trained without token
            evolution. Or as published, for weights that were trained with it: 'stage', one selection by class attention
            per segment, or 'layer', one per block. None for 'similarity', or 'stage' of a LeViT, which has no other
            than the published ones.
        tradeoff: Share alpha in [0, 1] of a block's class attention in the scores, for a published selection; one
            number for all evolved blocks or one per block (LeViT: per attention, those that downsample included). None
            for 0.5.
        fast_update: Update placeholder tokens through the representative token. If False they are only preserved, as
            in the authors' DeiT; for a published selection.
        class_head: Second head on the class token beside a patch-mean head (`global_pool='avg'`), as the authors train.
            Logits are the mean of both heads, or the pair of them in distilled training. In a LeViT two more heads,
            with `class_token=True`.
        class_token: LeViT, when it is created: class token and absolute position embeddings instead of attention
            biases.
        learn_tradeoff: LeViT: learn alpha, one scalar per attention, as the authors do; `tradeoff` is where it starts.
        layerwise_updates: For selection='stage': select in every block until this number of optimizer updates have been
            made, and once per segment from then on, see `LayerToStage`. Learned trade-offs are held until then, as the
            authors do.

    Raises:
        ValueError: An argument is outside what is allowed, whatever the model is. What depends on the model is refused
            by it.
    """
    keep_ratio: float | Sequence[float] = 0.5
    start_block: int | None = None
    stage_depth: int | None = None
    selection: str | None = None
    tradeoff: float | Sequence[float] | None = None
    fast_update: bool = True
    class_head: bool = False
    class_token: bool = False
    learn_tradeoff: bool = False
    layerwise_updates: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ('fast_update', 'class_head', 'class_token', 'learn_tradeoff'):
            # timm's scripts make a string of `false`, which would be taken as true
            self._check(name, isinstance(getattr(self, name), bool), 'True or False')
        for share in _each(self.keep_ratio):
            if not _is_share(share) or share == 0:
                raise ValueError(f'keep_ratio={share!r} is not allowed. It must be a number in (0, 1].')
        for share in _each(0.5 if self.tradeoff is None else self.tradeoff):
            if not _is_share(share):
                raise ValueError(f'tradeoff={share!r} is not allowed. It must be a number in [0, 1].')
        if self.learn_tradeoff and not self.fast_update:
            raise ValueError('learn_tradeoff=True is not allowed with fast_update=False, nothing would train it.')
        if self.learn_tradeoff and not {0, 1}.isdisjoint(_each(self.tradeoff)):
            raise ValueError(
                f'tradeoff={self.tradeoff!r} is not allowed with learn_tradeoff=True, it must be in (0, 1).')
        self._check('stage_depth', self.stage_depth is None or _is_whole(self.stage_depth, 1),
                    'a whole number of at least 1')
        self._check('layerwise_updates', _is_whole(self.layerwise_updates, 0), 'a number of optimizer updates, or 0')
        self._check_selection()

    def _check(self, name: str, is_allowed: bool, allowed: str) -> None:
        if not is_allowed:
            raise ValueError(f'{name}={getattr(self, name)!r} is not allowed. It must be {allowed}.')

    def _check_selection(self) -> None:
        """Refuse arguments that this selection has not."""
        needs = {}
        if self.selection == 'similarity':
            needs = dict(stage_depth="'stage'", tradeoff="'stage' or 'layer'", fast_update="'stage' or 'layer'")
        if self.selection not in (None, 'stage'):
            needs['layerwise_updates'] = "'stage'"
        for name, selections in needs.items():
            if (value := getattr(self, name)) != DEFAULTS[name]:
                raise ValueError(
                    f'{name}={value!r} is not allowed with selection={self.selection!r}, it needs '
                    f'selection={selections}.')


DEFAULTS = {field.name: field.default for field in fields(EvolutionConfig)}
ARGUMENTS = tuple(DEFAULTS)
# What can't change at run time: it has weights.
WEIGHTED = frozenset(['class_head', 'class_token', 'learn_tradeoff'])


UNCHANGED: Any = type('Unchanged', (), {'__repr__': lambda self: 'unchanged'})()  # None is a default


def _takes_arguments_of(config: Callable[_Arguments, Any], are_changes: bool = False):
    arguments = list(inspect.signature(config).parameters.values())
    if are_changes:
        arguments = [p.replace(default=UNCHANGED) for p in arguments if p.name not in WEIGHTED]

    def decorate(
            function: 'Callable[Concatenate[_First, ...], _Returned]',  # which Python 3.10 could not evaluate
    ) -> Callable[Concatenate[_First, _Arguments], _Returned]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]  # for `help`
            parameters=[*own, *arguments])
        return function

    return decorate


# Of a function that takes them by name, as `**arguments`: so editors, type checkers and `help` know each of them.
takes_evolution_arguments = _takes_arguments_of(EvolutionConfig)
takes_evolution_changes = _takes_arguments_of(EvolutionConfig, are_changes=True)


def plain(value: Any) -> Any:
    """The value with numbers and arrays of numpy or torch as Python's own, which type checks know and JSON can hold."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that a misspelt one is meant for, if there is one."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
