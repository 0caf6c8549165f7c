"""benchmarks/on_gpu.py on a CPU at tiny sizes: its records, its table, and that it continues."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def call(folder: Path, *arguments: str) -> str:
    """What the command prints, in an environment that knows the library from its checkout alone."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    env.pop('PYTHONPATH', None)
    return subprocess.run(
        [sys.executable, ROOT / 'benchmarks/on_gpu.py', '--device', 'cpu', '--quick', '--results', folder, *arguments],
        env=env, check=True, capture_output=True, text=True, cwd=folder).stdout


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'on_gpu_cpu_quick.jsonl').read_text().splitlines()]


def test_eager_models_are_timed_once_and_stand_in_the_table(tmp_path):
    call(tmp_path, '--only', 'eager')
    records = read(tmp_path)
    timed = [record for record in records if record['kind'] == 'speed']
    assert not [record for record in records if record['kind'] == 'failure']
    deit = {record['variant']: record for record in timed if record['model'].startswith('deit')}
    assert deit.keys() == {
        'dense', 'dense, product', 'stage', 'similarity', 'stage, kernels off', 'similarity, kernels off'}
    assert {record['variant'] for record in timed if record['model'].startswith('levit')} == {'dense', 'stage'}
    assert deit['dense']['ratio_to_dense'] == 1 and all(record['ms'] > 0 for record in timed)

    with (tmp_path / 'on_gpu_cpu_quick.jsonl').open('a') as file:
        file.write('{"kind": "speed", "run"')  # as if it had been killed
    table = call(tmp_path, '--only', 'eager')
    file = tmp_path / 'on_gpu_cpu_quick.jsonl'
    kinds = [json.loads(line)['kind'] for line in file.read_text().splitlines() if line.endswith('}')]
    assert kinds.count('run') == 2 and kinds.count('speed') == len(timed)  # nothing is measured again

    lines = table.splitlines()
    header = lines[lines.index('## Inference, eager') + 2]
    row = next(line for line in lines if line.startswith('| deit_tiny_patch16_224 64, 2 images |'))
    cells = dict(zip(header.split(' | '), row.split(' | '), strict=True))
    similarity = deit['similarity']
    assert cells['dense'] == f'{deit["dense"]["ms"]:.2f}'
    assert cells['similarity'] == f'{similarity["ms"]:.2f}, {similarity["ratio_to_dense"]:.2f} x'
