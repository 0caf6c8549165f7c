""" Calls of blocks """
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
    """Call a block with only the arguments that it needs, because a user's block may not take rotations or masks.

    Args:
        block: The block.
        x: Tokens present (B, L, C).
        rotation: Rotations of the tokens present without the prefix, if any.
        attn_mask: Mask that attention adds to its logits (B, 1, 1, L), if any.
        is_checkpointed: Whether the block is computed again for its gradient, instead of storing activations.

    Returns:
        Output of the block (B, L, C).
    """
    arguments: dict[str, Tensor] = {}
    if rotation is not None:
        arguments['rope'] = rotation
    if attn_mask is not None:
        arguments['attn_mask'] = attn_mask
    try:
        if not is_checkpointed:
            return block(x, **arguments)
        # by position, because a reentrant checkpoint takes no keyword arguments
        return checkpoint(partial(_call_by_name, block, tuple(arguments)), x, *arguments.values())
    except TypeError:
        if attn_mask is not None:  # the block may have been replaced after the model was evolved
            check_takes_mask(block)
        raise


def _call_by_name(block: nn.Module, names: tuple[str, ...], x: Tensor, *values: Tensor) -> Tensor:
    """Call a block with the tokens, and with the values as keyword arguments of these names."""
    return block(x, **dict(zip(names, values, strict=True)))


def check_takes_mask(block: nn.Module) -> None:
    """Check that a block takes an attention mask, by which selection by similarity weights averaged tokens.

    Raises:
        TypeError: Its forward takes no `attn_mask`.
    """
    parameters = inspect.signature(block.forward).parameters
    if 'attn_mask' not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"{type(block).__name__} is not allowed as a block with selection='similarity', because its forward takes "
            "no attn_mask. Add this argument, as in timm's blocks, or use selection='stage' or 'layer'.")
