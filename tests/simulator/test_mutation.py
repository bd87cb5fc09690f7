"""Every synchronisation of the forward kernel matters, and the simulator notices each.

Slow: run with ``--run-slow``.
"""

import functools

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import mutation, simulate
from tests.simulator.compiled import forward

BF16 = ml_dtypes.bfloat16
WINDOW = (None, 30)
"""Two boundary tiles at the right end of each row of tiles, so every loop runs."""

EQUIVALENT = {
    # The producer writes the work of tile i + 2 over that of tile i.  It has then waited for Q of
    # tile i to be released, and the consumers release Q of a tile after they have read its work.
    "ignore mbarrier wait": ("work[None, t_stage]",),
    # The same edge again: the threads' reads are ordered by their next wait.
    "remove bar.warp.sync": ("fields = [work[",),
    # S = Q K^T is issued just before O += P V: nothing touches a register between the two fences.
    "remove wgmma.fence": ("gemm(mma_pv, acc_O",),
}
"""For each kind of change, text of nearby source lines where it changes nothing, and why."""
EQUIVALENT_COUNTS = 2
"""Empty barriers of the work pipeline: that edge is covered by the one of Q, as above."""
UNUSED_BARRIERS = 1
"""Barriers that this variant of the kernel initialises and never uses (for lengths of keys)."""


@pytest.fixture(scope="module")
def case():
    """(kernel, inputs, outputs, the unmutated results): six tiles for each block."""
    kernel = forward(group=2, window=WINDOW).with_lines()
    b, t, n, s, heads, h = 1, 300, 4, 500, 2, 128
    random = np.random.default_rng(0)
    q = random.standard_normal((b, t, n, h)).astype(BF16)
    k, v = (random.standard_normal((b, s, heads, h)).astype(BF16) for _ in range(2))
    outputs = [(q.shape, BF16), ((b, t, n), np.float32), ((1,), np.int32)]
    return kernel, (q, k, v), outputs, simulate(kernel, q, k, v, outputs=outputs)


def same_results(expected, count=2):
    """Whether the first ``count`` results are the expected ones, bit for bit."""
    return functools.partial(_are_equal, expected[:count])


def _are_equal(expected, results):
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(results[: len(expected)], expected, strict=True)
    )


def test_the_list_of_mutants_is_not_empty(case):
    kinds = {m.what for m in mutation.mutants(case[0].ptx)}
    assert {
        "ignore mbarrier wait", "remove mbarrier.arrive", "remove fence", "remove wgmma.fence",
        "remove wgmma.commit_group", "remove wgmma.wait_group", "weaken wait_group by one",
        "remove bar.sync", "expect 16 bytes less", "mbarrier count -1",
    } <= kinds  # fmt: skip


@pytest.mark.slow
def test_every_mutant_is_killed(case):
    kernel, inputs, outputs, expected = case
    outcomes = mutation.judge_all(kernel, inputs, outputs, same_results(expected))
    print("\n".join(str(o) for o in outcomes))
    assert len(outcomes) > 80
    unused = mutation.unused_barriers(outcomes)
    assert len(unused) <= UNUSED_BARRIERS
    survivors = [
        o
        for o in outcomes
        if o.reason is None and o.mutant.line not in unused and not _equivalent(kernel, o.mutant)
    ]
    counts = [o for o in survivors if o.mutant.what == "mbarrier count -1"]
    assert len(counts) <= EQUIVALENT_COUNTS, "\n".join(str(o) for o in counts)
    survivors = [o for o in survivors if o not in counts]
    assert not survivors, "\n".join(str(o) for o in survivors)


def _equivalent(kernel, mutant) -> bool:
    texts = EQUIVALENT.get(mutant.what, ())
    lines = mutation.sources(kernel.ptx, mutant.line, "sm90/forward.py")
    return any(text in line for line in lines for text in texts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("warps", ["adversarial", "seeded"])
def test_a_hundred_seeds(case, warps):
    kernel, inputs, outputs, expected = case
    same = same_results(expected)
    for seed in range(1, 101):
        results = simulate(
            kernel, *inputs, outputs=outputs, timing="shuffled", warps=warps, seed=seed
        )
        assert same(results), f"seed {seed}"
