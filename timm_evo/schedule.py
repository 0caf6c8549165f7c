""" When tokens are selected

Turns the model arguments into what each block has to do, and refuses those that make no sense. Knows no tensors.
"""
import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple


class Schedule(NamedTuple):
    """What each block has to do, one entry per block; in a pyramid, one per attention, those that downsample included.

    Attributes:
        keep_ratio: Share of the patch tokens that the segment beginning at this block keeps on the slow path; 1 for a
            dense segment, 0 where no segment begins.
        scored: Whether a later selection reads the scores of this block.
        tradeoff: alpha, the share of this block's class attention in the scores.
    """
    keep_ratio: list[float]
    scored: list[bool]
    tradeoff: list[float]


def segments(depth: int, start_block: int, stage_depth: int) -> list[tuple[int, int]]:
    """(first, last) block of each segment: the blocks that share one selection.

    Layer-wise selection is `stage_depth=1`; the last segment is shorter where the depth leaves less.
    """
    return [(first, min(first + stage_depth, depth) - 1) for first in range(start_block, depth, stage_depth)]


def _check_share(name: str, value: float, allowed: str, low_included: bool) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (value == 0 and not low_included):
        raise ValueError(f'{name}={value!r} is not allowed, it must be a number in {allowed}.')
    return float(value)


