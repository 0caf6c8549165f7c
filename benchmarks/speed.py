""" The speed of evolved models in many settings, in one call per device

    python benchmarks/speed.py --results benchmarks/results/speed_cpu

Each setting is measured as in `throughput.py`, evolved models with their dense twins. Results are written after each
setting, so the same command continues an interrupted run.
"""
import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.arguments import add_device, positive_int
from common.environment import describe_environment, summarise_environment
from common.measuring import DTYPES, LATENCY_ROUNDS, dense_twin, measure, summarise, with_twins
from common.report import write_report
from common.results import add_results, markdown_table

CPU_THREADS = 2
DEIT = [f'evo_deit_{size}_patch16_224' for size in ('tiny', 'small', 'base')]
SMALL = ['evo_deit_small_patch16_224']
LEVIT = [f'evo_levit_{scheme}{size}' for size in ('128s', '256', '384') for scheme in ('', 'cls_')]
VIT_224 = [f'evo_vit_{size}_patch16_224' for size in ('small', 'base', 'large')]
VIT_384 = [f'evo_vit_{size}_patch16_384' for size in ('small', 'base', 'large')]
DINOV2 = ['evo_vit_small_patch14_dinov2']  # 518 pixels
DINOV3 = [f'evo_vit_{size}_patch16_dinov3' for size in ('small', 'base')]
BOTH = ('stage', 'similarity')


@dataclass
class Setting:
    """A setting to measure.

    Attributes:
        models: Evolved models. Their dense twins are added.
        batch_size: Number of images in a batch.
        img_size: Image size; None for that of each model.
        dtype: Name of the dtype of weights and images.
        autocast: Dtype of mixed precision; None for no mixed precision.
        compile_mode: Mode of torch.compile; None for eager.
        train: Whether it is training instead of inference.
        reparam: Whether batch norms are fused.
        selections: Selections with which each evolved model is measured. If there are none, the default is used.
    """
    models: list[str]
    batch_size: int
    img_size: int | None = None
    dtype: str = 'float32'
    autocast: str | None = None
    compile_mode: str | None = None
    train: bool = False
    reparam: bool = False
    selections: tuple[str, ...] = ()


