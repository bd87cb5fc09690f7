"""Native sparse attention whole: a JAX program on the CPU whose kernels are simulated."""

import pytest

from jax_flashcute.nsa import NSAConfig
from tests.nsa_cases import Case, check
from tests.simulator.jax_programs import simulated_kernels


def check_simulated(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    *,
    arch: str = "sm_90a",
    backward: bool = True,
    **how,
) -> None:
    """Against float64, every kernel simulated, few multiprocessors."""
    with simulated_kernels(arch, **how):
        check(case, "bfloat16", "cute", monkeypatch, backward=backward)


# Groups, head_dims, lengths below a tile and below a block, more blocks selected than there are.
CASES = {
    "64_group_3": Case(200, 1, 3, 64, NSAConfig(64, 2, 70, 128)),
    "96_group_5": Case(300, 1, 5, 96, NSAConfig(64, 3, 100, 128, complete_only=True)),
    "128_group_4": Case(333, 2, 4, 128, NSAConfig(64, 99, 40, 256), batch=2),
    "128_group_1_below_a_tile": Case(100, 2, 1, 128, NSAConfig(64, 2, 30, 128)),
    "64_group_4_below_a_block": Case(40, 1, 4, 64, NSAConfig(64, 2, 30, 128)),
}


def test_forward_under_adversarial_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"timing": "shuffled", "warps": "adversarial", "seed": 3}
    check_simulated(CASES["64_group_3"], monkeypatch, backward=False, **how)


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
@pytest.mark.parametrize("name", CASES)
def test_all_gradients_under_any_timing(
    name: str, timing: str, warps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_simulated(CASES[name], monkeypatch, timing=timing, warps=warps, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_gradients_on_blackwell(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lists have tiles of 128 keys, and so have blocks that its kernels take."""
    case = Case(300, 1, 3, head_dim, NSAConfig(128, 2, 70, 128))
    check_simulated(case, monkeypatch, arch="sm_100a", timing="shuffled", warps="seeded", seed=3)
