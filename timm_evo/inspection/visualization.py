""" Pictures of the patches of an image that an evolved model selects or averages """
import base64
import io
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import Tensor, nn

from ..api import evolved
from ..errors import reason
from ..models.base import EvolvedModel, evaluating, find_evolved, input_size
from .cost import count_gmacs
from .prediction import predict
from .tracing import Selection, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['visualize', 'write_page']

PAGE = 'page.html'
KEEP_RATIOS = (0.3, 0.5, 0.7, 0.9)
Photo = Image.Image | str | os.PathLike | np.ndarray
_MAX_COLUMNS = 4  # a figure of more is hard to read on a page
_ALLOWED = (
    'a photo (an image of Pillow, its file, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8), or a tensor '
    '(C, H, W) that is prepared for the model')


def visualize(
        image: Photo | Tensor,
        model: nn.Module,
        classes: Sequence[str] | None = None,
        **evolution_args,
) -> 'Figure':
    """Draw which patches of an image a model selects or averages, with the predictions of the dense and evolved model.

    The figure has one picture for each selection. In the published selections, patches that skip the blocks are dark,
    and the scores of the selection are below. In selection='similarity' no patch is skipped: all patches whose tokens
    are averaged into one have their mean colour.

    Args:
        image: One photo, which is prepared for the model as in timm: an image of Pillow, a file, or an array of uint8
            (H, W), (H, W, 3) or (H, W, 4). It is made grey for a model of one channel. Or one prepared tensor (C, H, W)
            or (1, C, H, W), which a model of other numbers of channels than 1 and 3 needs. Of such a tensor, the mean
            over the channels is drawn.
        model: An evolved model, a module with one inside, or a dense model, which is evolved only for the figure.
        classes: Names of the model's classes. By default those of ImageNet, for a model with as many classes. If the
            names are not known, the figure has no predictions.
        **evolution_args: Arguments of `evolve` or `set_evolution`, which are used only for the figure.

    Returns:
        A figure of matplotlib: `figure.savefig('kept.png')`. A notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: There is no such file.
        TypeError: The model cannot be evolved, or the image is of another type.
        ValueError: The value of an argument is not allowed, or the model does not take the image.
    """
    Figure = figure_class()
    with _evolved(model, evolution_args) as evolved_model:
        pixels, photo = _prepare(image, evolved_model)
        with evaluating(evolved_model):
            predictions = {
                'dense': _predict_dense(evolved_model, pixels, classes),
                'evolved': predict(evolved_model, pixels, classes)}
        selections = trace(evolved_model, pixels)
        settings = evolved_model.evolution
    title = [', '.join(f'{k}={v!r}' for k, v in settings.items() if k in ('selection', 'keep_ratio'))]
    for kind, prediction in predictions.items():
        if prediction is not None:
            title.append(f'{kind}: ' + ', '.join(f'{name} {share:.0%}' for name, share in prediction))
    has_scores = any(selection.scores is not None for selection in selections)
    num_columns = min(1 + len(selections), _MAX_COLUMNS)
    num_rows = (1 + has_scores) * math.ceil((1 + len(selections)) / num_columns)
    figure = Figure(figsize=(2.4 * num_columns, 1.0 + 2.6 * num_rows), layout='constrained')
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle('\n'.join(title), fontsize=10)
    if selections:
        figure.supxlabel(_legend(settings), fontsize=9)
    axes[0, 0].imshow(photo.numpy())
    axes[0, 0].set_title('image', fontsize=9)
    for i, selection in enumerate(selections, start=1):
        row, column = (1 + has_scores) * (i // num_columns), i % num_columns
        axis = axes[row, column]
        num_kept, num_patches = int(selection.slow[0].sum()), selection.slow[0].numel()
        if selection.scores is None:
            axis.set_title(f'block {selection.block}: {num_patches} patches, {num_kept} tokens', fontsize=9)
            _draw_groups(axis, photo, selection)
        else:
            axis.set_title(f'block {selection.block}: {num_kept} of {num_patches} patches', fontsize=9)
            slow = _to_pixels(selection.slow[0].cpu(), photo).unsqueeze(2)
            axis.imshow((photo * (0.2 + 0.8 * slow)).numpy())
            axes[row + 1, column].imshow(selection.scores[0].float().cpu().numpy(), cmap='viridis')
            axes[row + 1, column].set_title('scores', fontsize=9)
    return figure


def write_page(
        file: str | Path,
        image: Photo | Tensor,
        model: nn.Module,
        keep_ratios: Sequence[float] = KEEP_RATIOS,
        classes: Sequence[str] | None = None,
        **evolution_args,
) -> None:
    """Write an HTML page that shows the selections in an image, with sliders for block and keep ratio.

    Args:
        file: HTML file to write. It needs no other files.
        image: See `visualize`.
        model: See `visualize`.
        keep_ratios: Keep ratios of the slider.
        classes: See `visualize`.
        **evolution_args: See `visualize`, without `keep_ratio`.

    Raises:
        FileNotFoundError: There is no such image file.
        TypeError: The model cannot be evolved, or the image is of another type.
        ValueError: The value of an argument is not allowed, or the model does not take the image.
    """
    if not keep_ratios:
        raise ValueError('keep_ratios=[] is not allowed. A page needs at least one keep ratio.')
    if not isinstance(image, Tensor):
        image = open_photo(image)
    runs = []
    with _evolved(model, evolution_args | {'keep_ratio': keep_ratios[0]}) as evolved_model, evaluating(evolved_model):
        for keep_ratio in keep_ratios:
            evolved_model.set_evolution(keep_ratio=keep_ratio)  # checks each value before the model runs
        pixels, photo = _prepare(image, evolved_model)
        dense_prediction = _predict_dense(evolved_model, pixels, classes)
        for keep_ratio in keep_ratios:
            evolved_model.set_evolution(keep_ratio=keep_ratio)
            runs.append({
                'keep_ratio': keep_ratio,
                'gmacs': round(count_gmacs(evolved_model, pixels), 3),
                'selections': [_describe(selection) for selection in trace(evolved_model, pixels)],
                'prediction': predict(evolved_model, pixels, classes),
            })
        buffer = io.BytesIO()
        Image.fromarray((photo * 255).round().byte().numpy()).save(buffer, 'PNG')
        data = {
            'model': evolved_model.dense_architecture or type(evolved_model).__name__,
            'selection': evolved_model.evolution['selection'],
            'legend': _legend(evolved_model.evolution),
            'prediction': dense_prediction,
            'depth': _count_blocks(evolved_model),
            'runs': runs,
            'image': 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode(),
            'width': photo.shape[1], 'height': photo.shape[0],
        }
    page = files('timm_evo.inspection').joinpath(PAGE).read_text(encoding='utf-8')
    text = json.dumps(data).replace('<', '\\u003c')  # so that a class name cannot end the script
    Path(file).write_text(page.replace('"DATA"', text), encoding='utf-8')


def figure_class() -> 'type[Figure]':
    """matplotlib's class of figures. matplotlib is an optional dependency.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib, which is not installed: pip install matplotlib') from error
    return Figure


def _evolved(model: nn.Module, evolution_args: dict):
    """A context that gives the evolved model with these arguments."""
    _, found = find_evolved(model)
    if found is not None and not evolution_args:
        return nullcontext(found)
    return evolved(model if found is None else found, **evolution_args)


def _predict_dense(
        model: EvolvedModel,
        pixels: Tensor,
        classes: Sequence[str] | None,
) -> list[tuple[str, float]] | None:
    """The prediction of the dense model."""
    with evolved(model, keep_ratio=1.0):
        return predict(model, pixels, classes)


def _legend(settings: dict) -> str:
    """A legend for the patches that do not go through the blocks themselves."""
    if settings['selection'] == 'similarity':
        return 'Patches of one colour are averaged into one token. No patch is left out.'
    others = 'are updated by a representative token' if settings['fast_update'] else 'stay as they are'
    return f'Dark patches skip the blocks after this selection, and {others}.'


def open_photo(image: Photo) -> Image.Image:
    """The photo as an image of Pillow, read from a file or made from an array if needed.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: The photo is of another type.
        ValueError: The file cannot be read as an image, or the array is not an image.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise FileNotFoundError(f'There is no image file {image}.')
        try:
            with Image.open(image) as file:
                return file.convert('RGB')
        except Exception as error:  # a damaged file can cause any error in Pillow
            raise ValueError(f'{image} cannot be read as an image. {reason(error)}') from error
    if not isinstance(image, np.ndarray):
        raise TypeError(f'image cannot be a {type(image).__name__}. It must be {_ALLOWED}.')
    is_empty = image.size == 0
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)) or is_empty:
        raise ValueError(f'image cannot be an array {image.shape} of {image.dtype}. It must be {_ALLOWED}.')
    return Image.fromarray(image)


