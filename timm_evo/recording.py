""" Which tokens go through the blocks of an evolved model, noted while it runs

The model, or the stages of a LeViT, have another class for the time of a `with`, whose methods that select tokens note
what they return. A model that is not looked at knows nothing of it.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import similarity
from .evolved_model import Evolved
from .levit import LevitEvolution

__all__ = ['Record', 'Step', 'recording']


class Step(NamedTuple):
    """The tokens that go through the blocks from one on.

    Attributes:
        block: Number of that block. A LeViT's are counted through its stages, without those that downsample.
        present: Positions in the whole sequence of those that stand for themselves (B, K), in the order in which they
            go through the blocks.
        place: For each token of the whole sequence (B, P + N), where among them the one is that it is or follows. K is
            the representative token behind them, or nothing where there is none.
        has_representative: Whether there is one.
        scores: Global class attention that has selected them (B, P + N); None in selection='similarity'.
    """
    block: int
    present: Tensor
    place: Tensor
    has_representative: bool
    scores: Tensor | None

    @property
    def num_tokens(self) -> int:
        """How many tokens go through the blocks."""
        return self.present.shape[1] + self.has_representative


class Record:
    """What the last forward pass of a model has selected.

    Attributes:
        num_prefix_tokens: Number of prefix tokens P.
        grids: Height and width of the grid of patches, by the number of the first block that has it.
        steps: Selections so far, in the order of the blocks; another list in each pass.
        running: Whether the blocks are running.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.running = False
        self.forget()

    def forget(self) -> None:
        """As before the first pass."""
        self.grids: dict[int, tuple[int, int]] = {}
        self.steps: list[Step] = []

    def grid_of(self, length: int) -> tuple[int, int]:
        """The grid of whole sequences of a length P + N."""
        return next(grid for grid in self.grids.values() if math.prod(grid) == length - self.num_prefix_tokens)

    @contextmanager
    def forward_pass(self, grids: dict[int, tuple[int, int]]) -> Iterator[None]:
        """Begin anew, and note what is selected until the blocks have run."""
        self.grids, self.steps, self.running = grids, [], True
        try:
            yield
        finally:
            self.running = False

    def note_selected(self, block: int, slow: Tensor, scores: Tensor, has_representative: bool) -> None:
        """Note a published selection: positions of prefix and slow tokens (B, P + K) by scores (B, P + N)."""
        if not self.running:  # a checkpoint runs a stage of LeViT once more
            return
        number = torch.arange(slow.shape[1], device=slow.device).expand_as(slow)
        place = torch.full_like(scores, slow.shape[1], dtype=torch.int64).scatter(1, slow, number)
        self.steps.append(Step(block, slow, place, has_representative, scores.detach()))

    def note_averaged(self, block: int, goes: Tensor, into: Tensor, num_tokens: int) -> None:
        """Note which of the tokens present go (B, R), and into which others (B, R)."""
        if goes.shape[1] == 0:  # a share of so few patches that none goes
            return
        present, place = similarity.places_after(goes, into, num_tokens)
        if self.steps:
            present = self.steps[-1].present.gather(1, present)
            place = place.gather(1, self.steps[-1].place)
        self.steps.append(Step(block, present, place, False, None))


@contextmanager
def recording(model: Evolved, record: Record) -> Iterator[None]:
    """Have a model note what it selects; copies of it that are made meanwhile don't."""
    modules: list[Any] = [model]
    if isinstance(model, LevitEvolution):
        modules += model.stages
        listening = [_listening_levit(type(model), record)]
        first_block = 0
        for stage in model.stages:
            listening.append(_listening_stage(type(stage), record, first_block))
            first_block += len(stage.blocks)
    else:
        listening = [_listening_vit(type(model), record)]
    classes = [type(module) for module in modules]
    try:
        for module, cls, listening_cls in zip(modules, classes, listening, strict=True):
            module.__class__ = _named_as(cls, listening_cls)
        yield
    finally:
        for module, cls, listening_cls in zip(modules, classes, listening, strict=True):
            if type(module) is listening_cls:  # not where `restore` has made it dense meanwhile
                module.__class__ = cls


def _named_as(cls: Any, listening_cls: Any) -> Any:
    """The listening class under the name of a module's own, which copies and files take in its place."""
    def reduce(self, protocol):
        function, args, *rest = cls.__reduce_ex__(self, protocol)
        return (_new, (cls,), *rest) if listening_cls in args else (function, args, *rest)

    for name in ('__name__', '__qualname__', '__module__'):
        setattr(listening_cls, name, getattr(cls, name))
    listening_cls.__reduce_ex__ = reduce
    return listening_cls


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _listening_vit(cls: Any, record: Record) -> Any:
    class Listening(cls):

        def _forward_blocks(self, x, rope, grid_width, *args, **kwargs):
            if grid_width is None:
                raise RuntimeError(
                    'Some patches are dropped in training, so there is no whole grid: set patch_drop_rate=0, or '
                    'model.eval().')
            num_patches = x.shape[1] - self.num_prefix_tokens
            with record.forward_pass({0: (num_patches // grid_width, grid_width)}):
                return super()._forward_blocks(x, rope, grid_width, *args, **kwargs)

        def _begin_segment(self, index, x, scores, keep_ratio):
            segment = super()._begin_segment(index, x, scores, keep_ratio)
            if segment[1] is not None:
                record.note_selected(index, segment[1], scores, self.fast_update)
            return segment

        def _match_tokens(self, index, x, *args):
            goes, into = super()._match_tokens(index, x, *args)
            record.note_averaged(index, goes, into, x.shape[1])
            return goes, into

    return Listening


def _listening_levit(cls: Any, record: Record) -> Any:
    class Listening(cls):

        def forward_features(self, x):
            with record.forward_pass(self._find_grids(x)):
                return super().forward_features(x)

        def forward_intermediates(self, x, *args, **kwargs):
            with record.forward_pass(self._find_grids(x)):
                return super().forward_intermediates(x, *args, **kwargs)

        def _find_grids(self, images):
            grids, first = {}, 0
            height, width = images.shape[2:]
            for stage, info in zip(self.stages, self.feature_info, strict=False):  # a pruned model has fewer stages
                grids[first] = (-(-height // info['reduction']), -(-width // info['reduction']))
                first += len(stage.blocks)
            return grids

    return Listening


def _listening_stage(cls: Any, record: Record, first_block: int) -> Any:
    class Listening(cls):

        def _begin_segment(self, index, x, scores, keep_ratio):
            segment = super()._begin_segment(index, x, scores, keep_ratio)
            if segment[1] is not None:
                record.note_selected(first_block + index, segment[1], scores, self.fast_update)
            return segment

    return Listening
