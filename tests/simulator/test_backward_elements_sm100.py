"""The Blackwell backward with masks and scores by element, on what Hopper's is tested with."""

import pytest

from tests.cases import Case
from tests.simulator.test_backward_elements import (
    CASES,
    EVERYTHING,
    INFINITE_AT_0,
    OF_NUMBERS,
    check,
)
from tests.simulator.test_forward_elements import sized
from tests.user_functions import MASKS, SCORES

ARCH = "sm_100a"
SMALL = sized(64, group=3, seqlen_q=150, seqlen_k=140, batch=2, offset=True)
SLOW = {n: c for n, c in CASES.items() if n != "256_mask"}
SLOW["192_128_mask"] = sized(192, 128, mask="bs", seqlen_q=70, seqlen_k=140)
TOGETHER = sized(64, group=3, seqlen_k=140, **EVERYTHING)
TIMINGS = [("early", "adversarial"), ("shuffled", "seeded")]


def together(**how) -> None:
    check(TOGETHER, MASKS["documents"](TOGETHER), SCORES["gated"](TOGETHER), arch=ARCH, **how)


def test_together():
    together()


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("score", 64),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in [("derivative", 64), ("score", 256)]),
    ],
)
def test_what_is_infinite_at_0(name: str, head_dim: int):
    """Beyond the last row products are 0, and nothing is hidden where keys fill their tiles."""
    case = Case(1, 100, 256, 1, 1, head_dim, head_dim)
    check(case, score_mod=INFINITE_AT_0[name], arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_operand(name: str):
    check(SLOW[name], arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_NUMBERS)
def test_score(name: str):
    check(SMALL, score_mod=SCORES[name](SMALL), arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str):
    check(SMALL, mask_mod=MASKS[name](SMALL), arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_any_timing(timing: str, warps: str):
    together(timing=timing, warps=warps, seed=3)
