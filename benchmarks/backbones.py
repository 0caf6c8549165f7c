""" Patch features of a frozen backbone: their similarity to the dense ones, and their change from frame to frame

The model is DINOv2's ViT-S/14, from the file that `common/saliency.py` describes. The photos are those of
https://github.com/EliSchwartz/imagenet-sample-images:

    python benchmarks/backbones.py --features vit_s_focus.onnx --photos imagenet-sample-images --num-images 100 \
        --results benchmarks/results/backbones_cpu

The next frame is the photo with noise of one grey level. With similarity, other tokens may be averaged in it, so the
features of a patch change more than in the dense model. The table has the ratio of the changes. Rows without a final
norm are for backbones of `features_only=True`, which compare the tokens as they are. "published" is
`selection='stage'`.
"""
import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from common.arguments import add_device, positive_int
from common.environment import describe_environment, summarise_environment
from common.left import Features
from common.photos import reported_photos
from common.results import add_results, markdown_table, replacing, write_json
from common.saliency import Decoder, create_backbone, read_weights
from frozen import load_photos
from torch import Tensor, nn
from tqdm import tqdm

import timm_evo

KEEP_RATIOS = (0.9, 0.7, 0.5)
COLUMNS = ('patch_tokens', 'saliency', 'motion')


class Backbone(nn.Module):
    """An evolved model that compares its tokens as they are. Its final norm is applied after the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm, model.norm = model.norm, nn.Identity()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Images to class tokens (B, C)."""
        return self.forward_features(images)[:, 0]

    def forward_features(self, images: Tensor) -> Tensor:
        """Images to all tokens (B, P + N, C)."""
        return self.norm(self.model.forward_features(images))


def find_models(dense: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each row's name and model."""
    for keep_ratio in KEEP_RATIOS:
        evolved = timm_evo.evolve(copy.deepcopy(dense), keep_ratio=keep_ratio)
        yield f'similarity, {keep_ratio}', evolved
        yield f'similarity without final norm, {keep_ratio}', Backbone(copy.deepcopy(evolved))
        published = copy.deepcopy(dense)
        yield f'published, {keep_ratio}', timm_evo.evolve(published, keep_ratio=keep_ratio, selection='stage')


@torch.inference_mode()
def motion(model: nn.Module, features: Features, noise: Tensor) -> Tensor:
    """Distance of the patch tokens of each photo from those of the next frame, the same photo with noise (B,)."""
    distances = []
    for images, frame in zip(features.batches(), features.batches(noise), strict=True):
        moved = model.forward_features(frame) - model.forward_features(images)
        distances.append(moved[:, features.dense.num_prefix_tokens:].norm(dim=(1, 2)))
    return torch.cat(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--features', type=Path, required=True, metavar='FILE', help='vit_s_focus.onnx')
    parser.add_argument('--photos', type=Path, required=True, metavar='FOLDER', help='photos, as .JPEG, .jpg or .png')
    parser.add_argument('--num-images', type=positive_int, default=100, help='number of photos (default: %(default)s)')
    parser.add_argument('--img-size', type=positive_int, default=224, help='multiple of 14 (default: %(default)s)')
    parser.add_argument(
        '--batch-size', type=positive_int, default=10, help='number of photos in a batch (default: %(default)s)')
    add_device(parser)
    add_results(parser, ('.json', '.md'))
    args = parser.parse_args()

    backbone, decoder = read_weights(args.features)
    dense = create_backbone(backbone, args.img_size).to(args.device)
    files = reported_photos(args.photos, args.num_images)
    photos = load_photos(files, args.img_size)
    features = Features(dense, Decoder(decoder).to(args.device), photos, args.batch_size, args.device)
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0)).round()
    features.measure_dense(lambda: None)
    dense_motion = motion(dense, features, noise)
    rows = {'dense': dict.fromkeys(COLUMNS, 1.)}
    for name, model in tqdm(find_models(dense), total=3 * len(KEEP_RATIOS), unit='model'):
        left = features.measure(model, True, lambda: None)
        left['motion'] = (motion(model, features, noise) / dense_motion).median().item()
        rows[name] = {column: left[column] for column in COLUMNS}

    environment = describe_environment(torch.device(args.device))
    write_json(args.results, {
        **environment, 'images': len(files), 'img_size': args.img_size, 'rows': rows})
    table = markdown_table(
        ['', 'patch tokens', 'saliency', 'motion'],
        [[name, *(f'{row[column]:.3f}' for column in COLUMNS)] for name, row in rows.items()])
    text = (
        f'Patch tokens of a frozen DINOv2 ViT-S/14, {len(files)} photos of {args.img_size} pixels: cosine to the dense '
        'ones, correlation of the saliency map, and change in a frame with noise of one grey level (dense: '
        f'1)\n\n{table}\n{summarise_environment(environment)}.\n')
    with replacing(args.results.with_name(args.results.name + '.md')) as part:
        part.write_text(text)
    print(text)


if __name__ == '__main__':
    main()