def _prepare(image: Photo | Tensor, model: EvolvedModel) -> tuple[Tensor, Tensor]:
    """Input of the model (1, C, H, W), and the photo to draw (H, W, 3), in [0, 1]."""
    channels, height, width = input_size(model)
    config = resolve_data_config({'input_size': (channels, height, width)}, model=model)
    for key in ('mean', 'std'):  # timm has three numbers, one for each colour
        config[key] = adapt_to_chs(config[key], channels)
    if isinstance(image, Tensor):
        pixels = image[0] if image.dim() == 4 and len(image) == 1 else image
        _check_pixels(pixels, image, model)
    elif channels not in (1, 3):
        raise ValueError(
            f'image cannot be a photo, because {type(model).__name__} takes {channels} channels. It must be a tensor '
            f'({channels}, H, W) that is prepared for the model.')
    else:
        transform: Any = create_transform(**config)  # timm's annotation allows several transforms
        pixels = transform(open_photo(image).convert('L' if channels == 1 else 'RGB'))
    weight = next(model.parameters())
    return pixels.unsqueeze(0).to(weight.device, weight.dtype), _to_photo(pixels, config['mean'], config['std'])


def _check_pixels(pixels: Tensor, image: Tensor, model: EvolvedModel) -> None:
    """Check that a tensor is one prepared image (C, H, W). The message describes `image`, as the user has given it."""
    channels, *size = input_size(model)
    embed = getattr(model, 'patch_embed', model)
    if embed.img_size and getattr(embed, 'strict_img_size', True):  # LeViT takes only one size
        allowed = f'({channels}, {size[0]}, {size[1]})'
        fits = list(pixels.shape[1:]) == size
    else:
        steps = (1, 1) if embed.dynamic_img_pad else embed.feat_ratio(as_scalar=False)
        allowed = f'({channels}, H, W) with H and W multiples of {steps[0]} and {steps[1]}'
        fits = all(side > 0 and side % step == 0 for side, step in zip(pixels.shape[1:], steps, strict=False))
    if pixels.dim() != 3 or len(pixels) != channels or not fits or not pixels.is_floating_point():
        raise ValueError(
            f'image cannot be a tensor {tuple(image.shape)} of {image.dtype}. {type(model).__name__} takes one image '
            f'{allowed} of floating point numbers that is prepared as in timm.')


