""" A model in one of its variants, and a step of it """
import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from common.measuring import Step
from common.other_methods import load_evit, load_tome
from timm.layers import to_2tuple
from torch import Tensor, nn

import timm_evo

from .settings import DENSE, EVIT, OFF, PRODUCT, TOME, Setting

SMALL = dict(patch_size=8, embed_dim=48, num_heads=3, depth=2, num_classes=10)
SMALL_SIZE, SMALL_LEVIT_SIZE = 32, 128
TOME_R, TOME_SIZE, EVIT_KEEP = 11, 224, 0.7


class Product(nn.Module):
    """A convolution without overlapping patches, as one product.

    Args:
        conv: The convolution, whose stride is its kernel size.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.kernel_size != conv.stride or any(conv.padding) or conv.groups > 1 or max(conv.dilation) > 1:
            raise ValueError('The patches overlap or have gaps.')
        self.weight, self.bias, self.kernel_size = conv.weight, conv.bias, conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to patches (B, D, H / h, W / w)."""
        (B, C, H, W), (h, w) = x.shape, self.kernel_size
        x = x[:, :, :H // h * h, :W // w * w]  # without incomplete patches, like a convolution
        patches = x.reshape(B, C, H // h, h, W // w, w).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H / h, W / w, C h w)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def with_product(model: nn.Module) -> nn.Module:
    """Compute the patch embedding of a ViT as one product, in place."""
    model.patch_embed.proj = Product(model.patch_embed.proj)
    return model


def create_dense(model: str, img_size: int | None, small: bool) -> tuple[nn.Module, tuple[int, int]]:
    """timm's model, and the height and width of its images."""
    kwargs = {}
    if small:
        is_levit = model.startswith('levit')
        img_size = img_size or (SMALL_LEVIT_SIZE if is_levit else SMALL_SIZE)
        kwargs = {} if is_levit else SMALL
    if img_size is not None:
        kwargs = kwargs | {'img_size': img_size}
    return timm.create_model(model, **kwargs), to_2tuple(img_size or timm.get_pretrained_cfg(model).input_size[-1])


def change(dense: nn.Module, variant: str, clones: dict[str, Path]) -> nn.Module:
    """Make a variant of a dense model, in place.

    Args:
        dense: timm's model.
        variant: One of the variants in `settings`.
        clones: Folders of the authors' code, by variant.
    """
    name = variant.removesuffix(OFF)
    if name == DENSE:
        return dense
    if name == PRODUCT:
        return with_product(dense)
    if name == TOME:
        scale = (dense.patch_embed.img_size[0] / TOME_SIZE) ** 2
        return load_tome(clones[TOME])(dense, max(1, round(TOME_R * scale)))
    if name == EVIT:
        return load_evit(clones[EVIT])(dense, EVIT_KEEP)
    return timm_evo.evolve(dense, selection=name)


@contextmanager
def kernels(value: str | None) -> Iterator[None]:
    """A context with a value of TIMM_EVO_KERNELS; None for the library's default."""
    before = os.environ.pop('TIMM_EVO_KERNELS', None)
    if value is not None:
        os.environ['TIMM_EVO_KERNELS'] = value
    try:
        yield
    finally:
        os.environ.pop('TIMM_EVO_KERNELS', None)
        if before is not None:
            os.environ['TIMM_EVO_KERNELS'] = before


def kernels_of(variant: str) -> str | None:
    return '0' if variant.endswith(OFF) else None


def step_maker(setting: Setting, device: torch.device, clones: dict[str, Path]) -> Callable[[str], Step]:
    """A function that makes the step of a variant. All steps have the same weights and images."""
    torch.manual_seed(0)
    dense, size = create_dense(setting.model, setting.img_size, setting.small)
    dtype = torch.float32 if setting.train else torch.bfloat16
    images = torch.randn(setting.batch, 3, *size, device=device, dtype=dtype)
    autocast = torch.bfloat16 if setting.train else None

    def make(variant: str) -> Step:
        model = change(copy.deepcopy(dense), variant, clones).eval().to(device=device, dtype=dtype)
        return Step(model, images, setting.train, setting.mode, autocast)
    return make


def check_finite(step: Step) -> None:
    """Raise an error if logits or weights are not finite, before the model is timed."""
    if step.optimizer is None:
        if step.compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(), step.autocast:
            logits = step.forward(step.batch)
        if not logits.isfinite().all():
            raise ValueError('The logits are not finite.')
    elif not all(parameter.isfinite().all() for parameter in step.model.parameters()):
        raise ValueError('After training, the weights are not finite.')
