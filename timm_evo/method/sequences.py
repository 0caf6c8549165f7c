""" Steps on sequences of tokens, for both kinds of selection

Batches are reshaped by `view`, because `unflatten` would fix their size in a traced ONNX graph. Shapes are those of
`published`.
"""
import torch
import torch.fx
from torch import Tensor


def is_one_image(batch_size: int) -> bool:
    """Whether the batch is known to have one image, which needs fewer steps.

    In a trace, an export or a compiler with a dynamic batch size, the result of the comparison is not a bool. A
    conversion to a bool would fix the size.
    """
    return (batch_size == 1) is True


def patches(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """The part of a sequence (B, P + N, ...) that belongs to the patch tokens (B, N, ...)."""
    return x if num_prefix_tokens == 0 else x[:, num_prefix_tokens:]  # a slice of everything also costs time


def count_slow(keep_ratio: float, num_patches: int) -> int:
    """Number of patch tokens on the slow path.

    Args:
        keep_ratio: Share of the patch tokens.
        num_patches: Number of patch tokens of the image N.

    Raises:
        ValueError: No patch token would be on the slow path.
    """
    product = keep_ratio * num_patches
    # `sym_int` keeps a symbol, so that an export can leave the image size dynamic
    num_slow = int(product) if isinstance(product, float) else torch.sym_int(product)
    if num_slow < 1:
        raise ValueError(
            f'keep_ratio={keep_ratio} of {num_patches} patch tokens leaves none on the slow path. '
            'Use a larger keep_ratio or a larger image.')
    return num_slow


def count_left(share: float, num_patches: int, num_prefix_tokens: int, num_present: int, is_aligned: bool) -> int:
    """Number of patch tokens that remain after some are averaged into others.

    Args:
        share: Share of the patch tokens of the image that should remain.
        num_patches: Number of patch tokens of the image N.
        num_prefix_tokens: Number of prefix tokens P.
        num_present: Number of patch tokens before. At most half of them, rounded up, are averaged into others.
        is_aligned: Whether the number of prefix and remaining tokens should be a multiple of 8, because attention with
            a mask then takes half of the time on a GPU. The cost changes by less than 3%. It would change by more in a
            grid of fewer than 128 patches, which is not aligned.

    Raises:
        ValueError: No patch token would remain.
    """
    num_left = count_slow(share, num_patches)
    if is_aligned and num_patches >= 128:
        aligned = (num_left + num_prefix_tokens + 4) // 8 * 8 - num_prefix_tokens
        if aligned > num_present:
            aligned -= 8
        if aligned >= num_present // 2:
            return aligned
        return min(max(num_left, num_present // 2), num_present)
    return num_left


def rows(positions: Tensor, num_tokens: int) -> Tensor:
    """Positions (B, K) in sequences of `num_tokens` as rows of the flattened batch (B * K,), to copy whole rows."""
    if is_one_image(positions.shape[0]):
        return positions.view(-1)
    sequence = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
    return (positions + sequence * num_tokens).view(-1)  # with `alpha`, torch 2.8 exports no dynamic size to ONNX


@torch.fx.wrap
def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Tokens of a sequence (B, L, C) at positions (B, K): (B, K, C)."""
    tokens = x.flatten(0, 1).index_select(0, rows(positions, x.shape[1]))
    return tokens.view(positions.shape[0], positions.shape[1], x.shape[2])
