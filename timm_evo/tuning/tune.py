""" `tune`, which finds the settings that keep most of a model on its images and its machine """
import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ..api import evolve, restore
from ..inspection.cost import count_gmacs
from ..models.base import EvolvedModel
from .kept import Kept, Reference
from .notes import Notes, fingerprint
from .search import Space, find_best
from .speed import measure_speedups
from .tuned import Row, Tuned

__all__ = ['tune']

LEVELS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # keep ratios that are measured by the rule
MIN_IMAGES = 32
_MOST_SCHEDULES = 48  # largest number of schedules in a search
_ROUNDS = 9  # rounds of a speed measurement of several schedules
_FINAL_ROUNDS = 21  # rounds of a speed measurement of one schedule
_GAIN = 1.02  # least speed-up that counts as faster
_MISSED = 0.98  # a speed-up of less than this share of the wish is too small
_PASSED = 1.03  # a speed-up of more than this share of the wish loses more accuracy than needed
_MOST_STEPS = 4  # largest number of changes of the cost after a wrong speed-up

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]


def tune(
        model: nn.Module,
        images: Tensor | Iterable[Batch],
        labels: Tensor | None = None,
        *,
        speedup: float | None = None,
        agreement: float | None = None,
        keep_ratio: float | None = None,
        batch_size: int = 16,
        compile: bool = False,
        save: str | Path | None = None,
) -> Tuned:
    """Fit selection by similarity to a model, its images and the device that it is on.

    The search uses every second image. First, several keep ratios are measured by the rule. Then the schedule that
    keeps most is searched for, at the cost that meets the wish. The table is for the other images. The same images lead
    to the same schedules, except that a wish for a speed-up depends on measured times.

    Args:
        model: A ViT of timm, dense or evolved, in any mode. It is not changed. Without a head, its features are
            compared instead of its classes.
        images: At least 32 images (N, C, H, W) that are prepared for the model; some hundred are better. Or batches of
            images, or of pairs of images and labels, as from a `DataLoader`.
        labels: Classes (N,), if they are known and not in the batches. With labels, the table has top-1, too.
        speedup: Wanted speed-up over the dense model, above 1. It is 1.5 if no wish is given.
        agreement: Wanted share of the images that keep their class, in (0, 1). For a backbone, the wanted cosine of its
            features. The fastest schedule that meets it is the result.
        keep_ratio: Wanted cost, as the keep ratio in (0, 1) that has this cost.
        batch_size: Number of images in a batch, also when speed is measured.
        compile: Whether the speed of compiled models is measured. Each of them is compiled first.
        save: FILE.json for the settings. Measurements are written to FILE.measured.json at once: after an interruption
            the same call continues, and a second call returns the same settings without new measurements.

    Returns:
        The settings, or the reason why there are none, with a table and a curve.

    Raises:
        TypeError: The model cannot be evolved.
        ValueError: The value of an argument is not allowed, or there are too few different images.
    """
    wish = _check_wish(speedup, agreement, keep_ratio)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f'batch_size={batch_size!r} is not allowed. It must be a whole number of at least 1.')
    file = None if save is None else _check_save(Path(save))
    images, labels = _gather(images, labels)
    notes = None if file is None else file.with_suffix('.measured.json')
    tuned = _Tuning(model, images, labels, batch_size, compile, notes).meet(*wish)
    if file is not None and tuned.settings is not None:
        tuned.save(file)
    return tuned


def _check_wish(
        speedup: float | None,
        agreement: float | None,
        keep_ratio: float | None,
) -> tuple[str, float]:
    given = {'speedup': speedup, 'agreement': agreement, 'keep_ratio': keep_ratio}
    given = {name: value for name, value in given.items() if value is not None} or {'speedup': 1.5}
    if len(given) > 1:
        raise ValueError(f'{" and ".join(given)} are not allowed together. Give one of them.')
    name, value = next(iter(given.items()))
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if name == 'speedup':
        if not is_number or not 1 < value < math.inf:
            raise ValueError(
                f'speedup={value!r} is not allowed. It must be a number above 1, the speed-up of the dense model.')
    elif not is_number or not 0 < value < 1:
        raise ValueError(f'{name}={value!r} is not allowed. It must be a number in (0, 1).')
    return name, float(value)


