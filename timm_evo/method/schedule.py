""" Schedules: which blocks select, and how many tokens remain

The functions here compute the schedule of a model from the arguments, and refuse arguments that do not fit the depth of
the model. `EvolutionConfig` refuses arguments that are wrong for every model. Nothing here uses tensors.
"""
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

_NUM_EVENTS = 5  # least number of selections by similarity
_LEAST_LEFT = 0.8  # least share of the tokens that one selection by similarity leaves, if it can begin earlier


class Schedule(NamedTuple):
    """The part of each block: one entry per block, or in a pyramid one per attention, downsampling included.

    Attributes:
        begins: Whether a segment begins at this block. The blocks of a segment share one selection.
        keep_ratio: Share of the patch tokens that go through this block; 1 in a dense block.
        scored: Whether a later selection reads the scores of this block.
        tradeoff: alpha, the share of this block's class attention in the scores.
    """
    begins: list[bool]
    keep_ratio: list[float]
    scored: list[bool]
    tradeoff: list[float]

    def end_of_segment(self, begin: int) -> int:
        """The first entry after the segment that begins with this one."""
        for end in range(begin + 1, len(self.begins)):  # no generator, which torch 2.5 does not compile
            if self.begins[end]:
                return end
        return len(self.begins)

    def part(self, begin: int, end: int) -> 'Schedule':
        """The schedule of the blocks from `begin` to before `end`."""
        return Schedule(
            self.begins[begin:end], self.keep_ratio[begin:end], self.scored[begin:end], self.tradeoff[begin:end])


def segments(depth: int, start_block: int, stage_depth: int) -> list[tuple[int, int]]:
    """The first and last block of each segment.

    Layer-wise selection is `stage_depth=1`. The last segment is shorter if too few blocks remain for it.
    """
    return [(first, min(first + stage_depth, depth) - 1) for first in range(start_block, depth, stage_depth)]


def _per_entry(name: str, value: float | Sequence[float], length: int, entry: str) -> list[float]:
    if not isinstance(value, Sequence):
        return [float(value)] * length
    if len(value) != length:
        raise ValueError(
            f'{name}={value!r} has {len(value)} values. It must be one number, or one per {entry}: {length} here.')
    return [float(share) for share in value]


def make_schedule(
        depth: int,
        keep_ratio: float | Sequence[float],
        start_block: int | None,
        stage_depth: int | None,
        selection: str | None,
        tradeoff: float | Sequence[float] | None,
) -> Schedule:
    """The schedule of a flat model for a published selection.

    Args:
        depth: Number of blocks.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]: one number, or one per segment.
        start_block: First block that evolves, at least 1, because the scores come from the blocks before it. None for
            a third of the depth, rounded: 4 of 12 blocks.
        stage_depth: Blocks per segment in stage-wise selection. None for half of the blocks that evolve, rounded up.
        selection: 'stage', one selection per segment of `stage_depth` blocks, or 'layer', one per block.
        tradeoff: alpha in [0, 1]: one number for the evolved blocks, or one per block. With one number, dense blocks
            before them have 1, as in the authors' DeiT. None for 0.5.

    Raises:
        ValueError: An argument is outside what is allowed; the message names it.
    """
    _check_selection(selection, ('stage', 'layer', 'similarity'))
    tradeoff = 0.5 if tradeoff is None else tradeoff
    if start_block is None:
        start_block = _default_start(depth)
    _check_start(start_block, depth)
    if stage_depth is None:
        stage_depth = math.ceil((depth - start_block) / 2)

    firsts = [first for first, _ in segments(depth, start_block, stage_depth if selection == 'stage' else 1)]
    begins, ratios = _per_segment(depth, firsts, keep_ratio)
    alphas = _per_entry('tradeoff', tradeoff, depth, 'block')
    if not isinstance(tradeoff, Sequence):
        alphas[:start_block] = [1.] * start_block
    return Schedule(begins, ratios, _read_scores(begins, ratios, alphas), alphas)


