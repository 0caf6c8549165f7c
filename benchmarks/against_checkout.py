""" Speed of this state of the library compared with another state, such as the one before a change

    git clone . ../before && git -C ../before checkout COMMIT
    python benchmarks/against_checkout.py --checkout ../before --results benchmarks/results/against_checkout_cpu

The other state is imported from its folder under another name, so that both and timm's dense model run in one process,
batch by batch in turn. Results are written after each setting.
"""
import argparse
import importlib
import sys
import types
from pathlib import Path

import timm
import torch
from common.arguments import add_device, positive_int
from common.environment import describe_environment, summarise_environment
from common.measuring import Variant, measure, summarise
from common.report import write_report
from common.results import add_results, markdown_table
from torch import nn

import timm_evo

BEFORE = 'timm_evo_before'
TITLE = "This state of the library ('now') beside another ('before'), both evolved, and timm's dense model"
DEITS = [f'deit_{size}_patch16_224' for size in ('tiny', 'small', 'base')]
DINO = 'vit_small_patch16_dinov3'
LEVITS = ['levit_128s', 'levit_256']
MODELS = [*((name, selection) for name in (*DEITS, DINO) for selection in ('similarity', 'stage')),
          *((name, 'stage') for name in LEVITS)]
FEW = [(DEITS[0], 'similarity'), (DEITS[0], 'stage'), (DINO, 'similarity'), (LEVITS[0], 'stage')]  # they compile fast
# models and selections, batch size, and how they run
SETTINGS = [
    *((MODELS, batch_size, {}) for batch_size in (1, 16)),
    *((FEW, batch_size, {'compile_mode': 'default'}) for batch_size in (1, 16)),
    (FEW, 16, {'train': True}),
]


def import_before(checkout: Path) -> None:
    """Make the library of another checkout importable without its `__init__`, which would register its models."""
    package = types.ModuleType(BEFORE)
    package.__path__ = [str(checkout / 'timm_evo')]
    sys.modules[BEFORE] = package


def build_before(dense: str, selection: str) -> nn.Module:
    # modules in which `evolve` was in some state, newest first
    for name in ('api', 'instances', 'vision_transformer'):
        if (Path(sys.modules[BEFORE].__path__[0]) / f'{name}.py').exists():
            evolve = importlib.import_module(f'{BEFORE}.{name}').evolve
            return evolve(timm.create_model(dense), selection=selection)
    raise FileNotFoundError('The checkout has no evolve.')


def variants_of(dense: str, selection: str) -> list[Variant]:
    return [
        Variant('dense', dense, {}, 'dense'),
        Variant('before', dense, {}, 'dense', lambda: build_before(dense, selection)),
        Variant('now', dense, {}, 'dense', lambda: timm_evo.evolve(timm.create_model(dense), selection=selection)),
    ]


def describe(row: dict) -> str:
    how = 'training' if row['how'].get('train') else 'compiled' if row['how'].get('compile_mode') else 'eager'
    return f'{row["model"]}, {row["selection"]}, batch {row["batch_size"]}, {how}'


def format_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        before, now = row['models']['before'], row['models']['now']
        lines.append([
            describe(row),
            f'{row["now_to_before"]:.3f}',
            f'{before["ratio_to_dense"]:.2f} x',
            f'{now["ratio_to_dense"]:.2f} x',
            f'{now["flop_ratio_to_dense"]:.2f} x',
            f'{before["peak_memory_mb"]:.0f}',
            f'{now["peak_memory_mb"]:.0f}',
            f'{row["models"]["dense"]["peak_memory_mb"]:.0f}',
        ])
    header = ['setting', 'now to before', 'before to dense', 'now to dense', 'FLOP limit', 'memory before (MB)', 'now',
              'dense']
    return markdown_table(header, lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Speed of this state of the library and of another checkout.')
    parser.add_argument('--checkout', type=Path, required=True, metavar='DIR', help='folder with the other state')
    parser.add_argument('--rounds', type=positive_int, default=21, metavar='N', help='timed rounds (default: 21)')
    parser.add_argument(
        '--only', default='', metavar='TEXT',
        help='run only settings whose description has this text, such as "batch 1,"')
    add_device(parser)
    add_results(parser, ('.json', '.md'))
    args = parser.parse_args()
    if not (args.checkout / 'timm_evo').is_dir():
        parser.error(f'--checkout: there is no timm_evo in {args.checkout}')
    return args


def main() -> None:
    args = parse_args()
    import_before(args.checkout)
    rows = []
    for models, batch_size, how in SETTINGS:
        for dense, selection in models:
            row = {'model': dense, 'selection': selection, 'batch_size': batch_size, 'how': how}
            if args.only not in describe(row):
                continue
            print(describe(row))
            variants = variants_of(dense, selection)
            results = measure(
                variants, rounds=args.rounds * (3 if batch_size == 1 else 1), device=args.device, dtype=torch.float32,
                batch_size=batch_size, **how)
            seconds = [torch.tensor(results[label]['seconds'], dtype=torch.float64) for label in ('before', 'now')]
            row['models'] = summarise(variants, results, batch_size)
            row['now_to_before'] = (seconds[0] / seconds[1]).median().item()
            rows.append(row)
            environment = describe_environment(args.device)
            measured = f'{summarise_environment(environment)}; {args.rounds} rounds, three times as many of one image'
            text = f'{TITLE}\n\n{format_table(rows)}\n{measured}.\n'
            write_report(args.results, text, {**environment, 'rounds': args.rounds, 'rows': rows})
    print(f'\n{format_table(rows)}')


if __name__ == '__main__':
    main()
