"""Masks, scores, bias, soft cap and sinks on a GPU, through ``flash_attention``.

Against the dense reference in float32 on the same 16-bit inputs.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jax_flashcute import explain, flash_attention, masks
from jax_flashcute.kernels import registry
from jax_flashcute.spec import LEAST_LSE
from tests.cases import Case
from tests.user_functions import INTERVALS, MASKS, SCORES

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-2
"""Relative error in the Frobenius norm: bfloat16 inputs, probabilities and results."""
OF_SUMS = 3e-2
"""Likewise of gradients of bias and arrays, but relative to a tenth of the norm of the LSE's
gradients at least: a row's gradients sum to that of its LSE, and rounding does not cancel as these
may."""
OF_ROUNDED_SUMS = 0.2
"""Likewise where a score computes in bfloat16: each of these gradients is rounded."""

FEATURES = {"causal": True, "offset": True, "lengths": True}
SHAPES = {
    "64": {"head_dim": 64, "seqlen_q": 129, "seqlen_k": 257, "group": 3},
    "128": {"head_dim": 128, "seqlen_q": 513, "seqlen_k": 400, **FEATURES, "batch": 3},
    "128_packed": {"head_dim": 128, "seqlen_q": 5, "seqlen_k": 1000, "group": 7, "offset": True},
    "256": {"head_dim": 256, "seqlen_q": 200, "seqlen_k": 300, "causal": True},
}
OPERANDS = {
    "soft_cap": {"soft_cap": 1.5},
    "bias": {"bias": "bnts"},
    "bias_of_keys": {"bias": "bs"},
    "mask": {"mask": "nts"},
    "sinks": {"sinks": True},
    "everything": {"soft_cap": 2.0, "bias": "ns", "mask": "bt", "sinks": True, "window": (90, 3)},
}


@pytest.fixture(autouse=True)
def full_precision():
    """Where a score multiplies arrays XLA rounds these to TF32 else; kernels do not."""
    with jax.default_matmul_precision("highest"):
        yield


def case_of(shape: str, **features) -> Case:
    sizes = SHAPES[shape]
    return Case(head_dim_v=sizes["head_dim"], **(sizes | features))


def check(
    case: Case, *, score_mod=None, calls: int = 1, bias_dtype: str = "float32", **functions
) -> None:
    """The output, the LSE and the gradients of everything that has one.

    ``calls``: of the backward, whose results must be the same bit for bit.
    """
    arrays = case.arrays(jnp.bfloat16)
    main = {n: arrays.pop(n) for n in ("query", "key", "value")}
    main |= {n: arrays.pop(n) for n in ("bias", "sinks") if n in arrays}
    if "bias" in main:
        main["bias"] = main["bias"].astype(bias_dtype)
    call = case.static | arrays | functions | main
    explained = explain(**call, score_mod=score_mod)
    traced, closed_over = None, ()
    if score_mod is not None:
        traced, closed_over = masks.trace_score(score_mod, jnp.float32)
    floats = [i for i, x in enumerate(closed_over) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert (explained.forward, explained.backward) == ("cute", "cute")
    read = {f"array {i}": closed_over[i][0] for i in floats}

    def attend(implementation, main, read):
        given = call | main
        if traced is not None:
            rest = [read.get(f"array {i}", x[0]) for i, x in enumerate(closed_over)]
            given["score_mod"] = lambda *x: jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, rest))(*x)[0]
        return flash_attention(**given, return_residual=True, implementation=implementation)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), main)
    got, pull = jax.vjp(jax.jit(functools.partial(attend, None)), main, read)
    want, pull_wide = jax.vjp(jax.jit(functools.partial(attend, "reference")), wide, read)
    close("out", got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-3, rtol=1e-4)
    alive = want[1] > LEAST_LSE
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(got[0].shape), jnp.bfloat16)
    d_out = jnp.where(jnp.isneginf(want[1])[..., None] | alive[..., None], d_out, 0)
    d_lse = jnp.where(alive, jnp.asarray(rng.standard_normal(alive.shape), jnp.float32), 0)
    least = 0.1 * float(np.linalg.norm(d_lse))
    gradients, of_arrays = pull((d_out, d_lse))
    expected, of_arrays_expected = pull_wide((d_out.astype(jnp.float32), d_lse))
    for name, gradient in gradients.items():
        if name == "bias":
            tolerance = OF_SUMS if bias_dtype == "float32" else OF_ROUNDED_SUMS
            close(name, gradient, expected[name], tolerance, least)
        else:
            close(name, gradient, expected[name])
    for name, gradient in of_arrays.items():
        rounded = gradient.dtype == jnp.bfloat16
        tolerance = OF_ROUNDED_SUMS if rounded else OF_SUMS
        close(name, gradient, of_arrays_expected[name], tolerance, least)
    for _ in range(calls - 1):
        again = jax.tree.leaves(pull((d_out, d_lse)))
        for one, other in zip(again, jax.tree.leaves((gradients, of_arrays)), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def close(name: str, got, want, tolerance: float = TOLERANCE, least: float = 1e-2) -> None:
    """The error is relative to the norm, or to ``least`` where that is more."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all(), name
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), least)
    assert error < tolerance, (name, error)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("features", OPERANDS.values(), ids=OPERANDS)
