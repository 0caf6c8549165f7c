""" Selection by similarity: its steps on tensors, and the object that takes them in a forward pass

For weights that were trained without token evolution. Before some blocks, the patch tokens that another one can stand
for best are averaged into it, and follow it from then on: each is what it was then, moved by what its average was moved
by since, the one rule of `published.follow`. To average tokens that are alike is the idea of `Token Merging: Your ViT
But Faster` - https://arxiv.org/abs/2210.09461; that they follow, so that the grid stays whole, is that of Evo-ViT.
Nothing here knows a model.

Each step is one node to symbolic tracing, as in `published`.

Shapes: B images, P prefix tokens, L tokens present, the prefix first and the patches in grid order, R of them that go
into others, C channels. Positions count from the first prefix token.
"""
from typing import NamedTuple, Protocol

import torch
import torch.fx
from torch import Tensor

from ..kernels.choice import can_run, launch
from ..kernels.size_mask import SizeMask
from .schedule import Schedule
from .selector import Selector
from .sequences import count_left, gather_tokens


def _places(num_patches: int, width: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every second patch token, and those between; as on a checkerboard, if they are a grid of this width."""
    even = torch.arange(0, num_patches, 2, device=device)
    if width is None:
        return even, even[:num_patches // 2] + 1
    # a row of even width begins as the one before it, unless shifted; no branch, because an export may leave it open
    shift = even // width % 2 * (1 - width % 2)
    return even + shift, (even + 1 - shift)[:num_patches // 2]


def _lengths(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (B, L) of tokens (B, L, C)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # takes no longer in compiled code; in an ONNX file, tools know the shape of a sum but not of a norm
        return x.to(dtype).square().sum(dim=2).clamp(min=1e-37).sqrt()  # which has no gradient at zero
    return torch.linalg.vector_norm(x, dim=2, dtype=dtype)


@torch.fx.wrap
def match_tokens(
        features: Tensor,
        size: Tensor | None,
        share: float,
        num_patches: int,
        num_prefix_tokens: int,
        width: int | None,
        is_aligned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose the patch tokens that go, and for each the one that it goes into.

    Every second token may go, into one of those between (ToMe, section "Bipartite soft matching"). What an average
    loses of both is a b / (a + b) |x_a - x_b|^2 for sizes a and b (Ward, 1963); least is lost first.

    Args:
        features: What tells who is alike (B, L, C); only its direction counts.
        size: How many tokens each one counts (B, L); None for one each, as in a whole grid.
        share: Share of the patch tokens of the image that are left.
        num_patches: Number of patch tokens of the image N.
        num_prefix_tokens: Number of prefix tokens P, which stay.
        width: Width of the grid, if the patch tokens are a whole one: then as on a checkerboard.
        is_aligned: See `count_left`.

    Returns:
        Positions of the tokens that go (B, R), R such that `count_left` patch tokens are left.
        Positions of those that they go into (B, R).

    Raises:
        ValueError: No patch token would be left.
    """
    num_present = features.shape[1] - num_prefix_tokens
    num_left = count_left(share, num_patches, num_prefix_tokens, num_present, is_aligned)
    if num_present == 1:  # a grid of so few patches that there is no other to go into
        nowhere = torch.zeros(features.shape[0], 0, dtype=torch.int64, device=features.device)
        return nowhere, nowhere
    features = features if features.dtype == torch.float64 else features.float()
    features = features[:, num_prefix_tokens:]
    features = features / _lengths(features, features.dtype).clamp(min=1e-12).unsqueeze(2)
    source, target = _places(num_present, width, features.device)
    if width is None:  # slices, which copy nothing
        sources, targets = features[:, ::2], features[:, 1::2]
    else:
        sources, targets = features.index_select(1, source), features.index_select(1, target)
    likeness = sources.bmm(targets.transpose(1, 2))
    loss = 1 - likeness.to(features.dtype)  # autocast may have changed it
    if size is not None:
        inverse = size[:, num_prefix_tokens:].reciprocal()
        loss = loss / (inverse[:, ::2].unsqueeze(2) + inverse[:, 1::2].unsqueeze(1))
    nearest = loss.argmin(dim=2)  # not `min`, whose shape in an ONNX file tools do not know
    least = loss.gather(2, nearest.unsqueeze(2)).flatten(1)
    goes = least.topk(num_present - num_left, dim=1, largest=False, sorted=False)[1]
    return source[goes] + num_prefix_tokens, target[nearest.gather(1, goes)] + num_prefix_tokens


@torch.fx.wrap
def places_after(goes: Tensor, into: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Where tokens are once some have gone into others.

    Args:
        goes: Positions of the tokens that go (B, R).
        into: Positions of those that they go into (B, R).
        num_tokens: Number of tokens so far L.

    Returns:
        Positions so far of the tokens that are left, in order (B, L - R).
        For each token so far, the position of the one that it follows among those (B, L).
    """
    # torch 2.5 exports no new tensor of any batch size to ONNX, so one row is expanded
    stays = goes.new_ones(1, num_tokens).expand(goes.shape[0], num_tokens).scatter(1, goes, 0)
    place = stays.cumsum(dim=1) - 1
    # tokens that go would write where another one is, so they write to one place more, which is cut off
    num_left = num_tokens - goes.shape[1]
    one_more = (place[:, -1:] + 1).expand_as(goes)  # no number, which ONNX takes for a constant
    order = torch.arange(num_tokens, device=goes.device).expand(goes.shape[0], num_tokens)
    left = torch.zeros(goes.shape[0], num_left + 1, dtype=torch.int64, device=goes.device)
    left = left.scatter(1, place.scatter(1, goes, one_more), order)[:, :num_left]
    return left, place.scatter(1, goes, place.gather(1, into))


@torch.fx.wrap
def average_tokens(
        x: Tensor,
        size: Tensor | None,
        goes: Tensor,
        into: Tensor,
        left: Tensor,
) -> tuple[Tensor, Tensor]:
    """Average tokens into those that stay.

    An average of directions is shorter than what it is of, which a network has never seen, so it is brought to their
    mean length. It counts as many tokens as make it their sum: less than their number, the less they are alike.

    Args:
        x: Tokens present (B, L, C).
        size: How many tokens each one counts (B, L); None for one each.
        goes: Positions of the tokens that go (B, R).
        into: Positions of those that they go into (B, R).
        left: Positions of those that stay (B, L - R).

    Returns:
        Tokens (B, L - R, C).
        Their sizes (B, L - R), in float32 or wider, without a gradient, as counts have none.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = torch.ones_like(x[:, :, 0], dtype=wide)
    x_gone, x_into = gather_tokens(x, goes), gather_tokens(x, into)
    length_gone = _lengths(x_gone, wide)
    length_into = _lengths(x_into, wide)

    # one average for each token that goes, of all that go into the same one, so those of one average come out equal
    size_into = size.gather(1, into)
    weight = (into.unsqueeze(2) == into.unsqueeze(1)) * size.gather(1, goes).unsqueeze(1)
    total = size_into + weight.sum(dim=2)
    weight, own = weight / total.unsqueeze(2), size_into / total  # shares, because sums overflow in half precision
    mean = x_into * own.to(x.dtype).unsqueeze(2) + weight.to(x.dtype).bmm(x_gone)
    mean_length = length_into * own + (weight * length_gone.unsqueeze(1)).sum(dim=2)
    length = _lengths(mean, wide)
    kept = (length / mean_length.clamp(min=1e-12)).clamp(min=0.01)  # opposite tokens, or all zero, are left as they are
    mean = mean * kept.reciprocal().to(x.dtype).unsqueeze(2)

    # they stand behind all tokens, and are taken from there in the place of what they are averages of
    position = torch.arange(x.shape[1] + goes.shape[1], device=x.device).expand(x.shape[0], -1)
    taken = position[:, :x.shape[1]].scatter(1, into, position[:, x.shape[1]:]).gather(1, left)
    averages = gather_tokens(torch.cat([x, mean.to(x.dtype)], dim=1), taken)
    return averages, torch.cat([size, total * kept.detach()], dim=1).gather(1, taken)


@torch.fx.wrap
def size_mask(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What attention adds to its logits so that a token is looked at like as many as it counts (B, 1, 1, L).

    ToMe, section "Tracking token size".
    """
    return None if size is None else size.log().to(dtype).unsqueeze(1).unsqueeze(1)


@torch.fx.wrap
def follow_averages(x: Tensor, averages: Tensor, tokens: Tensor, follows: Tensor) -> Tensor:
    """Give the tokens back that went into averages.

    As `published.follow`: a token is what it was, moved by what the one that it follows was moved by since.

    Args:
        x: Tokens before some went into others (B, L, C).
        averages: Tokens right after that (B, K, C).
        tokens: Tokens now (B, K, C).
        follows: Position of the one that each follows (B, L).

    Returns:
        Tokens now, all of them (B, L, C).
    """
    return x + gather_tokens(tokens - averages, follows)


class LayerNorm(NamedTuple):
    """The numbers of one: weight and bias (C,), where it has them, and epsilon."""
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Likeness(Protocol):
    """What tells which tokens of a model are alike."""

    def __call__(self, x: Tensor) -> Tensor:
        """From tokens (B, L, C) features (B, L, C), of which only the direction counts."""
        ...

    def as_layer_norm(self) -> LayerNorm | None:
        """The LayerNorm that it is, which a kernel can compute; None if it is something else."""
        ...


class BySimilarity(Selector):
    """Selection of a few tokens at a time that are averaged into others, and follow them."""

    def __init__(
            self,
            schedule: Schedule,
            num_prefix_tokens: int,
            num_patches: int,
            grid_width: int | None,
            likeness: Likeness,
            is_aligned: bool,
            is_whole_wanted: bool = True,
    ) -> None:
        """
        Args:
            schedule: What each block has to do.
            num_prefix_tokens: Number of prefix tokens P.
            num_patches: Number of patch tokens N.
            grid_width: Width of the grid of patch tokens, if they are a whole one.
            likeness: What tells which tokens are alike.
            is_aligned: See `count_left`.
            is_whole_wanted: Whether anybody will ask for the whole grid; if not, the way back is not kept.
        """
        super().__init__(schedule, num_prefix_tokens)
        self._num_patches = num_patches
        self._grid_width = grid_width
        self._likeness = likeness
        self._is_aligned = is_aligned
        self._is_whole_wanted = is_whole_wanted
        self._size: Tensor | None = None  # how many tokens each one counts (B, L)
        self._handed_over: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens before, right after, who follows whom

    def whole(self, x: Tensor) -> Tensor:
        for before, averages, follows in reversed(self._handed_over):
            if can_run(x) and can_run(before):
                x = launch('follow_averages', before, averages, x, follows)
            else:
                x = follow_averages(before, averages, x, follows)
        return x

    def _select(self, block: int, x: Tensor) -> Tensor:
        averages, follows = (self._average_by_kernels if can_run(x) else self._average)(block, x)
        if self._is_whole_wanted:
            self._handed_over.append((x, averages, follows))
        return averages

    def _average(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that are left, and whom each of those before follows."""
        if isinstance(x, Tensor) and can_run(x.detach()):  # what is chosen has no gradient
            _, _, _, left, follows, goes, into = self._launch(block, x.detach(), None)
        else:
            goes, into = match_tokens(
                self._likeness(x), self._size, self.schedule.keep_ratio[block], self._num_patches,
                self.num_prefix_tokens, self._grid_width if self._size is None else None, self._is_aligned)
            left, follows = places_after(goes, into, x.shape[1])
        if self.record is not None:
            self.record.note_averaged(block, goes, into, x.shape[1])
        averages, self._size = average_tokens(x, self._size, goes, into, left)
        self.attn_mask = size_mask(self._size, x.dtype)
        if self._rope is not None:
            self.present = left if self.present is None else self.present.gather(1, left)
        return averages, follows

    def _average_by_kernels(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `_average`."""
        averages, self._size, log_size, present, follows, goes, into = self._launch(block, x, self.present)
        self.attn_mask = SizeMask.of(log_size)
        if self.record is not None:
            self.record.note_averaged(block, goes, into, x.shape[1])
        if self._rope is not None:
            self.present = present
        return averages, follows

    def _launch(self, block: int, x: Tensor, present: Tensor | None) -> tuple[Tensor, ...]:
        """See `kernels.similarity.average_alike`."""
        num_present = x.shape[1] - self.num_prefix_tokens
        num_left = count_left(
            self.schedule.keep_ratio[block], self._num_patches, self.num_prefix_tokens, num_present,
            self._is_aligned)
        num_gone = num_present - num_left if num_present > 1 else 0  # the only token has no other to go into
        norm = self._likeness.as_layer_norm()
        features = None if norm is not None else self._likeness(x)
        weight, bias, eps = norm or LayerNorm(None, None, 0.)
        width = self._grid_width if self._size is None and self._grid_width is not None else 0
        return launch(
            'average_alike', x, features, weight, bias, eps, _compared_in(x), self._size, present, num_gone,
            self.num_prefix_tokens, width)


def _compared_in(x: Tensor) -> torch.dtype:
    """In what numbers features are compared: those that autocast would have products of, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