def make_similarity_schedule(
        depth: int,
        keep_ratio: float | Sequence[float],
        start_block: int | None,
) -> Schedule:
    """The schedule of a flat model for selection by similarity.

    The first quarter of the blocks is dense. Then the same share of the remaining tokens is averaged into others five
    times: before blocks 3 to 7 of 12, or every second block from 6 to 14 of 24. If this share would be more than a
    fifth, there are more selections, and they begin at an earlier block. This rule was found on DeiT-Ti and DINOv2-S,
    which have 12 blocks. For other models it is scaled by their depth.

    Args:
        depth: Number of blocks.
        keep_ratio: Mean share of the patch tokens in the blocks from `start_block` on, without the last block, in
            (0, 1]. Or a sequence with the share of each block from `start_block` on. It must never grow from block to
            block, and at most halve.
        start_block: First block that evolves, at least 1. None stands for 1 if `keep_ratio` is a sequence, otherwise
            for a quarter of the depth. In the second case, the number of tokens in all blocks but the last is that of
            the published selections, which begin after a third of the depth.

    Raises:
        ValueError: An argument is outside what is allowed; the message names it.
    """
    if isinstance(keep_ratio, Sequence):
        first = 1 if start_block is None else start_block
        _check_start(first, depth)
        shares = _per_entry('keep_ratio', keep_ratio, depth - first, 'block that evolves')
        for before, share in itertools.pairwise([1., *shares]):
            if not before / 2 <= share <= before:
                raise ValueError(
                    f'keep_ratio={keep_ratio!r} is not allowed, because a share of {share:g} cannot follow one of '
                    f"{before:g}. With selection='similarity' the share must never grow from block to block, and at "
                    'most halve.')
    else:
        step = max(1, round(depth / 12))
        first = max(1, round(depth / 4)) if start_block is None else start_block
        _check_start(first, depth)
        num_dense = _default_start(depth) - first if start_block is None else 0
        num_events = _NUM_EVENTS
        shares = _fall_evenly(depth - first, keep_ratio, num_dense, num_events, step)
        while start_block is None and shares[0] < _LEAST_LEFT and first > step:
            first, num_dense, num_events = first - step, num_dense + step, num_events + 1
            shares = _fall_evenly(depth - first, keep_ratio, num_dense, num_events, step)
    shares = [1.] * first + shares
    begins = [False] + [share < before for before, share in itertools.pairwise(shares)]
    return Schedule(begins, shares, [False] * depth, [0.] * depth)


