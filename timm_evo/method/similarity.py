""" Selection by similarity: its steps on tensors, and the selector that runs them in a forward pass

It is for weights that were trained without token evolution. Before some blocks, the most similar patch tokens are
averaged into others. From then on, each averaged token follows its average: the change of the average is added to the
token, by the same rule as in `published.follow`. Averaging similar tokens is the idea of `Token Merging: Your ViT But
Faster` - https://arxiv.org/abs/2210.09461. Following, which keeps the grid whole, is the idea of Evo-ViT.

Symbolic tracing sees each step as one node, as in `published`.

Shapes: B images, P prefix tokens, L tokens present, R of them that are averaged into others, C channels. Sequences have
the prefix first and then the patches in grid order. Positions count from the first prefix token.
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
    """Positions of every second patch token, and of the others; as on a checkerboard in a grid of this width."""
    even = torch.arange(0, num_patches, 2, device=device)
    if width is None:
        return even, even[:num_patches // 2] + 1
    # in a grid of even width, every second row is shifted; no branch, because an export may have a dynamic width
    shift = even // width % 2 * (1 - width % 2)
    return even + shift, (even + 1 - shift)[:num_patches // 2]


def _lengths(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths (B, L) of tokens (B, L, C)."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # tools for ONNX files know the shape of a sum but not of a norm; in compiled code both take the same time
        return x.to(dtype).square().sum(dim=2).clamp(min=1e-37).sqrt()  # the root has no gradient at zero
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
    """Choose the patch tokens that are averaged into others, and for each of them the other token.

    Every second token may be averaged into one of the others (ToMe, section "Bipartite soft matching"). An average of
    two tokens of sizes a and b has the loss a b / (a + b) |x_a - x_b|^2 (Ward, 1963). The least losses are chosen.

    Args:
        features: Features of the tokens, of which only the direction is compared (B, L, C).
        size: Number of tokens that each token represents (B, L); None for one each, as in a whole grid.
        share: Share of the patch tokens of the image that remain.
        num_patches: Number of patch tokens of the image N.
        num_prefix_tokens: Number of prefix tokens P, which all remain.
        width: Width of the grid, if the patch tokens are a whole grid. The tokens are then split as on a checkerboard.
        is_aligned: See `count_left`.

    Returns:
        Positions of the tokens that are averaged into others (B, R). R is such that `count_left` patch tokens remain.
        Positions of the tokens that they are averaged into (B, R).

    Raises:
        ValueError: No patch token would remain.
    """
    num_present = features.shape[1] - num_prefix_tokens
    num_left = count_left(share, num_patches, num_prefix_tokens, num_present, is_aligned)
    if num_present == 1:  # a token alone has no other to be averaged into
        nowhere = torch.zeros(features.shape[0], 0, dtype=torch.int64, device=features.device)
        return nowhere, nowhere
    features = features if features.dtype == torch.float64 else features.float()
    features = features[:, num_prefix_tokens:]
    features = features / _lengths(features, features.dtype).clamp(min=1e-12).unsqueeze(2)
    source, target = _places(num_present, width, features.device)
    if width is None:  # slices do not copy
        sources, targets = features[:, ::2], features[:, 1::2]
    else:
        sources, targets = features.index_select(1, source), features.index_select(1, target)
    likeness = sources.bmm(targets.transpose(1, 2))
    loss = 1 - likeness.to(features.dtype)  # autocast may have changed it
    if size is not None:
        inverse = size[:, num_prefix_tokens:].reciprocal()
        loss = loss / (inverse[:, ::2].unsqueeze(2) + inverse[:, 1::2].unsqueeze(1))
    nearest = loss.argmin(dim=2)  # not `min`, because tools for ONNX files do not know its shape
    least = loss.gather(2, nearest.unsqueeze(2)).flatten(1)
    goes = least.topk(num_present - num_left, dim=1, largest=False, sorted=False)[1]
    return source[goes] + num_prefix_tokens, target[nearest.gather(1, goes)] + num_prefix_tokens


@torch.fx.wrap
def places_after(goes: Tensor, into: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions of the tokens after some were averaged into others.

    Args:
        goes: Positions of the tokens that are averaged into others (B, R).
        into: Positions of the tokens that they are averaged into (B, R).
        num_tokens: Number of tokens before L.

    Returns:
        Earlier positions of the remaining tokens, in order (B, L - R).
        For each earlier token, the position among the remaining tokens of the token that it follows (B, L).
    """
    # one row is expanded, because torch 2.5 cannot export a new tensor of a dynamic batch size to ONNX
    stays = goes.new_ones(1, num_tokens).expand(goes.shape[0], num_tokens).scatter(1, goes, 0)
    place = stays.cumsum(dim=1) - 1
    # tokens that do not remain have no own position, so they write to an additional one, which is cut off
    num_left = num_tokens - goes.shape[1]
    one_more = (place[:, -1:] + 1).expand_as(goes)  # not a number, which would be a constant in ONNX
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
    """Average tokens into those that remain.

    The average of tokens with different directions is shorter than the tokens. A network was not trained with such
    short tokens, so the average is scaled to their mean length. Its size is scaled by the inverse factor, so that size
    times token is still the sum. The less similar the tokens are, the smaller is the size.

    Args:
        x: Tokens present (B, L, C).
        size: Number of tokens that each token represents (B, L); None for one each.
        goes: Positions of the tokens that are averaged into others (B, R).
        into: Positions of the tokens that they are averaged into (B, R).
        left: Positions of the tokens that remain (B, L - R).

    Returns:
        Tokens that remain (B, L - R, C).
        Their sizes (B, L - R) in float32 or wider. They have no gradient.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if size is None:
        size = torch.ones_like(x[:, :, 0], dtype=wide)
    x_gone, x_into = gather_tokens(x, goes), gather_tokens(x, into)
    length_gone = _lengths(x_gone, wide)
    length_into = _lengths(x_into, wide)

    # One average for each token of `goes`, over all tokens with the same target. Those with the same target are equal.
    size_into = size.gather(1, into)
    weight = (into.unsqueeze(2) == into.unsqueeze(1)) * size.gather(1, goes).unsqueeze(1)
    total = size_into + weight.sum(dim=2)
    weight, own = weight / total.unsqueeze(2), size_into / total  # shares, because sums overflow in half precision
    mean = x_into * own.to(x.dtype).unsqueeze(2) + weight.to(x.dtype).bmm(x_gone)
    mean_length = length_into * own + (weight * length_gone.unsqueeze(1)).sum(dim=2)
    length = _lengths(mean, wide)
    kept = (length / mean_length.clamp(min=1e-12)).clamp(min=0.01)  # limit for opposite tokens, whose mean is small
    mean = mean * kept.reciprocal().to(x.dtype).unsqueeze(2)

    # the averages are appended to the tokens, and then gathered at the positions of their targets
    position = torch.arange(x.shape[1] + goes.shape[1], device=x.device).expand(x.shape[0], -1)
    taken = position[:, :x.shape[1]].scatter(1, into, position[:, x.shape[1]:]).gather(1, left)
    averages = gather_tokens(torch.cat([x, mean.to(x.dtype)], dim=1), taken)
    return averages, torch.cat([size, total * kept.detach()], dim=1).gather(1, taken)


@torch.fx.wrap
def size_mask(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask that attention adds to its logits, so that a token counts as several equal tokens (B, 1, 1, L).

    Paper: ToMe, section "Tracking token size".
    """
    return None if size is None else size.log().to(dtype).unsqueeze(1).unsqueeze(1)


