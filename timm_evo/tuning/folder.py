""" Images of a folder, prepared as timm does for a model """
from pathlib import Path
from typing import Any

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
import torch
from huggingface_hub.utils import tqdm
from timm.data import ImageDataset, create_transform, resolve_data_config
from torch import Tensor, nn

from ..errors import reason
from ..models.base import find_evolved

__all__ = ['load_images']


def load_images(folder: Path, model: nn.Module, num_images: int) -> tuple[Tensor, Tensor | None]:
    """Load images of a folder and its subfolders, evenly spread over the files in the order of their names.

    Args:
        folder: Folder of the images.
        model: Model for which the images are prepared.
        num_images: Largest number of images.

    Returns:
        Images (N, C, H, W).
        Their classes (N,), if there is a folder for each class of the model.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder has no images, or an image cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'--images {folder} cannot be read: there is no such folder.')
    if num_images < 1:
        raise ValueError(f'--num-images {num_images} is not allowed. It must be at least 1.')
    config = resolve_data_config({}, model=model)
    embed: Any = getattr(find_evolved(model)[1] or model, 'patch_embed', None)
    if getattr(embed, 'img_size', None) is not None:
        config['input_size'] = (config['input_size'][0], *embed.img_size)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    try:
        dataset = ImageDataset(str(folder), transform=create_transform(**{key: config[key] for key in keys}))
    except RuntimeError as error:
        raise ValueError(f'--images {folder} cannot be read: {reason(error)}') from error
    number = min(num_images, len(dataset))
    chosen = [i * len(dataset) // number for i in range(number)]
    images, labels = [], []
    for i in tqdm(chosen, desc='images', unit='image'):
        try:
            image, label = dataset[i]
        except OSError as error:
            file = dataset.filename(i, absolute=True)
            raise ValueError(f'{file} cannot be read as an image. {reason(error)}') from error
        images.append(image)
        labels.append(label)
    reader: Any = dataset.reader
    has_labels = len(reader.class_to_idx) == getattr(model, 'num_classes', 0) > 1
    return torch.stack(images), torch.tensor(labels) if has_labels else None
