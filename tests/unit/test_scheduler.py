"""Where the tiles of a call with few of them are placed."""

import math
from collections import Counter

import pytest

from jax_flashcute.kernels.common.scheduler import GPCS, blocks_apart


@pytest.mark.parametrize("num_sms", [3, 4, 16, 60, 78, 114, 120, 128, 132, 144, 148])
def test_every_block_has_a_tile(num_sms: int) -> None:
    assert math.gcd(blocks_apart(num_sms), num_sms) == 1


@pytest.mark.parametrize("num_sms", [114, 120, 132, 144])
@pytest.mark.parametrize("tiles", [8, 16, 32, 64, 96])
def test_tiles_are_spread_over_all_gpcs(num_sms: int, tiles: int) -> None:
    blocks = [tile * blocks_apart(num_sms) % num_sms for tile in range(tiles)]
    on_each = Counter(block * GPCS // num_sms for block in blocks)
    assert len(on_each) >= GPCS - 1
    assert max(on_each.values()) <= tiles / GPCS + 2
