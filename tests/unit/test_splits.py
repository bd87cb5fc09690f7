"""How long split-KV's parts are: near the best there is, by a model of blocks that draw parts."""

import heapq
import itertools

import numpy as np
import pytest

from jax_flashcute.kernels.common.splits import PART_TILES, parts_cost
from jax_flashcute.kernels.config.splits import most_splits

NUM_SMS, HEADS, ROOM = 132, 8, 1024
RANDOM = np.random.default_rng(0)
# Key tiles of each sequence, in a table with room for 1,024.
LENGTHS = {
    "one": [1024],
    "alike": [64] * 64,
    "alike, not a multiple": [64] * 20,
    "short": [8] * 16,
    "1 to 1000": RANDOM.permutation(np.ceil(1000.0 ** (np.arange(64) / 63))).astype(int).tolist(),
    "one long one last": [1] * 63 + [1000],
    "one long one first": [1000] + [1] * 63,
    "two of many slots": [64, 64] + [0] * 62,
    "random": RANDOM.integers(0, 64, 32).tolist(),
    "log-uniform": [round(0.5 * 2048 ** (5 * i % 16 / 15)) for i in range(16)],
}


def parts_of(tiles: list[int], length: int, most: int) -> list[int]:
    """The tiles of each part, in the order in which blocks draw them."""
    found = []
    for n in tiles:
        splits = max(1, min(-(-n // length), most))
        ends = [n * i // splits for i in range(splits + 1)]
        found += [b - a for a, b in itertools.pairwise(ends) for _ in range(HEADS)]
    return found


def makespan(parts: list[int]) -> float:
    """Time in tiles until all are done, half a tile more for each part."""
    free = [0.0] * NUM_SMS
    for part in parts:
        heapq.heapreplace(free, free[0] + part + 0.5)
    return max(free)


@pytest.mark.parametrize("name", LENGTHS)
def test_parts_are_nearly_the_best(name: str) -> None:
    tiles = LENGTHS[name]
    most = most_splits(len(tiles) * HEADS, ROOM, NUM_SMS, len(tiles) > 1)
    costs, times = {}, {}
    for length in PART_TILES:
        parts = parts_of(tiles, length, most)
        count = HEADS * sum(min(-(-n // length), most) for n in tiles)
        total = sum(tiles) * HEADS
        costs[length] = parts_cost(length, count, total, max(tiles), most, NUM_SMS)
        times[length] = makespan(parts) + 1.5 * (len(parts) > len(tiles) * HEADS)
    chosen = min(costs, key=costs.__getitem__)
    assert times[chosen] <= 1.1 * min(times.values()), (chosen, times)
    if name in ("alike", "short"):
        assert chosen == PART_TILES[0]
