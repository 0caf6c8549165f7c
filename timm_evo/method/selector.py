""" The interface of selections, which a model uses before each of its blocks """
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..kernels.choice import can_run, launch
from . import class_attention
from .schedule import Schedule


class Record(Protocol):
    """An object that gets each selection of a forward pass."""

    outer: 'Record | None'  # an earlier record of the same model, which gets the selections, too

    def forward_pass(self, grids: dict[int, tuple[int, int]]) -> AbstractContextManager[None]:
        """A context for the blocks. `grids` has height and width of the grid, by the first block that has this grid."""
        ...

    def note_selected(self, block: int, slow: Tensor, scores: Tensor, has_representative: bool) -> None:
        """Note a published selection: positions of prefix and slow tokens (B, P + K), scores of all (B, P + N)."""

    def note_averaged(self, block: int, goes: Tensor, into: Tensor, num_tokens: int) -> None:
        """Note a selection by similarity: tokens that are averaged (B, R), and those that they go into (B, R)."""


class Selector:
    """Selects the tokens that go through the blocks of a model, in one forward pass.

    Before each block, the model calls `enter` to get the tokens of the block. It calls the block with these tokens,
    their `rotation` and their `attn_mask`. If `needs_attention` is true for the block, the model passes the class
    attention of the block to `update_scores`. At any time, `whole` gives the whole grid. A kind of selection provides
    `_select` and `whole`.

    Attributes:
        schedule: Schedule of the blocks.
        num_prefix_tokens: Number of prefix tokens P.
        present: Positions in the whole sequence of the tokens present without a representative token (B, P + K); None
            if all tokens are present, or if nothing needs the positions.
        rotation: Rotations of the tokens present without the prefix, as timm's blocks take them; None without any.
        attn_mask: Mask that attention adds to its logits (B, 1, 1, L); None without a mask.
        record: Object that gets each selection, if any.
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
        """Set the rotations of the tokens.

        Args:
            rope: Rotations of all patch tokens, see `class_attention`.
            is_mixed: Whether each block has its own rotations.
        """
        self._rope, self._is_rope_mixed = rope, is_mixed
        if not is_mixed:
            self.rotation = rope

    def enter(self, block: int, x: Tensor) -> Tensor:
        """Tokens that enter a block (B, L, C), from the output of the block before it."""
        begins = self.schedule.begins[block]
        if begins:
            x = self._select(block, x)
        if self._rope is not None and (begins or self._is_rope_mixed):
            rope = self._rope[block] if self._is_rope_mixed else self._rope
            self.rotation = rope if self.present is None else _gather_rotations(
                rope, self.present, self.num_prefix_tokens, self._has_representative())
        return x

    def needs_attention(self, block: int) -> bool:
        """Whether a later selection depends on the class attention of this block."""
        return self.schedule.scored[block]

    def update_scores(self, block: int, attention: Tensor) -> None:
        """Update the scores with the class attention (B, L) of a block for all tokens that are present."""
        raise NotImplementedError

    def whole(self, x: Tensor) -> Tensor:
        """All tokens (B, P + N, C), prefix first and patches in grid order, from the output of a block."""
        raise NotImplementedError

    def _select(self, block: int, x: Tensor) -> Tensor:
        """Select the tokens for the segment that begins at this block, see `enter`."""
        raise NotImplementedError

    def _has_representative(self) -> bool:
        """Whether the last token present is a representative token."""
        return False


def _gather_rotations(rotation: Tensor, positions: Tensor, num_prefix_tokens: int, representative: bool) -> Tensor:
    """See `class_attention.gather_rotations`."""
    if not can_run(rotation):
        return class_attention.gather_rotations(rotation, positions, num_prefix_tokens, representative)
    return launch('gather_rotations', rotation, positions, num_prefix_tokens, representative)
