""" Steps 'compiled', 'graphs' and 'training': models that are compiled in parallel and timed one by one """
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from . import records
from .jobs import POLL, Job, Process
from .models import kernels_of
from .settings import Setting

SECONDS_TO_TIME = 2.5  # for a variant in one setting, including the profile
LEAST_SECONDS = 45  # for a compilation


def find_jobs(job: Job, settings: list[Setting], known: list[dict]) -> list[list[Job]]:
    """Jobs of each model, one for each variant, with all settings in which it is missing."""
    by_model: dict[str, dict[str, list[Setting]]] = {}
    for setting in settings:
        for variant in records.missing(setting, known):
            by_model.setdefault(setting.model, {}).setdefault(variant, []).append(setting)
    return [
        [replace(job, variant=variant, settings=own) for variant, own in variants.items()]
        for variants in by_model.values()
    ]


def in_waves(groups: list[list[Job]], size: int) -> Iterator[list[Job]]:
    """Groups of jobs that run in parallel. The jobs of one model are in one group if they fit."""
    wave: list[Job] = []
    for group in groups:
        if wave and len(wave) + len(group) > size:
            yield wave
            wave = []
        wave = wave + group
        while len(wave) > size:
            yield wave[:size]
            wave = wave[size:]
    if wave:
        yield wave


def environment_of(job: Job) -> dict[str, str | None]:
    """Environment variables for the process of a job: few threads, because there are as many processes as cores."""
    threads = '1' if job.device == 'cpu' else '2'
    return {
        'TIMM_EVO_KERNELS': kernels_of(job.variant), 'OMP_NUM_THREADS': threads,
        'TORCHINDUCTOR_COMPILE_THREADS': threads}


def run_wave(jobs: list[Job], folder: Path, end: float, report: Callable[[], None]) -> None:
    """Compile all jobs, then time all jobs.

    Args:
        jobs: Jobs that run in parallel.
        folder: An empty folder.
        end: Time at which all must have ended. Jobs that have not compiled early enough are stopped.
        report: Function that is called repeatedly.
    """
    num_settings = sum(len(job.settings) for job in jobs)
    last_to_compile = max(end - SECONDS_TO_TIME * num_settings, time.monotonic() + LEAST_SECONDS)
    jobs = [replace(job, folder=str(folder)) for job in jobs]
    processes: list[Process] = []
    try:
        for i, job in enumerate(jobs):
            processes.append(Process(['-m', 'gpu.worker', job.to_text()], folder / f'{i}.log', environment_of(job)))
        waiting = set(range(len(jobs)))
        while waiting and time.monotonic() < last_to_compile:
            waiting = {
                i for i in waiting
                if processes[i].status() is None and not (folder / f'ready.{processes[i].process.pid}').exists()}
            report()
            time.sleep(POLL)
        for i in waiting:
            processes[i].stop()  # it would use the GPU while others are timed
        (folder / 'go').touch()
        while any(process.status() is None for process in processes) and time.monotonic() < end:
            report()
            time.sleep(POLL)
    finally:
        stopped = [process.status() is None for process in processes]
        for process in processes:
            process.stop()
    report()
    for i, (job, process) in enumerate(zip(jobs, processes, strict=True)):
        if i in waiting or stopped[i] or process.status() != 0:
            said = 'not compiled in time' if i in waiting else 'not timed in time' if stopped[i] else process.said()
            job.failed(job.settings[0].step, f'{job.settings[0].model}, {job.variant}', said)


def measure(job: Job, settings: list[Setting], known: list[dict], size: int, seconds: float, report) -> None:
    """Measure the missing variants of the settings, until the time is over.

    Args:
        job: Job of this run.
        settings: Settings of the step.
        known: Records that are comparable with this run.
        size: Number of processes that run in parallel.
        seconds: Time limit.
        report: Function that is called repeatedly.
    """
    end = time.monotonic() + seconds
    for i, wave in enumerate(in_waves(find_jobs(job, settings, known), size)):
        if end - time.monotonic() < LEAST_SECONDS:
            return
        folder = Path(job.folder) / f'{settings[0].step}{i}'
        folder.mkdir()
        run_wave(wave, folder, end, report)
