""" When tokens are selected

Turns arguments into what each block has to do, and refuses those that do not fit the depth of the model; what is wrong
for any model, `EvolutionConfig` refuses. Knows no tensors.
"""
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

_NUM_EVENTS = 5  # of similarity at least
_LEAST_LEFT = 0.8  # of the tokens by one event, unless there is no earlier block to begin with


class Schedule(NamedTuple):
    """What each block has to do, one entry per block; in a pyramid, one per attention, those that downsample included.

    Attributes:
        begins: Whether a segment begins at this block: the blocks that share one selection.
        keep_ratio: Share of the patch tokens that go through this block; 1 where it is dense.
        scored: Whether a later selection reads the scores of this block.
        tradeoff: alpha, the share of this block's class attention in the scores.
    """
    begins: list[bool]
    keep_ratio: list[float]
    scored: list[bool]
    tradeoff: list[float]

    def end_of_segment(self, begin: int) -> int:
        """The first entry behind the segment that begins with this one."""
        for end in range(begin + 1, len(self.begins)):  # no generator, which torch 2.5 does not compile
            if self.begins[end]:
                return end
        return len(self.begins)

    def part(self, begin: int, end: int) -> 'Schedule':
        """That of some blocks, from one to before another."""
        return Schedule(
            self.begins[begin:end], self.keep_ratio[begin:end], self.scored[begin:end], self.tradeoff[begin:end])


def segments(depth: int, start_block: int, stage_depth: int) -> list[tuple[int, int]]:
    """(first, last) block of each segment: the blocks that share one selection.

    Layer-wise selection is `stage_depth=1`; the last segment is shorter where the depth leaves less.
    """
    return [(first, min(first + stage_depth, depth) - 1) for first in range(start_block, depth, stage_depth)]


def _per_entry(name: str, value: float | Sequence[float], length: int, entry: str) -> list[float]:
    if not isinstance(value, Sequence):
        return [float(value)] * length
    if len(value) != length:
        raise ValueError(
            f'{name}={value!r} has {len(value)} values, it must be one number or one per {entry}, {length} here.')
    return [float(share) for share in value]


