""" Pictures of the tokens that an evolved model keeps """
import base64
import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from .cost import count_gmacs
from .evolved_model import Evolved, evaluating, find_evolved, input_size
from .instances import evolved
from .tracing import Selection, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['visualize', 'write_page']

PAGE = 'page.html'
KEEP_RATIOS = (0.3, 0.5, 0.7, 0.9)


def visualize(image: Image.Image | str | Path | Tensor, model: nn.Module, **evolution_args) -> 'Figure':
    """Draw which tokens a model keeps of an image.

    One column for each selection. In the published selections, what is not selected is dark, and below are the scores
    that have selected; by similarity, each group of patches that goes on as one token has its mean colour.

    Args:
        image: A photo or its file, which is prepared as timm does for the model; or a tensor (C, H, W) that is.
        model: An evolved model, what wraps one, or a dense one, which is evolved for the time being.
        **evolution_args: Those of `evolve` or `set_evolution`, for the time being.

    Returns:
        A figure of matplotlib: `figure.savefig('kept.png')`. A notebook shows it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: The model is not evolved and cannot be.
        ValueError: An argument is outside what is allowed.
    """
    Figure = figure_class()
    with _evolved(model, evolution_args) as evolved_model:
        pixels, photo = _prepare(image, evolved_model)
        selections = trace(evolved_model, pixels)
        title = ', '.join(f'{k}={v!r}' for k, v in evolved_model.evolution.items() if k in ('selection', 'keep_ratio'))
    has_scores = any(selection.scores is not None for selection in selections)
    num_rows, num_columns = 1 + has_scores, 1 + len(selections)
    figure = Figure(figsize=(2.4 * num_columns, 0.4 + 2.6 * num_rows), layout='constrained')
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    axes[0, 0].imshow(photo.numpy())
    axes[0, 0].set_title('image', fontsize=9)
    for i, selection in enumerate(selections, start=1):
        num_kept, num_patches = int(selection.slow[0].sum()), selection.slow[0].numel()
        axes[0, i].set_title(f'block {selection.block}: {num_kept} of {num_patches}', fontsize=9)
        if selection.scores is None:
            _draw_groups(axes[0, i], photo, selection)
        else:
            axes[0, i].imshow(_darken(photo, selection).numpy())
            axes[1, i].imshow(selection.scores[0].float().cpu().numpy(), cmap='viridis')
            axes[1, i].set_title('scores', fontsize=9)
    return figure


def write_page(
        file: str | Path,
        image: Image.Image | str | Path | Tensor,
        model: nn.Module,
        keep_ratios: Sequence[float] = KEEP_RATIOS,
        **evolution_args,
) -> None:
    """Write one HTML file, which needs no other, to move through blocks and keep ratios over an image.

    Args:
        file: Where to.
        image: As of `visualize`.
        model: Likewise.
        keep_ratios: What can be chosen on the page.
        **evolution_args: As of `visualize`, without `keep_ratio`.

    Raises:
        TypeError: The model is not evolved and cannot be.
        ValueError: An argument is outside what is allowed.
    """
    if not keep_ratios:
        raise ValueError('keep_ratios=[] is not allowed, a page needs at least one.')
    for keep_ratio in keep_ratios:
        with _evolved(model, evolution_args | {'keep_ratio': keep_ratio}):
            pass  # refuses what is not allowed before the first one is run
    runs = []
    for keep_ratio in keep_ratios:
        with _evolved(model, evolution_args | {'keep_ratio': keep_ratio}) as evolved_model, evaluating(evolved_model):
            pixels, photo = _prepare(image, evolved_model)
            runs.append({
                'keep_ratio': keep_ratio,
                'gmacs': round(count_gmacs(evolved_model, pixels), 3),
                'selections': [_describe(selection) for selection in trace(evolved_model, pixels)],
            })
            name = evolved_model.dense_architecture or type(evolved_model).__name__
            shown = photo, name, _count_blocks(evolved_model), evolved_model.evolution['selection']
    buffer = io.BytesIO()
    photo, name, depth, selection = shown  # pyright: ignore[reportPossiblyUnboundVariable]  # there is a keep ratio
    Image.fromarray((photo * 255).round().byte().numpy()).save(buffer, 'PNG')
    data = {
        'model': name, 'selection': selection, 'depth': depth, 'runs': runs,
        'image': 'data:image/png;base64,' + base64.b64encode(buffer.getvalue()).decode(),
        'width': photo.shape[1], 'height': photo.shape[0],
    }
    page = files('timm_evo').joinpath(PAGE).read_text(encoding='utf-8')
    text = json.dumps(data).replace('<', '\\u003c')  # a name cannot end the script
    Path(file).write_text(page.replace('"DATA"', text), encoding='utf-8')


def figure_class() -> 'type[Figure]':
    """The class of figures of matplotlib, which is not installed with the package.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture is drawn with matplotlib: pip install 'timm-evo[visualize]'.") from error
    return Figure


def _evolved(model: nn.Module, evolution_args: dict):
    """The evolved model to look at, for the time of a `with`."""
    found = find_evolved(model) if isinstance(model, nn.Module) else None
    if found is not None and not evolution_args:
        return nullcontext(found[1])
    return evolved(model if found is None else found[1], **evolution_args)


def _prepare(image: Image.Image | str | Path | Tensor, model: Evolved) -> tuple[Tensor, Tensor]:
    """What the model takes (1, C, H, W), and the same to look at (H, W, C), in [0, 1]."""
    config = resolve_data_config({'input_size': input_size(model)}, model=model)
    if isinstance(image, Tensor):
        pixels = image
    else:
        opened: Any = image
        if not isinstance(image, Image.Image):
            with Image.open(image) as file:
                opened = file.convert('RGB')
        transform: Any = create_transform(**config)  # one, where timm says that it may be several
        pixels = transform(opened.convert('RGB'))
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    photo = (pixels.detach().cpu().float() * std + mean).clamp(0, 1).permute(1, 2, 0)
    weight = next(model.parameters())
    return pixels.unsqueeze(0).to(weight.device, weight.dtype), photo


def _count_blocks(model: Evolved) -> int:
    return len(model.blocks) if hasattr(model, 'blocks') else sum(len(stage.blocks) for stage in model.stages)


def _describe(selection: Selection) -> dict:
    """As the page has it."""
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


def _darken(photo: Tensor, selection: Selection) -> Tensor:
    slow = _to_pixels(selection.slow[0].cpu(), photo).unsqueeze(2)
    return photo * (0.2 + 0.8 * slow)


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
