""" Steps 'scripts', 'tests' and 'frozen': other commands, with the end of their output as result """
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from .jobs import POLL, ROOT, Job, Process

MODEL = ['--model', 'evo_deit_tiny_patch16_224']
SMALL_IMAGES = ['--amp', '--amp-dtype', 'bfloat16', '--img-size', 32, '--model-kwargs', 'img_size=32', 'patch_size=4']
CUT = ['depth=3', 'embed_dim=48', 'num_heads=3']
# Tests of computations on the device. The others take too long, or do not depend on the device.
TESTS = ('kernel', 'cuda', 'similarity', 'method', 'faithful', 'short_block')
FEW_TESTS = ('config',)
SAID = 300  # last characters of a command's output


def fake_images(folder: Path) -> Path:
    """Ten classes of noise instead of CIFAR-10, to try a step."""
    noise = np.random.default_rng(0)
    for split, number in (('train', 4), ('test', 2)):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(number):
                image = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / split / str(label) / f'{i}.jpg')
    return folder


def of_scripts(job: Job, scripts: Path, images: Path) -> dict[str, list]:
    """Commands, by name, of timm's train.py and validate.py on CIFAR-10, for one epoch."""
    output = Path(job.folder) / 'train'
    shared = [
        '--data-dir', images, *MODEL, '--num-classes', 10, *SMALL_IMAGES, *(CUT if job.quick else []), '--batch-size',
        8 if job.quick else 256, '--workers', 0 if job.quick else 8, '--device', job.device]
    return {
        'train.py': [
            '-m', 'gpu.launch', scripts / 'train.py', *shared, '--val-split', 'test', '--epochs', 1, '--opt', 'adamw',
            '--lr', '5e-4', '--model-ema', '--output', output, '--experiment', 'evo'],
        'validate.py': [
            '-m', 'gpu.launch', scripts / 'validate.py', *shared, '--split', 'test', '--checkpoint',
            output / 'evo/last.pth.tar'],
    }


def of_tests(job: Job) -> dict[str, list]:
    """pytest, if it is installed, on the tests that compute on a device."""
    if find_spec('pytest') is None:
        return {}
    names = FEW_TESTS if job.quick else TESTS
    files = [file for name in names for file in sorted((ROOT / 'tests').glob(f'test_*{name}*.py'))]
    beside = ['-n', 8] if find_spec('xdist') is not None and not job.quick else []
    return {'pytest': ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', *beside, *files]}


def of_frozen(job: Job, prefix: str, data: dict[str, list], clones: list) -> dict[str, list]:
    """Commands that measure how much accuracy frozen weights keep in bfloat16.

    Args:
        job: Job of this run.
        prefix: Beginning of the names of the results.
        data: Options of frozen.py for weights and images, by the kind of measurement.
        clones: Options for the authors' code of other methods.
    """
    few = [
        '--num-images', 4, '--batch-size', 2, '--rounds', 1, '--keep-ratios', 0.5, '--tome-r', 14,
        '--evit-keep-rates', 0.7] if job.quick else ['--batch-size', 50, '--keep-ratios', 0.3, 0.5, 0.7]
    return {
        f'frozen.py, {what}': [
            ROOT / 'benchmarks/frozen.py', *options, *few, *clones, '--left-dtype', 'bfloat16', '--dtype', 'bfloat16',
            '--device', job.device, '--results', f'{prefix}_{what}']
        for what, options in data.items()
    }


def run(
        job: Job,
        step: str,
        commands: dict[str, list],
        known: list[dict],
        seconds: float,
        report: Callable[[], None],
) -> None:
    """Run commands that have not succeeded before, one after the other, until the time is over.

    Args:
        job: Job of this run.
        step: Step of `on_gpu.py`.
        commands: Commands by name. All of them run again if one is missing.
        known: Records that are comparable with this run.
        seconds: Time limit for all of them.
        report: Function that is called repeatedly.
    """
    end = time.monotonic() + seconds
    done = {
        record['name'] for record in known
        if record['kind'] == 'command' and record['step'] == step and record['status'] == 0}
    if done.issuperset(commands):
        return
    for name, command in commands.items():
        process = Process(command, Path(job.folder) / f'{step}.{name}.log')
        begin = time.monotonic()
        try:
            while process.status() is None and time.monotonic() < end:
                report()
                time.sleep(POLL)
            status = process.status()
        finally:
            process.stop()
        values = {'step': step, 'name': name, 'seconds': time.monotonic() - begin, 'said': process.said()[-SAID:]}
        if status is None:
            job.failed(step, name, f'stopped after {values["seconds"]:.0f} s: {values["said"]}')
            return
        job.record('command', status=status, **values)
        if status != 0:
            job.failed(step, name, process.said())
            return
