""" Time and memory of evolved models and their dense twins by image size and batch size

    python benchmarks/scaling.py --batch-sizes 1 16 --results benchmarks/results/scaling_cpu

Models of one setting are measured in turn, as in `throughput.py`, and results are written after each setting. A setting
that does not fit on the GPU is recorded, and the next one follows.
"""
import argparse
from itertools import product

import torch
from common.arguments import add_how, add_models, choose_how, describe_how, parse_and_check, positive_int
from common.drawing import set_log_ticks
from common.measuring import Variant, dense_twin, measure, summarise, with_twins
from common.results import add_results, markdown_table, write_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DEFAULT_MODELS = ['evo_deit_small_patch16_224']
IMG_SIZES = [224, 288, 384, 448, 512]


def measure_setting(variants: list[Variant], img_size: int, batch_size: int, rounds: int, how: dict) -> dict:
    """The image size, the batch size, and under `models` the result of `summarise`; None if it did not fit."""
    try:
        results = measure(variants, rounds=rounds, batch_size=batch_size, **how)
        models = summarise(variants, results, batch_size)
    except torch.OutOfMemoryError:
        models = None
    return {'img_size': img_size, 'batch_size': batch_size, 'models': models}


def format_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        setting = [str(row['img_size']), str(row['batch_size'])]
        if row['models'] is None:
            lines.append([*setting, 'out of memory', *[''] * 6])
            continue
        for label, model in row['models'].items():
            seconds = model['seconds_per_batch']['median']
            lines.append([
                *setting,
                label,
                f'{1000 * seconds / row["batch_size"]:.3g}',
                f'{model["ratio_to_dense"]:.2f} x',
                f'{model["flop_ratio_to_dense"]:.2f} x',
                f'{model["flop_limit_share"]:.0%}',
                f'{model["peak_memory_mb"]:.0f}',
                f'{model["memory_ratio_to_dense"]:.2f} x',
            ])
    header = [
        'image size', 'batch', 'model', 'ms/image', 'ratio to dense', 'FLOP limit', 'reached', 'memory (MB)',
        'memory ratio']
    return markdown_table(header, lines)


def draw(variants: list[Variant], rows: list[dict], title: str) -> Figure:
    """Draw speed-up, its limit and memory against image size, with a line for each model and batch size."""
    figure = Figure(figsize=(13, 5.5), layout='constrained')
    figure.suptitle(title)
    speed, memory = figure.subplots(1, 2)
    speed.set(ylabel='ratio of throughputs, evolved to dense')
    memory.set(ylabel='peak memory (MB)', yscale='log')
    set_log_ticks(memory.yaxis)
    measured = [row for row in rows if row['models'] is not None]

    def draw_line(axis: Axes, batch_size: int, model: str, key: str, **style) -> None:
        points = [(row['img_size'], row['models'][model][key]) for row in measured if row['batch_size'] == batch_size]
        axis.plot(*zip(*points, strict=True), **style)

    for i, variant in enumerate(variants):
        is_dense, label = variant.label == variant.dense, variant.label
        batch_sizes = sorted({row['batch_size'] for row in measured})
        for j, batch_size in enumerate(batch_sizes):
            style = dict(color=f'C{i % 10}', marker='os^vD'[j % 5], label=f'{label}, batch {batch_size}')
            draw_line(memory, batch_size, label, 'peak_memory_mb', **style)
            if not is_dense:
                draw_line(speed, batch_size, label, 'ratio_to_dense', **style)
        if not is_dense and batch_sizes:
            limit = dict(color=f'C{i % 10}', linestyle='--', label=f'{label}, limit set by the FLOPs')
            draw_line(speed, batch_sizes[0], label, 'flop_ratio_to_dense', **limit)  # for all batch sizes
    for axis in (speed, memory):
        axis.set(xlabel='image size (pixels)', xticks=sorted({row['img_size'] for row in rows}))
        axis.grid(alpha=0.3)
        if measured:
            axis.legend(fontsize=8)
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time and memory of evolved models and their dense twins by size.')
    add_models(parser, DEFAULT_MODELS)
    add_how(parser)
    parser.add_argument(
        '--img-sizes',
        nargs='+',
        type=positive_int,
        default=IMG_SIZES,
        metavar='N',
        help=f'image sizes in pixels (default: {" ".join(map(str, IMG_SIZES))})',
    )
    parser.add_argument(
        '--batch-sizes', nargs='+', type=positive_int, default=[16], metavar='N', help='batch sizes (default: 16)')
    parser.add_argument('--rounds', type=positive_int, default=11, metavar='N', help='timed rounds (default: 11)')
    add_results(parser)
    args = parse_and_check(parser)
    if all(name == dense_twin(name) for name in args.models):
        parser.error('--models must have an evolved model')
    args.img_sizes, args.batch_sizes = sorted(set(args.img_sizes)), sorted(set(args.batch_sizes))
    return args


def main() -> None:
    args = parse_args()
    settings = {
        **describe_how(args), 'img_sizes': args.img_sizes, 'batch_size': args.batch_sizes, 'rounds': args.rounds}
    title = f'{"Training" if args.train else "Inference"} by image size, evolved models beside dense ones'
    rows = []
    for img_size, batch_size in product(args.img_sizes, args.batch_sizes):
        print(f'{img_size} pixels, batch {batch_size}')
        variants = with_twins(args.models, img_size, args.model_kwargs)
        rows.append(measure_setting(variants, img_size, batch_size, args.rounds, choose_how(args)))
        record = {'settings': settings, 'sizes': rows}
        text = write_results(args.results, title, format_table(rows), record, draw(variants, rows, title))
    print(f'\n{text}')


if __name__ == '__main__':
    main()
