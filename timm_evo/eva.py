""" timm's `Eva` with token evolution: EVA, EVA-02, DINOv3, Perception Encoder, ROPE-ViT

Most of these models have rotary position embeddings. A token keeps the rotation of its place when others have gone. The
representative token stands for no place and is not rotated. The blocks take rotations of each image, as timm gives them
where patches are dropped in training.
"""
from timm.models.eva import Eva
from torch import Tensor, nn

from . import evolution, token_evolution
from .class_head import ClassHead
from .evolved_model import Evolved
from .token_evolution import TokenEvolution

__all__ = ['EvaEvolution', 'EvoEva', 'evolved_class']

# as for `VisionTransformer`
exec("torch.fx.wrap('resample_abs_pos_embed')", Eva._pos_embed.__globals__)


class EvaEvolution(TokenEvolution):
    """Token evolution for a timm `Eva`, to stand before it in the bases of a class."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.patch_embed(x)
        x, rope = self._pos_embed(x)
        return self.norm_pre(x), rope

    def _grid_width(self, images: Tensor) -> int | None:
        if self.training and self.patch_drop is not None:
            return None
        return self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))[1]

    def _rotations(
            self,
            index: int,
            begins: bool,
            rope: Tensor | None,
            rotation: Tensor | None,
            positions: Tensor | None,
            representative: bool,
    ) -> Tensor | None:
        if rope is None:
            return None
        if self.rope_mixed:
            rope = rope[index]  # each block has its own
        elif rotation is not None and not begins:
            return rotation
        if positions is None:
            return rope
        return evolution.gather_rotations(rope, positions, self.num_prefix_tokens, representative)


class EvoEva(  # pyright: ignore[reportIncompatibleMethodOverride]  # two heads; `output_dict`, as timm's ViT has it
        ClassHead, EvaEvolution, Eva):
    """timm's `Eva` with token evolution."""

    def _num_read(self) -> int | None:
        return 1 if self.global_pool == 'token' else None


def evolved_class(dense_cls: type[Eva]) -> type[Evolved]:
    """The evolved class of timm's class, or of a subclass of it, see `token_evolution.evolved_class`."""
    known: dict[type[nn.Module], type[Evolved]] = {Eva: EvoEva}
    return token_evolution.evolved_class(dense_cls, known, EvaEvolution)
