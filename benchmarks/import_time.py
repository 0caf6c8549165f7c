""" Time that the plugin adds to a process that imports torch, but not timm

PyTorch imports timm-evo at the end of `import torch`. This script uses fresh processes. The added time is that of
`import timm_evo` after torch was imported without plugins. `import torch` is also measured without and with plugins,
but this time is noisy and includes PyTorch's search for plugins.

    python benchmarks/import_time.py --output results.json
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common.environment import describe_environment
from tqdm import tqdm

LIMIT_MS = 10

# Each child prints its figures in seconds as JSON.
WITHOUT_PLUGINS = """
import time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import timm_evo
evo_done = time.perf_counter()

import json
print(json.dumps({'import timm_evo': evo_done - torch_done, 'import torch, plugins off': torch_done - start}))
"""
WITH_PLUGINS = """
import sys, time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()

import json
assert 'timm_evo' in sys.modules, 'PyTorch did not load timm-evo. Is it installed?'
loaded = [name for name in sys.modules if name in ('timm', 'torchvision') or name.startswith('timm_evo.')]
assert not loaded, f'import torch has imported {", ".join(loaded)}'
print(json.dumps({'import torch, plugins on': torch_done - start}))
"""


def run_child(code: str, autoload: str) -> dict[str, float]:
    """Run `code` in a fresh process and return the figures it prints."""
    env = {**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': autoload}
    child = subprocess.run([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description='Time that timm-evo adds to import torch.')
    parser.add_argument('--rounds', type=int, default=15, help='processes of each kind (default: 15)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='JSON file for the results')
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, not {args.rounds}')
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f'--output: the folder of {args.output} does not exist')

    times: dict[str, list[float]] = {}  # in milliseconds
    for i in tqdm(range(args.rounds + 1), unit='round'):
        for code, autoload in ((WITHOUT_PLUGINS, '0'), (WITH_PLUGINS, '1')):
            figures = run_child(code, autoload)
            if i > 0:  # the first round reads the files from disk and writes byte code
                for label, seconds in figures.items():
                    times.setdefault(label, []).append(1000 * seconds)

    print(f'\n{"":<28}{"median ms":>12}{"min ms":>10}{"max ms":>10}')
    for label, values in times.items():
        print(f'{label:<28}{statistics.median(values):>12.2f}{min(values):>10.2f}{max(values):>10.2f}')
    within = statistics.median(times['import timm_evo']) < LIMIT_MS
    print(f'\nimport timm_evo takes {"less" if within else "MORE"} than {LIMIT_MS} ms')

    if args.output is not None:
        summary = {
            label: {'median_ms': statistics.median(values), 'min_ms': min(values), 'max_ms': max(values)}
            for label, values in times.items()
        }
        args.output.write_text(json.dumps({**describe_environment(), 'imports': summary}, indent=2) + '\n')


if __name__ == '__main__':
    main()
