""" Which tokens an evolved model keeps

The model runs as it is, as a shallow copy whose methods that select tokens are listened to.
"""
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import similarity
from .evolved_model import Evolved, evaluating, find_evolved
from .levit import LevitEvolution
from .torch_private import shallow_copy

__all__ = ['Selection', 'trace']

if TYPE_CHECKING:
    class _Listening:
        """The class of the module that is copied, which stands behind."""
        num_prefix_tokens: int
        fast_update: bool
        _begin_segment: Any
        _match_tokens: Any
else:
    _Listening = object

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
    found = find_evolved(model)
    if found is None:
        raise TypeError(f'{type(model).__name__} cannot be traced, it is not evolved and has no evolved model in it.')
    evolved = found[1]
    selections: list[Selection] = []
    with evaluating(evolved):
        _listening_copy(evolved, images, selections).forward_features(images)
    return selections


def _copy(module: Any, *listening_cls: type, **attributes) -> Any:
    """A shallow copy of a module, perhaps with a class before its own, which the original knows nothing of."""
    module = shallow_copy(module)
    module.__class__ = type(type(module).__name__, (*listening_cls, type(module)), {})
    vars(module).update(attributes)
    return module


def _listening_copy(model: Evolved, images: Tensor, selections: list[Selection]) -> Evolved:
    height, width = images.shape[2:]
    if not isinstance(model, LevitEvolution):
        grid = model.patch_embed.dynamic_feat_size((height, width))
        return _copy(model, _ListeningVit, selections=selections, grid=grid)
    stages, first_block = nn.ModuleList(), 0
    for stage, info in zip(model.stages, model.feature_info, strict=False):  # a pruned model has fewer stages
        grid = tuple(-(-size // info['reduction']) for size in (height, width))
        stages.append(_copy(stage, _ListeningStage, selections=selections, grid=grid, first_block=first_block))
        first_block += len(stage.blocks)
    model = _copy(model)
    model.stages = stages
    return model


def _published(
        block: int,
        grid: tuple[int, int],
        slow: Tensor,
        scores: Tensor,
        num_prefix_tokens: int,
        fast_update: bool,
) -> Selection:
    """From positions of prefix and slow tokens (B, P + K) and scores (B, P + N)."""
    size = len(slow), *grid
    is_slow = torch.zeros_like(scores, dtype=torch.bool).scatter(1, slow, True)[:, num_prefix_tokens:].reshape(size)
    position = torch.arange(grid[0] * grid[1], device=slow.device).view(1, *grid).expand(size)
    follows = position.where(is_slow, REPRESENTATIVE if fast_update else NOTHING)
    return Selection(block, is_slow, scores[:, num_prefix_tokens:].reshape(size), follows)


class _ListeningStage(_Listening):
    if TYPE_CHECKING:
        selections: list[Selection]
        grid: tuple[int, int]
        first_block: int

    def _begin_segment(self, index, x, scores, keep_ratio):
        segment = super()._begin_segment(index, x, scores, keep_ratio)
        if segment[1] is not None:
            self.selections.append(_published(
                self.first_block + index, self.grid, segment[1], scores, self.num_prefix_tokens, self.fast_update))
        return segment


class _ListeningVit(_ListeningStage):
    first_block = 0
    leader: Tensor | None = None  # position among all tokens of the one that each token follows (B, P + N)
    present: Tensor | None = None  # positions among all tokens of those that are left (B, L)

    def _match_tokens(self, index, x, size, keep_ratio, num_patches, grid_width):
        goes, into = super()._match_tokens(index, x, size, keep_ratio, num_patches, grid_width)
        if goes.shape[1] == 0:  # a share of so few patches that none goes
            return goes, into
        tokens = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if self.present is None:
            self.present = self.leader = tokens
        assert self.leader is not None
        left, follows = similarity.places_after(goes, into, x.shape[1])
        place = torch.zeros_like(self.leader).scatter(1, self.present, tokens).gather(1, self.leader)
        self.present = self.present.gather(1, left)
        self.leader = self.present.gather(1, follows.gather(1, place))
        leader = (self.leader[:, self.num_prefix_tokens:] - self.num_prefix_tokens).reshape(len(x), *self.grid)
        position = torch.arange(leader[0].numel(), device=x.device).view(self.grid)
        self.selections.append(Selection(index, leader == position, None, leader))
        return goes, into
