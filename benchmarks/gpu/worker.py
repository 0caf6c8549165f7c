""" A process of `compiled.py`: compiles a variant of a model in its settings, waits for the others, and is timed """
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

NUM_WARMUP, PROFILED_STEPS, TOP = 3, 2, 30  # few steps, because a profiler takes its time to start


def is_ready(folder: Path) -> Path:
    return folder / f'ready.{os.getpid()}'


def compile_step(setting: Setting, job: Job) -> Step:
    """A step that is compiled, and has shown that what it computes is finite."""
    step = step_maker(setting, torch.device(job.device), {})(job.variant)
    for _ in range(NUM_WARMUP):
        step()
    check_finite(step)
    if job.device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what compiling took, the other processes may need
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
    """Until `compiled.py` says that all have compiled; ends where it is no more."""
    is_ready(folder).touch()
    parent = os.getppid()
    while not (folder / 'go').exists():
        if os.getppid() != parent:
            raise SystemExit('nobody waits for this any more')
        time.sleep(0.1)


def main() -> None:
    job = Job.from_text(sys.argv[1])
    folder = Path(job.folder)
    torch._dynamo.config.cache_size_limit = 64  # its settings are compilations of one `forward`
    if job.device == 'cpu':
        torch.set_num_threads(1)
    steps = []
    for setting in job.settings:
        begin = time.monotonic()
        try:
            steps.append((setting, compile_step(setting, job), time.monotonic() - begin))
        except Exception as error:  # out of memory, or what cannot be compiled: the others shall run
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
            except (Exception, SystemExit) as error:  # a profiler that records nothing ends so
                job.failed(setting.step, f'{setting.label()}, {job.variant}', error)
                if job.device == 'cuda' and not isinstance(error, torch.OutOfMemoryError):
                    raise  # after some errors of CUDA, nothing works any more


if __name__ == '__main__':
    main()
