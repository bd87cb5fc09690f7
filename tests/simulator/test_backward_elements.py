"""The Hopper backward with masks and scores by element, in simulation, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import reference, xla
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from jax_flashcute.spec import Operands, Residuals
from tests.cases import Case
from tests.simulator import simulate
from tests.simulator.test_forward_elements import compiled, operands_of, sized, widened
from tests.user_functions import MASKS, SCORES

MAIN = ("query", "key", "value")
TOLERANCE = 8e-3
"""Relative error of a gradient in the Frobenius norm: products of bfloat16 probabilities."""


def check(case: Case, mask_mod=None, score_mod=None, *, arch: str = "sm_90a", **how):
    dtype = "bfloat16"
    spec, operands = operands_of(case, dtype, mask_mod, score_mod)
    assert not registry.reasons_against(spec, operands, "bwd", arch)
    key = registry.kernel_key(spec, operands, "bwd", arch, 0)
    wide = widened(operands)
    floats = {n: getattr(wide, n) for n in (*MAIN, "sinks") if getattr(wide, n) is not None}
    others = {n: x for n, x in vars(wide).items() if n not in floats}

    def attend(floats):
        found = reference.attention(spec, Operands(**floats, **others))
        return found.out, found.lse

    rng = np.random.default_rng(1)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    d_out = jnp.asarray(rng.standard_normal((*rows, case.head_dim_v)), dtype)
    d_lse = jnp.asarray(rng.standard_normal(rows), jnp.float32)
    (out, lse), pull = jax.vjp(jax.jit(attend), floats)
    alive = ~jnp.isinf(lse)
    if case.lengths:
        inside = jnp.arange(case.seqlen_q)[None] < operands.query_seq_lengths[:, None]
        alive &= inside[..., None]
    clean = jnp.where(alive[..., None], d_out.astype(jnp.float32), 0), jnp.where(alive, d_lse, 0)
    (want,) = pull(clean)

    inputs = [*(getattr(operands, n) for n in MAIN), out.astype(dtype), lse, d_out, d_lse]
    inputs += other_inputs(key, spec, operands)
    outputs = [(want[n].shape, jnp.dtype(dtype)) for n in MAIN]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    found = simulate(compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how)
    got = dict(zip(MAIN, found, strict=False))
    if case.sinks:
        residuals = Residuals(out=out, lse=lse)
        got["sinks"] = xla.sink_gradient(operands, residuals, d_out, d_lse)
    for name, expected in want.items():
        expected = np.asarray(expected, np.float64)
        actual = np.asarray(got[name]).astype(np.float64)
        assert np.isfinite(actual).all(), name
        error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-2)
        assert error < TOLERANCE, (name, error)


EVERYTHING = {"batch": 3, "causal": True, "offset": True, "lengths": True}
CASES = {
    "soft_cap": sized(64, soft_cap=1.5, causal=True),
    "mask": sized(64, mask="nts", group=3, seqlen_q=70, seqlen_k=140),
    "sinks": sized(64, sinks=True, group=3, **EVERYTHING),
    "everything": sized(128, **EVERYTHING, window=(90, 3), soft_cap=2.0, mask="bt", sinks=True),
    "256_mask": sized(256, mask="bs", seqlen_q=70, seqlen_k=140),
}


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
def test_operand(case: Case):
    check(case)


SMALL = sized(64, group=3, kv_heads=2, seqlen_q=70, seqlen_k=140, batch=2, offset=True)
OF_NUMBERS = (
    *("alibi_of_numbers", "soft_cap", "squared", "gated", "hidden_by_score", "distance_decay"),
)


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_score(name: str):
    check(SMALL, score_mod=SCORES[name](SMALL))


@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str):
    check(SMALL, mask_mod=MASKS[name](SMALL))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_together(head_dim: int):
    case = sized(head_dim, seqlen_q=130, **EVERYTHING)
    check(case, MASKS["documents"](case), SCORES["alibi_of_numbers"](case))