def _check_save(file: Path) -> Path:
    if file.suffix != '.json':
        raise ValueError(f'save={str(file)!r} is not allowed. It must end with .json.')
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f'save={str(file)!r} cannot be written: there is no folder {file.parent}.')
    return file


def _gather(images: Tensor | Iterable[Batch], labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """All different images that do not have only one colour, and their labels."""
    if not isinstance(images, Tensor):
        batches = list(images)
        pairs = [batch for batch in batches if not isinstance(batch, Tensor)]
        if pairs and len(pairs) == len(batches):
            labels = torch.cat([pair[1] for pair in pairs])
        images = torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in batches]) if batches else (
            torch.empty(0, 3, 1, 1))
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f'images of shape {tuple(images.shape)} and {images.dtype} are not allowed. They must be (N, C, H, W) in '
            'floating point, prepared as the model takes them.')
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(
            f'labels of shape {tuple(labels.shape)} are not allowed. There must be one for each of {len(images)} '
            'images.')
    seen: dict[str, int] = {}
    num_plain = 0
    for i, image in enumerate(images):
        if (image.flatten(1) == image.flatten(1)[:, :1]).all():
            num_plain += 1
        else:
            seen.setdefault(fingerprint([image]), i)
    if len(seen) < MIN_IMAGES:
        plain = f' ({num_plain} of {len(images)} have only one colour and do not count)' if num_plain else ''
        raise ValueError(
            f'{len(seen)} different images{plain} are too few. There must be at least {MIN_IMAGES}. With 200, the '
            'agreement has an error of one or two points, with 32 an error of three to five.')
    kept = list(seen.values())
    return images[kept], None if labels is None else labels[kept]


