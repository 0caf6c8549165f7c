""" A record of the tokens that go through the blocks of an evolved model in a forward pass

A `with` gives the model a record, `_record`. The objects that select tokens pass each selection to it.
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
    """The tokens that go through the blocks after one selection.

    Attributes:
        block: Number of the first of these blocks. Blocks of a LeViT are counted through its stages, without
            downsampling.
        present: Positions in the whole sequence of the tokens present (B, K), in the order in which they go through the
            blocks, without a representative token.
        place: For each token of the whole sequence (B, P + N), the index in `present` of the token that it is or
            follows. Index K stands for the representative token, or without one for nothing.
        has_representative: Whether a representative token is the last token present.
        scores: Global class attention that has selected the tokens (B, P + N); None in selection='similarity'.
    """
    block: int
    present: Tensor
    place: Tensor
    has_representative: bool
    scores: Tensor | None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that go through the blocks."""
        return self.present.shape[1] + self.has_representative


class Record:
    """The selections of the last forward pass of a model.

    Attributes:
        num_prefix_tokens: Number of prefix tokens P.
        grids: Height and width of the grid of patches, by the number of the first block that has it.
        steps: Selections so far, in the order of the blocks. Each pass has a new list.
        running: Whether the blocks are running.
        outer: A record that the model had before. It gets the same selections.
    """

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.running = False
        self.outer: selector.Record | None = None
        self.forget()

    def forget(self) -> None:
        """Remove all selections, as before the first pass."""
        self.grids: dict[int, tuple[int, int]] = {}
        self.steps: list[Step] = []

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies and files of the model have no record

    def grid_of(self, length: int) -> tuple[int, int]:
        """The grid of whole sequences of a length P + N."""
        return next(grid for grid in self.grids.values() if math.prod(grid) == length - self.num_prefix_tokens)

    @contextmanager
    def forward_pass(self, grids: dict[int, tuple[int, int]]) -> Iterator[None]:
        """Start a new list of selections, which grows until the blocks have run."""
        self.grids, self.steps, self.running = grids, [], True
        try:
            with nullcontext() if self.outer is None else self.outer.forward_pass(grids):
                yield
        finally:
            self.running = False

    def note_selected(self, block: int, slow: Tensor, scores: Tensor, has_representative: bool) -> None:
        """Add a published selection: positions of prefix and slow tokens (B, P + K), and the scores (B, P + N)."""
        if self.outer is not None:
            self.outer.note_selected(block, slow, scores, has_representative)
        if not self.running:  # checkpointing runs a stage of LeViT again
            return
        number = torch.arange(slow.shape[1], device=slow.device).expand_as(slow)
        place = torch.full_like(scores, slow.shape[1], dtype=torch.int64).scatter(1, slow, number)
        self.steps.append(Step(block, slow, place, has_representative, scores.detach()))

    def note_averaged(self, block: int, goes: Tensor, into: Tensor, num_tokens: int) -> None:
        """Add a selection by similarity: which tokens present are averaged (B, R), and into which others (B, R)."""
        if self.outer is not None:
            self.outer.note_averaged(block, goes, into, num_tokens)
        if goes.shape[1] == 0:  # there are so few patches that no token is averaged
            return
        present, place = similarity.places_after(goes, into, num_tokens)
        if self.steps:
            present = self.steps[-1].present.gather(1, present)
            place = place.gather(1, self.steps[-1].place)
        self.steps.append(Step(block, present, place, False, None))


@contextmanager
def recording(model: EvolvedModel, record: Record) -> Iterator[None]:
    """A context in which a record gets the selections of a model. Copies made inside it have no record."""
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
            if getattr(module, '_record', None) is own:  # not if a later record is in place, or the model is dense now
                del module._record
                if record.outer is not None:
                    module._record = other


def _unchain(inner: Any, record: Record) -> None:
    """Remove a record from the chain of outer records of later ones of the same model."""
    while inner is not None:
        if inner.outer is record:
            inner.outer = record.outer
        inner = inner.outer


class _StageRecord:
    """Passes selections of a LeViT stage to the record, which counts blocks through all stages."""

    def __init__(self, record: Record, first_block: int) -> None:
        self.record = record
        self.first_block = first_block

    def note_selected(self, block: int, *selection: Any) -> None:
        self.record.note_selected(self.first_block + block, *selection)

    def __reduce__(self) -> tuple:
        return type(None), ()
