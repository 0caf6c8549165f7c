""" What hooks see in an evolved model, as values of all patches

Between two blocks there are the tokens of a selection, so a hook sees those, in the order in which they go through the
blocks. Every token of the whole sequence is one of them or follows one; that gives the way back.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.base import find_evolved
from .recording import Record, Step, recording

__all__ = ['WholeGrid', 'whole_grid']


@contextmanager
def whole_grid(model: nn.Module) -> 'Iterator[WholeGrid]':
    """The way back to the whole grid for what hooks see in an evolved model.

    It goes by the last forward pass, whoever has called the model:

        with timm_evo.whole_grid(model) as grid:
            handle = model.blocks[7].register_forward_hook(lambda block, args, out: seen.append(grid.tokens(out)))
            model(images)

    Args:
        model: An evolved model, or what wraps one. It is as it was afterwards.

    Yields:
        What turns values of the tokens present into values of all. Within the `with` alone.

    Raises:
        TypeError: There is no evolved model in it.
    """
    _, evolved = find_evolved(model)
    if evolved is None:
        raise TypeError(f'{type(model).__name__} has a whole grid everywhere, it is not evolved.')
    record = Record(evolved.num_prefix_tokens)
    try:
        with recording(evolved, record):
            yield WholeGrid(record)
    finally:
        record.forget()  # a hook that stays may see later passes, which nobody notes


class WholeGrid:
    """Values of the tokens present as values of all P + N, in the order of the dense model: prefix, then patches.

    Of a block or a part of one (`norm1`, `attn`, `mlp`), in the last forward pass of the model. Where no selection is
    open, values are returned as they are. With `fast_update=False` placeholders follow nothing: nothing is computed for
    them, and their values are zero.

    A value finds its selection by its number of tokens. Several published selections may leave as many: a hook that
    runs within the forward pass need not care, but later on `block` says where the value is from, as in
    `model.blocks[block]`. A LeViT's blocks are counted through its stages, without those that downsample.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._steps = record.steps  # of the pass that these are of:
        self._shown: list[Step | None] = []  # where the activations are from that `reshape_transform` was given
        self._num_gradients = 0  # that it was given

    def tokens(self, x: Tensor, block: int | None = None) -> Tensor:
        """Values of tokens: each has that of the token that it is or follows.

        For the output of a block, `forward_intermediates` has more: there each token is what it was, moved by what the
        one that it follows was moved by.

        Args:
            x: What a hook saw of the tokens present (B, L, C), or of their queries, keys or values (B, H, L, d).
            block: Block that it is from, where that is not clear.

        Returns:
            The same of all tokens (B, P + N, C) or (B, H, P + N, d).

        Raises:
            ValueError: The last forward pass had no such tokens, or several selections of so many.
            RuntimeError: There was no forward pass within the `with`, or that has ended.
        """
        return _spread(x, self._find(x, block), -2)

    def gradients(self, x: Tensor, block: int | None = None) -> Tensor:
        """Gradients: tokens that are one share its gradient equally, so the sum over all is what it was.

        Args:
            x: Gradient of the tokens present (B, L, C), or of their queries, keys or values (B, H, L, d).
            block: Block that it is from, where that is not clear.

        Returns:
            Gradient of all tokens (B, P + N, C) or (B, H, P + N, d).

        Raises:
            ValueError: As of `tokens`.
        """
        return _share(x, self._find(x, block), -2)

    def attention(self, x: Tensor, block: int | None = None) -> Tensor:
        """Attention maps: tokens that are one look at the same, and share equally what looks at it.

        Rows still sum to 1. A token that follows nothing looks at itself.

        Args:
            x: Attention of the tokens present to each other (B, H, L, L).
            block: Block that it is from, where that is not clear.

        Returns:
            Attention of all tokens to each other (B, H, P + N, P + N).

        Raises:
            ValueError: As of `tokens`.
        """
        if x.dim() != 4 or x.shape[-1] != x.shape[-2]:
            raise ValueError(f'x of shape {tuple(x.shape)} is not allowed, attention maps are of shape (B, H, L, L).')
        step = self._find(x, block)
        whole = _spread(_share(x, step, -1), step, -2)
        if step is not None and not step.has_representative:
            follows_nothing = step.place == step.num_tokens
            whole = whole + follows_nothing.to(x.dtype).diag_embed().unsqueeze(1)
        return whole

    def reshape_transform(self, x: Tensor) -> Tensor:
        """Feature maps of activations and of their gradients, as pytorch-grad-cam asks for both.

        What comes while the blocks run is an activation, see `tokens`. What comes after that is a gradient, see
        `gradients`, of the activations of the same pass in reverse order.

        Args:
            x: Activations of the tokens present (B, L, C), or their gradient.

        Returns:
            Feature maps of the patches (B, C, H, W).

        Raises:
            ValueError: As of `tokens`.
        """
        if self._steps is not self._record.steps:
            self._steps, self._shown, self._num_gradients = self._record.steps, [], 0
        if self._record.running:
            step = self._find(x, None)
            whole = _spread(x, step, -2)
            self._shown.append(step)
        elif self._shown:
            step = self._shown[-1 - self._num_gradients % len(self._shown)]
            self._num_gradients += 1
            self._check(x, step)
            whole = _share(x, step, -2)
        else:
            whole = self.gradients(x)
        num_prefix_tokens = self._record.num_prefix_tokens
        return whole[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, self._record.grid_of(whole.shape[1]))

    def _find(self, x: Tensor, block: int | None) -> Step | None:
        """The selection that values of tokens are from; None for a whole sequence."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f'x is a {type(x).__name__}, not a tensor. Of what a block of LeViT returns, take the first.')
        record = self._record
        if not record.grids:
            raise RuntimeError(
                'There is no forward pass to go by: the model has not run within the `with`, or that has ended.')
        if block is not None:
            step = self._step_before(block)
        else:
            steps: list[Step | None] = [step for step in record.steps if step.num_tokens == x.shape[-2]]
            if record.running:
                steps = steps[-1:]
            # a flat model that runs and has selected has no whole sequence any more
            if self._is_whole(x) and not (steps and record.running and len(record.grids) == 1):
                steps.append(None)
            if len(steps) > 1:
                raise ValueError(f'block=None is not clear, say which block x is from: {self._describe()}.')
            step = steps[0] if steps else None
        self._check(x, step)
        return step

    def _step_before(self, block: int) -> Step | None:
        """The selection that is open in a block; None where none is."""
        if block < 0:
            raise ValueError(f'block={block} is not allowed. It must be the number of a block, from 0.')
        stage = max(first for first in self._record.grids if first <= block)  # one for all blocks, but of a LeViT
        return next((step for step in reversed(self._record.steps) if stage <= step.block <= block), None)

    def _is_whole(self, x: Tensor) -> bool:
        num_patches = [math.prod(grid) for grid in self._record.grids.values()]
        return x.shape[-2] - self._record.num_prefix_tokens in num_patches

    def _check(self, x: Tensor, step: Step | None) -> None:
        """Refuse values that can't be from a selection."""
        fits = self._is_whole(x) if step is None else (len(step.place), step.num_tokens) == (len(x), x.shape[-2])
        if not fits:
            where = 'the last forward pass' if step is None else f'block {step.block} or those behind it'
            raise ValueError(f'x of shape {tuple(x.shape)} is not from {where}: {self._describe()}.')

    def _describe(self) -> str:
        """How many tokens there were in the last forward pass, for an error."""
        record = self._record
        numbers = {first: record.num_prefix_tokens + math.prod(grid) for first, grid in record.grids.items()}
        numbers |= {step.block: step.num_tokens for step in record.steps}
        images = f' of each of {len(record.steps[0].place)} images' if record.steps else ''
        return f'tokens{images}: ' + ', '.join(f'{numbers[block]} from block {block} on' for block in sorted(numbers))


def _spread(x: Tensor, step: Step | None, dim: int) -> Tensor:
    """Values of the tokens present in the places of all, along a dimension counted from the last."""
    if step is None:
        return x
    if not step.has_representative:  # zero for tokens that follow nothing
        x = F.pad(x, [0, 0] * (-1 - dim) + [0, 1])
    shape = [len(step.place)] + [1] * (x.dim() - 1)
    shape[dim] = -1
    return x.take_along_dim(step.place.view(shape), dim)


def _share(x: Tensor, step: Step | None, dim: int) -> Tensor:
    """As `_spread`, in equal parts that have the same sum."""
    if step is None:
        return x
    number = torch.zeros(len(step.place), step.num_tokens + 1, dtype=x.dtype, device=x.device)
    number = number.scatter_add(1, step.place, torch.ones_like(step.place, dtype=x.dtype))[:, :step.num_tokens]
    shape = [len(x)] + [1] * (x.dim() - 1)
    shape[dim] = -1
    return _spread(x / number.reshape(shape), step, dim)
