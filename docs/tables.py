"""The tables of README and docs that repeat what stands elsewhere: in results, in the library, in its arguments.

    python docs/tables.py             # after a measurement, a change of arguments, of models or of selections
    python docs/tables.py --models    # that of the models, too, which takes minutes

A table stands between `<!-- table: NAME (by docs/tables.py) -->` and `<!-- end of table -->`. Figures of a file that is
not there yet are TODO. `tests/test_documentation.py` compares.
"""
import argparse
import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]
START, END = '<!-- table: {} (by docs/tables.py) -->', '<!-- end of table -->'
TABLE = re.compile(re.escape(START).replace(r'\{\}', r'([\w-]+)') + r'\n(.*?)' + re.escape(END), re.DOTALL)
Row = dict[str, str]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), ['---'] * len(list(header)), *map(list, rows)]
    return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


# Results: a file of benchmarks/results has tables, and a line that says where and how they were measured


def read_result(name: str) -> tuple[list[Row], str]:
    """The rows of the first table, the first cell of each as '', and the machine."""
    file = RESULTS / f'{name}.md'
    if not file.is_file():
        return [], ''
    text = file.read_text(encoding='utf-8')
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in re.search(r'(?:^\|.*\n)+', text, re.MULTILINE)[0].splitlines()]
    rows = [dict(zip(['', *header[1:]], row, strict=True)) for row in rows]
    machine = re.findall(r'^(?![|*]).*, torch [\d.]+.*', text, re.MULTILINE)[-1].rstrip('.')
    return rows, re.sub(r'\+cu\d+', '', machine)


def caption(name: str, machine: str) -> str:
    return f'\n({machine}. [All figures](../benchmarks/results/{name}.md).)\n' if machine else '\n(TODO.)\n'


def command(name: str) -> str:
    """The command that a result was made with."""
    file = RESULTS / f'{name}.json'
    if not file.is_file():
        return ''
    line = json.loads(file.read_text(encoding='utf-8'))['command']
    line = re.sub(r'(?<=--results )\S+', f'benchmarks/results/{name}', line)
    lines = ['']
    for option in re.split(r' (?=--)', line):
        if len(lines[-1]) + len(option) > 86:  # the width of a page
            lines.append('   ')
        lines[-1] = f'{lines[-1]} {option}'
    return '\n```\n' + ' \\\n'.join(lines).lstrip() + '\n```\n'


def method(label: str) -> str:
    """What a row is called: `published` is `'stage'`, and a bare number behind ToMe is its r."""
    return re.sub(r'^ToMe, (?=\d)', 'ToMe, r = ', label).replace('published', 'stage')


def cells(row: Row, columns: Iterable[tuple[str, ...]]) -> list[str]:
    """Of a row, the first column of each alternative that is there."""
    return [next((row[name] for name in names if name in row), 'TODO') for names in columns]


def close_to(rows: list[Row], other: str, ours: list[Row]) -> list[Row]:
    """Settings of another method that cost about as much as each of our rows."""
    others = [row for row in rows if row[''].startswith(other)]
    nearest = [
        min(others, key=lambda row: abs(float(row['GMACs']) - float(our['GMACs']))) for our in ours if others]
    return [row for i, row in enumerate(nearest) if row not in nearest[:i]]


SPEED = ('throughput', 'ratio to dense')
CHANGED = ('decisions changed', 'other classes than dense')


def short_frozen(name: str, header: dict[str, tuple[str, ...]], labels: list[str]) -> str:
    """The rows that a reader decides by, ours and at about their cost those of others."""
    rows, machine = read_result(name)
    found = {method(row['']): row for row in rows}
    chosen = [(label, found.get(label, {})) for label in labels]
    ours = [row for label, row in chosen if label.startswith('similarity') and row]
    for other in ('ToMe', 'EViT'):
        chosen += [(method(row['']), row) for row in close_to(rows, other, ours)] or [(f'{other}, TODO', {})]
    lines = [[f'**{label}**' if label.startswith('similarity') else label, *cells(row, header.values())]
             for label, row in chosen]
    return table(['', *header], lines) + caption(name, machine)


