""" Speed of token evolution and of other methods of token reduction, in their authors' code, in one run

    python benchmarks/other_methods.py --tome ToMe --evit evit --dynamic-vit DynamicViT --evo-vit Evo-ViT \
        --results benchmarks/results/other_methods_cpu

Each option is a clone of a repository: https://github.com/facebookresearch/ToMe, https://github.com/youweiliang/evit,
https://github.com/raoyongming/DynamicViT and https://github.com/YifanXu74/Evo-ViT. Methods without a clone are skipped.
All models are DeiT. The setting of each method has about the multiply-accumulates of the published Evo-ViT, and its
numbers of tokens grow with the image. This package is measured with the published selection `'stage'`, with the same
selection and a whole last block, as in the other methods, and with selection by similarity. Weights are random, because
only speed is measured.
"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from common.arguments import add_device, positive_int
from common.measuring import DTYPES, Through, Variant, measure, summarise
from common.other_methods import clone, import_from, load_evit, load_tome
from common.results import add_results, markdown_table, write_results
from matplotlib.figure import Figure
from torch import nn

SIZES = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}  # width and heads of DeiT
PATCH_SIZE = 16
PUBLISHED_SIZE = 224
PRUNED_BLOCKS = (3, 6, 9)  # blocks in which DynamicViT and EViT drop tokens

Build = Callable[[str, int], nn.Module]  # from the model's size and the image size


def create_deit(size: str, img_size: int) -> nn.Module:
    return timm.create_model(f'deit_{size}_patch16_224', img_size=img_size)


def build_tome(folder: Path) -> Build:
    with_tome = load_tome(folder)

    def build(size: str, img_size: int) -> nn.Module:
        return with_tome(create_deit(size, img_size), round(11 * (img_size / PUBLISHED_SIZE) ** 2))
    return build


def build_evit(folder: Path) -> Build:
    with_evit = load_evit(folder)
    return lambda size, img_size: with_evit(create_deit(size, img_size), 0.7)


def build_dynamic_vit(folder: Path) -> Build:
    dyvit = import_from(folder, 'models.dyvit')

    def build(size: str, img_size: int) -> nn.Module:
        width, heads = SIZES[size]
        return dyvit.VisionTransformerDiffPruning(
            img_size=img_size, embed_dim=width, num_heads=heads, pruning_loc=PRUNED_BLOCKS,
            token_ratio=(0.7, 0.7 ** 2, 0.7 ** 3))
    return build


def build_evo_vit(folder: Path) -> Build:
    evo_deit = import_from(folder, 'deit.evo_deit')
    return lambda size, img_size: getattr(evo_deit, f'evo_deit_{size}_patch16_224')(img_size=img_size)


METHODS = {
    'tome': ('ToMe', build_tome),
    'evit': ('EViT, 0.7', build_evit),
    'dynamic_vit': ('DynamicViT, 0.7', build_dynamic_vit),
    'evo_vit': ("Evo-ViT, authors' code", build_evo_vit),
}
OURS = 'timm-evo'


def build_whole(size: str, img_size: int) -> nn.Module:
    """The published evolution with a last block that computes all tokens, as in the other methods."""
    model = timm.create_model(f'evo_deit_{size}_patch16_224', img_size=img_size, selection='stage')
    return Through(model, lambda model, images: model.forward_head(model.forward_features(images)))


def find_variants(size: str, img_size: int, builds: dict[str, Build]) -> list[Variant]:
    """The dense model, the evolved ones, and those of other methods."""
    dense = f'deit_{size}_patch16_224'
    shared = {'img_size': img_size}
    evolved = [
        Variant(f'{OURS}, {size}', f'evo_{dense}', {**shared, 'selection': 'stage'}, dense),
        Variant(f'{OURS}, whole last block, {size}', dense, shared, dense, partial(build_whole, size, img_size)),
        Variant(f'{OURS}, similarity, {size}', f'evo_{dense}', {**shared, 'selection': 'similarity'}, dense),
    ]
    others = [
        Variant(f'{label}, {size}', dense, shared, dense, partial(build, size, img_size))
        for label, build in builds.items()
    ]
    return [Variant(dense, dense, shared, dense), *evolved, *others]


def method_of(variant: Variant) -> str:
    return variant.label.rpartition(', ')[0]


def format_table(summary: dict[str, dict]) -> str:
    header = ['model', 'GMACs', 'img/s', 'ms/batch', 'ratio to dense', 'FLOP limit', 'reached', 'memory (MB)']
    lines = [
        [
            label,
            f'{row["gmacs"]:.2f}',
            f'{row["images_per_second"]:.1f}',
            f'{1000 * row["seconds_per_batch"]["median"]:.0f}',
            f'{row["ratio_to_dense"]:.2f} x',
            f'{row["flop_ratio_to_dense"]:.2f} x',
            f'{row["flop_limit_share"]:.0%}',
            f'{row["peak_memory_mb"]:.0f}',
        ]
        for label, row in summary.items()
    ]
    return markdown_table(header, lines)


def draw(variants: list[Variant], summary: dict[str, dict], title: str) -> Figure:
    """Draw the speed-up against the remaining share of multiply-accumulates, with the limit that it sets."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axis = figure.subplots()
    axis.set(title=title, xlabel='share of the dense GMACs', ylabel='ratio to the dense throughput')
    reduced = [variant for variant in variants if variant.label != variant.dense]
    methods = list(dict.fromkeys(map(method_of, reduced)))
    names = list(dict.fromkeys(variant.dense for variant in variants))
    shares = []
    for variant in reduced:
        row = summary[variant.label]
        shares.append(1 / row['flop_ratio_to_dense'])
        i, j = methods.index(method_of(variant)), names.index(variant.dense)
        size = 9 if methods[i].startswith(OURS) else 7
        axis.plot(shares[-1], row['ratio_to_dense'], 'os^'[j], color=f'C{i}', markersize=size)
    for i, method in enumerate(methods):
        axis.plot([], [], 'o', color=f'C{i}', label=method)
    for j, name in enumerate(names):
        axis.plot([], [], 'os^'[j], color='gray', label=name)
    limit = torch.linspace(min(shares) - .01, max(shares) + .01, 50)
    axis.plot(limit, 1 / limit, '--', color='gray', linewidth=1, label='limit set by the FLOPs')
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of token evolution and other methods, in their authors' code.")
    for option, (label, _) in METHODS.items():
        parser.add_argument(
            f'--{option.replace("_", "-")}', type=clone, metavar='FOLDER', help=f'clone of the repository: {label}')
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES), help='sizes of DeiT (default: all)')
    parser.add_argument(
        '--img-size',
        type=positive_int,
        default=PUBLISHED_SIZE,
        metavar='N',
        help=f'multiple of {PATCH_SIZE} pixels (default: {PUBLISHED_SIZE})',
    )
    add_device(parser)
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='dtype of weights and images (default: float32)')
    parser.add_argument('--threads', type=positive_int, metavar='N', help='CPU threads (default: all)')
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='batch size (default: 16)')
    parser.add_argument('--rounds', type=positive_int, default=15, metavar='N', help='timed rounds (default: 15)')
    add_results(parser)
    args = parser.parse_args()
    if args.img_size % PATCH_SIZE:
        parser.error(f'--img-size {args.img_size} is not a multiple of {PATCH_SIZE}')
    if args.dynamic_vit is not None and args.img_size != PUBLISHED_SIZE:
        parser.error(f'--dynamic-vit only takes images of {PUBLISHED_SIZE} pixels')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if all(getattr(args, option) is None for option in METHODS):
        parser.error('at least one clone of another method must be given')
    return args


def main() -> None:
    args = parse_args()
    builds = {}
    for option, (label, build) in METHODS.items():
        if (folder := getattr(args, option)) is not None:
            builds[label] = build(folder)
    variants, results = [], {}
    for size in args.sizes:  # one size after the other, so that models of the same size are timed together
        own = find_variants(size, args.img_size, builds)
        results |= measure(
            own, rounds=args.rounds, device=args.device, dtype=DTYPES[args.dtype], batch_size=args.batch_size)
        variants += own
    summary = summarise(variants, results, args.batch_size)
    settings = {
        'device': args.device.type, 'dtype': args.dtype, 'img_size': args.img_size, 'batch_size': args.batch_size,
        'rounds': args.rounds}
    title = f'Inference of DeiT at {args.img_size} pixels'
    record = {'settings': settings, 'models': summary}
    text = write_results(args.results, title, format_table(summary), record, draw(variants, summary, title))
    print(f'\n{text}')


if __name__ == '__main__':
    main()
