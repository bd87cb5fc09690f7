"""Outputs and gradients of two implementations, side by side."""

import functools

import jax
import numpy as np

from jax_flashcute import flash_attention
from tests.arrays import random
from tests.cases import Case, differentiable


def out_lse_and_gradients(case: Case, arrays: dict, implementation: str | None) -> dict:
    """``{"out", "lse", "d_query", ...}`` for fixed, uneven cotangents of out and lse."""

    def attend(floating, others):
        return flash_attention(
            **floating, **others, **case.static, implementation=implementation, return_residual=True
        )

    def run(floating, others):
        (out, lse), vjp = jax.vjp(functools.partial(attend, others=others), floating)
        gradients = vjp((cotangent(out, 1), cotangent(lse, 2)))[0]
        return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in gradients.items()}

    floating = differentiable(arrays)
    others = {name: array for name, array in arrays.items() if name not in floating}
    # The oracle runs once per compile, so its code need not be good.
    options = {"xla_backend_optimization_level": 0} if implementation == "reference" else None
    return jax.jit(run, compiler_options=options)(floating, others)


def cotangent(like, seed: int):
    """A fixed random array of the shape and dtype of ``like``."""
    return random(seed, *like.shape, dtype=like.dtype)


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Every array within ``tolerance`` of the largest expected value, infinities exactly."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(actual[name], np.float64)
        want = np.asarray(want, np.float64)
        assert got.shape == want.shape, name
        assert not np.isnan(want).any(), f"{name}: the expected values hold NaN"
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=name)
        finite = np.isfinite(want)
        scale = np.max(np.abs(want[finite]), initial=1.0)
        np.testing.assert_allclose(
            got[finite], want[finite], rtol=tolerance, atol=tolerance * scale, err_msg=name
        )
