""" This state of the library against another one, such as the one before a change

    git clone . ../before && git -C ../before checkout COMMIT
    python benchmarks/against_checkout.py --checkout ../before --results benchmarks/results/against_checkout_cpu

The other state is imported from its folder under another name, so both run in one process, batch by batch in turn,
beside timm's dense model. Results are written after each setting.
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
from timm.models.levit import model_cfgs as levit_cfgs
from torch import nn

BEFORE = 'timm_evo_before'
TITLE = "This state of the library ('now') beside another ('before'), both evolved, and timm's dense model"
DEITS = [f'deit_{size}_patch16_224' for size in ('tiny', 'small', 'base')]
LEVITS = ['levit_128s', 'levit_256', 'levit_384']
# models, pixels, batch size, and how they run
SETTINGS = [
    *((DEITS, 224, batch_size, {}) for batch_size in (1, 16)),
    *((DEITS, 384, batch_size, {}) for batch_size in (1, 4)),
    *((LEVITS, 224, batch_size, {}) for batch_size in (1, 16)),
    (DEITS[:2], 224, 16, {'train': True}),
    (LEVITS[:1], 224, 16, {'train': True}),
    *((DEITS[:2], 224, batch_size, {'compile_mode': 'default'}) for batch_size in (1, 16)),
    *((LEVITS[:1], 224, batch_size, {'compile_mode': 'default'}) for batch_size in (1, 16)),
]


def import_before(checkout: Path) -> None:
    """Make the library of another checkout importable, without its `__init__`, which would register its models."""
    package = types.ModuleType(BEFORE)
    package.__path__ = [str(checkout / 'timm_evo')]
    sys.modules[BEFORE] = package


def build_before(dense: str, img_size: int) -> nn.Module:
    if dense in levit_cfgs:
        return importlib.import_module(f'{BEFORE}.levit').EvoLevit(img_size, **levit_cfgs[dense])
    modules = ('instances', 'vision_transformer')  # of `evolve`, newest first
    module = next(name for name in modules if (Path(sys.modules[BEFORE].__path__[0]) / f'{name}.py').exists())
    return importlib.import_module(f'{BEFORE}.{module}').evolve(timm.create_model(dense, img_size=img_size))


def variants_of(dense: str, img_size: int) -> list[Variant]:
    size = {'img_size': img_size}
    return [
        Variant('dense', dense, size, 'dense'),
        Variant('before', dense, size, 'dense', lambda: build_before(dense, img_size)),
        Variant('now', f'evo_{dense}', size, 'dense'),
    ]


def describe(row: dict) -> str:
    how = 'training' if row['how'].get('train') else 'compiled' if row['how'].get('compile_mode') else 'eager'
    return f'{row["model"]}, {row["img_size"]}, batch {row["batch_size"]}, {how}'


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
    parser = argparse.ArgumentParser(description='Speed of this state of the library beside that of another checkout.')
    parser.add_argument('--checkout', type=Path, required=True, metavar='DIR', help='folder with the other state')
    parser.add_argument('--rounds', type=positive_int, default=21, metavar='N', help='timed rounds (default: 21)')
    parser.add_argument(
        '--only', default='', metavar='TEXT', help='settings that have this in their description, such as "batch 1,"')
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
    for models, img_size, batch_size, how in SETTINGS:
        for dense in models:
            row = {'model': dense, 'img_size': img_size, 'batch_size': batch_size, 'how': how}
            if args.only not in describe(row):
                continue
            print(describe(row))
            variants = variants_of(dense, img_size)
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