def test_operands(shape: str, features: dict) -> None:
    check(case_of(shape, **features))


@pytest.mark.parametrize("hidden", [-1e9, -1e10, float(jnp.finfo(jnp.float32).min)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 257])
def test_keys_hidden_by_a_large_number(rows: int, dtype: str, hidden: float) -> None:
    """Whole tiles, in products of which ptxas rounds the difference once."""
    case = Case(2, 257, 400, 2, 2, 128, 128)
    main = {n: x.astype(dtype) for n, x in case.arrays(jnp.float32).items()}
    seen = np.arange(400) < 130 + np.arange(rows)[:, None] % 70
    bias = jnp.asarray(np.where(seen, 0, hidden)[None, None], jnp.float32)

    def attend(implementation, main):
        return flash_attention(**main, bias=bias, implementation=implementation)

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), main)
    got, pull = jax.vjp(jax.jit(functools.partial(attend, "cute")), main)
    want, pull_wide = jax.vjp(jax.jit(functools.partial(attend, "reference")), wide)
    close("out", got, want)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(got.shape), dtype)
    ((gradients,), (expected,)) = pull(d_out), pull_wide(d_out.astype(jnp.float32))
    for name, gradient in gradients.items():
        close(name, gradient, expected[name])


KINDS = ["".join(x) for n in range(5) for x in itertools.combinations("bnts", n)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_bias(kind: str) -> None:
    check(case_of("128" if "n" in kind else "64", bias=kind))


STAGED = {
    "64": ((64, 64), {"bias": "bnts", "group": 3, **FEATURES}, "bfloat16"),
    "64_float32": ((64, 64), {"bias": "ts", "group": 4, "causal": True}, "float32"),
    "72_40": ((72, 40), {"bias": "bts", "window": (200, 30)}, "float16"),
    "128": ((128, 128), {"bias": "nts", "group": 2, "causal": True}, "bfloat16"),
    "128_float32": ((128, 128), {"bias": "bts", "group": 2, "soft_cap": 2.0}, "float32"),
    "128_documents": ((128, 128), {"bias": "ts", "group": 3, "mask": "bs"}, "float32"),
    "192_128": ((192, 128), {"bias": "nts", "group": 2}, "bfloat16"),
    "256": ((256, 256), {"bias": "bts", "group": 2, "sinks": True}, "float32"),
}


@pytest.mark.parametrize("name", STAGED)
def test_bias_in_shared_memory(name: str) -> None:
    (head_dim, head_dim_v), features, dtype = STAGED[name]
    sizes = {"batch": 3, "seqlen_q": 1111, "seqlen_k": 1456, "kv_heads": 2}
    case = Case(head_dim=head_dim, head_dim_v=head_dim_v, **sizes, **features)
    functions = {"mask_mod": MASKS["documents"](case)} if "documents" in name else {}
    arrays = case.arrays(jnp.bfloat16)
    arrays["bias"] = arrays["bias"].astype(dtype)
    assert explain(**case.static | arrays | functions).bias == "TMA, to shared memory"
    check(case, bias_dtype=dtype, **functions)


@pytest.mark.parametrize(("axes", "group"), [("ts", 2), ("nts", 3)])
def test_table_of_queries_and_keys(axes: str, group: int) -> None:
    sizes = {"batch": 2, "seqlen_q": 1111, "seqlen_k": 1456, "kv_heads": 2, "group": group}
    case = Case(head_dim=128, head_dim_v=128, causal=True, **sizes)
    shape = (case.q_heads,) * ("n" in axes) + (case.seqlen_q, case.seqlen_k)
    table = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    if axes == "ts":
        check(case, score_mod=lambda score, b, h, q, kv: score + table[q, kv])
    else:
        check(case, score_mod=lambda score, b, h, q, kv: score + table[h, q, kv])


OF_SCORES = ("alibi", "relative_bias", "t5_buckets", "key_bias", "query_temperature")


OF_128 = [(128, name) for name in (*OF_SCORES, "ts", "bts", "bns", "bnts")]
OF_256 = [(256, name) for name in ("relative_bias", "query_temperature", "bts")]


@pytest.mark.parametrize(("head_dim", "name"), OF_128 + OF_256)
def test_deterministic(head_dim: int, name: str) -> None:
    """Right, and the same bit for bit at every call, with many blocks that add to an element."""
    sizes = {"seqlen_q": 1000, "seqlen_k": 1100, "group": 3, "kv_heads": 2, **FEATURES}
    case = Case(batch=2, head_dim=head_dim, head_dim_v=head_dim, **sizes)
    if name in SCORES:
        given = {"score_mod": SCORES[name](case)}
    else:
        case, given = dataclasses.replace(case, bias=name), {}
    check(case, deterministic=True, calls=5, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORES)
def test_scores(shape: str, name: str) -> None:
    case = case_of(shape)
    check(case, score_mod=SCORES[name](case))


def multiplied(case: Case):
    return lambda score, b, h, q, kv: score * (1.0 + 0.1 * h) - 0.01 * q


WIDE = {
    "256_soft_cap": ((256, 256), {"soft_cap": 5.0, "group": 2}, None),
    "256_both": ((256, 256), {"soft_cap": 2.0, "group": 3}, multiplied),
    "192": ((192, 192), {"group": 3}, multiplied),
    "192_128": ((192, 128), {"group": 2}, multiplied),
    "64_256": ((64, 256), {"soft_cap": 2.0, "group": 3}, None),
    "256_bias": ((256, 256), {"soft_cap": 5.0, "group": 2, "bias": "bnts"}, None),
    "192_bias": ((192, 192), {"group": 3, "bias": "ts"}, SCORES["alibi"]),
    "192_128_temperature": ((192, 128), {"group": 2, "bias": "ns"}, SCORES["query_temperature"]),
    "256_relative_bias": ((256, 256), {"group": 3}, SCORES["relative_bias"]),
}


@pytest.mark.parametrize("name", WIDE)
def test_where_warpgroups_share_keys(name: str) -> None:
    """One has the scores, the other their gradients; from these it sums those of arrays."""
    (head_dim, head_dim_v), features, score = WIDE[name]
    sizes = {"seqlen_q": 513, "seqlen_k": 400, "kv_heads": 2, **FEATURES}
    case = Case(batch=2, head_dim=head_dim, head_dim_v=head_dim_v, **sizes, **features)
    check(case, score_mod=score(case) if score else None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MASKS | INTERVALS)
def test_masks(shape: str, name: str) -> None:
    case = case_of(shape)
    check(case, mask_mod=(MASKS | INTERVALS)[name](case))


@pytest.mark.parametrize("full", ["bnt", "t", "n"])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_masks(shape: str, full: str) -> None:
    case = case_of(shape)
    lengths = zip("bnt", (case.batch, case.q_heads, case.seqlen_q), strict=True)
    rows = tuple(length if axis in full else 1 for axis, length in lengths)
    words = np.random.default_rng(3).integers(0, 2**32, (*rows, -(-case.seqlen_k // 32)), np.uint32)
    check(case, packed_mask=jnp.asarray(words))


@pytest.mark.parametrize("full", ["bnts", "nts", "ts", "ns"])
@pytest.mark.parametrize("shape", ["64", "128", "256"])
def test_masks_packed_in_the_call(monkeypatch: pytest.MonkeyPatch, shape: str, full: str) -> None:
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_WORDS", 1)
    case = case_of(shape, mask=full)
    arrays = case.arrays(jnp.bfloat16)
    assert explain(**case.static, **arrays).bits[0].startswith("mask: as bits")
    check(case)


@pytest.mark.parametrize("shape", SHAPES)
def test_together(shape: str) -> None:
    case = case_of(shape, soft_cap=4.0, sinks=True)
    check(case, mask_mod=MASKS["documents"](case), score_mod=SCORES["alibi_of_numbers"](case))
