""" timm's `VisionTransformer` with token evolution """
import copy

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..torch_private import has_hooks
from .class_head import ClassHead
from .flat import FlatModel

__all__ = ['EvoVisionTransformer', 'EvoVisionTransformerDistilled', 'VisionTransformerEvolution']

# torchvision's tracer does not trace into functions that timm marks as untraceable, but only in the module that defines
# the model's `forward`. `torch.fx.wrap` acts on the module in which it is called, so it is called in timm's module.
exec("torch.fx.wrap('resample_abs_pos_embed')", VisionTransformer._pos_embed.__globals__)


class VisionTransformerEvolution(FlatModel):
    """Token evolution for timm's `VisionTransformer`, which follows it in the bases of a class."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._embed_patches(x)
        x = self._pos_embed(x)
        x = self.patch_drop(x)
        return self.norm_pre(x), None

    def _grid_width(self, images: Tensor) -> int | None:
        if self.training and not isinstance(self.patch_drop, nn.Identity):
            return None
        return self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))[1]

    def _forward_all_blocks(self, x: Tensor, rope: Tensor | None, grid_width: int | None) -> Tensor:
        if not has_hooks(self.blocks):
            return super()._forward_all_blocks(x, rope, grid_width)
        blocks = copy.copy(self.blocks)  # called as one module, so that its hooks run as in timm
        blocks.forward = lambda x: self._forward_blocks(x, None, grid_width)[0]
        return blocks(x)


class EvoVisionTransformer(  # pyright: ignore[reportIncompatibleMethodOverride]  # two heads
        ClassHead, VisionTransformerEvolution, VisionTransformer):
    """timm's `VisionTransformer` with token evolution."""

    def _num_read(self) -> int | None:
        return 1 if self.global_pool == 'token' else None


class EvoVisionTransformerDistilled(VisionTransformerEvolution, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` with token evolution. The attention of the class token gives the scores."""

    def _num_read(self) -> int | None:
        return 2