# Weights are random, so the DeiTs for 224 pixels, which exist in all sizes, are also measured at 384 pixels.
SETTINGS = {
    'cpu': {
        'deit-224': Setting(DEIT, 16),
        'deit-384': Setting(DEIT, 4, img_size=384),
        'deit-latency': Setting(DEIT, 1),
        'deit-224-compiled': Setting(SMALL, 16, compile_mode='default'),
        'deit-train': Setting(SMALL, 16, train=True),
        'levit': Setting(LEVIT, 32),
        'levit-fused': Setting(LEVIT, 32, reparam=True),
        'levit-latency': Setting(LEVIT, 1),
        'vit-224': Setting(VIT_224, 4),
        'vit-384': Setting(VIT_384, 2),
        'dinov2-518': Setting(DINOV2, 2),
    },
    'cuda': {
        'deit-224-compiled': Setting(DEIT, 256, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'deit-384-compiled': Setting(DEIT, 64, 384, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'deit-latency-graphs': Setting(DEIT, 1, dtype='bfloat16', compile_mode='reduce-overhead', selections=BOTH),
        'deit-224': Setting(DEIT, 256, dtype='bfloat16', selections=BOTH),
        'deit-384': Setting(DEIT, 64, img_size=384, dtype='bfloat16', selections=BOTH),
        'deit-latency': Setting(DEIT, 1, dtype='bfloat16', selections=BOTH),
        'deit-train': Setting(SMALL, 256, autocast='bfloat16', train=True, selections=BOTH),
        'levit-bfloat16': Setting(LEVIT, 256, dtype='bfloat16'),
        'levit-float16': Setting(LEVIT, 256, dtype='float16'),
        'levit-bfloat16-compiled': Setting(LEVIT, 256, dtype='bfloat16', compile_mode='default'),
        'levit-float16-compiled': Setting(LEVIT, 256, dtype='float16', compile_mode='default'),
        'vit-224-compiled': Setting(VIT_224, 128, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'vit-384-compiled': Setting(VIT_384, 32, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'dinov2-518-compiled': Setting(DINOV2, 32, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'dinov3-256-compiled': Setting(DINOV3, 128, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'dinov3-512-compiled': Setting(DINOV3, 32, 512, dtype='bfloat16', compile_mode='default', selections=BOTH),
        'levit-latency-graphs': Setting(LEVIT, 1, dtype='bfloat16', compile_mode='reduce-overhead'),
    },
}


def by_dense_twin(names: Iterable[str]) -> list[list[str]]:
    """Models in groups of the same dense twin."""
    groups = defaultdict(list)
    for name in names:
        groups[dense_twin(name)].append(name)
    return list(groups.values())


def measure_setting(setting: Setting, device: torch.device, rounds: int) -> dict:
    """The setting, the environment, and the summary of each model."""
    if setting.batch_size == 1:
        rounds *= LATENCY_ROUNDS
    summary = {}
    for names in by_dense_twin(setting.models):  # separately, because models of other sizes change the memory
        variants = with_twins(names, setting.img_size, each=[{'selection': each} for each in setting.selections])
        results = measure(
            variants,
            rounds=rounds,
            device=device,
            dtype=DTYPES[setting.dtype],
            autocast=DTYPES[setting.autocast] if setting.autocast else None,
            batch_size=setting.batch_size,
            train=setting.train,
            compile_mode=setting.compile_mode,
            reparam=setting.reparam,
        )
        summary |= summarise(variants, results, setting.batch_size)
    return {
        **describe_environment(device), 'settings': {**asdict(setting), 'rounds': rounds}, 'models': summary}


def format_text(records: dict[str, dict]) -> str:
    """A table of all settings, and their descriptions."""
    header = [
        'setting', 'model', 'img/s', 'ms/batch', 'ratio to dense', 'FLOP limit', 'reached', 'memory (MB)',
        'memory ratio']
    lines = []
    for name, record in records.items():
        for label, row in record['models'].items():
            lines.append([
                name,
                label,
                f'{row["images_per_second"]:.1f}',
                f'{1000 * row["seconds_per_batch"]["median"]:.2f}',
                f'{row["ratio_to_dense"]:.2f} x',
                f'{row["flop_ratio_to_dense"]:.2f} x',
                f'{row["flop_limit_share"]:.0%}',
                f'{row["peak_memory_mb"]:.0f}',
                f'{row["memory_ratio_to_dense"]:.2f} x',
            ])
    notes = [f'* {name}: {format_setting(record)}\n' for name, record in records.items()]
    return f'{markdown_table(header, lines)}\n{"".join(notes)}'


def format_setting(record: dict) -> str:
    settings = record['settings']
    parts = [
        'training' if settings['train'] else 'inference',
        f'autocast to {settings["autocast"]}' if settings.get('autocast') else settings['dtype'],
        f'batch {settings["batch_size"]}',
        f'{settings["img_size"]} pixels' if settings['img_size'] else '',
        f'compiled ({settings["compile_mode"]})' if settings['compile_mode'] else 'eager',
        'fused batch norms' if settings['reparam'] else '',
        f'median of {settings["rounds"]} rounds',
    ]
    return f'{", ".join(part for part in parts if part)}; {summarise_environment(record)}'


def read_records(file: Path, device: torch.device) -> dict[str, dict]:
    """Settings of an earlier run, which must have the same machine and versions."""
    if not file.exists():
        return {}
    try:
        records = json.loads(file.read_text())['settings']
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f'--results: {file} is not a file of this script: {error!r}') from error
    now = describe_environment(device)
    for name, record in records.items():
        for key in ('machine', 'versions'):
            if record[key] != now[key]:
                raise SystemExit(
                    f'--results: {file} has {name} with {key} {record[key]}, not {now[key]}. Use another PREFIX.')
    return records


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='The speed of evolved models in many settings.')
    add_device(parser)
    names = [f'{device}: {", ".join(settings)}' for device, settings in SETTINGS.items()]
    parser.add_argument(
        '--settings', nargs='+', metavar='NAME',
        help=f'settings to measure (default: all of the device); {"; ".join(names)}')
    parser.add_argument('--rounds', type=positive_int, default=9, metavar='N', help='timed rounds (default: 9)')
    parser.add_argument(
        '--threads', type=positive_int, metavar='N', help=f'CPU threads (default: {CPU_THREADS}, on CUDA all)')
    parser.add_argument('--again', action='store_true', help='repeat measurements that PREFIX.json has already')
    add_results(parser, ('.json', '.md'))
    args = parser.parse_args()
    known = SETTINGS[args.device.type]
    args.settings = list(known) if args.settings is None else args.settings
    unknown = [name for name in args.settings if name not in known]
    if unknown:
        parser.error(f'--settings: {args.device.type} has no {", ".join(unknown)}, only {", ".join(known)}')
    return args


def main() -> None:
    args = parse_args()
    if args.threads is not None or args.device.type == 'cpu':
        torch.set_num_threads(args.threads or CPU_THREADS)
    records = read_records(args.results.with_name(args.results.name + '.json'), args.device)
    failed = []
    for i, name in enumerate(args.settings):
        print(f'{i + 1} of {len(args.settings)}: {name}')
        if name in records and not args.again:
            print('    is measured already')
            continue
        try:
            record = measure_setting(SETTINGS[args.device.type][name], args.device, args.rounds)
        except KeyboardInterrupt:
            raise SystemExit('\nThe run was interrupted. The same command continues it.') from None
        except Exception as error:  # for example out of memory; the other settings should run
            failed.append(f'{name}: {type(error).__name__}: {error}')
            continue
        records[name] = record
        records = {name: records[name] for name in SETTINGS[args.device.type] if name in records}
        write_report(args.results, format_text(records), {'settings': records})
    print(f'\n{format_text(records)}')
    if failed:
        raise SystemExit('\n'.join(['These settings have failed:', *failed]))


if __name__ == '__main__':
    main()
