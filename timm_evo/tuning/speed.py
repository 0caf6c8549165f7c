""" Speed of models relative to a dense model """
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer  # waits for a GPU

__all__ = ['measure_speedups']

_SECONDS = 0.02  # least time of one measurement, which has several calls if one call is faster


def measure_speedups(
        dense: nn.Module,
        models: Sequence[nn.Module],
        images: Tensor,
        rounds: int,
        report: Callable[[], object],
) -> list[float]:
    """Speed-up of each model over the dense one.

    Each measurement of a model is compared with a measurement of the dense model right before it, so that other work of
    the machine affects both. The speed-up is the median over the rounds.

    Args:
        dense: The dense model.
        models: Models that take the same images.
        images: One batch (B, C, H, W).
        rounds: Number of rounds.
        report: Function that is called after each measurement, and once per model after its first calls.
    """
    ratios: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        num_calls = 1
        for model in (dense, *models):
            model(images)  # which may compile it
            model(images)
            start = timer()
            model(images)
            num_calls = max(num_calls, round(_SECONDS / max(timer() - start, 1e-6)))
            report()
        for _ in range(rounds):
            for model, of_model in zip(models, ratios, strict=True):
                dense_seconds = _measure(dense, images, num_calls)
                of_model.append(dense_seconds / _measure(model, images, num_calls))
                report()
    return [statistics.median(of_model) for of_model in ratios]


def _measure(model: nn.Module, images: Tensor, num_calls: int) -> float:
    start = timer()
    for _ in range(num_calls):
        model(images)
    return timer() - start
