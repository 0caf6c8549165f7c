""" timm's LeViT blocks and stages, for selected tokens

timm builds them, and then their classes are changed. Weights and all other modules are unchanged.
"""
from typing import TYPE_CHECKING, Any

from timm.models.levit import Attention, AttentionDownsample, LevitBlock, LevitDownsample, LevitStage
from torch import Tensor, nn

from ..kernels.choice import can_run
from ..method.published import ByClassAttention
from ..method.schedule import Schedule
from ..method.selector import Record
from . import levit_attention
from .levit_attention import EvoAttention, EvoAttentionDownsample

__all__ = ['EvoLevitStage', 'dense_class_of', 'evolved_class_of']


class EvoLevitBlock(LevitBlock):
    """timm's `LevitBlock` with `EvoAttention`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            x: Tensor,
            scores: Tensor | None,
            biases: Tensor | None,
            positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and scores after attention and MLP, see `EvoAttention.forward`."""
        y, scores = self.attn(x, scores, biases, positions)
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(x)), scores


class EvoLevitDownsample(LevitDownsample):
    """timm's `LevitDownsample` with `EvoAttentionDownsample`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Sequence and scores of the smaller grid, see `EvoAttentionDownsample.forward`."""
        x, scores = self.attn_downsample(x, scores)
        return x + self.drop_path(self.mlp(x)), scores


class EvoLevitStage(LevitStage):
    """timm's `LevitStage`, whose blocks compute the slow tokens of a selection.

    Attributes:
        schedule: The part of the model's schedule for these blocks.
        _record: Object that records what is selected, if any.
    """
    _record: Record | None = None
    if TYPE_CHECKING:
        schedule: Schedule
        num_prefix_tokens: int
        fast_update: bool
        blocks: Any

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Downsample, if this is not the first stage, and run the blocks.

        Args:
            x: Full sequence (B, P + N, C).
            scores: Scores (B, P + N), if any.

        Returns:
            Full, ordered sequence after the stage.
            Its scores.
        """
        if not isinstance(self.downsample, nn.Identity):
            x, scores = self.downsample(x, scores)
        selector = ByClassAttention(self.schedule, self.num_prefix_tokens, self.fast_update, scores)
        selector.record = self._record
        biases: list[Tensor] | None = None  # of the blocks of the segment
        positions: Tensor | None = None  # instead of biases, if kernels run
        first = 0  # the first of these blocks
        for i, block in enumerate(self.blocks):
            x = selector.enter(i, x)
            if self.schedule.begins[i]:
                biases, positions, first = None, selector.present, i
                if positions is None or block.attn.attention_bias_idxs is None:
                    positions = None
                elif not can_run(x):
                    biases, positions = self._gather_biases(i, positions), None
            x, selector.scores = block(x, selector.scores, None if biases is None else biases[i - first], positions)
        return selector.whole(x), selector.whole_scores()

    def _gather_biases(self, begin: int, positions: Tensor) -> list[Tensor]:
        """Attention biases of the selected tokens, for the blocks of the segment that begins with this block."""
        segment = [self.blocks[i] for i in range(begin, self.schedule.end_of_segment(begin))]
        tables = [block.attn.attention_biases for block in segment]
        index = segment[0].attn.attention_bias_idxs  # the same in all of them
        return levit_attention.gather_biases(tables, index, positions, self.fast_update)


_EVOLVED: dict[type[nn.Module], type[nn.Module]] = {  # timm's class, and the one that replaces it
    Attention: EvoAttention,
    AttentionDownsample: EvoAttentionDownsample,
    LevitBlock: EvoLevitBlock,
    LevitDownsample: EvoLevitDownsample,
    LevitStage: EvoLevitStage,
}


def evolved_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    return next((evolved for dense, evolved in _EVOLVED.items() if issubclass(cls, dense)), cls)


def dense_class_of(cls: type[nn.Module]) -> type[nn.Module]:
    return next((dense for dense, evolved in _EVOLVED.items() if issubclass(cls, evolved)), cls)
