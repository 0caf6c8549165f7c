""" Search for the schedule of a given cost that keeps most of a model

Here, a schedule of selection by similarity is a list of weights. The weight of a block is the number of parts of the
tokens that are averaged into others before it. Each part is the same share of the tokens that remain. So the rule is a
schedule of equal weights. The cost of the schedule determines the size of a part.
"""
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

from ..method.schedule import make_similarity_schedule
from ..method.sequences import count_left

__all__ = ['Space', 'find_best']

Weights = tuple[int, ...]
_WIDTH = 2  # number of best schedules whose neighbours are tried, so that a worse one can lead to a better one
_PARTS = 4  # number of parts of a selection, which can move separately


class Space:
    """Schedules of selection by similarity for a model.

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
        self._attention = 1 / (6 * num_channels)  # cost of attention to one token, relative to linear layers

    def cost(self, shares: Sequence[float]) -> float:
        """Cost of all blocks but the last, relative to the linear layers of a dense block."""
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
        """The schedule with equal weights at each block where these shares decrease."""
        return 0, *(_PARTS if after < before else 0 for before, after in itertools.pairwise(shares))

    def shares_of(self, weights: Weights, cost: float) -> list[float] | None:
        """Share of each block for these weights and this cost; None if a selection would average more than half."""
        parts = list(itertools.accumulate(weights))

        def shares_by(left: float) -> list[float]:
            # rounded up to ten-thousandths, so that a schedule is the same after it was printed
            return [math.ceil(1e4 * left ** part - 1e-6) / 1e4 for part in parts]

        # of the share that a part leaves; in the end, at least one token remains
        low, high = self._num_patches ** (-1 / parts[-1]), 1.
        for _ in range(20):
            left = (low + high) / 2
            if self.cost(shares_by(left)) > cost:
                high = left
            else:
                low = left
        # The number of tokens is whole, so the cost changes in steps. The nearer one is taken.
        shares = min(map(shares_by, (low, high)), key=lambda found: abs(self.cost(found) - cost))
        is_allowed = all(after >= before / 2 for before, after in itertools.pairwise(shares))
        return shares if is_allowed else None

    def neighbours(self, weights: Weights) -> Iterator[Weights]:
        """Schedules in which one selection, half of its parts, or all selections are one block earlier or later."""
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
    """The same schedule with weights that can be halved twice."""
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
    """Search step by step for the schedule of a given cost with the least loss.

    All neighbours of the best schedules so far are measured, until none of them is better.

    Args:
        space: Schedules of the model.
        cost: Cost of the schedule.
        seeds: Schedules to start from. At least one must be possible at this cost.
        measure: Loss for the share of each block. It must be the same for the same shares.
        most: Largest number of measurements.

    Returns:
        The best schedule.
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
