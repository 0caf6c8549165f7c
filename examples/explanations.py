""" Explanations of a dense classifier and an evolved one: Grad-CAM, attention rollout and a linear probe

This draws the picture of docs/explanations.md. It needs `pip install . --group example` (pip 25.1 or newer):

    python examples/explanations.py --picture explanations.png

Weights are timm's pretrained ones, which are downloaded, or those of a checkpoint. The photos are scikit-image's
`coffee` (CC0, Rachel Michetti) and `chelsea` (CC0, Stefan van der Walt). The probe predicts the mean colour of each
patch. It is fitted to the dense model's tokens of `astronaut` (NASA) and `rocket` (SpaceX), both public domain.
"""
import argparse

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage import data
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import timm_evo

MODEL = 'deit_tiny_patch16_224'
GRID = (14, 14)
PHOTOS, PHOTOS_OF_PROBE = (data.coffee, data.chelsea), (data.astronaut, data.rocket)
PROBED = 8  # index of the block


def grad_cam(model: nn.Module, images: Tensor, classes: list[int]) -> Tensor:
    """Grad-CAM of one class of each image at the last block (B, H, W)."""
    targets = [ClassifierOutputTarget(label) for label in classes]
    with timm_evo.whole_grid(model) as grid:
        with GradCAM(model, [model.blocks[-1].norm1], reshape_transform=grid.reshape_transform) as cam:
            return torch.from_numpy(cam(images, targets))


@torch.no_grad()
def rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to the patches through all blocks (B, h, w)."""
    maps: list[Tensor] = []
    with timm_evo.whole_grid(model) as grid:
        handles = [
            block.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(grid.attention(out)))
            for block in model.blocks]
        model(images)
        for handle in handles:
            handle.remove()
    itself = torch.eye(maps[0].shape[2])
    total = itself
    for attention in maps:
        total = (attention.mean(dim=1) + itself) / 2 @ total
    return total[:, 0, model.num_prefix_tokens:].unflatten(1, GRID)


@torch.no_grad()
def probed_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens after a block (B, N, C)."""
    seen: list[Tensor] = []
    with timm_evo.whole_grid(model) as grid:
        handle = model.blocks[PROBED].register_forward_hook(lambda module, args, out: seen.append(grid.tokens(out)))
        model(images)
        handle.remove()
    return F.layer_norm(seen[0], seen[0].shape[2:])[:, model.num_prefix_tokens:]


def colours(images: Tensor) -> Tensor:
    """Mean colour of each patch in the normalised images (B, N, 3)."""
    return F.adaptive_avg_pool2d(images, GRID).flatten(2).transpose(1, 2)


def fit_probe(tokens: Tensor, of: Tensor) -> Tensor:
    """Ridge regression from tokens (B, N, C) with mean zero, and a constant, to (B, N, 3): a matrix (C + 1, 3)."""
    x = F.pad(tokens, (0, 1), value=1).flatten(0, 1)
    return torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ of.flatten(0, 1))


def correlations(maps: Tensor, dense_maps: Tensor) -> list[str]:
    pairs = torch.stack([maps.flatten(1), dense_maps.flatten(1)], dim=1)
    return [f'{torch.corrcoef(pair)[0, 1]:.3f}' for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw explanations of a classifier, dense and evolved.')
    parser.add_argument('--weights', default='', metavar='FILE', help="checkpoint (default: timm's pretrained weights)")
    parser.add_argument('--keep-ratio', type=float, default=0.7, help='mean share of patch tokens (default: 0.7)')
    parser.add_argument('--picture', default='explanations.png', metavar='FILE', help='PNG (default: %(default)s)')
    args = parser.parse_args()
    model = timm.create_model(MODEL, pretrained=not args.weights, checkpoint_path=args.weights).eval()
    for block in model.blocks:
        block.attn.fused_attn = False  # fused attention has no attention map
    config = resolve_data_config({}, model=model)
    images, images_of_probe = (
        torch.stack([create_transform(**config)(Image.fromarray(load())) for load in photos])
        for photos in (PHOTOS, PHOTOS_OF_PROBE))
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    classes = model(images).argmax(dim=1).tolist()

    timm_evo.evolve(model, keep_ratio=1.0)
    probe = fit_probe(probed_tokens(model, images_of_probe), colours(images_of_probe))
    found = {}
    for name, keep_ratio in (('dense', 1.0), ('evolved', args.keep_ratio)):
        model.set_evolution(keep_ratio=keep_ratio)
        read = F.pad(probed_tokens(model, images), (0, 1), value=1) @ probe
        found[name] = {
            'Grad-CAM': grad_cam(model, images, classes),
            'attention rollout': rollout(model, images),
            'linear probe': read.transpose(1, 2).unflatten(2, GRID)}

    for kind in found['dense']:
        of_photos = ', '.join(correlations(found['evolved'][kind], found['dense'][kind]))
        print(f'{kind}: correlation with dense {of_photos}')
    bare = {'xticks': [], 'yticks': [], 'frame_on': False}
    figure, axes = plt.subplots(len(images), 5, figsize=(10, 4.6), layout='constrained', subplot_kw=bare)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, wspace=0, hspace=0)
    photos = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    columns = [(kind, name) for kind in ('Grad-CAM', 'attention rollout') for name in found]
    for i, row in enumerate(axes):
        row[0].imshow(photos[i])
        for axis, (kind, name) in zip(row[1:], columns, strict=True):
            axis.imshow(found[name][kind][i])
            if i == 0:
                axis.set_title(f'{kind},\n{name}', fontsize=10.5)
            if name == 'evolved':
                value = correlations(found[name][kind], found['dense'][kind])[i]
                axis.set_xlabel(f'correlation with dense: {value}', labelpad=2, fontsize=9)
    figure.savefig(args.picture, dpi=90)


if __name__ == '__main__':
    main()
