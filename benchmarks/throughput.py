""" Inference or training throughput, memory and latency of evolved models and their dense twins

    python benchmarks/throughput.py --models evo_deit_small_patch16_224 --batch-size 32 --output results.json

Any model of timm can be added. Weights and inputs are random. `--dtype` casts both without autocast, as timm's
`benchmark.py --precision` does. `--train` measures a whole update: forward, backward of the
cross-entropy and a step of AdamW. `common/measuring.py` describes the measurement, and its `measure_memory` the memory.
"""
import argparse
import json

from common.arguments import add_how, add_models, choose_how, describe_how, output_file, parse_and_check, positive_int
from common.drawing import set_log_ticks
from common.environment import describe_environment, summarise_environment
from common.measuring import LATENCY_ROUNDS, Variant, dense_twin, measure, summarise, with_twins
from common.results import replacing
from matplotlib.figure import Figure

DEFAULT_MODELS = ['evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_224', 'evo_deit_base_patch16_224']


def format_table(summary: dict[str, dict]) -> str:
    """Columns of text, of which the first is left-aligned."""
    lines = [[
        '', 'img/s', 'ms/batch', 'quartiles', 'ratio', 'FLOP limit', 'reached', 'MB', 'ratio', 'GMACs', 'params (M)']]
    for label, row in summary.items():
        seconds = row['seconds_per_batch']
        lines.append([
            label,
            f'{row["images_per_second"]:.1f}',
            f'{1000 * seconds["median"]:.1f}',
            f'{1000 * seconds["lower_quartile"]:.1f}-{1000 * seconds["upper_quartile"]:.1f}',
            f'{row["ratio_to_dense"]:.2f}',
            f'{row["flop_ratio_to_dense"]:.2f}',
            f'{row["flop_limit_share"]:.0%}',
            f'{row["peak_memory_mb"]:.1f}',
            f'{row["memory_ratio_to_dense"]:.2f}',
            f'{row["gmacs"]:.3f}',
            f'{row["params"] / 1e6:.2f}',
        ])
    if any('latency' in row for row in summary.values()):
        lines[0] += ['ms at batch 1', 'ratio']
        for line, row in zip(lines[1:], summary.values(), strict=True):
            line += [f'{row["latency"]["ms_per_image"]:.2f}', f'{row["latency"]["ratio_to_dense"]:.2f}']
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join('  '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def summarise_latency(variants: list[Variant], results: dict[str, dict]) -> dict[str, dict]:
    """Milliseconds per image, from measurements with batches of one."""
    return {
        label: {
            'ms_per_image': 1000 * row['seconds_per_batch']['median'],
            'ratio_to_dense': row['ratio_to_dense'],
            'peak_memory_mb': row['peak_memory_mb'],
            'memory_ratio_to_dense': row['memory_ratio_to_dense'],
        }
        for label, row in summarise(variants, results, batch_size=1).items()
    }


def draw(variants: list[Variant], summary: dict[str, dict], title: str) -> Figure:
    """Draw throughput against multiply-accumulates, with a line from a dense model to its twin at all keep ratios."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axis = figure.subplots()
    axis.set_title(title, fontsize=10)
    axis.set(xlabel='GMACs per image', ylabel='images/s', xscale='log', yscale='log')
    set_log_ticks(axis.xaxis)
    set_log_ticks(axis.yaxis)
    axis.grid(alpha=0.3)

    def place(label: str) -> tuple[float, float]:
        return summary[label]['gmacs'], summary[label]['images_per_second']

    for i, model in enumerate(dict.fromkeys(variant.model for variant in variants)):
        own = [variant for variant in variants if variant.model == model]
        color = f'C{i % 10}'
        if model == dense_twin(model):
            axis.plot(*place(own[0].label), '*', color=color, markersize=13, label=model, zorder=3)
            continue
        points = sorted((place(variant.label) for variant in own), reverse=True)
        axis.plot(*zip(place(own[0].dense), *points, strict=True), '-', color=color, linewidth=1)
        axis.plot(*zip(*points, strict=True), 'o', color=color, label=model, zorder=3)
        for variant in own:
            if len(own) > 1:
                axis.annotate(
                    f'{variant.kwargs["keep_ratio"]}', place(variant.label), xytext=(6, 4),
                    textcoords='offset points', fontsize=8)
    axis.legend(fontsize=8)
    return figure


def keep_ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'must be in (0, 1], not {value}')
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Throughput, memory and latency of evolved models and their dense twins.')
    add_models(parser, DEFAULT_MODELS)
    parser.add_argument(
        '--keep-ratios',
        nargs='+',
        type=keep_ratio,
        metavar='RATIO',
        help='keep ratios of each evolved model (default: only 0.5)',
    )
    add_how(parser)
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='batch size (default: 16)')
    parser.add_argument('--img-size', type=positive_int, metavar='N', help="image size (default: each model's own)")
    parser.add_argument('--latency', action='store_true', help='measure batches of one image, too')
    parser.add_argument('--rounds', type=positive_int, default=11, metavar='N', help='timed rounds (default: 11)')
    parser.add_argument('--output', type=output_file, metavar='FILE', help='JSON file for the results')
    parser.add_argument(
        '--plot', type=output_file, metavar='FILE',
        help='file for a plot of throughput against GMACs, such as plot.png')
    args = parse_and_check(parser)
    if args.latency and args.train:
        parser.error('--latency measures inference, so it is not allowed with --train')
    if args.keep_ratios is not None:
        if 'keep_ratio' in args.model_kwargs:
            parser.error('--keep-ratios and keep_ratio in --model-kwargs are not allowed together')
        if all(name == dense_twin(name) for name in args.models):
            parser.error('--keep-ratios is only for evolved models, but --models has none')
        args.keep_ratios = list(dict.fromkeys(args.keep_ratios))
    if args.plot is not None and args.plot.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        parser.error(f'--plot: cannot draw {args.plot.name}. Use a name like plot.png.')
    return args


def main() -> None:
    args = parse_args()
    each = [{'keep_ratio': ratio} for ratio in args.keep_ratios] if args.keep_ratios else None
    variants = with_twins(args.models, args.img_size, args.model_kwargs, each)
    how = choose_how(args)
    results = measure(variants, rounds=args.rounds, batch_size=args.batch_size, **how)
    summary = summarise(variants, results, args.batch_size)
    if args.latency:
        results = measure(variants, rounds=LATENCY_ROUNDS * args.rounds, batch_size=1, **how)
        for label, row in summarise_latency(variants, results).items():
            summary[label]['latency'] = row
    print(f'\n{format_table(summary)}')

    environment = describe_environment(args.device)
    if args.output is not None:
        settings = {
            **describe_how(args),
            'batch_size': args.batch_size,
            'img_size': args.img_size,
            'keep_ratios': args.keep_ratios,
            'latency': args.latency,
            'rounds': args.rounds,
        }
        record = {**environment, 'settings': settings, 'models': summary}
        with replacing(args.output) as part:
            part.write_text(json.dumps(record, indent=2) + '\n')
    if args.plot is not None:
        what = f'{"training" if args.train else "inference"}, {args.dtype}, batch {args.batch_size}'
        compiled = f', compiled ({args.compile})' if args.compile else ''
        title = f'{what}{compiled}\n{summarise_environment(environment)}'
        with replacing(args.plot) as part:
            draw(variants, summary, title).savefig(part, dpi=120)


if __name__ == '__main__':
    main()
