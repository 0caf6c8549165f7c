""" timm's `Eva` with token evolution: EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT

Most of these models have rotary position embeddings. A selected token keeps the rotation of its position. The
representative token has no position and is not rotated. The blocks get rotations for each image, as timm gives them
when it drops patches in training.
"""
from timm.models.eva import Eva
from torch import Tensor

from .class_head import ClassHead
from .flat import FlatModel

__all__ = ['EvaEvolution', 'EvoEva']

# for torchvision's tracer, as in `vision_transformer`
exec("torch.fx.wrap('resample_abs_pos_embed')", Eva._pos_embed.__globals__)


class EvaEvolution(FlatModel):
    """Token evolution for timm's `Eva`, which follows it in the bases of a class."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._embed_patches(x)
        x, rope = self._pos_embed(x)
        return self.norm_pre(x), rope

    def _grid_width(self, images: Tensor) -> int | None:
        if self.training and self.patch_drop is not None:
            return None
        return self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))[1]


class EvoEva(  # pyright: ignore[reportIncompatibleMethodOverride]  # two heads; `output_dict`, as timm's ViT has it
        ClassHead, EvaEvolution, Eva):
    """timm's `Eva` with token evolution."""

    def _num_read(self) -> int | None:
        return 1 if self.global_pool == 'token' else None
