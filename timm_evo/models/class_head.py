""" A second head on the class token

The authors' DeiT classifies the mean of the patch tokens. In training, a second head reads the class token, because
its attention selects, so it must be trained, too.
"""
import copy
from typing import TYPE_CHECKING

from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

__all__ = ['ClassHead']

if TYPE_CHECKING:
    from .flat import FlatModel as _Model  # follows `ClassHead` in the bases of a model
else:
    _Model = object


class ClassHead(_Model):
    """The argument `class_head` of a model whose own head is timm's `head(head_drop(fc_norm(pool(x))))`."""

    def _init_class_head(self, class_head: bool) -> None:
        if class_head and (self.global_pool != 'avg' or not self.has_class_token):
            raise ValueError(
                f'class_head=True is not allowed with global_pool={self.global_pool!r} and '
                f'{"a" if self.has_class_token else "no"} class token. '
                "It needs global_pool='avg' and a class token.")
        self.class_head = class_head
        # copies, so that dtype, device and mode are those of the pooled head
        self.norm_cls = copy.deepcopy(self.fc_norm) if class_head else nn.Identity().train(self.training)
        self.head_cls = copy.deepcopy(self.head) if class_head else nn.Identity().train(self.training)
        init_weights_vit_timm(self.head_cls)
        self.distilled_training = False  # set by `set_distilled_training`

    def get_classifier(  # pyright: ignore[reportIncompatibleMethodOverride]
            self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The classifier head, or both heads with `class_head=True`, as timm's `VisionTransformerDistilled`."""
        return (self.head, self.head_cls) if self.class_head else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier head, as timm's; the class head is removed unless global_pool='avg'."""
        super().reset_classifier(num_classes, global_pool)
        if self.class_head:
            norm_cls = self.norm_cls  # it is kept, as timm keeps `fc_norm`
            self._init_class_head(self.global_pool == 'avg')
            self.norm_cls = norm_cls if self.class_head else self.norm_cls

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the logits of both heads separately while training, as timm's `VisionTransformerDistilled`."""
        if enable and not self.class_head:
            raise ValueError('Distilled training needs a second head. Create the model with class_head=True.')
        self.distilled_training = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised sequence (B, P + N, C) to logits (B, num_classes), or to pooled features if `pre_logits`."""
        logits, logits_cls = self._heads(x, pre_logits)
        if logits_cls is None:
            return logits
        if self.distilled_training and self.training and not pre_logits:
            return logits, logits_cls  # pyright: ignore[reportReturnType]  # as timm's, whose annotation is this, too
        return (logits + logits_cls) / 2

    def _heads(self, x: Tensor, pre_logits: bool) -> tuple[Tensor, Tensor | None]:
        """Logits of the head on the pooled tokens and of the head on the class token, or the features of both."""
        x_pool = self.head_drop(self.fc_norm(self.pool(x)))
        logits = x_pool if pre_logits else self.head(x_pool)
        if not self.class_head:
            return logits, None
        x_cls = self.head_drop(self.norm_cls(x[:, 0]))
        return logits, x_cls if pre_logits else self.head_cls(x_cls)
