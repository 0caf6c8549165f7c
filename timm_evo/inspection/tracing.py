""" Which tokens an evolved model keeps

A shallow copy of the model runs and notes what it selects, so whoever uses the model meanwhile sees nothing of it.
"""
import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import EvolvedModel, evaluating, find_evolved
from ..models.levit import LevitEvolution
from ..torch_private import shallow_copy
from .recording import Record, Step, recording

__all__ = ['Selection', 'trace']

REPRESENTATIVE, NOTHING = -1, -2  # that a patch follows


class Selection(NamedTuple):
    """What was selected before a block.

    Attributes:
        block: Number of the block. A LeViT's are counted through its stages, without those that downsample.
        slow: Patches that go through the blocks from here on (B, H, W), bool. After a downsampling of LeViT, the grid
            is smaller.
        scores: Global class attention that has selected them (B, H, W); None in selection='similarity'.
        follows: Position in the grid, row by row, of the patch that each one follows (B, H, W), int64. A slow patch
            follows itself. In selection='similarity' the others follow the patch whose token they were averaged into;
            in the published selections -1, the representative token, or with fast_update=False -2, nothing.
    """
    block: int
    slow: Tensor
    scores: Tensor | None
    follows: Tensor


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> list[Selection]:
    """Run an evolved model, and tell which tokens it selects.

    It runs in evaluation mode, uncompiled, and is as it was afterwards.

    Args:
        model: An evolved model, or what wraps one: a backbone of `features_only=True`, a compiled or averaged model.
        images: Images as the model takes them (B, C, H, W).

    Returns:
        Each selection, in the order of the blocks; none where `keep_ratio` is 1.

    Raises:
        TypeError: There is no evolved model in it.
    """
    _, evolved = find_evolved(model)
    if evolved is None:
        raise TypeError(f'{type(model).__name__} cannot be traced, it is not evolved and has no evolved model in it.')
    record = Record(evolved.num_prefix_tokens)
    with evaluating(evolved):
        twin = _twin(evolved)
        with recording(twin, record):
            twin.forward_features(images)
    return [_selection(step, record) for step in record.steps]


def _twin(model: EvolvedModel) -> EvolvedModel:
    """A copy that can have a record of its own, and so can its stages."""
    model = shallow_copy(model)
    model._record = None
    if isinstance(model, LevitEvolution):
        stages: list[Any] = [copy.copy(stage) for stage in model.stages]
        for stage in stages:
            stage._record = None
        model.stages = nn.ModuleList(stages)
    return model


def _selection(step: Step, record: Record) -> Selection:
    num_prefix_tokens = record.num_prefix_tokens
    grid = record.grid_of(step.place.shape[1])
    is_slow = torch.zeros_like(step.place, dtype=torch.bool).scatter(1, step.present, True)
    behind = REPRESENTATIVE if step.has_representative else NOTHING
    follows = F.pad(step.present - num_prefix_tokens, (0, 1), value=behind).gather(1, step.place)
    is_slow, follows, scores = (
        None if x is None else x[:, num_prefix_tokens:].unflatten(1, grid) for x in (is_slow, follows, step.scores))
    return Selection(step.block, is_slow, scores, follows)
