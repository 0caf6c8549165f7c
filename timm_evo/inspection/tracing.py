""" The selections of an evolved model for given images

A shallow copy of the model runs and records them, so the model can be used elsewhere at the same time.
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

REPRESENTATIVE, NOTHING = -1, -2  # values of `Selection.follows`


class Selection(NamedTuple):
    """A selection before a block.

    Attributes:
        block: Number of the block. Blocks of a LeViT are counted through its stages, without downsampling.
        slow: Patches that go through this block and later ones (B, H, W), bool. After a downsampling of LeViT, the grid
            is smaller.
        scores: Global class attention that has selected the patches (B, H, W); None in selection='similarity'.
        follows: Position in the grid, row by row, of the patch that each patch follows (B, H, W), int64. A slow patch
            follows itself. In selection='similarity', another patch follows the one whose token it was averaged into.
            In the published selections, -1 is the representative token, and with fast_update=False -2 is nothing.
    """
    block: int
    slow: Tensor
    scores: Tensor | None
    follows: Tensor


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> list[Selection]:
    """Run an evolved model, and return its selections.

    The model runs in evaluation mode and is not compiled. It is not changed.

    Args:
        model: An evolved model, or a module with one inside: a backbone of `features_only=True`, a compiled or averaged
            model.
        images: Images as the model takes them (B, C, H, W).

    Returns:
        The selections in the order of the blocks; none for a `keep_ratio` of 1.

    Raises:
        TypeError: The model is not evolved and has no evolved model inside.
    """
    _, evolved = find_evolved(model)
    if evolved is None:
        raise TypeError(
            f'{type(model).__name__} cannot be traced, because it is not evolved and has no evolved model inside.')
    record = Record(evolved.num_prefix_tokens)
    with evaluating(evolved):
        twin = _twin(evolved)
        with recording(twin, record):
            twin.forward_features(images)
    return [_selection(step, record) for step in record.steps]


def _twin(model: EvolvedModel) -> EvolvedModel:
    """A copy of the model that can have its own record, as can its stages."""
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
