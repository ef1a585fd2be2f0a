"""The order of the videos of several data sets that are drawn by weight.

Videos are dealt in blocks of 100. How many of a block come from each data set is fixed, and their order within the
block is random. Each data set has an endless stream of its own: a permutation of its videos, then another one. So any
place is found without drawing those before it, and the stream of a data set does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

import numpy as np
from numpy.typing import NDArray

BLOCK = 100
_HALF = Fraction(1, 2)
# Random streams of one seed, beside those of tgmae.data.sampling: the order of a block, and of a data set's videos.
_BLOCKS, _VIDEOS = 3, 4


@dataclass
class WeightedOrder:
    """Videos of several data sets, by their number in the stream.

    sizes     videos of each data set        weights  of each data set, above 0; only their ratios matter
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    # The block that was looked at last: its number, the data set of each video, and videos of each data set before it.
    _block: tuple[int, NDArray[np.int64], list[int]] = field(default=(-1, np.empty(0, np.int64), []), repr=False)
    _orders: dict[int, tuple[int, NDArray[np.int64]]] = field(default_factory=dict, repr=False)

    def find(self, number: int) -> tuple[int, int]:
        """Return which data set the video with a number in the stream is of, and its row there."""
        block, place = divmod(number, BLOCK)
        sets, before = self._deal(block)
        chosen = int(sets[place])
        epoch, place = divmod(before[chosen] + int((sets[:place] == chosen).sum()), self.sizes[chosen])
        return chosen, int(self._order(chosen, epoch)[place])

    def count(self, number: int) -> list[int]:
        """Return how many of the first `number` videos are of each data set."""
        block, place = divmod(number, BLOCK)
        sets, before = self._deal(block)
        more = np.bincount(sets[:place], minlength=len(before))
        return [whole + int(part) for whole, part in zip(before, more, strict=True)]

    def _count_blocks(self, blocks: int) -> list[int]:
        """Return how many videos of the first blocks are of each data set: their shares, rounded to whole videos.

        The first data set gets its share of all, rounded, the second one its share of what is left, and so on. So the
        counts add up, never fall from one block to the next, and rounding does not add up over the blocks.
        """
        left, weight, counts = blocks * BLOCK, sum(map(Fraction, self.weights)), []
        for own in map(Fraction, self.weights):
            counts.append(floor(left * own / weight + _HALF))
            left, weight = left - counts[-1], weight - own
        return counts

    def _deal(self, block: int) -> tuple[NDArray[np.int64], list[int]]:
        """Return the data set of each video of a block, and how many videos of each there are before the block."""
        if self._block[0] != block:
            before = self._count_blocks(block)
            counts = np.subtract(self._count_blocks(block + 1), before)
            generator = np.random.default_rng((self.seed, _BLOCKS, block))
            sets = generator.permutation(np.repeat(np.arange(len(counts)), counts))
            self._block = (block, sets, before)
        return self._block[1:]

    def _order(self, chosen: int, epoch: int) -> NDArray[np.int64]:
        if self._orders.get(chosen, (-1,))[0] != epoch:
            generator = np.random.default_rng((self.seed, _VIDEOS, chosen, epoch))
            self._orders[chosen] = (epoch, generator.permutation(self.sizes[chosen]))
        return self._orders[chosen][1]
