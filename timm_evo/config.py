""" The arguments of token evolution, each declared once

`evolve`, `evolved`, `set_evolution`, `timm.create_model('evo_*')`, model cards, `repr` and schedules take them from
`EvolutionConfig`.
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
    """Arguments of token evolution: how the tokens of a model are selected, and how the others are updated.

    Args:
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]: one number, or one per segment. In
            'similarity' it is the mean share over the evolved blocks, or one share per block (see
            `method.schedule.make_similarity_schedule`). The same number costs about the same in each selection. With
            1.0 no token is left out or averaged.
        start_block: First block that evolves, at least 1. None for a third of the depth, rounded: 4 of 12 blocks. In
            'similarity', None stands for a quarter of the depth (3 of 12), or for 1 if `keep_ratio` has one number per
            block. In a LeViT, whose blocks are counted through the stages, None stands for 2.
        stage_depth: Blocks per segment of a ViT, for selection='stage'. None for half of the blocks that evolve,
            rounded up: two segments of 4 for 12 blocks. Each stage of a LeViT is a segment.
        selection: 'similarity' averages similar tokens, and is for weights that were trained without token evolution.
            The published selections are for weights that were trained with it: 'stage' selects by class attention once
            per segment, 'layer' in each block. None for 'similarity', or in a LeViT, which has only the published
            selections, for 'stage'.
        tradeoff: Share alpha in [0, 1] of a block's class attention in the scores of a published selection: one number
            for all evolved blocks or one per block (LeViT: one per attention, downsampling included). None for 0.5.
        fast_update: Whether a published selection updates placeholder tokens through the representative token. If
            False, they are only preserved, as in the authors' DeiT.
        class_head: Whether a second head on the class token is added beside a patch-mean head (`global_pool='avg'`), as
            the authors train. Logits are the mean of both heads, or both in distilled training. A LeViT gets two more
            heads, and needs `class_token=True`.
        class_token: Whether a LeViT is created with a class token and absolute position embeddings instead of attention
            biases.
        learn_tradeoff: Whether a LeViT learns alpha, one scalar per attention, as the authors do. It starts from
            `tradeoff`.
        layerwise_updates: Number of optimizer updates in which selection='stage' selects in every block, before it
            selects once per segment (see `LayerToStage`). Until then, learned trade-offs keep their initial value, as
            the authors do.

    Raises:
        ValueError: A value is not allowed for any model. The model checks values that depend on it.
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
            # timm's scripts read `false` as a string, which would count as true
            self._check(name, isinstance(getattr(self, name), bool), 'True or False')
        for share in _each(self.keep_ratio):
            if not _is_share(share) or share == 0:
                raise ValueError(f'keep_ratio={share!r} is not allowed. It must be a number in (0, 1].')
        for share in _each(0.5 if self.tradeoff is None else self.tradeoff):
            if not _is_share(share):
                raise ValueError(f'tradeoff={share!r} is not allowed. It must be a number in [0, 1].')
        if self.learn_tradeoff and not self.fast_update:
            raise ValueError(
                'learn_tradeoff=True is not allowed with fast_update=False, because it would get no gradient.')
        if self.learn_tradeoff and not {0, 1}.isdisjoint(_each(self.tradeoff)):
            raise ValueError(
                f'tradeoff={self.tradeoff!r} is not allowed with learn_tradeoff=True. It must be in (0, 1).')
        self._check('stage_depth', self.stage_depth is None or _is_whole(self.stage_depth, 1),
                    'a whole number of at least 1')
        self._check('layerwise_updates', _is_whole(self.layerwise_updates, 0), 'a number of optimizer updates, or 0')
        self._check_selection()

    def _check(self, name: str, is_allowed: bool, allowed: str) -> None:
        if not is_allowed:
            raise ValueError(f'{name}={getattr(self, name)!r} is not allowed. It must be {allowed}.')

    def _check_selection(self) -> None:
        """Check that all arguments belong to the selection."""
        needs = {}
        if self.selection == 'similarity':
            needs = dict(stage_depth="'stage'", tradeoff="'stage' or 'layer'", fast_update="'stage' or 'layer'")
        if self.selection not in (None, 'stage'):
            needs['layerwise_updates'] = "'stage'"
        for name, selections in needs.items():
            if (value := getattr(self, name)) != DEFAULTS[name]:
                raise ValueError(
                    f'{name}={value!r} is not allowed with selection={self.selection!r}, but only with '
                    f'selection={selections}.')


DEFAULTS = {field.name: field.default for field in fields(EvolutionConfig)}
ARGUMENTS = tuple(DEFAULTS)
# arguments that add weights, so they cannot change at run time
WEIGHTED = frozenset(['class_head', 'class_token', 'learn_tradeoff'])


# not None, which is a value of some arguments
UNCHANGED: Any = type('Unchanged', (), {'__repr__': lambda self: 'unchanged'})()


def _takes_arguments_of(config: Callable[_Arguments, Any], are_changes: bool = False):
    arguments = list(inspect.signature(config).parameters.values())
    if are_changes:
        arguments = [p.replace(default=UNCHANGED) for p in arguments if p.name not in WEIGHTED]

    def decorate(
            function: 'Callable[Concatenate[_First, ...], _Returned]',  # Python 3.10 cannot evaluate it
    ) -> Callable[Concatenate[_First, _Arguments], _Returned]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]  # for `help`
            parameters=[*own, *arguments])
        return function

    return decorate


# For a function that takes the arguments as `**arguments`: editors, type checkers and `help` then show each of them.
takes_evolution_arguments = _takes_arguments_of(EvolutionConfig)
takes_evolution_changes = _takes_arguments_of(EvolutionConfig, are_changes=True)


def plain(value: Any) -> Any:
    """Convert numbers and arrays of numpy or torch to Python's own types, for type checks and JSON."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most similar to a misspelt one, if any is similar enough."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
