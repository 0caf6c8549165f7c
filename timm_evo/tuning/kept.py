""" Comparison of the outputs of a faster model with those of the dense model """
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ['Kept', 'Reference']


class Kept(NamedTuple):
    """Similarity of the outputs of a model to those of the dense model.

    Attributes:
        loss: Mean Kullback-Leibler divergence of the predicted classes from the dense ones, in nats. For a backbone,
            one minus `agreement`.
        log_loss: Mean logarithm of the divergence of each image. The search minimises this, because the mean of the
            divergences depends on a few images, and says less about other images.
        agreement: Share of the images that get the same class. For a backbone, the mean cosine of its features, after
            subtraction of the mean of the dense features.
        error: Standard error of `agreement` for other images of the same kind.
        top1: Share of the images that get their label, if there are labels.
    """
    loss: float
    log_loss: float
    agreement: float
    error: float
    top1: float | None


class Reference:
    """Outputs of the dense model, with which outputs of other models are compared.

    Args:
        outputs: Logits (N, num_classes), or features (N, ..., C) of a backbone.
        is_classifier: Whether the outputs are logits.
        labels: Classes (N,), if they are known.
    """

    def __init__(self, outputs: Tensor, is_classifier: bool, labels: Tensor | None) -> None:
        outputs = outputs.double()
        if is_classifier:
            self._log_probs = outputs.log_softmax(dim=1)
        else:
            self._mean = outputs.flatten(0, -2).mean(dim=0)
            self._features = outputs - self._mean
        self.is_classifier = is_classifier
        self._labels = labels

    def compare(self, outputs: Tensor, first: int, step: int) -> Kept:
        """Compare the outputs for every `step`-th image from `first` on with those of the dense model."""
        outputs = outputs.double()
        if not self.is_classifier:
            cosines = F.cosine_similarity(outputs - self._mean, self._features[first::step], dim=-1)
            cosines = cosines.flatten(1).mean(dim=1) if cosines.dim() > 1 else cosines
            mean = cosines.mean().item()
            error = (cosines.std() / math.sqrt(len(cosines))).item()
            return Kept(1 - mean, _mean_log(1 - cosines), mean, error, None)
        dense = self._log_probs[first::step]
        losses = F.kl_div(outputs.log_softmax(dim=1), dense, log_target=True, reduction='none').sum(dim=1)
        classes = outputs.argmax(dim=1)
        num_same, num = int((classes == dense.argmax(dim=1)).sum()), len(classes)
        # the share of Agresti and Coull, by which the error is not zero even if all images agree
        share = (num_same + 2) / (num + 4)
        error = math.sqrt(share * (1 - share) / (num + 4))
        top1 = None if self._labels is None else _share(classes == self._labels[first::step])
        return Kept(losses.mean().item(), _mean_log(losses), num_same / num, error, top1)


def _mean_log(losses: Tensor) -> float:
    return losses.clamp(min=1e-5).log().mean().item()  # smaller losses make no difference


def _share(is_right: Tensor) -> float:
    return is_right.to(torch.float64).mean().item()
