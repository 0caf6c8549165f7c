""" The classes that a model predicts for an image """
import functools
from collections.abc import Sequence
from pathlib import Path

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from ..errors import reason
from ..models.base import EvolvedModel

__all__ = ['predict', 'read_classes']

NUM_LIKELIEST = 3


@torch.no_grad()
def predict(
        model: EvolvedModel,
        image: Tensor,
        classes: Sequence[str] | None = None,
) -> list[tuple[str, float]] | None:
    """The most likely classes of an image and their probabilities by softmax, in descending order.

    Args:
        model: A model in evaluation mode.
        image: A batch of one image (1, C, H, W).
        classes: Names of the classes. By default those of ImageNet, if the model has as many outputs as one of
            ImageNet's subsets has classes.

    Returns:
        Names and probabilities. None if the names are not known: such a model may not be a classifier. It may be the
        image tower of a CLIP, whose last layer is a projection.

    Raises:
        ValueError: The number of names is not the number of outputs.
    """
    logits = model.forward(image)  # not compiled if the model was compiled in place, as in `trace`
    names = _imagenet_classes(logits.shape[-1]) if classes is None else classes
    if names is None:
        return None
    if logits.shape != (1, len(names)):
        raise ValueError(
            f'classes has {len(names)} names, but the output of {type(model).__name__} has the shape '
            f'{tuple(logits.shape)}. It must have one name for each output.')
    likeliest = logits[0].float().softmax(dim=0).topk(min(NUM_LIKELIEST, len(names)))
    return [(names[int(i)], float(probability)) for probability, i in zip(*likeliest, strict=True)]


@functools.lru_cache
def _imagenet_classes(number: int) -> list[str] | None:
    """The first word for each class of ImageNet's subset with this number of classes; None if there is no such subset.
    """
    subset = infer_imagenet_subset({'num_classes': number})
    if subset is None:
        return None
    return [words.partition(',')[0] for words in ImageNetInfo(subset).label_descriptions()]


def read_classes(file: Path) -> list[str]:
    """Names of classes in a text file, one per line.

    Raises:
        ValueError: The file cannot be read as text.
    """
    try:
        return file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f'{file} cannot be read as names of classes, one per line. {reason(error)}') from error
