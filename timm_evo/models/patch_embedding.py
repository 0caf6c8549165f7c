""" The patch embedding as one product

A convolution whose stride is its kernel size reads each pixel once, so it is a product of patches and weights. On a GPU
in half precision, PyTorch's convolution takes several times as long as this product: a sixth of the time of a DeiT-S.

The product is used only where the difference is not visible: no module of the embedding is replaced or has hooks.
"""
from typing import Any

import torch
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.choice import is_exporting, is_wanted
from ..torch_private import has_global_hooks
from .plain import has_plain_weights, is_plain

__all__ = ['can_be_product', 'embed_by_product', 'is_product_faster']


def can_be_product(embed: Any) -> bool:
    """Whether a patch embedding is a plain convolution without overlap, and has no hooks."""
    proj = getattr(embed, 'proj', None)
    return (
        type(embed) is PatchEmbed
        and type(proj) is nn.Conv2d
        and proj.kernel_size == proj.stride == tuple(embed.patch_size)
        and proj.padding == (0, 0)
        and proj.dilation == (1, 1)
        and proj.groups == 1
        and has_plain_weights(proj)
        and (embed.flatten or embed.output_fmt == Format.NHWC)
        and is_plain(embed)
        and not has_global_hooks()
    )


def embed_by_product(embed: Any, images: Tensor) -> Tensor:
    """Compute the output of timm's `PatchEmbed`.

    Args:
        embed: A patch embedding that `can_be_product`.
        images: Images (B, C, H, W).

    Returns:
        Patches (B, N, C), or (B, H / patch, W / patch, C) if the embedding keeps the grid.
    """
    if not _fits(embed, images):
        return embed(images)  # timm pads the images or raises an error
    batch_size, channels, height, width = images.shape
    down, across = embed.patch_size
    grid = height // down, width // across
    x = images.view(batch_size, channels, grid[0], down, grid[1], across).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(batch_size, *((grid[0] * grid[1],) if embed.flatten else grid), channels * down * across)
    return embed.norm(F.linear(x, embed.proj.weight.flatten(1), embed.proj.bias))


def is_product_faster(images: Tensor) -> bool:
    """Whether the product is faster: on a GPU, in half precision. In float32 it would also change the rounding."""
    if not isinstance(images, Tensor) or not is_wanted(images):
        return False
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    return dtype in (torch.float16, torch.bfloat16) and not torch.jit.is_tracing() and not is_exporting()


def _fits(embed: Any, images: Tensor) -> bool:
    """Whether images have a size that timm takes without padding."""
    height, width = images.shape[2:]
    if embed.img_size is not None and embed.strict_img_size:
        return (height, width) == tuple(embed.img_size)
    return height % embed.patch_size[0] == 0 and width % embed.patch_size[1] == 0