class _Tuning:
    """Measurements of a model, and the choice of its settings."""

    def __init__(
            self,
            model: nn.Module,
            images: Tensor,
            labels: Tensor | None,
            batch_size: int,
            compile: bool,
            notes: Path | None,
    ) -> None:
        dense = _share(model).eval()
        self._dense: Any = restore(dense) if isinstance(dense, EvolvedModel) else dense
        self._model = evolve(_share(self._dense), selection='similarity', keep_ratio=1.)
        weight = next(self._model.parameters())
        self._images = images.to(weight.device, weight.dtype)
        self._labels = None if labels is None else labels.to(weight.device)
        self._batch_size, self._compile = batch_size, compile
        self._notes = Notes(notes, dict(
            images=fingerprint([images, *([] if labels is None else [labels])]),
            weights=fingerprint((*model.parameters(), *model.buffers())),
            model=type(model).__name__,
            batch_size=batch_size,
            compile=compile,
            device=str(weight.device),
            versions={name: version(name) for name in ('timm-evo', 'timm', 'torch')},
        ))
        self._progress = tqdm(total=0, unit='step')

    def meet(self, wish: str, value: float) -> Tuned:
        """Find the best settings that meet a wish."""
        with self._progress:
            return self._meet(wish, value)

    def _meet(self, wish: str, value: float) -> Tuned:
        self._expect('dense model', 1)
        outputs = self._outputs(self._dense, 0, 1)
        self._progress.update()
        if not outputs.isfinite().all():
            raise ValueError('The output of the dense model for these images has numbers that are not finite.')
        is_classifier = outputs.dim() == 2 and getattr(self._model, 'num_classes', 0) > 0
        self._reference = Reference(outputs, is_classifier, self._labels if is_classifier else None)
        num_prefix_tokens = self._model.num_prefix_tokens
        with torch.inference_mode():
            num_patches = self._model.forward_features(self._images[:1]).shape[1] - num_prefix_tokens
        self._space = Space(
            len(self._model.blocks), num_patches, num_prefix_tokens, self._model.embed_dim,
            is_aligned=not self._model.dynamic_img_size)

        if wish == 'keep_ratio':
            self._space.rule(value)  # raises an error for a value that is too small, before any measurement
        levels = [level for level in LEVELS if self._is_possible(level)]
        schedules = [self._space.rule(level) for level in levels]
        self._expect('keep ratios', 2 * len(levels))
        searched = [self._kept(shares, 0) for shares in schedules]
        speedups = self._speedups(schedules)
        rows = [self._row('dense', 1., [1.] * self._space.depth, 1.)] + [
            self._row('rule', *row) for row in zip(levels, schedules, speedups, strict=True)]
        if max(speedups) < _GAIN:
            return self._none(
                'No keep ratio makes the model faster than the dense model, with this image size, batch size and '
                f'device. The largest speed-up is {max(speedups):.2f} x.', rows)
        costs = [self._space.cost(shares) for shares in schedules]
        if wish == 'speedup':
            return self._meet_speedup(value, costs, speedups, rows)
        if wish == 'agreement':
            return self._meet_agreement(value, levels, searched, rows)
        shares = self._search(self._space.cost(self._space.rule(value)))
        return self._found(shares, rows, f'keep ratio {value:g}', self._speedups([shares])[0])

    def _meet_speedup(self, wish: float, costs: list[float], speedups: list[float], rows: list[Row]) -> Tuned:
        if wish > max(speedups):
            return self._none(
                f'No keep ratio meets {wish:g} x. The fastest that was measured has {max(speedups):.2f} x.', rows)
        # Without noise, times are a linear function of the costs. A regression over all of them reduces the noise.
        dense = self._space.cost([1.] * self._space.depth)
        slope, offset = statistics.linear_regression([dense, *costs], [1., *(1 / found for found in speedups)])
        if slope <= 0:
            return self._none('Measured times do not grow with the cost. Other work may keep the machine busy.', rows)

        def possible(cost: float) -> float:
            return min(max(cost, min(costs)), max(costs))

        cost = possible((1 / wish - offset) / slope)
        shares = self._search(cost)
        tried = [(self._speedups([shares])[0], shares)]
        while len(tried) <= _MOST_STEPS and not _MISSED <= tried[-1][0] / wish <= _PASSED:
            cost = possible(cost - (1 / tried[-1][0] - 1 / wish) / slope)
            shares = self._space.shares_of(self._weights, cost) or shares
            tried.append((self._speedups([shares])[0], shares))
        met = [pair for pair in tried if pair[0] >= _MISSED * wish]
        if not met:
            return self._none(f'No schedule meets {wish:g} x. The nearest has {max(tried)[0]:.2f} x.', rows)
        found, shares = min(met)
        return self._found(shares, rows, f'{wish:g} x', found)

    def _meet_agreement(self, wish: float, levels: list[float], searched: list[Kept], rows: list[Row]) -> Tuned:
        met = [level for level, kept in zip(levels, searched, strict=True) if kept.agreement >= wish]
        level = min(met, default=levels[0])
        shares = self._search(self._space.cost(self._space.rule(level)))
        best = shares if self._kept(shares, 0).agreement >= wish else None
        while best is not None and self._is_possible(level := round(level - 0.02, 2)):
            shares = self._space.shares_of(self._weights, self._space.cost(self._space.rule(level)))
            self._expect('fewer tokens', 1)
            if shares is None or self._kept(shares, 0).agreement < wish:
                break
            best = shares
        speed = 0. if best is None else self._speedups([best])[0]
        if best is None or speed < _GAIN:
            return self._none(
                f'No schedule that is faster than the dense model meets an agreement of {wish:g} on the images of the '
                'search.', rows)
        return self._found(best, rows, f'agreement {wish:g}', speed)

    def _none(self, message: str, rows: list[Row]) -> Tuned:
        return Tuned(None, message, rows, self._reference.is_classifier)

    def _found(self, shares: list[float], rows: list[Row], wish: str, speed: float) -> Tuned:
        """The result, with its row and a row for the rule at the same cost."""
        level = self._level_of(self._space.cost(shares))
        rule = self._space.rule(level)
        compared = self._row('rule', level, rule, self._speedups([rule])[0])
        tuned = self._row('tuned', level, shares, speed)
        start = next(i for i, share in enumerate(shares) if share < 1)
        settings = dict(selection='similarity', keep_ratio=shares[start:], start_block=start)
        kept = f'{tuned.agreement:.1%} of the images keep their class' if self._reference.is_classifier else (
            f'the cosine of the features is {tuned.agreement:.4f}')
        message = f'Tuned for {wish}: the speed-up over the dense model is {tuned.speedup:.2f} x, and {kept}.'
        rows = [row for row in rows if row.keep_ratio != level]
        return Tuned(settings, message, [*rows, compared, tuned], self._reference.is_classifier)

    def _search(self, cost: float) -> list[float]:
        """The schedule of a cost with the least loss on the images of the search."""
        space = self._space
        rule = space.weights_of(space.rule(self._level_of(cost)))
        seeds = [rule, *space.neighbours(rule)]
        self._expect('schedules', _MOST_SCHEDULES)
        self._weights = find_best(space, cost, seeds, lambda shares: self._kept(shares, 0).log_loss, _MOST_SCHEDULES)
        shares = space.shares_of(self._weights, cost)
        assert shares is not None
        return shares

    def _level_of(self, cost: float) -> float:
        """The keep ratio in hundredths that has this cost by the rule."""
        hundredths = [i for i in range(1, 100) if self._is_possible(i / 100)]
        costs = [self._space.cost(self._space.rule(i / 100)) for i in hundredths]
        # several may have the same cost, because the number of tokens is whole; a round one is preferred
        _, _, found = min((abs(of - cost), i % 10 > 0, i) for of, i in zip(costs, hundredths, strict=True))
        return found / 100

    def _is_possible(self, level: float) -> bool:
        try:
            self._space.rule(level)
        except ValueError:
            return False
        return True

    def _row(self, setting: str, level: float, shares: list[float], speed: float) -> Row:
        kept = self._kept(shares, 1)
        self._set(shares)
        gmacs = count_gmacs(self._dense if setting == 'dense' else self._model, self._images[:1])
        return Row(setting, level, gmacs, speed, kept.agreement, 0. if setting == 'dense' else kept.error, kept.loss,
                   kept.top1)

    def _kept(self, shares: list[float], part: int) -> Kept:
        """Comparison with the dense model on every second image, from the first (part 0) or second (part 1) one."""
        def measure() -> list[Any]:
            self._set(shares)
            return list(self._reference.compare(self._outputs(self._model, part, 2), part, 2))

        kept = Kept(*self._notes.get(f'kept of part {part} by {shares}', measure))
        self._progress.update()
        return kept

    def _speedups(self, schedules: Sequence[list[float]]) -> list[float]:
        """Measured speed-up of each schedule over the dense model."""
        def measure() -> list[float]:
            images = self._images[:self._batch_size]
            models = [self._timed(shares) for shares in schedules]
            dense: Any = torch.compile(self._dense) if self._compile else self._dense
            rounds = _ROUNDS if len(models) > 1 else _FINAL_ROUNDS
            self._expect('speed', 1 + len(models) + rounds * len(models))
            return measure_speedups(dense, models, images, rounds, self._progress.update)

        return self._notes.get(f'speed-ups of {list(schedules)}', measure)

    def _timed(self, shares: list[float]) -> Any:
        """A model with a schedule and with the same weights."""
        self._set(shares)
        model = _share(self._model)
        return torch.compile(model) if self._compile else model

    def _set(self, shares: list[float]) -> None:
        self._model.set_evolution(keep_ratio=shares[1:], start_block=1)

    @torch.inference_mode()
    def _outputs(self, model: Any, first: int, step: int) -> Tensor:
        return torch.cat([model(batch) for batch in self._images[first::step].split(self._batch_size)])

    def _expect(self, what: str, steps: int) -> None:
        """Show the next phase and its largest number of steps in the progress bar."""
        self._progress.set_description(what)
        self._progress.total = self._progress.n + steps
        self._progress.refresh()


def _share(model: nn.Module) -> Any:
    """A copy that shares the weights of a model."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