def _fall_evenly(num_blocks: int, keep_ratio: float, num_dense: int, num_events: int, step: int) -> list[float]:
    """Share of the tokens in each block, if each selection leaves the same share of the tokens before it.

    Args:
        num_blocks: Number of blocks. The last is not counted, because fewer tokens in it save almost nothing.
        keep_ratio: Mean share in the counted blocks without `num_dense` of them.
        num_dense: Number of counted blocks whose tokens are added as if they were dense.
        num_events: Largest number of selections.
        step: Number of blocks between two selections.
    """
    end = max(num_blocks - 1, 1)
    powers = [min(i // step + 1, num_events) for i in range(end)]
    factor = _solve_factor(keep_ratio, powers, num_dense)
    shares = [factor ** power for power in powers]
    return shares + shares[-1:] * (num_blocks - end)


def _solve_factor(keep_ratio: float, powers: Sequence[int], num_dense: int) -> float:
    """The factor in [0.5, 1] whose powers have the same sum as `num_dense` ones and `keep_ratio` for each other."""
    if keep_ratio == 1:
        return 1.
    least = (sum(0.5 ** power for power in powers) - num_dense) / (len(powers) - num_dense)
    if keep_ratio < least:
        raise ValueError(
            f"keep_ratio={keep_ratio} is not allowed with selection='similarity' in this model, because one selection "
            f'averages at most half of the tokens. It must be at least {math.ceil(1e4 * least) / 1e4:g}.')
    goal = num_dense + keep_ratio * (len(powers) - num_dense)
    low, high = 0.5, 1.
    for _ in range(60):  # halve the interval until no number is in between
        factor = (low + high) / 2
        if sum(factor ** power for power in powers) > goal:
            high = factor
        else:
            low = factor
    return high


def make_pyramid_schedule(
        depths: Sequence[int],
        keep_ratio: float | Sequence[float],
        start_block: int | None,
        selection: str | None,
        tradeoff: float | Sequence[float] | None,
) -> Schedule:
    """The schedule of a pyramid, with one entry per attention: those of the blocks, and those that downsample.

    Downsampling ends a segment. It attends to every token and scores all of them.

    Args:
        depths: Number of blocks of each stage.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment.
        start_block: First block that evolves, counted through the stages without the downsampling; at least 1. None
            for 2.
        selection: 'stage', one selection per stage of the model, or 'layer', one per block.
        tradeoff: alpha in [0, 1]; one number, or one per attention. None for 0.5.

    Raises:
        ValueError: An argument is outside what is allowed; the message names it.
    """
    if selection == 'similarity':
        raise ValueError(
            "selection='similarity' is not allowed for LeViT. It averages a few tokens at a time over many blocks, but "
            "LeViT needs the whole grid after a few blocks to downsample it. It must be 'stage' or 'layer'.")
    _check_selection(selection, ('stage', 'layer'))
    start_block = 2 if start_block is None else start_block
    _check_start(start_block, sum(depths))
    downsampling, firsts = [], []
    block = length = 0
    for stage, depth in enumerate(depths):
        if stage > 0:
            downsampling.append(length)
            length += 1
        evolved = range(max(start_block - block, 0), depth)  # may be empty
        firsts += [length + i for i in (evolved if selection == 'layer' else evolved[:1])]
        block += depth
        length += depth

    begins, ratios = _per_segment(length, firsts, keep_ratio, downsampling)
    last = _last_selection(begins, ratios)
    scored = [i < last for i in range(length)]
    alphas = _per_entry('tradeoff', 0.5 if tradeoff is None else tradeoff, length, 'attention')
    return Schedule(begins, ratios, scored, alphas)


def make_layerwise(schedule: Schedule) -> Schedule:
    """The schedule with a selection in every block that a stage-wise one evolves, at the ratio of its segment."""
    begins = [begin or ratio < 1 for begin, ratio in zip(schedule.begins, schedule.keep_ratio, strict=True)]
    first = next((i for i, ratio in enumerate(schedule.keep_ratio) if ratio < 1), len(begins))
    last = _last_selection(begins, schedule.keep_ratio)
    scored = [read or first <= i < last for i, read in enumerate(schedule.scored)]
    return schedule._replace(begins=begins, scored=scored)


def cut_schedule(schedule: Schedule, length: int) -> Schedule:
    """The schedule of a model that keeps only its first entries, without scores for the removed selections."""
    begins, keep_ratio = schedule.begins[:length], schedule.keep_ratio[:length]
    last = _last_selection(begins, keep_ratio)
    scored = [read and i < last for i, read in enumerate(schedule.scored[:length])]
    return Schedule(begins, keep_ratio, scored, schedule.tradeoff[:length])


def check_slow_tokens(keep_ratio: Sequence[float], num_patches: Sequence[int]) -> None:
    """Refuse a keep ratio that leaves no slow token.

    Args:
        keep_ratio: Share of the patch tokens of each block.
        num_patches: Number of patch tokens of the grid in each block.

    Raises:
        ValueError: A block would have no slow token. The message says which keep ratio is allowed.
    """
    for ratio, number in zip(keep_ratio, num_patches, strict=True):
        if number < 1:
            raise ValueError('There are no patch tokens to select from, because the image is smaller than a patch.')
        if int(ratio * number) < 1:
            raise ValueError(
                f'keep_ratio={ratio:.4g} of {number} patch tokens leaves none on the slow path of a block. It must be '
                f'at least {math.ceil(1e4 / number) / 1e4:g} there.')


def _default_start(depth: int) -> int:
    """The first block that evolves in a published selection: after a third of the depth, 4 of 12 blocks."""
    return max(1, round(depth / 3))


def _check_selection(selection: str | None, known: Sequence[str]) -> None:
    if selection not in known:
        raise ValueError(
            f'selection={selection!r} is not known. It must be {", ".join(map(repr, known[:-1]))} or {known[-1]!r}.')


def _check_start(start_block: int, depth: int) -> None:
    if depth < 2:
        raise ValueError(
            f'A model of {depth} block cannot be evolved. It needs at least 2, as the first block only gives scores.')
    if not isinstance(start_block, int) or isinstance(start_block, bool) or not 1 <= start_block < depth:
        raise ValueError(
            f'start_block={start_block!r} is not allowed. It must be in 1..{depth - 1} for a model of {depth} blocks.')


def _per_segment(
        length: int,
        firsts: Sequence[int],
        keep_ratio: float | Sequence[float],
        dense: Sequence[int] = (),
) -> tuple[list[bool], list[float]]:
    """`begins` and `keep_ratio` of a schedule, from the first entry of each segment and the dense entries between."""
    ratios = _per_entry('keep_ratio', keep_ratio, len(firsts), 'segment')
    by_first = dict(zip(firsts, ratios, strict=True)) | dict.fromkeys(dense, 1.)
    per_entry: list[float] = []
    for i in range(length):
        per_entry.append(by_first.get(i, per_entry[-1] if per_entry else 1.))
    return [i in by_first for i in range(length)], per_entry


def _selects(begins: list[bool], keep_ratio: list[float]) -> list[bool]:
    return [begin and ratio < 1 for begin, ratio in zip(begins, keep_ratio, strict=True)]


def _last_selection(begins: list[bool], keep_ratio: list[float]) -> int:
    return max((i for i, selects in enumerate(_selects(begins, keep_ratio)) if selects), default=0)


def _read_scores(begins: list[bool], keep_ratio: list[float], tradeoff: list[float]) -> list[bool]:
    """Whether a later selection reads the scores of each block."""
    selects = _selects(begins, keep_ratio)
    scored = [False] * len(begins)
    read = False  # whether this entry or a later one reads the scores that exist before it
    for i in reversed(range(len(begins))):
        scored[i] = read
        if selects[i]:
            read = True
        elif keep_ratio[i] == 1 and tradeoff[i] == 1:
            read = False  # the new attention replaces the earlier scores of all tokens
    return scored
