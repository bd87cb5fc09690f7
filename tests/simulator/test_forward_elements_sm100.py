"""The Blackwell forward with masks and scores by element, on what the Hopper one is tested with."""

import dataclasses

import pytest

from jax_flashcute.kernels.config.sm100 import FwdConfigSm100
from tests.simulator.test_forward_elements import (
    CASES,
    EVERYTHING,
    SMALL,
    TABLES,
    check,
    table_of_booleans,
    table_of_scores,
)
from tests.simulator.test_forward_features import sized
from tests.user_functions import MASKS, SCORES

ARCH = "sm_100a"
SMALL_TILES = FwdConfigSm100(
    1, 64, 2, softmax_registers=224, correction_registers=96, other_registers=96
)
SLOW = {n: c for n, c in CASES.items() if n != "everything"}
SLOW |= {"256_mask": sized(256, mask="nts", seqlen_q=70), "192_128": sized(192, 128, bias="ts")}
PACKED = sized(64, group=3, seqlen_q=70, **EVERYTHING)
SLOW["split"] = sized(64, sinks=True, group=7, seqlen_q=3, seqlen_k=1300, bias="ns", **EVERYTHING)
TIMINGS = [("early", "adversarial"), ("shuffled", "seeded")]


def together(case, **how) -> None:
    check(case, MASKS["documents"](case), SCORES["relative_bias"](case), arch=ARCH, **how)


def test_operands_together():
    check(CASES["everything"], arch=ARCH)


def test_functions_together():
    together(dataclasses.replace(PACKED, sinks=True))


@pytest.mark.parametrize("name", ["even", "next_pair", "short"])
def test_table_of_scores(name: str):
    """Up to 16 bytes at once."""
    case, dtype, keys, index, _ = TABLES[name]
    score_mod = table_of_scores(case, dtype, keys, index)
    check(case, None, score_mod, config=SMALL_TILES, arch=ARCH)


@pytest.mark.parametrize("keys", [144, 140])
def test_table_of_booleans(keys: int):
    case = sized(64, seqlen_q=70, seqlen_k=keys, batch=2, bias="ts")
    check(case, table_of_booleans(case), config=SMALL_TILES, arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_operand(name: str):
    check(SLOW[name], arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_score(name: str):
    check(SMALL, score_mod=SCORES[name](SMALL), config=SMALL_TILES, arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str):
    check(SMALL, mask_mod=MASKS[name](SMALL), config=SMALL_TILES, arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_any_timing(timing: str, warps: str):
    together(PACKED, timing=timing, warps=warps, seed=3)
    check(CASES["everything"], arch="sm_103a", timing=timing, warps=warps, seed=4)
