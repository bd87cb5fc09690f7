"""The Blackwell forward in simulation, on what the Hopper one is tested with.

No Blackwell GPU has run it: this is where it has been seen right.
"""

import dataclasses

import pytest

from tests.cases import Case
from tests.simulator.test_forward_features import (
    CASES,
    EVERYTHING,
    SLOW_CASES,
    SLOW_SPLIT_CASES,
    SPLIT_CASES,
    check,
    sized,
)

ARCH = "sm_100a"
GROUPS_OF_7 = SLOW_CASES["128_groups_of_7"]
FAST = CASES | {
    "128_full": sized(128),
    "192_128": SLOW_CASES["192_128"],
    "192_128_full": sized(192, 128, seqlen_q=70),
    "256": SLOW_CASES["256"],
    "256_full": sized(256, seqlen_q=70),
}
HALF = ("64_chunked", "128_full", "192_128_full", "256_full")
"""Those in float16: each head_dim class meets either dtype, and is causal and full."""
SLOW = {n: c for n, c in SLOW_CASES.items() if n not in FAST}
GROUPS_OF_3 = sized(
    64, group=3, seqlen_q=2, seqlen_k=2100, batch=4, causal=True, offset=True, lengths=True
)
SLOW_SPLITS = SPLIT_CASES | SLOW_SPLIT_CASES


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_feature(name: str) -> None:
    check((FAST | SLOW)[name], "float16" if name in HALF else "bfloat16", arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_every_class(dims: tuple[int, int], causal: bool, dtype: str) -> None:
    check(sized(*dims, group=3, seqlen_q=190, causal=causal), dtype, arch=ARCH)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GROUPS_OF_3, id="64_groups_of_3"),
        *(
            pytest.param(c, id=n, marks=[pytest.mark.slow] * (n != "64_first_keys"))
            for n, c in SLOW_SPLITS.items()
        ),
    ],
)
def test_split_kv(case: Case) -> None:
    assert check(case, num_sms=16, arch=ARCH, timing="shuffled", warps="adversarial").split_kv


@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_any_timing(timing: str, warps: str) -> None:
    """Several key tiles, several tiles of work a block, empty rows, packed groups of 7."""
    check(GROUPS_OF_7, arch=ARCH, timing=timing, warps=warps, seed=3)
    check(sized(128, seqlen_k=500, **EVERYTHING), arch=ARCH, timing=timing, warps=warps, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST | SLOW)
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
def test_feature_under_any_timing(name: str, timing: str, warps: str) -> None:
    check((FAST | SLOW)[name], arch=ARCH, timing=timing, warps=warps, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("warps", ["adversarial", "seeded"])
@pytest.mark.parametrize("seed", range(50))
def test_any_seed(seed: int, warps: str) -> None:
    case = sized(128, group=3, seqlen_k=500, **EVERYTHING)
    check(case, arch=ARCH, timing="shuffled", warps=warps, seed=seed)


@pytest.mark.slow
def test_half_precision_on_the_other_blackwell() -> None:
    check(dataclasses.replace(CASES["128_everything"], group=3), "float16", arch="sm_103a")
