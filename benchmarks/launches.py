""" How many kernels a forward pass launches on a GPU, dense and by selection, with the library's kernels and without

    python benchmarks/launches.py --results benchmarks/results/launches

`tests/count_operators.py` counts, which needs no GPU. Views and new memory are left out.
"""
import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from common.environment import describe_environment, summarise_environment
from common.report import write_report
from common.results import add_results, markdown_table
from tqdm import tqdm

COUNTER = Path(__file__).parents[1] / 'tests' / 'count_operators.py'
MODELS = ('deit_small_patch16_224', 'vit_small_patch16_dinov3', 'levit_128s')
SELECTIONS = ('stage', 'layer', 'similarity')
KERNELS = {'': '', '0': ' without kernels'}  # by TIMM_EVO_KERNELS; the empty one is as if it was not set


def count(model: str, kernels: str) -> dict[str, int]:
    """Launches by selection, that of the dense model as 'dense'."""
    counter = subprocess.run(
        [sys.executable, COUNTER, model], env={**os.environ, 'TIMM_EVO_KERNELS': kernels}, stdout=subprocess.PIPE,
        text=True, check=True)
    return {selection: int(number) for _, selection, number in map(str.split, counter.stdout.splitlines())}


def format_text(records: dict[str, dict], environment: dict) -> str:
    columns = ['dense', *(f'{selection}{kernels}' for selection in SELECTIONS for kernels in KERNELS.values())]
    rows = [[model, *(str(counts.get(column, '-')) for column in columns)] for model, counts in records.items()]
    title = 'Kernels that a forward pass launches at keep ratio 0.5, without views and new memory, counted on a CPU'
    table, machine = markdown_table(['', *columns], rows), summarise_environment(environment)
    return f'{title}\n\n{table}\n{machine}, triton {environment["versions"]["triton"]}.\n'


def main() -> None:
    parser = argparse.ArgumentParser(description='How many kernels a forward pass launches.')
    add_results(parser, ('.json', '.md'))
    args = parser.parse_args()
    environment = describe_environment(torch.device('cpu'))
    environment['versions']['triton'] = version('triton')
    records: dict[str, dict[str, int]] = {}
    for model in tqdm(MODELS, unit='model'):
        records[model] = {}
        for kernels, suffix in KERNELS.items():
            counts = count(model, kernels)
            records[model] |= {'dense': counts.pop('dense')}
            records[model] |= {f'{selection}{suffix}': number for selection, number in counts.items()}
    text = format_text(records, environment)
    write_report(args.results, text, {**environment, 'settings': records})
    print(f'\n{text}')


if __name__ == '__main__':
    main()