def _to_photo(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Prepared pixels (C, H, W) as a photo to draw (H, W, 3), in [0, 1]; of 1 or 3 channels, or their grey mean.
    """
    pixels = pixels.detach().cpu().float()
    if len(pixels) in (1, 3):
        shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        pixels = (pixels * scale + shift).clamp(0, 1)
    else:
        pixels = pixels.mean(dim=0, keepdim=True)
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    return pixels.expand(3, -1, -1).permute(1, 2, 0)


def _count_blocks(model: EvolvedModel) -> int:
    return len(model.blocks) if hasattr(model, 'blocks') else sum(len(stage.blocks) for stage in model.stages)


def _describe(selection: Selection) -> dict:
    """The selection as plain values for the page."""
    scores = selection.scores
    return {
        'block': selection.block,
        'height': selection.slow.shape[1],
        'width': selection.slow.shape[2],
        'slow': selection.slow[0].flatten().int().tolist(),
        'follows': selection.follows[0].flatten().tolist(),
        'scores': None if scores is None else [round(score, 6) for score in scores[0].flatten().tolist()],
    }


def _to_pixels(values: Tensor, photo: Tensor) -> Tensor:
    """Values of patches (H, W) as values of pixels."""
    return F.interpolate(values[None, None].float(), photo.shape[:2], mode='nearest-exact')[0, 0]


def _draw_groups(axis: 'Axes', photo: Tensor, selection: Selection) -> None:
    """Paint each group of more than one patch in its mean colour, and draw lines between groups."""
    follows = selection.follows[0].cpu()
    height, width = follows.shape
    colours = F.adaptive_avg_pool2d(photo.permute(2, 0, 1), (height, width)).flatten(1).T  # (N, C)
    number = torch.bincount(follows.flatten(), minlength=len(colours))
    total = torch.zeros_like(colours).index_add(0, follows.flatten(), colours)
    mean = (total / number.clamp(min=1).unsqueeze(1))[follows.flatten()].view(height, width, -1)
    painted = torch.stack([_to_pixels(channel, photo) for channel in mean.unbind(2)], dim=2)
    is_alone = _to_pixels((number[follows] == 1), photo).unsqueeze(2).bool()
    axis.imshow(photo.where(is_alone, painted).numpy())
    y_step, x_step = photo.shape[0] / height, photo.shape[1] / width
    ends: dict[str, Any] = dict(color='white', linewidth=0.5)
    below, beside = follows[1:] != follows[:-1], follows[:, 1:] != follows[:, :-1]
    for y, x in below.nonzero().tolist():
        axis.plot([x * x_step - 0.5, (x + 1) * x_step - 0.5], [(y + 1) * y_step - 0.5] * 2, **ends)
    for y, x in beside.nonzero().tolist():
        axis.plot([(x + 1) * x_step - 0.5] * 2, [y * y_step - 0.5, (y + 1) * y_step - 0.5], **ends)