@torch.fx.wrap
def follow_averages(x: Tensor, averages: Tensor, tokens: Tensor, follows: Tensor) -> Tensor:
    """Restore the tokens that were averaged into others.

    As in `published.follow`, the change of the followed token is added to each token.

    Args:
        x: Tokens before some were averaged (B, L, C).
        averages: Tokens right after that (B, K, C).
        tokens: Tokens after some blocks (B, K, C).
        follows: Position of the token that each token follows (B, L).

    Returns:
        All tokens after these blocks (B, L, C).
    """
    return x + gather_tokens(tokens - averages, follows)


class LayerNorm(NamedTuple):
    """Weight and bias (C,) of a LayerNorm, if it has them, and its epsilon."""
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Likeness(Protocol):
    """Features by which the tokens of a model are compared."""

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B, L, C) of tokens (B, L, C). Only their direction is compared."""
        ...

    def as_layer_norm(self) -> LayerNorm | None:
        """The LayerNorm that computes the features, for a kernel; None if something else computes them."""
        ...


class BySimilarity(Selector):
    """Selection that averages a few tokens at a time into others, which they follow."""

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
            schedule: Schedule of the blocks.
            num_prefix_tokens: Number of prefix tokens P.
            num_patches: Number of patch tokens N.
            grid_width: Width of the grid of patch tokens, if they are a whole grid.
            likeness: Features by which tokens are compared.
            is_aligned: See `count_left`.
            is_whole_wanted: Whether `whole` will be called. If not, what it needs is not stored.
        """
        super().__init__(schedule, num_prefix_tokens)
        self._num_patches = num_patches
        self._grid_width = grid_width
        self._likeness = likeness
        self._is_aligned = is_aligned
        self._is_whole_wanted = is_whole_wanted
        self._size: Tensor | None = None  # number of tokens that each token represents (B, L)
        self._handed_over: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens before, right after, `follows`

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
        """Tokens that remain, and the position of the token that each earlier token follows."""
        if isinstance(x, Tensor) and can_run(x.detach()):  # the choice has no gradient
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
        """Average as `_average`, with kernels."""
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
        num_gone = num_present - num_left if num_present > 1 else 0  # see `match_tokens`
        norm = self._likeness.as_layer_norm()
        features = None if norm is not None else self._likeness(x)
        weight, bias, eps = norm or LayerNorm(None, None, 0.)
        width = self._grid_width if self._size is None and self._grid_width is not None else 0
        return launch(
            'average_alike', x, features, weight, bias, eps, _compared_in(x), self._size, present, num_gone,
            self.num_prefix_tokens, width)


def _compared_in(x: Tensor) -> torch.dtype:
    """Dtype in which features are compared: that of autocast for products, if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
