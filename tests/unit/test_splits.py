"""How long split-KV's parts are: near the best there is, by a model of blocks that draw parts."""

import heapq
import itertools

import numpy as np
import pytest

from jax_flashcute.kernels.common.splits import PART_TILES
from jax_flashcute.kernels.config.sm90 import few_rows_config
from jax_flashcute.kernels.config.splits import lone_tile_time, most_splits, parts_cost

NUM_SMS, HEADS, ROOM = 132, 8, 1024
LONE = lone_tile_time(few_rows_config(128, 128, 4), 128, 128, NUM_SMS)
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


def tile_time(blocks: int, spread: bool) -> float:
    """What a key tile takes each of so many blocks that read, as was measured: 1 where all do."""
    if spread:
        return max(LONE / 64, min(blocks / NUM_SMS + 0.03, 0.98))
    return max((LONE + 12) / 64, min(blocks / NUM_SMS + 0.14, 0.97))


def makespan(parts: list[int]) -> float:
    """Time until all are done, each as long as half a tile more; blocks at work share memory."""
    # Those that begin together are spread over the GPU.
    spread = len(parts) <= NUM_SMS
    left = [part + 0.5 for part in parts]
    at_work, waiting, done, time = left[:NUM_SMS], left[NUM_SMS:][::-1], 0.0, 0.0
    heapq.heapify(at_work)
    while at_work:
        # All progress alike: the one with the least left is the next to end.
        end = heapq.heappop(at_work)
        time += (end - done) * tile_time(len(at_work) + 1, spread)
        done = end
        if waiting:
            heapq.heappush(at_work, done + waiting.pop())
    return time


@pytest.mark.parametrize("name", LENGTHS)
def test_parts_are_nearly_the_best(name: str) -> None:
    tiles = LENGTHS[name]
    most = most_splits(len(tiles) * HEADS, ROOM, NUM_SMS, len(tiles) > 1, LONE, 2**18)
    costs, times = {}, {}
    for length in PART_TILES:
        parts = parts_of(tiles, length, most)
        count = HEADS * sum(min(-(-n // length), most) for n in tiles)
        total = sum(tiles) * HEADS
        costs[length] = parts_cost(length, count, total, max(tiles), most, NUM_SMS, LONE)
        times[length] = makespan(parts) + 1.25 * (len(parts) > len(tiles) * HEADS)
    chosen = min(costs, key=costs.__getitem__)
    assert times[chosen] <= 1.1 * min(times.values()), (chosen, times)
    if name in ("alike", "short"):
        assert chosen == PART_TILES[0]


@pytest.mark.parametrize("key_tiles", [4, 8, 16, 32, 64, 128, 512, 1024])
@pytest.mark.parametrize("rows", [1, 8, 20, 32, 48, 64, 96, 128, 132, 144, 192, 256])
def test_rows_of_one_length_are_divided_nearly_as_is_best(rows: int, key_tiles: int) -> None:
    times = {}
    for splits in range(1, max(1, min(key_tiles // 4, 128)) + 1):
        ends = [key_tiles * i // splits for i in range(splits + 1)]
        parts = [b - a for a, b in itertools.pairwise(ends) for _ in range(rows)]
        times[splits] = makespan(parts) + 1.25 * (splits > 1)
    assert times[most_splits(rows, key_tiles, NUM_SMS, False, LONE, 2**18)] <= 1.1 * min(
        times.values()
    )


def test_parts_are_no_more_than_it_takes() -> None:
    def most(rows: int, key_tiles: int, lengths_vary: bool = False, **others) -> int:
        others = {"lone": LONE, "part_bytes": 2**18, **others}
        return most_splits(rows, key_tiles, NUM_SMS, lengths_vary, **others)

    # Half the multiprocessors read nearly as fast as all, if tiles are long.
    assert most(64, 16) == most(96, 64) == most(256, 64) == 1
    assert most(64, 16, lone=64) == 2
    assert most(32, 32) in (2, 3, 4)
    assert 64 <= 8 * most(8, 1024) <= 132
    # No more parts than the keys are worth, and none where there are hardly any keys.
    assert most(8, 20) == 5
    assert most(1, 3) == 1
    # Where lengths vary, the longest sequence may have more.
    assert most(256, 1024, lengths_vary=True) == 64
    assert most(256, 64, lengths_vary=True) == 4
    assert most(64, 16, lengths_vary=True) == 4
    assert most(64, 512, lengths_vary=True) == 128
    assert most(64, 512, lengths_vary=True, part_bytes=2**20) == 64
    assert most(64, 512, lengths_vary=True, part_bytes=2**24) == 32
    assert most(64, 8, lengths_vary=True) == most(256, 16, lengths_vary=True) == 1


def test_small_pages_take_a_block_longer() -> None:
    config = few_rows_config(128, 128, 4)
    times = [lone_tile_time(config, 128, 128, NUM_SMS, page) for page in (None, 16, 1)]
    assert times == sorted(set(times))
    assert times[-1] < 64


def test_fewer_multiprocessors_are_all_needed() -> None:
    """Each has more of memory's speed than it can take alone."""
    config = few_rows_config(128, 128, 4)
    times = [lone_tile_time(config, 128, 128, num_sms) for num_sms in (132, 114, 78, 40)]
    assert times == sorted(times)
    assert times[-1] == 64
    for lone, num_sms in zip(times[:3], (132, 114, 78), strict=True):
        blocks = 8 * most_splits(8, 1024, num_sms, False, lone, 2**18)
        assert 57 <= blocks <= num_sms