def frozen_classifier() -> str:
    name, header = 'frozen_deit_tiny_cpu', {name: (name,) for name in ('top-1', 'top-5', 'loss')}
    shown = short_frozen(
        name, header | {'decisions changed': CHANGED, 'throughput to dense': SPEED, 'GMACs': ('GMACs',)},
        ['dense', 'similarity, 0.7', 'similarity, 0.5', 'stage, 0.7', 'layer, 0.7'])
    rows = {row['']: row for row in read_result(name)[0]}

    def cost(keep_ratio: float) -> str:
        lost, changed = 'TODO', 'TODO'
        if (row := rows.get(f'similarity, {keep_ratio}')) is not None:
            top1, changed = cells(row, [('top-1',), CHANGED])
            lost = f'{float(rows["dense"]["top-1"]) - float(top1):.1f}'
        return f'{keep_ratio} costs {lost} points of top-1 and changes {changed.rstrip("% ")}% of the decisions'

    return f'{shown}\nBy similarity, a keep ratio of {cost(0.7)}, and {cost(0.5)}.\n'


def frozen_features_short() -> str:
    header = {name: (name,) for name in ('class token', '5 neighbours', 'patch tokens', 'saliency')}
    return short_frozen(
        'frozen_features_cpu', header | {'throughput to dense': SPEED, 'GMACs': ('GMACs',)},
        ['dense', 'similarity, 0.7', 'similarity, 0.5', 'stage, 0.7', 'stage, 0.5'])


def frozen_features(name: str) -> str:
    columns = {name: name for name in ('class token', '5 neighbours', 'patch tokens', 'saliency')}
    columns |= {'ratio to dense': 'throughput to dense', 'of whole grids': 'of whole grids', 'GMACs': 'GMACs'}
    return as_measured(name, columns)


SELECTIONS = {
    'dense, ms/batch': 'dense, ms a batch', 'stage : dense': "`'stage'` to dense",
    'similarity : dense': "`'similarity'` to dense"}


def as_measured(name: str, columns: dict[str, str] | None = None, keep: tuple[str, ...] = ('',)) -> str:
    """Columns of a result file by the names that they get here; similarity first, the largest keep ratio first.

    Args:
        name: The result.
        columns: From its names to those on the page; None for all as they are.
        keep: What the first cells of the rows end with.
    """
    rows, machine = read_result(name)
    rows = [row for row in rows if row[''].endswith(keep) and 'earlier rule' not in row['']]  # which had no release
    columns = columns or {column: column for row in rows[:1] for column in row if column}
    order = {'dense': 0, 'similarity': 1, 'published': 2, 'stage': 2, 'layer': 3}

    def place(row: Row) -> tuple[int, float]:
        found = re.fullmatch(r'(\w+).*?, ([\d.]+)', row[''])
        rank = order.get(found[1] if found else row[''], 4)
        return rank, -float(found[2]) if found and rank < 4 else 0

    rows.sort(key=place)
    shown = [[method(row['']), *(row[column] for column in columns)] for row in rows]
    return table(['', *columns.values()], shown) + caption(name, machine) + command(name)


def speed_notes(name: str) -> dict[str, str]:
    """Of `benchmarks/speed.py`: how and where each setting was measured."""
    text = (RESULTS / f'{name}.md').read_text(encoding='utf-8')
    return dict(re.findall(r'^\* ([\w-]+): (.*)$', re.sub(r'\+cu\d+', '', text), re.MULTILINE))


def speed(settings: dict[str, str], name: str = 'speed_cpu') -> str:
    """Of `benchmarks/speed.py`: a row per model, a column per setting, each beside the limit of the products."""
    text = (RESULTS / f'{name}.md').read_text(encoding='utf-8')
    rows = [[cell.strip() for cell in line.strip('|\n').split('|')] for line in text.splitlines() if line[:1] == '|']
    found: dict[str, dict[str, str]] = {}
    for setting, model, _, _, ratio, limit, *_ in rows[2:]:
        if setting in settings and model.startswith('evo_'):
            found.setdefault(model, {})[setting] = f'{ratio} of {limit.removesuffix(" x")}'
    shown = [[f'`{model}`', *(row.get(setting, '') for setting in settings)] for model, row in found.items()]
    notes = speed_notes(name)
    how = '; '.join(f'{settings[s]}: {re.sub(r"; .*", "", notes[s])}' for s in settings)
    machine = notes[next(iter(settings))].partition('; ')[2]
    return table(['model', *settings.values()], shown) + caption(name, f'{how}. {machine}')


