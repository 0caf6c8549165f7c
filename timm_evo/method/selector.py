""" What a model asks before each of its blocks """
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..kernels.choice import can_run, launch
from . import class_attention
from .schedule import Schedule


class Record(Protocol):
    """Who is told what is selected."""

    outer: 'Record | None'  # who was told already

    def forward_pass(self, grids: dict[int, tuple[int, int]]) -> AbstractContextManager[None]:
        """Around the blocks; height and width of the grid of patches, by the number of the first block that has it."""
        ...

    def note_selected(self, block: int, slow: Tensor, scores: Tensor, has_representative: bool) -> None:
        """Before this block: positions of prefix and slow tokens (B, P + K), by scores of all tokens (B, P + N)."""

    def note_averaged(self, block: int, goes: Tensor, into: Tensor, num_tokens: int) -> None:
        """Before this block: which of so many tokens present go (B, R), and into which others (B, R)."""


class Selector:
    """Which tokens go through the blocks of a model, in one forward pass.

    The model asks it before each block for the tokens that `enter` it, and calls the block with these, their `rotation`
    and their `attn_mask`. Where it `listens`, it is to `hear` the class attention of the block. At any time it gives
    the `whole` grid. A kind of selection provides `_select` and `whole`.

    Attributes:
        schedule: What each block has to do.
        num_prefix_tokens: Number of prefix tokens P.
        present: Positions in the whole sequence of the tokens present but a representative one (B, P + K); None where
            all are, or where nothing needs them.
        rotation: Rotations of the tokens present but the prefix, as timm's blocks take them; None where there are none.
        attn_mask: What attention adds to its logits (B, 1, 1, L); None for nothing.
        record: Who is told what is selected, if anybody.
    """
    present: Tensor | None = None
    rotation: Tensor | None = None
    attn_mask: Tensor | None = None
    record: Record | None = None
    _rope: Tensor | None = None
    _is_rope_mixed = False

    def __init__(self, schedule: Schedule, num_prefix_tokens: int) -> None:
        self.schedule = schedule
        self.num_prefix_tokens = num_prefix_tokens

    def rotate(self, rope: Tensor, is_mixed: bool) -> None:
        """Have the tokens rotated.

        Args:
            rope: Rotations of all patch tokens, see `class_attention`.
            is_mixed: Whether each block has its own of these.
        """
        self._rope, self._is_rope_mixed = rope, is_mixed
        if not is_mixed:
            self.rotation = rope

    def enter(self, block: int, x: Tensor) -> Tensor:
        """The tokens that enter a block (B, L, C), from those that have left the block before it."""
        begins = self.schedule.begins[block]
        if begins:
            x = self._select(block, x)
        if self._rope is not None and (begins or self._is_rope_mixed):
            rope = self._rope[block] if self._is_rope_mixed else self._rope
            self.rotation = rope if self.present is None else _gather_rotations(
                rope, self.present, self.num_prefix_tokens, self._has_representative())
        return x

    def listens(self, block: int) -> bool:
        """Whether a later selection depends on the class attention of this block."""
        return self.schedule.scored[block]

    def hear(self, block: int, attention: Tensor) -> None:
        """Take the class attention of a block that it `listens` to: that of all tokens present (B, L)."""
        raise NotImplementedError

    def whole(self, x: Tensor) -> Tensor:
        """All tokens (B, P + N, C), prefix first and patches in grid order, from those that have left a block."""
        raise NotImplementedError

    def _select(self, block: int, x: Tensor) -> Tensor:
        """Select the tokens for the blocks from this one on, where a segment begins, see `enter`."""
        raise NotImplementedError

    def _has_representative(self) -> bool:
        """Whether the last token present is a representative one."""
        return False


def _gather_rotations(rotation: Tensor, positions: Tensor, num_prefix_tokens: int, representative: bool) -> Tensor:
    """See `class_attention.gather_rotations`."""
    if not can_run(rotation):
        return class_attention.gather_rotations(rotation, positions, num_prefix_tokens, representative)
    return launch('gather_rotations', rotation, positions, num_prefix_tokens, representative)