def make_schedule(
        depth: int,
        keep_ratio: float | Sequence[float],
        start_block: int | None,
        stage_depth: int | None,
        selection: str | None,
        tradeoff: float | Sequence[float] | None,
) -> Schedule:
    """Work out what each block of a flat model has to do in one of the published selections.

    Args:
        depth: Number of blocks.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment.
        start_block: First block that evolves; at least 1, because the scores come from the blocks before it. None for
            a third of the depth, rounded: 4 of 12 blocks.
        stage_depth: Blocks per segment in stage-wise selection. None for half of the blocks that evolve, rounded up.
        selection: 'stage', one selection per segment of `stage_depth` blocks, or 'layer', one per block.
        tradeoff: alpha in [0, 1]; one number for the evolved blocks (the dense ones before them then take 1, as in the
            authors' DeiT), or one per block. None for 0.5.

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
    """Work out how many tokens are averaged into others before each block of a flat model.

    The first quarter of the blocks is dense; then the same share of the tokens that are left goes five times, before
    blocks 3 to 7 of 12, or every second one from 6 to 14 of 24. Where that share would be more than a fifth, tokens go
    more often, from an earlier block on. (Found on DeiT-Ti and DINOv2-S, of 12 blocks; others follow by their depth.)

    Args:
        depth: Number of blocks.
        keep_ratio: Mean share of the patch tokens in the blocks from `start_block` on without the last, in (0, 1]; or
            a sequence with the share of each block from there on, which never grows, and at most halves.
        start_block: First block that evolves, at least 1. None for a quarter of the depth, and for as many tokens, over
            all blocks but the last, as the published selections leave, which begin after a third of the depth; for 1
            with a sequence.

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
                    f'keep_ratio={keep_ratio!r} is not allowed, a share of {share:g} cannot follow one of {before:g}: '
                    "in selection='similarity' it never grows from block to block, and at most halves.")
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
    """Shares of blocks, of which some begin with an event that leaves the same share of the tokens each time.

    Args:
        num_blocks: Number of blocks, the last of which does not count, because fewer tokens there save next to nothing.
        keep_ratio: Mean share in the blocks that count but for as many dense ones as `num_dense`.
        num_dense: See `keep_ratio`.
        num_events: Number of events at most.
        step: Blocks from one to the next.
    """
    end = max(num_blocks - 1, 1)
    powers = [min(i // step + 1, num_events) for i in range(end)]
    factor = _solve_factor(keep_ratio, powers, num_dense)
    shares = [factor ** power for power in powers]
    return shares + shares[-1:] * (num_blocks - end)


def _solve_factor(keep_ratio: float, powers: Sequence[int], num_dense: int) -> float:
    """The factor whose powers have the sum of `num_dense` ones and `keep_ratio` for the others, in [0.5, 1]."""
    if keep_ratio == 1:
        return 1.
    least = (sum(0.5 ** power for power in powers) - num_dense) / (len(powers) - num_dense)
    if keep_ratio < least:
        raise ValueError(
            f"keep_ratio={keep_ratio} is not allowed with selection='similarity' here, at most half of the tokens go "
            f'at a time: it must be at least {math.ceil(1e4 * least) / 1e4:g}.')
    goal = num_dense + keep_ratio * (len(powers) - num_dense)
    low, high = 0.5, 1.
    for _ in range(60):  # halvings, until no number is in between
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
    """Work out what each attention of a pyramid has to do: the blocks of a stage, and before them one that downsamples.

    Downsampling ends a segment. It sees and scores every token.

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
            "selection='similarity' is not allowed for LeViT: it averages a few tokens at a time over many blocks, and "
            "LeViT needs the whole grid again after a few blocks, where it halves it. It must be 'stage' or 'layer'.")
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
    """The schedule of a model that has lost all but its first entries; scores for lost selections go, too."""
    begins, keep_ratio = schedule.begins[:length], schedule.keep_ratio[:length]
    last = _last_selection(begins, keep_ratio)
    scored = [read and i < last for i, read in enumerate(schedule.scored[:length])]
    return Schedule(begins, keep_ratio, scored, schedule.tradeoff[:length])


def check_slow_tokens(keep_ratio: Sequence[float], num_patches: Sequence[int]) -> None:
    """Refuse a keep ratio that leaves no slow token.

    Args:
        keep_ratio: Share of the patch tokens of each block.
        num_patches: Patch tokens that each has to select from.

    Raises:
        ValueError: What is not allowed, and what is.
    """
    for ratio, number in zip(keep_ratio, num_patches, strict=True):
        if number < 1:
            raise ValueError('There are no patch tokens to select from, the image is smaller than a patch.')
        if int(ratio * number) < 1:
            raise ValueError(
                f'keep_ratio={ratio:.4g} of {number} patch tokens leaves none on the slow path of a block, it must be '
                f'at least {math.ceil(1e4 / number) / 1e4:g} there.')


def _default_start(depth: int) -> int:
    """Where the published selections begin: after a third of the depth, 4 of 12 blocks."""
    return max(1, round(depth / 3))


def _check_selection(selection: str | None, known: Sequence[str]) -> None:
    if selection not in known:
        raise ValueError(
            f'selection={selection!r} is not known, it must be {", ".join(map(repr, known[:-1]))} or {known[-1]!r}.')


def _check_start(start_block: int, depth: int) -> None:
    if depth < 2:
        raise ValueError(
            f'A model of {depth} block cannot be evolved: the first one only gives scores, so it takes at least 2.')
    if not isinstance(start_block, int) or isinstance(start_block, bool) or not 1 <= start_block < depth:
        raise ValueError(
            f'start_block={start_block!r} is not allowed. It must be in 1..{depth - 1} for a model of {depth} blocks.')


def _per_segment(
        length: int,
        firsts: Sequence[int],
        keep_ratio: float | Sequence[float],
        dense: Sequence[int] = (),
) -> tuple[list[bool], list[float]]:
    """`begins` and `keep_ratio` of a schedule, from the first entry of each segment and of dense ones in between."""
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
    read = False  # going backwards: whether anything from here on reads the scores that come in
    for i in reversed(range(len(begins))):
        scored[i] = read
        if selects[i]:
            read = True
        elif keep_ratio[i] == 1 and tradeoff[i] == 1:
            read = False  # every token takes the new attention whole, nothing is left of the scores before
    return scored