def exports() -> str:
    """Of `benchmarks/exports.py`: a row per format, which leads to its section of the page."""
    sections = {
        'ONNX': 'onnx', 'ONNX in int8': 'int8-by-onnxruntime', 'OpenVINO, weights in float16': 'openvino',
        'torch.export': 'torchexport-and-aotinductor', 'AOTInductor': 'torchexport-and-aotinductor',
        'torch.jit.trace': 'torchscript'}
    columns = {
        'dense, MB': 'dense, MB', 'evolved, MB': 'evolved, MB', 'evolved, largest difference': 'largest difference',
        'evolved, same class': 'same class', 'dense, ms/batch of 16': '16 images, dense, ms',
        'evolved : dense, batch 16': '16 images, speed', 'dense, ms/batch of 1': 'one image, dense, ms',
        'evolved : dense, batch 1': 'one image, speed'}
    name = 'exports_cpu'
    rows, machine = read_result(name)
    shown = [[f'[{row[""]}](#{sections[row[""]]})', *(row[column] for column in columns)] for row in rows]
    gmacs = json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8'))['gmacs']
    limit = (
        f'The evolved model has {gmacs["evolved"]:.2f} GMACs, the dense one {gmacs["dense"]:.2f}, so the limit of the '
        f'speed is {gmacs["dense"] / gmacs["evolved"]:.2f} x.')
    return f'{table(["format", *columns.values()], shown)}{caption(name, machine)}\n{limit}\n{command(name)}'


def hours() -> str:
    """Of `benchmarks/speed.py`: what one pass over many images takes."""
    settings = json.loads((RESULTS / 'speed_cpu.json').read_text(encoding='utf-8'))['settings']
    rows = []
    for what, number, setting, model in (
            ('a million images of 224 pixels through DeiT-S', 1_000_000, 'deit-224', 'deit_small_patch16_224'),
            ('the same through ViT-L/16', 1_000_000, 'vit-224', 'vit_large_patch16_224'),
            ('an epoch of ImageNet-1k, 1,281,167 images, DeiT-S', 1_281_167, 'deit-train', 'deit_small_patch16_224')):
        result = settings[setting]
        dense, evolved = (
            result['models'][name]['seconds_per_batch']['median'] / result['settings']['batch_size']
            for name in (model, f'evo_{model}'))
        in_hours = [f'{number * seconds / 3600:.1f} h' for seconds in (dense, evolved, dense - evolved)]
        in_hours[2] += f', {1 - evolved / dense:.0%}'
        rows.append([f'{what} ({1000 * dense:.3g} and {1000 * evolved:.3g} ms per image)', *in_hours])
    machine = speed_notes('speed_cpu')['deit-224'].partition('; ')[2]
    return table(['', 'dense', 'evolved', 'saved'], rows) + caption('speed_cpu', machine)


def other_methods() -> str:
    """Of `benchmarks/other_methods.py`: a row per method, from three runs."""
    runs = {
        '224 pixels': 'other_methods_cpu', 'DeiT-B at 224 pixels': 'other_methods_base_cpu',
        '384 pixels': 'other_methods_384_cpu'}
    found = {what: read_result(name) for what, name in runs.items()}
    at_224, base_at_224, at_384 = ({row['']: row for row in rows} for rows, _ in found.values())
    labels = {
        'timm-evo': 'timm-evo, stage', 'timm-evo, whole last block': 'timm-evo, stage, whole last block',
        'ToMe': 'ToMe, r = 11 (14 for 256 patches)', "Evo-ViT, authors' code": "Evo-ViT, the authors' code"}

    def ratios(name: str, size: str, at_224: dict[str, Row]) -> str:
        here = f'{name}, {size}'
        there = f'evo_deit_{size}_patch16_224' if name == 'timm-evo' else here
        return f'{at_224[here]["ratio to dense"]} / {at_384.get(there, {}).get("ratio to dense", "-")}'

    shown = []
    for label, row in at_224.items():
        name, _, size = label.rpartition(', ')
        if size == 'small':
            shown.append([
                labels.get(name, name), ratios(name, 'tiny', at_224), ratios(name, 'small', at_224),
                ratios(name, 'base', base_at_224), row['GMACs']])
    cost = f'GMACs of DeiT-S (dense: {at_224["deit_small_patch16_224"]["GMACs"]})'
    where = ' '.join(
        f'{what}: {machine}. [All figures](../benchmarks/results/{runs[what]}.md).'
        for what, (_, machine) in found.items())
    header = ['throughput to dense, 224 / 384 pixels', 'DeiT-T', 'DeiT-S', 'DeiT-B', cost]
    return f'{table(header, shown)}\n({where})\n'


