"""The Blackwell backward with masks and scores by element, on what Hopper's is tested with."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import Case
from tests.simulator.test_backward_elements import (
    BIASES,
    CASES,
    DETERMINISTIC,
    EVERYTHING,
    INFINITE_AT_0,
    check,
    check_order,
)
from tests.simulator.test_forward_elements import sized
from tests.user_functions import MASKS, SCORES

ARCH = "sm_100a"
SMALL = sized(64, group=3, seqlen_q=150, seqlen_k=140, batch=2, offset=True)
SLOW = {n: c for n, c in CASES.items() if n != "256_mask"}
SLOW["192_128_mask"] = sized(192, 128, mask="bs", seqlen_q=70, seqlen_k=140)
TOGETHER = sized(64, group=3, seqlen_k=140, bias="nt", **EVERYTHING)
TIMINGS = [("early", "adversarial"), ("shuffled", "seeded")]


IN_PASSES = sized(200, 8, bias="nt", seqlen_q=70, seqlen_k=140, causal=True, offset=True)
SUMS = {f"bias {n}": c for n, c in BIASES.items()} | {
    "each block alone, a bias": sized(40, bias="ns", group=3, seqlen_k=300, **EVERYTHING),
    "in turn, a bias": sized(192, 128, bias="ts", group=2, soft_cap=2.0, **EVERYTHING),
    "in passes, a bias": sized(256, bias="nt", soft_cap=2.0, group=3, **EVERYTHING),
}


def in_all_ways(case: Case):
    """A score that is not additive, with arrays by distance, by head, by key and by score."""
    table, slopes, gate = (
        jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)
        for i, shape in enumerate([(case.q_heads, 65), case.q_heads, (case.batch, case.seqlen_k)])
    )

    def score_mod(score, b, h, q, kv):
        gated = score * (1 + 0.25 * gate[b, kv])
        return gated + table[h, jnp.clip(kv - q, -32, 32) + 32] + slopes[h] * (1 - 2 * (kv % 2))

    return score_mod


def together(case: Case = TOGETHER, **how) -> None:
    check(case, MASKS["documents"](case), in_all_ways(case), arch=ARCH, **how)


def test_together():
    """With gradients of a bias and of arrays, in pairs of blocks."""
    together()


def test_gradients_of_arrays_in_passes():
    """In fixed point: a first run measures what is added."""
    check_order(IN_PASSES, SCORES["query_temperature"], ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(40, 40), (128, 128), (192, 128), (256, 256)])
def test_together_of_every_class(dims: tuple[int, int]):
    together(sized(*dims, group=3, seqlen_k=140, bias="ts", **EVERYTHING))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str):
    check(SUMS[name], arch=ARCH)


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
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic(name: str):
    check_order(*DETERMINISTIC[name], ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["query_temperature", "t5_buckets"])
@pytest.mark.parametrize("dims", [(40, 40), (192, 128), (256, 256)])
def test_deterministic_of_every_class(dims: tuple[int, int], name: str):
    case, score = DETERMINISTIC[name]
    head_dims = dict(zip(("head_dim", "head_dim_v"), dims, strict=True))
    check_order(dataclasses.replace(case, **head_dims), score, ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_operand(name: str):
    check(SLOW[name], arch=ARCH)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
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
