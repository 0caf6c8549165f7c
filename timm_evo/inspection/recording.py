""" Which tokens go through the blocks of an evolved model, noted while it runs

The objects that select tokens tell a model's `_record` of it, which is there for the time of a `with`.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..method import selector, similarity
from ..models.base import EvolvedModel
from ..models.levit import LevitEvolution

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
        outer: Another one that the model had already, and that is told the same.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.running = False
        self.outer: selector.Record | None = None
        self.forget()

    def forget(self) -> None:
        """As before the first pass."""
        self.grids: dict[int, tuple[int, int]] = {}
        self.steps: list[Step] = []

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies of the model, and files, have none

    def grid_of(self, length: int) -> tuple[int, int]:
        """The grid of whole sequences of a length P + N."""
        return next(grid for grid in self.grids.values() if math.prod(grid) == length - self.num_prefix_tokens)

    @contextmanager
    def forward_pass(self, grids: dict[int, tuple[int, int]]) -> Iterator[None]:
        """Begin anew, and note what is selected until the blocks have run."""
        self.grids, self.steps, self.running = grids, [], True
        try:
            with nullcontext() if self.outer is None else self.outer.forward_pass(grids):
                yield
        finally:
            self.running = False

    def note_selected(self, block: int, slow: Tensor, scores: Tensor, has_representative: bool) -> None:
        """Note a published selection: positions of prefix and slow tokens (B, P + K) by scores (B, P + N)."""
        if self.outer is not None:
            self.outer.note_selected(block, slow, scores, has_representative)
        if not self.running:  # a checkpoint runs a stage of LeViT once more
            return
        number = torch.arange(slow.shape[1], device=slow.device).expand_as(slow)
        place = torch.full_like(scores, slow.shape[1], dtype=torch.int64).scatter(1, slow, number)
        self.steps.append(Step(block, slow, place, has_representative, scores.detach()))

    def note_averaged(self, block: int, goes: Tensor, into: Tensor, num_tokens: int) -> None:
        """Note which of the tokens present go (B, R), and into which others (B, R)."""
        if self.outer is not None:
            self.outer.note_averaged(block, goes, into, num_tokens)
        if goes.shape[1] == 0:  # a share of so few patches that none goes
            return
        present, place = similarity.places_after(goes, into, num_tokens)
        if self.steps:
            present = self.steps[-1].present.gather(1, present)
            place = place.gather(1, self.steps[-1].place)
        self.steps.append(Step(block, present, place, False, None))


@contextmanager
def recording(model: EvolvedModel, record: Record) -> Iterator[None]:
    """Have a record told what a model selects; copies of it that are made meanwhile tell nobody."""
    modules: list[tuple[Any, Record | _StageRecord]] = [(model, record)]
    if isinstance(model, LevitEvolution):
        first_block = 0
        for stage in model.stages:
            modules.append((stage, _StageRecord(record, first_block)))
            first_block += len(stage.blocks)
    before = [module._record for module, _ in modules]
    record.outer = model._record
    try:
        for module, own in modules:
            module._record = own
        yield
    finally:
        _unchain(model._record, record)
        for (module, own), other in zip(modules, before, strict=True):
            if getattr(module, '_record', None) is own:  # not where another one has begun since, or it is dense now
                del module._record
                if record.outer is not None:
                    module._record = other


def _unchain(inner: Any, record: Record) -> None:
    """Take a record away from behind those of the same model that have begun later."""
    while inner is not None:
        if inner.outer is record:
            inner.outer = record.outer
        inner = inner.outer


class _StageRecord:
    """Notes what a stage of LeViT selects, whose blocks are counted through the stages in the record."""

    def __init__(self, record: Record, first_block: int) -> None:
        self.record = record
        self.first_block = first_block

    def note_selected(self, block: int, *selection: Any) -> None:
        self.record.note_selected(self.first_block + block, *selection)

    def __reduce__(self) -> tuple:
        return type(None), ()