def tuned(name: str = 'tuned_deit_tiny_cpu') -> str:
    """What `timm-evo tune` printed, and what was measured afterwards."""
    text = (RESULTS / f'{name}.md').read_text(encoding='utf-8')
    printed, again, machine = re.fullmatch(r'.*?(```text.*?```)\n\n(.*)\n\n(.*)\.\n', text, re.DOTALL).groups()
    machine = re.sub(r'\+cu\d+', '', machine)
    return f'{printed}\n\n{again}\n{caption(name, machine)}{command(name)}'


# Models


class Family(NamedTuple):
    """Models that are built alike.

    Attributes:
        pattern: Their names.
        note: Which they are, and whose weights they take.
        examples: Those that the table has.
    """
    pattern: str
    note: str
    examples: tuple[str, ...]


FAMILIES = [
    Family('evo_deit_*distilled*', 'DeiT, distilled', ('evo_deit_small_distilled_patch16_224',)),
    Family('evo_deit_*', 'DeiT', (
        'evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_224', 'evo_deit_base_patch16_224',
        'evo_deit_base_patch16_384')),
    Family('evo_levit_cls_*', 'LeViT as the authors of Evo-ViT have it; none on the Hub', (
        'evo_levit_cls_128s', 'evo_levit_cls_128', 'evo_levit_cls_192', 'evo_levit_cls_256', 'evo_levit_cls_384')),
    Family('evo_levit_*', 'LeViT', ('evo_levit_128s', 'evo_levit_256', 'evo_levit_384')),
    Family('evo_deit3_*', 'DeiT III', ('evo_deit3_small_patch16_224',)),
    Family('evo_vit_*dinov3*', 'DINOv3', (
        'evo_vit_small_patch16_dinov3', 'evo_vit_base_patch16_dinov3', 'evo_vit_large_patch16_dinov3')),
    Family('evo_vit_*_reg4_dinov2', 'DINOv2 with registers', ('evo_vit_small_patch14_reg4_dinov2',)),
    Family('evo_vit_*_dinov2', 'DINOv2', (
        'evo_vit_small_patch14_dinov2', 'evo_vit_base_patch14_dinov2', 'evo_vit_large_patch14_dinov2')),
    Family('evo_vit_*_tipsv2', 'TIPSv2', ('evo_vit_base_patch14_reg1_tipsv2',)),
    Family('evo_vit_pe_core_*', 'Perception Encoder, core', ('evo_vit_pe_core_base_patch16_224',)),
    Family('evo_vit_pe_lang_*', 'Perception Encoder, language', ('evo_vit_pe_lang_large_patch14_448',)),
    Family('evo_vit_pe_spatial_*', 'Perception Encoder, spatial', ('evo_vit_pe_spatial_base_patch16_512',)),
    Family('evo_vit_*_lingbot', 'LingBot-Vision', ('evo_vit_base_patch16_lingbot',)),
    Family('evo_vit_*_sapiens2', 'Sapiens2', ('evo_vit_base_patch16_sapiens2',)),
    Family('evo_vit_*_siglip_gap_*', 'SigLIP and SigLIP 2, pooled by mean', ('evo_vit_base_patch16_siglip_gap_224',)),
    Family('evo_vit_*_siglip_*', 'SigLIP and SigLIP 2', ('evo_vit_base_patch16_siglip_224',)),
    Family('evo_eva02_*_clip_*', 'EVA-02 CLIP', ('evo_eva02_base_patch16_clip_224',)),
    Family('evo_eva02_*', 'EVA-02', ('evo_eva02_small_patch14_336', 'evo_eva02_base_patch14_448')),
    Family('evo_eva_giant_*', 'EVA', ('evo_eva_giant_patch14_224',)),
    Family('evo_eva_large_*', 'EVA, large', ('evo_eva_large_patch14_196',)),
    Family('evo_vit_*_clip_*', 'CLIP, OpenCLIP, DFN, MetaCLIP', ('evo_vit_base_patch16_clip_224',)),
    Family('evo_vit_*_mci_*', 'MobileCLIP', ('evo_vit_base_mci_224',)),
    Family('evo_vit_*_rope_reg*', 'ViT with rotations and registers', ('evo_vit_betwixt_patch16_rope_reg4_gap_256',)),
    Family('evo_vit_*_rope_*', 'ROPE-ViT', ('evo_vit_small_patch16_rope_224', 'evo_vit_small_patch16_rope_mixed_224')),
    Family('evo_vit_*_reg*', 'ViT with registers', ('evo_vit_betwixt_patch16_reg4_gap_256',)),
    Family('evo_vit_*_gap_*', 'ViT, mean of the patches', ('evo_vit_base_patch16_gap_224',)),
    Family('evo_vit_*_18x2_*', 'ViT with parallel blocks', ('evo_vit_small_patch16_18x2_224',)),
    Family('evo_vit_*_r*_s*', 'hybrids, with convolutions before the patches', ('evo_vit_base_r50_s16_224',)),
    Family('evo_vit_*_resnet*', 'hybrids with a whole ResNet', ('evo_vit_base_resnet50d_224',)),
    Family('evo_vit_intern300m_*', 'InternViT', ('evo_vit_intern300m_patch14_448',)),
    Family('evo_vit_*', 'ViT: AugReg, ORIG, SAM, DINO, MAE and other tags', (
        'evo_vit_tiny_patch16_224', 'evo_vit_small_patch16_224', 'evo_vit_base_patch16_224',
        'evo_vit_large_patch16_224', 'evo_vit_huge_patch14_224')),
    Family('evo_aimv2_*', 'AIMv2', ('evo_aimv2_large_patch14_224',)),
    Family('evo_beit3_*', 'BEiT-3', ('evo_beit3_base_patch16_224',)),
    Family('evo_flexivit_*', 'FlexiViT', ('evo_flexivit_base',)),
    Family('evo_test_vit*', 'tiny ones, for quick tests', ('evo_test_vit', 'evo_test_vit2')),
]


