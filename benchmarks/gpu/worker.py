""" A process of `compiled.py`: it compiles a variant of a model in its settings, waits for the others, and times it """
import os
import sys
import time
from pathlib import Path

import torch
from common.environment import describe_environment, summarise_environment
from common.measuring import Step
from profile_model import format_text, profile_step, summarise_steps

from .jobs import Job
from .models import check_finite, step_maker
from .settings import Setting
from .timing import alone, time_alone

NUM_WARMUP, PROFILED_STEPS, TOP = 3, 2, 30  # few steps, because profiling is slow


def is_ready(folder: Path) -> Path:
    return folder / f'ready.{os.getpid()}'


def compile_step(setting: Setting, job: Job) -> Step:
    """A compiled step with finite results."""
    step = step_maker(setting, torch.device(job.device), {})(job.variant)
    for _ in range(NUM_WARMUP):
        step()
    check_finite(step)
    if job.device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other processes may need the memory of the compilation
    return step


def write_profile(step: Step, setting: Setting, job: Job) -> None:
    """Add the kernels that take the most time to the file of profiles."""
    label = f'{setting.label()}, {job.variant}'
    result = summarise_steps([profile_step(step) for _ in range(PROFILED_STEPS)])
    where = summarise_environment(describe_environment(step.batch.device))
    title = f'{label}: a step, mean of {PROFILED_STEPS}; {where}'
    with open(job.profiles, 'a') as file:
        file.write(format_text({label: result}, TOP, job.device == 'cuda', title) + '\n')


def wait_for_the_others(folder: Path) -> None:
    """Wait until `compiled.py` signals that all have compiled. Exit if it has ended."""
    is_ready(folder).touch()
    parent = os.getppid()
    while not (folder / 'go').exists():
        if os.getppid() != parent:
            raise SystemExit('compiled.py has ended.')
        time.sleep(0.1)


def main() -> None:
    job = Job.from_text(sys.argv[1])
    folder = Path(job.folder)
    torch._dynamo.config.cache_size_limit = 64  # each setting compiles the same `forward` again
    if job.device == 'cpu':
        torch.set_num_threads(1)
    steps = []
    for setting in job.settings:
        begin = time.monotonic()
        try:
            steps.append((setting, compile_step(setting, job), time.monotonic() - begin))
        except Exception as error:  # for example out of memory or a failed compilation; the others should run
            job.failed(setting.step, f'{setting.label()}, {job.variant}', error)
    wait_for_the_others(folder)
    for setting, step, seconds in steps:
        with alone(folder):
            try:
                times = time_alone(step, job.quick)
                job.record(
                    'speed', **setting.where(), variant=job.variant, seconds_to_compile=round(seconds, 1), **times)
                if setting.profiled:
                    write_profile(step, setting, job)
            except (Exception, SystemExit) as error:  # SystemExit if the profiler records nothing
                job.failed(setting.step, f'{setting.label()}, {job.variant}', error)
                if job.device == 'cuda' and not isinstance(error, torch.OutOfMemoryError):
                    raise  # after some errors, CUDA no longer works


if __name__ == '__main__':
    main()
