""" Steps 'eager' and 'training' without compilation: all variants of a model in turn, in one process """
import os
import sys
from pathlib import Path

import torch
from common.measuring import Step

from .jobs import Job
from .models import check_finite, kernels, kernels_of, step_maker
from .settings import Setting
from .timing import alone, time_in_turn


class WithKernels:
    """A step that runs with or without the kernels.

    Args:
        step: The step.
        value: Value of TIMM_EVO_KERNELS.
    """

    def __init__(self, step: Step, value: str | None) -> None:
        self.step, self.value = step, value

    def __call__(self) -> None:
        with kernels(self.value):
            self.step()

    def __getattr__(self, name: str):
        return getattr(self.step, name)


def time_setting(setting: Setting, job: Job) -> None:
    """Time all variants of a setting that can be built, and record those that cannot."""
    make = step_maker(setting, torch.device(job.device), {name: Path(path) for name, path in job.clones.items()})
    steps = {}
    for variant in setting.variants:
        try:
            step = WithKernels(make(variant), kernels_of(variant))
            step()
            with kernels(kernels_of(variant)):
                check_finite(step)
            steps[variant] = step
        except (Exception, SystemExit) as error:  # SystemExit if a clone cannot be imported
            job.failed(setting.step, f'{setting.label()}, {variant}', error)
    dense = setting.variants[0]
    if dense not in steps:
        return
    with alone(Path(job.folder)):
        times = time_in_turn(steps, dense, job.quick)
    for variant, values in times.items():
        job.record('speed', **setting.where(), variant=variant, **values)


def main() -> None:
    job = Job.from_text(sys.argv[1])
    os.environ.pop('TIMM_EVO_KERNELS', None)
    for setting in job.settings:
        time_setting(setting, job)
        if job.device == 'cuda':
            torch.cuda.empty_cache()


if __name__ == '__main__':
    main()
