""" Speed of the selections, compared with each other and with the dense model, in PyTorch and as exported files

    python benchmarks/selections.py --results benchmarks/results/selections_cpu
    python benchmarks/selections.py --family rope --results benchmarks/results/selections_rope_cpu

Each ratio is given with its limit, the ratio of multiply-accumulates. PyTorch is measured as in `throughput.py`. Files
are ONNX, written by `torch.onnx.export`, and run by onnxruntime and by OpenVINO on the CPU, batch by batch in turn.
Results are written after each setting, so the same command continues an interrupted run.
"""
import argparse
import statistics
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path

import timm
import torch
from common.arguments import positive_int
from common.environment import describe_environment, summarise_environment
from common.exported import RUNTIMES, THREADS, Run, load_file, median_ratio, time_in_turn
from common.measuring import LATENCY_ROUNDS, Variant, measure
from common.report import write_report
from common.results import add_results, markdown_table, read_records

from timm_evo import count_gmacs

SELECTIONS = ('stage', 'similarity')
SMALL, BASE = 'deit_small_patch16_224', 'deit_base_patch16_224'
# by family: model, (pixels, batch size), and the runtime
SETTINGS = {
    'deit': [
        *product((SMALL, BASE), ((224, 16), (384, 4)), ('eager', 'compiled')),
        *product((SMALL, BASE), ((224, 1),), ('eager',)),
        *product((SMALL,), ((224, 16), (224, 1)), RUNTIMES),
    ],
    'rope': [
        *product(('vit_small_patch16_dinov3', 'vit_base_patch16_dinov3'), ((256, 16), (512, 4)), ('eager',)),
        ('eva02_small_patch14_336', (336, 8), 'eager'),
        ('vit_small_patch16_rope_224', (224, 16), 'eager'),
        ('vit_small_patch16_rope_mixed_224', (224, 16), 'eager'),
    ],
}
TITLE = "Dense, selection='stage' (published) and selection='similarity', keep ratio 0.5"


def make_variants(model: str, img_size: int) -> list[Variant]:
    size = {'img_size': img_size}
    evolved = [Variant(selection, f'evo_{model}', size | {'selection': selection}, 'dense') for selection in SELECTIONS]
    return [Variant('dense', model, size, 'dense'), *evolved]


def time_in_torch(model: str, img_size: int, batch_size: int, compiled: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch in each round."""
    results = measure(
        make_variants(model, img_size), rounds=rounds, device=torch.device('cpu'), dtype=torch.float32,
        batch_size=batch_size, compile_mode='default' if compiled else None)
    return {label: result['seconds'] for label, result in results.items()}


def time_files(model: str, img_size: int, batch_size: int, runtime: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per batch in each round."""
    images = torch.randn(batch_size, 3, img_size, img_size)
    run: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in make_variants(model, img_size):
            file = Path(folder) / f'{variant.label}.onnx'
            original = timm.create_model(variant.model, **variant.kwargs).eval()
            torch.onnx.export(original, (images,), file, dynamo=True, input_names=['images'], verbose=False)
            run[variant.label] = load_file(file, runtime)
            with torch.inference_mode():  # checks that the file computes the same as the model
                torch.testing.assert_close(run[variant.label](images), original(images), rtol=0, atol=1e-3)

        return time_in_turn(run, images, rounds, runtime)


def summarise_seconds(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians of times and of ratios."""
    return {
        **{f'{label}_ms_per_batch': 1000 * statistics.median(values) for label, values in seconds.items()},
        **{f'{selection}_to_dense': median_ratio(seconds, selection, 'dense') for selection in SELECTIONS},
        'similarity_to_stage': median_ratio(seconds, 'similarity', 'stage'),
    }


def name_setting(setting: tuple[str, tuple[int, int], str]) -> str:
    model, (img_size, batch_size), runs = setting
    return f'{model.removesuffix("_patch16_224")}, {img_size} pixels, batch {batch_size}, {runs}'


def count_limits(model: str, img_size: int) -> dict[str, float]:
    """Ratio of the multiply-accumulates of the dense model to those of each selection."""
    gmacs = {}
    with torch.device('meta'):
        for variant in make_variants(model, img_size):
            image = torch.zeros(1, 3, img_size, img_size)
            gmacs[variant.label] = count_gmacs(timm.create_model(variant.model, **variant.kwargs).eval(), image)
    return {f'{selection}_limit': gmacs['dense'] / gmacs[selection] for selection in SELECTIONS}


def measure_setting(setting: tuple[str, tuple[int, int], str], rounds: int) -> dict:
    model, (img_size, batch_size), runs = setting
    if batch_size == 1:
        rounds *= LATENCY_ROUNDS
    if runs in RUNTIMES:
        seconds = time_files(model, img_size, batch_size, runs, rounds)
    else:
        seconds = time_in_torch(model, img_size, batch_size, runs == 'compiled', rounds)
    return {**summarise_seconds(seconds), **count_limits(model, img_size), 'rounds': rounds, 'seconds': seconds}


def format_text(records: dict[str, dict], environment: dict) -> str:
    header = ['', 'dense, ms/batch', 'stage : dense', 'similarity : dense', 'similarity : stage']
    lines = [
        [
            name,
            f'{record["dense_ms_per_batch"]:.1f}',
            *(f'{record[f"{s}_to_dense"]:.2f} x (limit {record[f"{s}_limit"]:.2f} x)' for s in SELECTIONS),
            f'{record["similarity_to_stage"]:.3f}',
        ]
        for name, record in records.items()
    ]
    return f'{TITLE}\n\n{markdown_table(header, lines)}\n{summarise_environment(environment)}; float32.\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Speed of the selections, in PyTorch and as exported files.')
    parser.add_argument('--family', choices=SETTINGS, default='deit', help='family of models (default: deit)')
    parser.add_argument(
        '--rounds', type=positive_int, default=15, metavar='N',
        help=f'timed rounds, {LATENCY_ROUNDS} times as many at batch 1 (default: 15)')
    parser.add_argument('--again', action='store_true', help='repeat measurements that PREFIX.json has already')
    add_results(parser, ('.json', '.md'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(THREADS)
    environment = describe_environment(torch.device('cpu'))
    environment['versions'] |= {name: version(name.lower()) for name in RUNTIMES}
    records = {} if args.again else read_records(args.results, environment)
    settings = SETTINGS[args.family]
    for i, setting in enumerate(settings):
        name = name_setting(setting)
        print(f'{i + 1} of {len(settings)}: {name}')
        if name in records:
            print('    is measured already')
            continue
        records[name] = measure_setting(setting, args.rounds)
        write_report(args.results, format_text(records, environment), {**environment, 'settings': records})
    print(f'\n{format_text(records, environment)}')


if __name__ == '__main__':
    main()
