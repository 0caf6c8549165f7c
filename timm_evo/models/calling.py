""" How a block is called """
import inspect
from functools import partial

from timm.models import checkpoint
from torch import Tensor, nn

__all__ = ['call_block', 'check_takes_mask']


def call_block(
        block: nn.Module,
        x: Tensor,
        rotation: Tensor | None,
        attn_mask: Tensor | None,
        is_checkpointed: bool,
) -> Tensor:
    """Call a block with no more than it needs, as blocks of a user may know nothing of rotations or masks.

    Args:
        block: The block.
        x: Tokens present (B, L, C).
        rotation: Rotations of the tokens present but the prefix, if any.
        attn_mask: What attention adds to its logits (B, 1, 1, L), if anything.
        is_checkpointed: Whether it is to be computed once more for its gradient.

    Returns:
        What the block returns (B, L, C).
    """
    arguments: dict[str, Tensor] = {}
    if rotation is not None:
        arguments['rope'] = rotation
    if attn_mask is not None:
        arguments['attn_mask'] = attn_mask
    try:
        if not is_checkpointed:
            return block(x, **arguments)
        # by position, because a reentrant checkpoint takes no names
        return checkpoint(partial(_call_by_name, block, tuple(arguments)), x, *arguments.values())
    except TypeError:
        if attn_mask is not None:  # it may have been put in after the model was evolved
            check_takes_mask(block)
        raise


def _call_by_name(block: nn.Module, names: tuple[str, ...], x: Tensor, *values: Tensor) -> Tensor:
    """Call a block with the tokens and, by these names, these values."""
    return block(x, **dict(zip(names, values, strict=True)))


def check_takes_mask(block: nn.Module) -> None:
    """Refuse a block that cannot be told how many tokens each one counts, which selection by similarity needs.

    Raises:
        TypeError: Its forward takes no `attn_mask`.
    """
    parameters = inspect.signature(block.forward).parameters
    if 'attn_mask' not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{type(block).__name__} is not allowed as a block with selection='similarity', its forward takes no "
            "attn_mask. Let it take one, as timm's blocks do, or use selection='stage' or 'layer'.")