def model_row(name: str) -> list[str]:
    """Input, tokens of the last block and GMACs of a model as `timm-evo info` says them, by keep ratio."""
    from timm_evo.inspection.info import summarise
    gmacs, tokens = [], []
    for keep_ratio in (1.0, 0.7, 0.5):
        text = summarise(name, keep_ratio=keep_ratio)
        # with keep ratio 1 the last block still computes no more than the head reads, which the dense model does not
        gmacs.append(re.search(r'dense ([\d.]+)' if keep_ratio == 1 else r'GMACs +([\d.]+)', text)[1])
        tokens.append(re.findall(r'^  \d+(?: to \d+)? +(\d+)$', text, re.MULTILINE)[-1])
    size = re.search(r'images +\d+ x (\d+)', text)[1]
    in_one_line = ',\N{NO-BREAK SPACE}'.join
    gmacs = [f'{value:.2f}' if value < 100 else f'{value:.0f}' for value in map(float, gmacs)]
    return [f'`{name}`', size, in_one_line(tokens), in_one_line(gmacs)]


def published_accuracy() -> dict[str, str]:
    """Top-1 that the authors publish, from the table of the recipes."""
    text = (ROOT / 'docs/reproduce.md').read_text(encoding='utf-8')
    return dict(re.findall(r'^\| `(evo_\w+)` \|.*\| ([\d.]+) \|$', text, re.MULTILINE))


def measured_throughput() -> dict[str, dict[str, str]]:
    """Ratio to the dense model at keep ratio 0.5, by model and selection, in eager mode and with several images."""
    found: dict[str, dict[str, str]] = {}
    for setting, result in json.loads((RESULTS / 'speed_cpu.json').read_text())['settings'].items():
        if setting in ('deit-224', 'levit', 'vit-224', 'vit-384', 'dinov2-518'):
            for model, figures in result['models'].items():
                if model.startswith('evo_'):
                    found.setdefault(model, {})['stage'] = f'{figures["ratio_to_dense"]:.2f} x'
    for name in ('selections_cpu', 'selections_rope_cpu'):
        for setting, figures in json.loads((RESULTS / f'{name}.json').read_text())['settings'].items():
            model, _, rest = setting.partition(', ')
            size = int(rest.split()[0])
            model = f'evo_{model}_patch16_224' if model in ('deit_small', 'deit_base') else f'evo_{model}'
            if rest.endswith('eager') and 'batch 1,' not in rest and size in (224, 256, 336):
                for selection in ('stage', 'similarity'):
                    ratio = f'{figures[f"{selection}_to_dense"]:.2f} x'
                    found.setdefault(model, {}).setdefault(selection, ratio)
    return found


def models() -> str:
    throughput, accuracy = measured_throughput(), published_accuracy()
    rows = []
    for family in FAMILIES:
        rows.append([f'**{family.note}**', *[''] * 5])
        for name in family.examples:
            ratios = throughput.get(name, {})
            speed = ', '.join(ratios.get(selection, '-') for selection in ('stage', 'similarity'))
            rows.append([
                *model_row(name), speed.replace(' ', '\N{NO-BREAK SPACE}') if ratios else '', accuracy.get(name, '')])
    return table(['model', 'input', 'tokens', 'GMACs', 'throughput', 'top-1'], rows)


