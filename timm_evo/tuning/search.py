""" Which schedule of the same cost keeps most

A schedule of similarity is written as weights here: before each block a whole number of parts goes, and a part is the
same share of the tokens that are left. So the rule is a schedule of equal weights. How large a part is follows from
what the schedule may cost.
"""
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

from ..method.schedule import make_similarity_schedule
from ..method.sequences import count_left

__all__ = ['Space', 'find_best']

Weights = tuple[int, ...]
_WIDTH = 2  # how many of the best are followed: so one that is worse alone but leads to a better one is not lost
_PARTS = 4  # parts of an event that can move alone


class Space:
    """Schedules of similarity for a model.

    Args:
        depth: Number of blocks.
        num_patches: Number of patch tokens.
        num_prefix_tokens: Number of prefix tokens.
        num_channels: Number of channels of a token.
        is_aligned: See `method.sequences.count_left`.
    """

    def __init__(
            self,
            depth: int,
            num_patches: int,
            num_prefix_tokens: int,
            num_channels: int,
            is_aligned: bool,
    ) -> None:
        self.depth = depth
        self._num_patches, self._num_prefix_tokens = num_patches, num_prefix_tokens
        self._is_aligned = is_aligned
        self._attention = 1 / (6 * num_channels)  # multiply-adds of attention with a token to those of linear layers

    def cost(self, shares: Sequence[float]) -> float:
        """What all blocks but the last cost, in units of what the linear layers of a dense block do."""
        num_left, cost = self._num_patches, 0.
        for before, share in itertools.pairwise([1., *shares[:-1]]):
            if share < before:
                num_left = count_left(
                    share, self._num_patches, self._num_prefix_tokens, num_left, self._is_aligned)
            num_tokens = num_left + self._num_prefix_tokens
            cost += num_tokens * (1 + self._attention * num_tokens)
        return cost / (self._num_patches + self._num_prefix_tokens)

    def rule(self, keep_ratio: float) -> list[float]:
        """Share of each block by the rule."""
        return make_similarity_schedule(self.depth, keep_ratio, None).keep_ratio

    def weights_of(self, shares: Sequence[float]) -> Weights:
        """The schedule with an equal part before each block where these shares fall."""
        return 0, *(_PARTS if after < before else 0 for before, after in itertools.pairwise(shares))

    def shares_of(self, weights: Weights, cost: float) -> list[float] | None:
        """Shares of each block with these weights and this cost; None if more than half would have to go at once."""
        parts = list(itertools.accumulate(weights))

        def shares_by(left: float) -> list[float]:
            # in ten-thousandths, rounded up, so that all see the same schedule wherever it is written down
            return [math.ceil(1e4 * left ** part - 1e-6) / 1e4 for part in parts]

        low, high = self._num_patches ** (-1 / parts[-1]), 1.  # what a part leaves: at least one token in the end
        for _ in range(20):
            left = (low + high) / 2
            if self.cost(shares_by(left)) > cost:
                high = left
            else:
                low = left
        # Whole tokens go, so the cost grows in steps: the nearer one counts.
        shares = min(map(shares_by, (low, high)), key=lambda found: abs(self.cost(found) - cost))
        is_allowed = all(after >= before / 2 for before, after in itertools.pairwise(shares))
        return shares if is_allowed else None

    def neighbours(self, weights: Weights) -> Iterator[Weights]:
        """Schedules where one event, a part of one, or all of them go one block earlier or later."""
        for step in (-1, 1):
            moved = (0,) * max(step, 0) + weights[max(-step, 0):self.depth - max(step, 0)] + (0,) * max(-step, 0)
            if sum(moved[1:-1]) == sum(weights):
                yield _simplest(moved)
            for block in range(1, self.depth - 1):
                if not weights[block] or not 1 <= block + step < self.depth - 1:
                    continue
                for part in {weights[block], -(-weights[block] // 2)}:
                    changed = list(weights)
                    changed[block] -= part
                    changed[block + step] += part
                    yield _simplest(tuple(changed))


def _simplest(weights: Weights) -> Weights:
    """The same schedule in parts that can be halved twice."""
    common = reduce(math.gcd, weights)
    simple = tuple(weight // common for weight in weights)
    return tuple(weight * _PARTS for weight in simple) if max(simple) < _PARTS else simple


def find_best(
        space: Space,
        cost: float,
        seeds: Sequence[Weights],
        measure: Callable[[list[float]], float],
        most: int,
) -> Weights:
    """Search step by step for the schedule of a cost that loses least.

    From the best ones so far, all neighbours are measured, until none of them is better.

    Args:
        space: Schedules of the model.
        cost: What a schedule may cost.
        seeds: Where to begin; at least one is possible at this cost.
        measure: What shares of each block lose. The same shares always lose the same.
        most: Number of measurements at most.

    Returns:
        The schedule.
    """
    losses: dict[Weights, float] = {}
    followed: set[Weights] = set()
    todo = list(seeds)
    while True:
        for weights in dict.fromkeys(todo):
            if weights in losses or len(losses) >= most:
                continue
            shares = space.shares_of(weights, cost)
            if shares is not None:
                losses[weights] = measure(shares)
        best = sorted(losses, key=lambda weights: (losses[weights], weights))[:_WIDTH]
        if not set(best) - followed or len(losses) >= most:
            return best[0]
        todo = [neighbour for weights in best if weights not in followed for neighbour in space.neighbours(weights)]
        followed.update(best)
