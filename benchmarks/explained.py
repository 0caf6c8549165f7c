""" Explanations of an evolved classifier compared with those of the dense one: Grad-CAM and attention rollout

Both use hooks, whose values `timm_evo.whole_grid` spreads to the whole grid. Grad-CAM uses the last block's first norm
and the class that the dense model predicts. Attention rollout uses all blocks, as (A + I) / 2 of the mean over heads.
The result is the correlation with the dense model's map of the same photo, over the grid of patches.

Example with photos of https://github.com/EliSchwartz/imagenet-sample-images and a checkpoint (default: pretrained):

    python benchmarks/explained.py --weights deit_tiny.safetensors --photos imagenet-sample-images --num-images 240 \
        --results benchmarks/results/explained_cpu

Every 25th photo in the order of names, from the first, is left out: the rules of `whole_grid` were chosen on these.
"""
import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from common.arguments import positive_int
from common.environment import describe_environment, summarise_environment
from common.photos import reported_photos
from common.report import write_report
from common.results import add_results, markdown_table
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

import timm_evo

SETTINGS = [(selection, ratio) for selection in ('similarity', 'stage') for ratio in (0.7, 0.5)]
NAMES = {'similarity': 'similarity', 'stage': 'published'}


@contextmanager
def removed(*handles: RemovableHandle) -> Iterator[None]:
    """A context that removes hooks at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM of classes (B,) at the first norm of the last block (B, N)."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen.append(grid.reshape_transform(out).detach())
        out.register_hook(lambda gradient: seen.append(grid.reshape_transform(gradient)))

    with timm_evo.whole_grid(model) as grid, removed(model.blocks[-1].norm1.register_forward_hook(see)):
        model(images).gather(1, classes.unsqueeze(1)).sum().backward()
    model.zero_grad()
    activations, gradients = seen
    return (activations * gradients.mean(dim=(2, 3), keepdim=True)).sum(dim=1).relu().flatten(1)


@torch.no_grad()
def rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to the patches through all blocks (B, N)."""
    maps: list[Tensor] = []

    def see(module: nn.Module, args: tuple, out: Tensor) -> None:
        maps.append(grid.attention(out).mean(dim=1))

    hooks = [block.attn.attn_drop.register_forward_hook(see) for block in model.blocks]
    with timm_evo.whole_grid(model) as grid, removed(*hooks):
        model(images)
    total = maps[-1].new_zeros(len(images), 1, maps[-1].shape[2])
    total[:, :, 0] = 1
    for attention in reversed(maps):
        total = (total @ attention + total) / 2
    return total[:, 0, model.num_prefix_tokens:]


def correlate(maps: Tensor, dense_maps: Tensor) -> Tensor:
    """Correlation of two maps (B, N) of each photo (B,); 0 if one is empty."""
    maps, dense_maps = (x - x.mean(dim=1, keepdim=True) for x in (maps, dense_maps))
    return torch.cosine_similarity(maps, dense_maps, dim=1)


def explain(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    return {'Grad-CAM, last block': grad_cam(model, images, classes), 'attention rollout': rollout(model, images)}


def load_photos(folder: Path, number: int, model: nn.Module) -> list[Tensor]:
    """Photos that nothing was chosen on, as input of the model (C, H, W)."""
    files = reported_photos(folder, number)
    transform = create_transform(**resolve_data_config({}, model=model))
    photos = []
    for file in tqdm(files, desc='photos', unit='photo'):
        with Image.open(file) as image:
            photos.append(transform(image.convert('RGB')))
    return photos


def measure(dense: nn.Module, photos: list[Tensor], batch_size: int) -> dict[str, dict]:
    """Correlations in each setting."""
    models = {
        f'{NAMES[selection]}, {ratio:g}': timm_evo.evolve(copy.deepcopy(dense), selection=selection, keep_ratio=ratio)
        for selection, ratio in SETTINGS}
    reference = timm_evo.evolve(dense, keep_ratio=1.0)
    found: dict[str, dict[str, list[Tensor]]] = {label: {} for label in models}
    for start in tqdm(range(0, len(photos), batch_size), unit='batch'):
        images = torch.stack(photos[start:start + batch_size])
        with torch.no_grad():
            classes = reference(images).argmax(dim=1)
        expected = explain(reference, images, classes)
        for label, model in models.items():
            for name, maps in explain(model, images, classes).items():
                found[label].setdefault(name, []).append(correlate(maps, expected[name]))
    records = {}
    for label, by_map in found.items():
        values = {name: torch.cat(parts) for name, parts in by_map.items()}
        records[label] = {
            name: {
                'mean': x.mean().item(),
                'standard_error': (x.std() / len(x) ** 0.5).item(),
                'quantiles': dict(zip((0.1, 0.5), x.quantile(torch.tensor([0.1, 0.5])).tolist(), strict=True)),
            } for name, x in values.items()}
        records[label]['gmacs'] = timm_evo.count_gmacs(models[label], photos[0].unsqueeze(0))
    return records


def format_text(title: str, records: dict[str, dict], environment: dict) -> str:
    maps = [name for name in next(iter(records.values())) if name != 'gmacs']
    header = ['', *(f'{name}{of}' for name in maps for of in ('', ', one photo in ten below')), 'GMACs']
    rows = [
        [
            label,
            *(text for name in maps for text in (
                f'{record[name]["mean"]:.3f} ± {record[name]["standard_error"]:.3f}',
                f'{record[name]["quantiles"][0.1]:.3f}')),
            f'{record["gmacs"]:.2f}',
        ] for label, record in records.items()]
    return f'{title}\n\n{markdown_table(header, rows)}\n{summarise_environment(environment)}; float32.\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='How much Grad-CAM and attention rollout change.')
    parser.add_argument(
        '--model', default='deit_tiny_patch16_224', help="timm's ViT with a class token (default: %(default)s)")
    parser.add_argument(
        '--weights', type=Path, metavar='FILE', help='checkpoint of the dense model (default: pretrained ones)')
    parser.add_argument('--photos', type=Path, required=True, metavar='FOLDER', help='folder of photos')
    parser.add_argument('--num-images', type=positive_int, default=240, metavar='N', help='photos (default: 240)')
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='batch size (default: 16)')
    add_results(parser, ('.json', '.md'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dense = timm.create_model(args.model, pretrained=args.weights is None, checkpoint_path=args.weights or '').eval()
    if not isinstance(dense, VisionTransformer) or dense.cls_token is None:
        raise SystemExit(f"--model: {args.model} is not one of timm's VisionTransformer with a class token")
    for block in dense.blocks:
        block.attn.fused_attn = False  # fused attention has no attention map
    photos = load_photos(args.photos, args.num_images, dense)
    title = f'Correlation with the maps of the dense {args.model}, {len(photos)} photos: mean and its standard error'
    environment = describe_environment(torch.device('cpu'))
    records = measure(dense, photos, args.batch_size)
    text = format_text(title, records, environment)
    write_report(args.results, text, {**environment, 'model': args.model, 'images': len(photos), 'settings': records})
    print(f'\n{text}')


if __name__ == '__main__':
    main()
