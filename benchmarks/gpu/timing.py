""" Timing of a step, alone on the GPU and by the clock of the GPU """
import fcntl
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common.measuring import Step, measure_memory, time_step

ROUNDS, ROUNDS_OF_ONE, QUICK_ROUNDS = 30, 150, 3


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A context that waits until no other process of these measurements is timing on the GPU."""
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def num_rounds(step: Step, quick: bool) -> int:
    return QUICK_ROUNDS if quick else ROUNDS_OF_ONE if len(step.batch) == 1 else ROUNDS


def warm_up(step: Step, rounds: int) -> None:
    """Run a step until caches and clock rates are those of a model that runs alone."""
    for _ in range(max(2, rounds // 6)):
        step()
    if step.batch.device.type == 'cuda':
        torch.cuda.synchronize()


def summarise(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    lower, median, upper = statistics.quantiles([1000 * value for value in seconds], n=4, method='inclusive')
    return {'ms': median, 'lower_quartile': lower, 'upper_quartile': upper, 'rounds': len(seconds)}


def time_alone(step: Step, quick: bool) -> dict[str, float]:
    """Times of single steps, and peak memory."""
    rounds = num_rounds(step, quick)
    warm_up(step, rounds)
    seconds = [time_step(step) for _ in range(rounds)]
    return {**summarise(seconds), 'peak_memory_mb': measure_memory(step) / 1e6}


def time_in_turn(steps: dict[str, Step], dense: str, quick: bool) -> dict[str, dict[str, float]]:
    """Times and memory of several steps, one of each in a round, so that other load on the machine slows all.

    Args:
        steps: Steps by variant.
        dense: Variant that the others are compared with, by the ratio within each round.
        quick: Whether to run few rounds.
    """
    rounds = num_rounds(steps[dense], quick)
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for step in steps.values():
        warm_up(step, rounds)
    for i in range(rounds):
        for variant in steps if i % 2 == 0 else reversed(steps):
            steps[variant]()  # so that caches are those of this model
            seconds[variant].append(time_step(steps[variant]))
    return {
        variant: {
            **summarise(values),
            'ratio_to_dense': statistics.median(a / b for a, b in zip(seconds[dense], values, strict=True)),
            'peak_memory_mb': measure_memory(steps[variant]) / 1e6,
        }
        for variant, values in seconds.items()
    }
