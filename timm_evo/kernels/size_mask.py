""" A mask that computes the attention itself

timm's blocks pass their mask to `scaled_dot_product_attention`, which calls the mask's `__torch_function__` first, as
it does for PyTorch's own `CausalBias`. So the blocks are unchanged, and all other functions get a plain tensor.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private import WithoutTorchFunction
from .choice import is_differentiated, launch

__all__ = ['SizeMask']


class SizeMask(Tensor):
    """Log of the number of tokens that each key represents (B, 1, 1, L), which is added to the logits."""

    @classmethod
    def of(cls, log_size: Tensor) -> Tensor:
        """The mask for log sizes (B, L). For tensors of a subclass, such as `FakeTensor`, the mask is plain."""
        mask = log_size.unsqueeze(1).unsqueeze(1)
        return mask.as_subclass(cls) if type(mask) is Tensor else mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with WithoutTorchFunction():
            if func is F.scaled_dot_product_attention:
                return _attend(*args, **kwargs)
            return func(*args, **kwargs)


def _attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        dropout_p: float = 0.,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
) -> Tensor:
    """See `torch.nn.functional.scaled_dot_product_attention`."""
    attn_mask = attn_mask.view(attn_mask.shape)  # a plain tensor
    if torch.is_autocast_enabled(query.device.type):  # autocast casts only arguments of PyTorch's operators
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype == torch.float32 else x for x in (query, key, value))
    # `can_run` was true when the mask was made; since then, only gradients and kinds of tensors may have changed
    if dropout_p or is_causal or is_differentiated(query, key, value) or not (
            type(query) is type(key) is type(value) is Tensor and query.dtype == key.dtype == value.dtype
            and query.dim() == 4 and query.shape[3] == value.shape[3] <= 128):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask.to(query.dtype), dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return launch('attend', query, key, value, attn_mask.flatten(1), scale)