def family_of(name: str) -> Family | None:
    return next((family for family in FAMILIES if fnmatch(name, family.pattern)), None)


# Arguments


def as_code(text: str) -> str:
    """Text of a docstring, with all that is code between backticks."""
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
    return ''.join(
        part if part[:1] == '`' else re.sub(r"(?:\b\w+=)?'\w+'|\b\w+=\w+", r'`\g<0>`', part) for part in parts)


def arguments() -> str:
    from inspect import cleandoc

    from timm_evo.config import DEFAULTS, EvolutionConfig
    section = cleandoc(EvolutionConfig.__doc__).partition('Args:\n')[2].partition('\n\n')[0]
    meanings = dict(re.findall(r'^    (\w+): (.*?)(?=^    \w+: |\Z)', section, re.MULTILINE | re.DOTALL))
    rows = [(f'`{name}`', f'`{default!r}`', as_code(meanings[name])) for name, default in DEFAULTS.items()]
    return table(['argument', 'default', 'meaning'], rows)


SLOW = {'models': models}
TABLES: dict[str, Callable[[], str]] = {
    'arguments': arguments,
    'tuned': tuned,
    'frozen-classifier': frozen_classifier,
    'frozen-classifier-all': lambda: as_measured('frozen_deit_tiny_cpu'),
    'frozen-features-short': frozen_features_short,
    'frozen-features': lambda: frozen_features('frozen_features_cpu'),
    'frozen-features-448': lambda: frozen_features('frozen_features_448_cpu'),
    'backbones': lambda: as_measured('backbones_cpu', {
        'patch tokens': 'patch tokens', 'saliency': 'saliency map', 'motion': 'motion'}),
    'explained': lambda: as_measured('explained_cpu', {
        'Grad-CAM, last block': 'Grad-CAM', 'Grad-CAM, last block, one photo in ten below': 'one photo in ten is below',
        'attention rollout': 'rollout', 'attention rollout, one photo in ten below': 'one photo in ten is below',
        'GMACs': 'GMACs'}),
    'selections': lambda: as_measured('selections_cpu', SELECTIONS),
    'selections-rope': lambda: as_measured('selections_rope_cpu', SELECTIONS),
    'exported': lambda: as_measured('selections_cpu', SELECTIONS, keep=('onnxruntime', 'OpenVINO')),
    'frozen-cifar10': lambda: as_measured('frozen_cifar10_cpu', {
        'top-1': 'top-1', 'as dense': 'decisions as dense, %', 'ratio to dense': 'throughput to dense'}),
    'exports': exports,
    'launches': lambda: as_measured('launches', {
        'dense': 'dense', 'stage': "`'stage'`", 'stage without kernels': "`'stage'` without kernels",
        'similarity': "`'similarity'`", 'similarity without kernels': "`'similarity'` without kernels"}),
    'hours': hours,
    'other-methods': other_methods,
    'speed-deit': lambda: speed({
        'deit-224': '224 pixels', 'deit-224-compiled': '224, compiled', 'deit-384': '384 pixels',
        'deit-latency': 'one image of 224', 'deit-train': 'training, 224'}),
    'speed-vit': lambda: speed({'vit-224': '224 pixels', 'vit-384': '384 pixels', 'dinov2-518': '518 pixels'}),
    'speed-levit': lambda: speed({'levit': 'as timm has it', 'levit-fused': 'batch norms fused'}),
    'speed-levit-latency': lambda: speed({'levit-latency': 'one image'}, 'speed_levit_latency_cpu'),
}


def fill(page: Path, tables: dict[str, Callable[[], str]]) -> str:
    """A page with these tables as they should be."""
    def one(found: re.Match[str]) -> str:
        name, text = found.groups()
        if name in tables:
            text = f'\n{tables[name]()}\n'
        if page.parent == ROOT:  # PyPI shows it
            text = text.replace('](../', '](https://github.com/timm-evo/timm-evo/blob/main/')
        return f'{START.format(name)}\n{text}{END}'

    return TABLE.sub(one, page.read_text(encoding='utf-8'))


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the tables of README and docs.')
    parser.add_argument('--models', action='store_true', help='the table of the models, too, which takes minutes')
    args = parser.parse_args()
    for page in PAGES:
        page.write_text(fill(page, TABLES | (SLOW if args.models else {})), encoding='utf-8')


if __name__ == '__main__':
    main()