def _per_entry(name: str, value: float | Sequence[float], length: int, entry: str) -> list[float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != length:
            raise ValueError(
                f'{name}={value!r} has {len(value)} values, it must be one number or one per {entry}, {length} here.')
        return list(value)
    return [value] * length


def make_schedule(
        depth: int,
        keep_ratio: float | Sequence[float],
        start_block: int | None,
        stage_depth: int | None,
        selection: str,
        tradeoff: float | Sequence[float],
) -> Schedule:
    """Work out what each block of a flat model has to do.

    Args:
        depth: Number of blocks.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment.
        start_block: First block that evolves; at least 1, because the scores come from the blocks before it. None for
            a third of the depth, rounded: 4 of 12 blocks.
        stage_depth: Blocks per segment in stage-wise selection. None for half of the blocks that evolve, rounded up.
        selection: 'stage', one selection per segment of `stage_depth` blocks, or 'layer', one per block.
        tradeoff: alpha in [0, 1]; one number for the evolved blocks (the dense ones before them then take 1, as in the
            authors' DeiT), or one per block.

    Raises:
        ValueError: An argument is outside what is allowed; the message names it.
    """
    _check_selection(selection)
    if start_block is None:
        start_block = max(1, round(depth / 3))
    _check_start(start_block, depth)
    if stage_depth is None:
        stage_depth = math.ceil((depth - start_block) / 2)
    if not isinstance(stage_depth, int) or isinstance(stage_depth, bool) or stage_depth < 1:
        raise ValueError(f'stage_depth={stage_depth!r} is not allowed, it must be a whole number of at least 1.')

    firsts = [first for first, _ in segments(depth, start_block, stage_depth if selection == 'stage' else 1)]
    begins = _begin_segments(depth, firsts, keep_ratio)
    alphas = _check_tradeoff(tradeoff, depth, 'block')
    if not isinstance(tradeoff, Sequence):
        alphas[:start_block] = [1.] * start_block
    return Schedule(begins, _read_scores(begins, alphas), alphas)


def make_pyramid_schedule(
        depths: Sequence[int],
        keep_ratio: float | Sequence[float],
        start_block: int,
        selection: str,
        tradeoff: float | Sequence[float],
) -> Schedule:
    """Work out what each attention of a pyramid has to do: the blocks of a stage, and before them one that downsamples.

    Downsampling ends a segment. It sees and scores every token.

    Args:
        depths: Number of blocks of each stage.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment.
        start_block: First block that evolves, counted through the stages without the downsampling; at least 1.
        selection: 'stage', one selection per stage of the model, or 'layer', one per block.
        tradeoff: alpha in [0, 1]; one number, or one per attention.

    Raises:
        ValueError: An argument is outside what is allowed; the message names it.
    """
    _check_selection(selection)
    _check_start(start_block, sum(depths))
    dense, firsts = [], []
    block = length = 0
    for stage, depth in enumerate(depths):
        if stage > 0:
            dense.append(length)
            length += 1
        evolved = range(max(start_block - block, 0), depth)  # may be empty
        firsts += [length + i for i in (evolved if selection == 'layer' else evolved[:1])]
        block += depth
        length += depth

    begins = _begin_segments(length, firsts, keep_ratio)
    for i in dense:
        begins[i] = 1.
    last = _last_selection(begins)
    return Schedule(begins, [i < last for i in range(length)], _check_tradeoff(tradeoff, length, 'attention'))


def make_layerwise(schedule: Schedule) -> Schedule:
    """The schedule with a selection in every block that a stage-wise one evolves, at the ratio of its segment."""
    keep_ratio, current = [], 1.
    for ratio in schedule.keep_ratio:
        current = ratio or current
        keep_ratio.append(current if current < 1 else ratio)
    first = next((i for i, ratio in enumerate(keep_ratio) if 0 < ratio < 1), len(keep_ratio))
    last = _last_selection(keep_ratio)
    scored = [read or first <= i < last for i, read in enumerate(schedule.scored)]
    return Schedule(keep_ratio, scored, schedule.tradeoff)


def cut_schedule(schedule: Schedule, length: int) -> Schedule:
    """The schedule of a model that has lost all but its first entries; scores for lost selections go, too."""
    keep_ratio = schedule.keep_ratio[:length]
    last = _last_selection(keep_ratio)
    return Schedule(keep_ratio, [read and i < last for i, read in enumerate(schedule.scored[:length])],
                    schedule.tradeoff[:length])


def check_layerwise_updates(layerwise_updates: int, selection: str) -> None:
    """Refuse a number of layer-wise updates that is none, or that no stage-wise selection follows.

    Raises:
        ValueError: What is not allowed, and what is.
    """
    if not isinstance(layerwise_updates, int) or isinstance(layerwise_updates, bool) or layerwise_updates < 0:
        raise ValueError(
            f'layerwise_updates={layerwise_updates!r} is not allowed, it must be a number of optimizer updates, or 0.')
    if layerwise_updates and selection != 'stage':
        raise ValueError(
            f"layerwise_updates={layerwise_updates} is not allowed with selection={selection!r}, only 'stage' can "
            'follow.')


def check_flag(name: str, value: bool) -> None:
    """Refuse what is no bool: a string, as timm's scripts make of `false`, would be taken as true.

    Raises:
        ValueError: What is not allowed, and what is.
    """
    if not isinstance(value, bool):
        raise ValueError(f'{name}={value!r} is not allowed, it must be True or False.')


def check_slow_tokens(keep_ratio: Sequence[float], num_patches: Sequence[int]) -> None:
    """Refuse a keep ratio that leaves no slow token.

    Args:
        keep_ratio: Of each entry of a schedule.
        num_patches: Patch tokens that each has to select from.

    Raises:
        ValueError: What is not allowed, and what is.
    """
    for ratio, number in zip(keep_ratio, num_patches, strict=True):
        if ratio > 0 and int(ratio * number) < 1:
            raise ValueError(
                f'keep_ratio={ratio} of {number} patch tokens leaves none on the slow path, it must be at least '
                f'{math.ceil(1e4 / number) / 1e4:g} here.')


def _check_selection(selection: str) -> None:
    if selection not in ('stage', 'layer'):
        raise ValueError(f"selection={selection!r} is not known, it must be 'stage' or 'layer'.")


def _check_start(start_block: int, depth: int) -> None:
    if depth < 2:
        raise ValueError(
            f'A model of {depth} block cannot be evolved: the first one only gives scores, so it takes at least 2.')
    if not isinstance(start_block, int) or isinstance(start_block, bool) or not 1 <= start_block < depth:
        raise ValueError(
            f'start_block={start_block!r} is not allowed, it must be in 1..{depth - 1} for a model of {depth} blocks.')


def _check_tradeoff(tradeoff: float | Sequence[float], length: int, entry: str) -> list[float]:
    return [
        _check_share('tradeoff', alpha, '[0, 1]', low_included=True)
        for alpha in _per_entry('tradeoff', tradeoff, length, entry)
    ]


def _begin_segments(length: int, firsts: list[int], keep_ratio: float | Sequence[float]) -> list[float]:
    """The ratio of each segment at its first entry, 0 elsewhere."""
    begins = [0.] * length
    for first, ratio in zip(firsts, _per_entry('keep_ratio', keep_ratio, len(firsts), 'segment'), strict=True):
        begins[first] = _check_share('keep_ratio', ratio, '(0, 1]', low_included=False)
    return begins


def _last_selection(keep_ratio: list[float]) -> int:
    return max((i for i, ratio in enumerate(keep_ratio) if 0 < ratio < 1), default=0)


def _read_scores(keep_ratio: list[float], tradeoff: list[float]) -> list[bool]:
    """Whether a later selection reads the scores of each block."""
    dense = []
    for i, ratio in enumerate(keep_ratio):
        dense.append(ratio == 1 if ratio > 0 else dense[i - 1] if i else True)

    scored = [False] * len(keep_ratio)
    read = False  # going backwards: whether anything from here on reads the scores that come in
    for i in reversed(range(len(keep_ratio))):
        scored[i] = read
        if 0 < keep_ratio[i] < 1:
            read = True
        elif dense[i] and tradeoff[i] == 1:
            read = False  # every token takes the new attention whole, nothing is left of the scores before
    return scored
