""" The tables of `on_gpu.py`, from its records """
import statistics
from pathlib import Path

from common.environment import summarise_environment
from common.results import markdown_table, replacing

from . import records
from .settings import DENSE, SETTINGS, Setting, identity

TITLES = {
    'compiled': 'Inference, compiled', 'graphs': 'One image, compiled with CUDA graphs', 'eager': 'Inference, eager',
    'training': 'Training steps'}
SAID = 150  # last characters of a command's output
COLUMNS = list(dict.fromkeys(variant for setting in SETTINGS for variant in setting.variants))


def latest(found: list[dict], *keys: str) -> list[dict]:
    """The latest record for each value of the keys."""
    return list({tuple(record[key] for key in keys): record for record in found}.values())


def label(record: dict) -> str:
    """Label of the row of a record."""
    setting = Setting(*(record[key] for key in ('step', 'model', 'batch', 'img_size', 'mode', 'train')))
    how = ', '.join(filter(None, ['training' if record['train'] else '', 'compiled' if record['mode'] else 'eager']))
    return f'{setting.label()}, {how}' if record['step'] == 'training' else setting.label()


def format_time(record: dict, dense: dict[tuple[str, str], float]) -> str:
    """Milliseconds, and the ratio to the dense model in the same run."""
    ms = dense.get((record['run'], identity(record)))
    ratio = record.get('ratio_to_dense', ms / record['ms'] if ms else None)
    if record['variant'] == DENSE or ratio is None:
        return f'{record["ms"]:.2f}'
    return f'{record["ms"]:.2f}, {ratio:.2f} x'


def speed_table(found: list[dict]) -> str:
    """A row for each setting, a column for each variant."""
    dense = {(record['run'], identity(record)): record['ms'] for record in found if record['variant'] == DENSE}
    variants = [name for name in COLUMNS if any(record['variant'] == name for record in found)]
    rows: dict[str, dict[str, str]] = {}
    for record in found:
        rows.setdefault(label(record), {})[record['variant']] = format_time(record, dense)
    return markdown_table(
        ['', *variants], [[name, *(cells.get(variant, '') for variant in variants)] for name, cells in rows.items()])


def memory_table(found: list[dict]) -> str:
    variants = [name for name in COLUMNS if any(record['variant'] == name for record in found)]
    rows: dict[str, dict[str, str]] = {}
    for record in found:
        rows.setdefault(label(record), {})[record['variant']] = f'{record["peak_memory_mb"]:.1f}'
    return markdown_table(
        ['', *variants], [[name, *(cells.get(variant, '') for variant in variants)] for name, cells in rows.items()])


def equal_table(found: list[dict]) -> str:
    """A row for each model, selection and dtype, with the worst values over image and batch sizes."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for record in found:
        groups.setdefault((record['model'], record['selection'], record['dtype']), []).append(record)
    lines = []
    for names, group in groups.items():
        within = all(record['difference'] <= record['limit'] for record in group)
        lines.append([
            ', '.join(names),
            f'{max(record["difference"] for record in group):.1g}',
            f'{min(record["same_tokens"] for record in group):.2%}',
            f'{max(record["alone"] for record in group):.1g}',
            'yes' if all(record['same_bits'] for record in group) else '**no**',
            'yes' if within else '**no**',
        ])
    return markdown_table(
        ['', 'difference', 'same tokens', 'image alone', 'same bits twice', 'within the limit'], lines)


def cifar_table(found: list[dict]) -> str:
    """Mean of the seeds, and the value of each."""
    lines = []
    for variant in dict.fromkeys(record['variant'] for record in found):
        group = sorted((record for record in found if record['variant'] == variant), key=lambda record: record['seed'])
        values = [record['top1'] for record in group]
        again = [record['top1_dense_again'] for record in group if 'top1_dense_again' in record]
        lines.append([
            variant, f'{statistics.mean(values):.2f}', ', '.join(f'{value:.2f}' for value in values),
            f'{statistics.mean(again):.2f}' if again else '', f'{group[0]["epochs"]}'])
    return markdown_table(['trained as', 'top-1', 'of each seed', 'the same weights, dense', 'epochs'], lines)


def commands_table(found: list[dict]) -> str:
    lines = []
    for record in found:
        said = ' '.join(record['said'].replace('|', ' ').replace('`', ' ').split())
        lines.append([record['name'], str(record['status']), f'{record["seconds"]:.0f}', f'`{said[-SAID:]}`'])
    return markdown_table(['command', 'exit status', 'seconds', 'end of its output'], lines)


def failures(known: list[dict]) -> str:
    """Failures of each step in its last run."""
    last_run = {record['step']: record['run'] for record in known if 'step' in record}
    lines = []
    for record in known:
        if record['kind'] == 'failure' and record['run'] == last_run[record['step']]:
            said = record['error'].strip().splitlines() or ['']
            lines.append(f'* {record["step"]}: {record["what"]}: `{said[-1][:200]}`\n')
    return ''.join(lines)


def format_text(all_records: list[dict]) -> str:
    """All tables of the last run and of earlier runs that are comparable with it."""
    runs = [record for record in all_records if record['kind'] == 'run']
    known = records.comparable(all_records, runs[-1])

    def of_kind(kind: str, *keys: str, step: str | None = None) -> list[dict]:
        return latest(
            [record for record in known if record['kind'] == kind and step in (None, record['step'])], *keys)
    where = ('step', 'model', 'batch', 'img_size', 'mode', 'train', 'variant')
    versions, state = runs[-1]['versions'], runs[-1]
    parts = [
        '# On a GPU\n',
        f'{summarise_environment(state)}, Triton {versions["triton"]}, CUDA {versions["cuda"]}; the library '
        f'{"has kernels" if state["has_kernels"] else "has no kernels"} (state {state["library"]}); bfloat16, random '
        'weights, medians. Milliseconds a batch, and the ratio to the dense model in the same run.\n']
    if found := of_kind('equal', 'case'):
        parts += [
            '## Kernels beside the library without them\n',
            'Differences are shares of the largest logit, the largest of all image and batch sizes.\n',
            equal_table(found)]
    speeds = of_kind('speed', *where)
    for step, title in TITLES.items():
        if found := [record for record in speeds if record['step'] == step]:
            parts += [f'## {title}\n', speed_table(found)]
    if found := of_kind('trained', 'variant', 'seed'):
        images = found[0]['test_images']
        parts += ['## CIFAR-10 from scratch\n', f'Top-1 of {images} test images.\n', cifar_table(found)]
    if found := of_kind('command', 'step', 'name'):
        parts += ['## Commands\n', commands_table(found)]
    if speeds:
        parts += ['## Peak memory in MB\n', memory_table([record for record in speeds if record['step'] != 'graphs'])]
    if text := failures(known):
        parts += ['## Failed\n', text]
    commands = dict.fromkeys(record['command'] for record in runs if record['run'] in {r['run'] for r in known})
    parts += ['## Calls\n', ''.join(f'* `{command}`\n' for command in commands)]
    return '\n'.join(parts)


def write(results: Path) -> None:
    """Write the tables of a file of records to a file beside it."""
    with replacing(results.with_suffix('.md')) as part:
        part.write_text(format_text(records.read(results)))
