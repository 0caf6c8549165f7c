""" Time and memory of examples/embed_images.py, compared with a plain loop

Both use two cores: one thread for the model and one process that decodes. Rounds alternate. Times include the start of
Ray. Throughput and memory of Ray are measured between its first and its last output file, so without its start.

    python benchmarks/embed_images.py --data cifar/test --images 10000 --results results/embed_images_cpu
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import timm
import torch
from common.environment import describe_environment, summarise_environment
from common.report import write_report
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import ParseKwargs
from torch.utils.data import DataLoader

CORES = 2  # cores of each measurement
SCRIPT = Path(__file__).parents[1] / 'examples' / 'embed_images.py'


def run_plain(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    begin = time.perf_counter()
    model = timm.create_model(args.model, **args.model_kwargs).eval()
    transform = create_transform(**resolve_data_config(args.model_kwargs, model=model))
    loader = DataLoader(create_dataset('', folder, transform=transform), args.batch_size, num_workers=1)
    features = []
    with torch.inference_mode():
        for images, _ in loader:
            tokens = model.forward_features(images)
            logits = model.forward_head(tokens)
            features.append((model.forward_head(tokens, pre_logits=True), logits.softmax(-1).max(-1)))
    seconds = time.perf_counter() - begin
    return {'seconds': seconds, 'images_per_second': len(loader.dataset) / seconds}


def run_ray(args: argparse.Namespace, folder: Path, output: Path) -> dict[str, float]:
    begin, memory = time.time(), []
    kwargs = ['--model-kwargs', *(f'{name}={value}' for name, value in args.model_kwargs.items())]
    command = [sys.executable, SCRIPT, '--data', folder, '--output', output, '--model', args.model, '--actors', '1',
               '--batch-size', args.batch_size, '--save-every', args.batch_size, *kwargs]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        used = []
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                used.append(each.memory_info())
            except psutil.NoSuchProcess:
                pass
        memory.append((time.time(), sum(each.rss for each in used), sum(each.rss - each.shared for each in used)))
        time.sleep(0.5)
    seconds = time.time() - begin
    assert process.returncode == 0, 'examples/embed_images.py failed. Run it alone to see the error.'
    files = sorted((file.stat().st_mtime, pq.read_metadata(file).num_rows) for file in output.glob('features/*'))
    assert sum(rows for _, rows in files) == args.images
    first, last = files[0][0], files[-1][0]
    memory = [each for each in memory if first <= each[0] <= last]
    after_first = sum(rows for written, rows in files if written > first)
    result = {'seconds': seconds, 'images_per_second': after_first / (last - first)}
    for i, name in enumerate(('rss', 'private'), 1):
        third = len(memory) // 3
        for part, samples in (('second', memory[third:2 * third]), ('last', memory[-third:])):  # processes start first
            result[f'{name}_{part}_third_mb'] = statistics.mean(each[i] for each in samples) / 1e6 if third else 0.
    return result


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data', required=True, help='a folder of images')
    parser.add_argument('--images', type=int, default=600, help='number of images')
    parser.add_argument('--model', default='evo_deit_tiny_patch16_224', help='a model of timm')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
    parser.add_argument('--batch-size', type=int, default=32, help='batch size of both')
    parser.add_argument('--rounds', type=int, default=3, help='number of rounds of each, in turn')
    parser.add_argument('--results', type=Path, metavar='PREFIX', help='write PREFIX.json and PREFIX.md')
    args = parser.parse_args()
    found = [file for file, _ in find_images_and_targets(args.data)[0]]
    if len(found) < args.images:
        parser.error(f'--images must be at most {len(found)}, the number of images in {args.data}, not {args.images}')
    if args.images <= args.batch_size:  # a file has one batch, and throughput is measured between files
        parser.error(f'--images must be more than --batch-size {args.batch_size}, not {args.images}')
    torch.set_num_threads(1)
    measured: dict[str, list[dict]] = {'plain loop': [], 'Ray Data': []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'images')
        for i in range(args.images):  # images of all classes
            link = folder / 'all' / f'{i}{Path(found[i]).suffix}'
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(found[i * len(found) // args.images]).absolute())
        for i in range(args.rounds):
            measured['plain loop'].append(run_plain(args, folder))
            measured['Ray Data'].append(run_ray(args, folder, Path(temporary, f'output{i}')))
            print({name: rounds[-1] for name, rounds in measured.items()}, flush=True)
    medians = {name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
               for name, rounds in measured.items()}
    environment = describe_environment(torch.device('cpu'))
    lines = [f'{args.model}, {args.images} images, {summarise_environment(environment)}, median of {args.rounds}', '',
             '| | all, with the start, s | images/s without it | per core |', '| --- | ---: | ---: | ---: |']
    for name, each in medians.items():
        throughput = each['images_per_second']
        lines.append(f'| {name} | {each["seconds"]:.0f} | {throughput:.0f} | {throughput / CORES:.0f} |')
    ray = medians['Ray Data']
    lines += ['', 'Memory of all processes of Ray Data, in MB, on average:', '',
              '| | second third of the time | last third |', '| --- | --- | --- |']
    for name, text in [('rss', 'resident, shared memory counted in each'), ('private', 'without what is shared')]:
        lines.append(f'| {text} | {ray[f"{name}_second_third_mb"]:.0f} | {ray[f"{name}_last_third_mb"]:.0f} |')
    print('\n'.join(lines))
    if args.results:
        write_report(args.results, '\n'.join(lines) + '\n', {**environment, 'medians': medians, 'rounds': measured})


if __name__ == '__main__':
    main()
