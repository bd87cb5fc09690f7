"""The Hopper backward launcher, whole: three kernels, bulk reductions into global memory."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.kernels.config.sm90 import backward_config
from jax_flashcute.kernels.config.workspace import workspace_shapes
from tests.simulator import SimulationError, reference, simulate
from tests.simulator.compiled import backward

BF16 = ml_dtypes.bfloat16


def check(kernel, shape, *, window=(None, None), deterministic=False, seed=0, **how):
    """Simulate (B, T, N, S, K, H) and compare the gradients with the reference."""
    b, t, n, s, heads, h = shape
    random = np.random.default_rng(seed)
    q, do = (random.standard_normal((b, t, n, h)).astype(BF16) for _ in range(2))
    k, v = (random.standard_normal((b, s, heads, h)).astype(BF16) for _ in range(2))
    scale = h**-0.5
    out, lse = reference.attention(q, k, v, scale, window)
    config = backward_config(h, h, deterministic)
    scratch = workspace_shapes(config, b, t, s, n, heads, h, h)
    outputs = [(x.shape, BF16) for x in (q, k, v)]
    outputs += [(dims, np.dtype(name)) for dims, name in scratch]
    dq, dk, dv, *_ = simulate(
        kernel, q, k, v, out.astype(BF16), lse.astype(np.float32), do,
        outputs=outputs, seed=seed, **how,
    )  # fmt: skip
    expected = reference.gradients(q, k, v, do, scale, window)
    for got, want in zip((dq, dk, dv), expected, strict=True):
        np.testing.assert_allclose(
            got.astype(np.float64), want, atol=0.01 * np.abs(want).max(), rtol=0.02
        )


@pytest.mark.parametrize(
    "how",
    [{}, {"timing": "early", "warps": "seeded"}, {"timing": "shuffled", "warps": "adversarial"}],
    ids=lambda how: "-".join(how.values()) or "default",
)
def test_schedules(how):
    check(backward(), (1, 128, 1, 128, 1, 128), **how)


@pytest.mark.parametrize(
    ("head_dim", "window", "deterministic"),
    [
        (64, (None, 0), False),
        (64, (None, 0), True),
        (40, (200, 100), False),
        (128, (None, None), False),
        (136, (None, 0), False),
        (160, (None, None), True),
    ],
)
def test_dq_is_cleared_for_other_heads(head_dim, window, deterministic):
    """Eight key/value heads, two of which are worked on together: four sections of them."""
    kernel = backward(head_dim, 2, window=window, deterministic=deterministic, least_heads=True)
    shape = (2, 200, 8, 500, 4, head_dim)
    how = {"deterministic": deterministic, "seed": head_dim}
    check(kernel, shape, window=window, timing="shuffled", warps="adversarial", **how)


def test_causal_tails_and_groups():
    window = (None, 0)
    check(backward(64, 2, window=window), (2, 200, 2, 300, 1, 64), window=window)


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("ld.acquire.gpu.global", "ld.relaxed.gpu.global"),
        ("red.release.gpu.global", "red.relaxed.gpu.global"),
        ("griddepcontrol.wait;", ""),
    ],
)
def test_dq_is_read_once_it_is_counted_or_the_kernel_has_ended(there, instead):
    """Where rounding begins before the products have ended, counters say which heads are done."""
    kernel = backward(64)
    assert there in kernel.ptx
    broken = dataclasses.replace(kernel, ptx=kernel.ptx.replace(there, instead))
    with pytest.raises(SimulationError, match="missing griddepcontrol"):
        check(broken, (1, 128, 1, 128, 1, 64))
