""" Values that hooks get in an evolved model, spread to all patches

A hook on a block gets the tokens present after a selection, in the order in which they go through the blocks. Every
token of the whole sequence is one of these tokens or follows one, which tells how values are spread.
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
    """A context that spreads values of hooks in an evolved model to the whole grid.

    The selections are those of the last forward pass inside the `with`, which any code may call:

        with timm_evo.whole_grid(model) as grid:
            handle = model.blocks[7].register_forward_hook(
                lambda block, args, out: seen.append(grid.tokens(out)))
            model(images)

    Args:
        model: An evolved model, or a module with one inside. It is not changed.

    Yields:
        An object whose methods spread values. It works only inside the `with`.

    Raises:
        TypeError: The model is not evolved and has no evolved model inside.
    """
    _, evolved = find_evolved(model)
    if evolved is None:
        raise TypeError(f'{type(model).__name__} is not evolved, so hooks already get the whole grid.')
    record = Record(evolved.num_prefix_tokens)
    try:
        with recording(evolved, record):
            yield WholeGrid(record)
    finally:
        record.forget()  # a hook that remains may get values of later passes, which have no record


class WholeGrid:
    """Spreads values of the tokens present to all P + N tokens, in the order of the dense model: prefix, then patches.

    The values are from a block or a part of one (`norm1`, `attn`, `mlp`) in the last forward pass of the model. Values
    from blocks before the first selection are returned unchanged. With `fast_update=False` placeholders follow no
    token, and their values are zero.

    The selection of a value is found by its number of tokens. Several published selections may have the same number.
    This does not matter for a hook that runs in the forward pass. Later, `block` must tell which block the value is
    from, as in `model.blocks[block]`. Blocks of a LeViT are counted through its stages, without downsampling.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        # for `reshape_transform`: the pass, the selections of its activations, and the number of its gradients so far
        self._steps = record.steps
        self._shown: list[Step | None] = []
        self._num_gradients = 0

    def tokens(self, x: Tensor, block: int | None = None) -> Tensor:
        """Spread values: each token gets the value of the token that it is or follows.

        For the output of a block, `forward_intermediates` is more exact: it adds to each token the change of the token
        that it follows.

        Args:
            x: Values of the tokens present (B, L, C), or their queries, keys or values (B, H, L, d).
            block: Block that the values are from, if the number of tokens does not tell it.

        Returns:
            Values of all tokens (B, P + N, C) or (B, H, P + N, d).

        Raises:
            ValueError: The last forward pass had no selection with this number of tokens, or several.
            RuntimeError: There was no forward pass inside the `with`, or the `with` has ended.
        """
        return _spread(x, self._find(x, block), -2)

    def gradients(self, x: Tensor, block: int | None = None) -> Tensor:
        """Spread gradients: all tokens that follow one token share its gradient equally, so the sum is the same.

        Args:
            x: Gradient of the tokens present (B, L, C), or of their queries, keys or values (B, H, L, d).
            block: Block that the gradient is from, if the number of tokens does not tell it.

        Returns:
            Gradient of all tokens (B, P + N, C) or (B, H, P + N, d).

        Raises:
            ValueError: As in `tokens`.
            RuntimeError: As in `tokens`.
        """
        return _share(x, self._find(x, block), -2)

    def attention(self, x: Tensor, block: int | None = None) -> Tensor:
        """Spread attention maps.

        All tokens that follow one token pay its attention, and share equally the attention that is paid to it. Rows
        still sum to 1. A token that follows nothing pays attention to itself.

        Args:
            x: Attention of the tokens present to each other (B, H, L, L).
            block: Block that the attention is from, if the number of tokens does not tell it.

        Returns:
            Attention of all tokens to each other (B, H, P + N, P + N).

        Raises:
            ValueError: As in `tokens`.
            RuntimeError: As in `tokens`.
        """
        if x.dim() != 4 or x.shape[-1] != x.shape[-2]:
            raise ValueError(
                f'x of shape {tuple(x.shape)} is not allowed. Attention maps must be of shape (B, H, L, L).')
        step = self._find(x, block)
        whole = _spread(_share(x, step, -1), step, -2)
        if step is not None and not step.has_representative:
            follows_nothing = step.place == step.num_tokens
            whole = whole + follows_nothing.to(x.dtype).diag_embed().unsqueeze(1)
        return whole

    def reshape_transform(self, x: Tensor) -> Tensor:
        """Feature maps of activations and of their gradients, for the argument of this name in pytorch-grad-cam.

        A call while the blocks run is for an activation (see `tokens`). A call after that is for a gradient (see
        `gradients`). Gradients must come in the reverse order of the activations of the same pass.

        Args:
            x: Activations of the tokens present (B, L, C), or their gradient.

        Returns:
            Feature maps of the patches (B, C, H, W).

        Raises:
            ValueError: As in `tokens`.
            RuntimeError: As in `tokens`.
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
        """The selection of the blocks that values are from; None for a whole sequence."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f'x must be a tensor, not a {type(x).__name__}. Of the tuple that a block of LeViT returns, take the '
                'first element.')
        record = self._record
        if not record.grids:
            raise RuntimeError(
                'There is no forward pass to read selections from: the model has not run inside the `with`, or the '
                '`with` has ended.')
        if block is not None:
            step = self._step_before(block)
        else:
            steps: list[Step | None] = [step for step in record.steps if step.num_tokens == x.shape[-2]]
            if record.running:
                steps = steps[-1:]
            # once a flat model has selected, no later block of this pass has the whole sequence
            if self._is_whole(x) and not (steps and record.running and len(record.grids) == 1):
                steps.append(None)
            if len(steps) > 1:
                raise ValueError(f'block=None is not clear. Give the block that x is from: {self._describe()}.')
            step = steps[0] if steps else None
        self._check(x, step)
        return step

    def _step_before(self, block: int) -> Step | None:
        """The selection whose tokens go through a block; None before the first selection."""
        if block < 0:
            raise ValueError(f'block={block} is not allowed. It must be the number of a block, at least 0.')
        stage = max(first for first in self._record.grids if first <= block)  # only a LeViT has several
        return next((step for step in reversed(self._record.steps) if stage <= step.block <= block), None)

    def _is_whole(self, x: Tensor) -> bool:
        num_patches = [math.prod(grid) for grid in self._record.grids.values()]
        return x.shape[-2] - self._record.num_prefix_tokens in num_patches

    def _check(self, x: Tensor, step: Step | None) -> None:
        """Check that values can be from a selection."""
        fits = self._is_whole(x) if step is None else (len(step.place), step.num_tokens) == (len(x), x.shape[-2])
        if not fits:
            where = 'the last forward pass' if step is None else f'block {step.block} or later ones'
            raise ValueError(f'x of shape {tuple(x.shape)} is not from {where}: {self._describe()}.')

    def _describe(self) -> str:
        """The number of tokens in each part of the last forward pass, for an error."""
        record = self._record
        numbers = {first: record.num_prefix_tokens + math.prod(grid) for first, grid in record.grids.items()}
        numbers |= {step.block: step.num_tokens for step in record.steps}
        images = f' of each of {len(record.steps[0].place)} images' if record.steps else ''
        return f'tokens{images}: ' + ', '.join(f'{numbers[block]} from block {block} on' for block in sorted(numbers))


def _spread(x: Tensor, step: Step | None, dim: int) -> Tensor:
    """Spread values of the tokens present to all tokens, along a dimension counted from the last."""
    if step is None:
        return x
    if not step.has_representative:  # index K: zero for tokens that follow nothing
        x = F.pad(x, [0, 0] * (-1 - dim) + [0, 1])
    shape = [len(step.place)] + [1] * (x.dim() - 1)
    shape[dim] = -1
    return x.take_along_dim(step.place.view(shape), dim)


def _share(x: Tensor, step: Step | None, dim: int) -> Tensor:
    """Spread values as `_spread`, but in equal parts with the same sum."""
    if step is None:
        return x
    number = torch.zeros(len(step.place), step.num_tokens + 1, dtype=x.dtype, device=x.device)
    number = number.scatter_add(1, step.place, torch.ones_like(step.place, dtype=x.dtype))[:, :step.num_tokens]
    shape = [len(x)] + [1] * (x.dim() - 1)
    shape[dim] = -1
    return _spread(x / number.reshape(shape), step, dim)
