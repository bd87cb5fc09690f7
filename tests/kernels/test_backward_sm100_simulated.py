"""The Blackwell backward in simulation, on what the Hopper one is tested with.

No Blackwell GPU has run it: this is where it has been seen right.
"""

import dataclasses

import pytest

from jax_flashcute.kernels.config.sm100 import (
    BwdConfigSm100,
    PassConfigSm100,
    backward_config_sm100,
)
from tests.cases import Case
from tests.kernels import test_backward_simulated as hopper
from tests.kernels.test_backward_simulated import CASES, EVERYTHING, SLOW_CASES, sized, slowly

ARCH = "sm_100a"
MANY_TILES = sized(128, group=3, seqlen_q=300, seqlen_k=260, **EVERYTHING)
"""Several tiles of queries and of keys, tails of both, empty rows, an odd group."""
IN_PASSES = sized(256, group=3, seqlen_q=140, seqlen_k=150, **EVERYTHING)
"""Head_dims whose gradients have a kernel each."""
IN_TURN = sized(192, 128, seqlen_q=130, seqlen_k=129)
"""Head_dims whose S, dP and dQ follow each other in one place in tensor memory."""
FAST = {
    "72_40_lengths": (CASES["72_40_lengths"], "float16"),
    "192_128_causal": (dataclasses.replace(IN_TURN, causal=True), "bfloat16"),
    "192_128": (IN_TURN, "float16"),
}
SLOW = {n: c for n, c in (CASES | SLOW_CASES).items() if n not in FAST}
SLOW["128_many_tiles"] = MANY_TILES
SLOW["128_pairs_long"] = sized(128, seqlen_q=400, seqlen_k=600, kv_heads=2, causal=True)
SLOW["64_96_pairs"] = sized(64, 96, group=2, seqlen_k=600, **EVERYTHING)
SLOW["136_168_causal"] = sized(136, 168, causal=True, group=2)
SLOW["200_136_window"] = sized(
    *(200, 136), window=(40, 10), offset=True, batch=2, group=7, seqlen_k=300
)
SLOW["136_256_many_tiles"] = sized(136, 256, group=3, seqlen_q=400, seqlen_k=300, **EVERYTHING)
TIMINGS = [("early", "adversarial"), ("shuffled", "seeded")]


def check(case: Case, dtype: str = "bfloat16", arch: str = ARCH, **how) -> None:
    hopper.check(case, dtype, arch=arch, **how)


@pytest.mark.parametrize(("case", "dtype"), [pytest.param(*c, id=n) for n, c in FAST.items()])
def test_each(case: Case, dtype: str) -> None:
    """With those below each kind of kernel meets either dtype, and is causal and full."""
    check(case, dtype)


@pytest.mark.parametrize("case", slowly(SLOW))
def test_gradients(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(64, 40), (64, 64), (128, 128), (192, 128), (256, 256)])
def test_every_class(dims: tuple[int, int], causal: bool, dtype: str) -> None:
    check(sized(*dims, group=3, causal=causal), dtype)


@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_any_timing(timing: str, warps: str) -> None:
    check(MANY_TILES, timing=timing, warps=warps, seed=3)


@pytest.mark.parametrize(
    ("timing", "warps"), [TIMINGS[0], pytest.param(*TIMINGS[1], marks=pytest.mark.slow)]
)
def test_passes(timing: str, warps: str) -> None:
    check(IN_PASSES, "float16", timing=timing, warps=warps, seed=3)


@pytest.mark.parametrize("case", slowly(SLOW))
@pytest.mark.parametrize(("timing", "warps"), TIMINGS)
def test_gradients_under_any_timing(case: Case, timing: str, warps: str) -> None:
    check(case, timing=timing, warps=warps, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("warps", ["adversarial", "seeded"])
@pytest.mark.parametrize("seed", range(50))
def test_any_seed(seed: int, warps: str) -> None:
    check(MANY_TILES, timing="shuffled", warps=warps, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64", "128_everything", "72_40_lengths", "192_128_everything"])
def test_half_precision_on_the_other_blackwell(name: str) -> None:
    check(CASES[name], "float16", arch="sm_103a")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(sized(64, window=(100, 20), seqlen_k=500, offset=True, group=2), id="64"),
        *slowly({name: CASES[name] for name in ("128_everything", "192_128_everything")}),
        *slowly({"long": sized(128, seqlen_q=300, seqlen_k=600, causal=True, offset=True)}),
    ],
)
def test_deterministic(case: Case) -> None:
    """A block that waits for a turn that never comes, or has passed, is a deadlock."""
    config = backward_config_sm100(case.head_dim, case.head_dim_v, deterministic=True)
    check(case, "float16", config=config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64", "128_everything", "64_128"])
def test_blocks_that_share_nothing(name: str) -> None:
    """What lists of tiles take at head_dims where other calls have pairs of blocks."""
    case = (CASES | SLOW_CASES)[name]
    config = backward_config_sm100(case.head_dim, case.head_dim_v, may_pair=False)
    assert config.cta_group == 1
    check(case, config=config)


@pytest.mark.slow
def test_more_stages() -> None:
    """dQ with columns of its own, and rings that are longer than two."""
    config = dataclasses.replace(backward_config_sm100(64, 64), q_stages=3, do_stages=3)
    check(sized(64, seqlen_q=700, causal=True), config=config)


def test_configurations() -> None:
    """One kernel for all gradients where dK and dV leave room in tensor memory, else three."""
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            config = backward_config_sm100(head_dim, head_dim_v, deterministic=True)
            fits = head_dim <= 192 and -(-head_dim // 16) + -(-head_dim_v // 16) <= 20
            assert (config.passes == ()) == fits
            # Sums of passes have one order: nothing takes turns.
            assert config.deterministic == fits
            assert config.reasons_invalid(head_dim, head_dim_v) == []
            pairs = {head_dim, head_dim_v} <= {56, 64, 88, 96, 120, 128}
            assert config.cta_group == (2 if pairs else 1)
    in_one = BwdConfigSm100(1, 1, in_turn=True)
    reasons = in_one.reasons_invalid(192, 192)
    assert "tensor memory: 576 columns needed, 512 available" in reasons
    reasons = BwdConfigSm100(0, 0, passes=(PassConfigSm100("key", 1, 3),)).reasons_invalid(256, 256)
    assert reasons == [
        "the pass for the gradient of key needs 2 and 1 stages at least, got 1 and 3",
        "shared memory: 264192 bytes needed, 232448 available",
    ]
