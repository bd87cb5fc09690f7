"""The backward kernel on a GPU, through ``flash_attention``, against float64 on the host.

The kernels of all cases are compiled by several processes first, into the store that users have.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashcute import flash_attention
from jax_flashcute.ffi.runtime import CALL_TARGET
from tests.cases import EDGE_LENGTHS, Case
from tests.kernels.gpu_cases import (
    BF16,
    FP16,
    UNIT_ROUNDOFF,
    compile_in_parallel,
    host_arrays,
    key_of,
)

pytestmark = pytest.mark.gpu

IMPLEMENTATION = "cute"
DTYPES = {BF16: ml_dtypes.bfloat16, FP16: np.float16}
OPERANDS = ("query", "key", "value")


class Variant(NamedTuple):
    """What decides which kernels serve a call, and with ``features`` what else it has."""

    head_dim: int
    head_dim_v: int
    dtype: str
    group: int
    features: dict
    deterministic: bool = False


CAUSAL_64 = Variant(64, 64, BF16, 1, {"causal": True})
FULL_128 = Variant(128, 128, BF16, 1, {})
DETERMINISTIC = Variant(128, 128, BF16, 7, {"causal": True, "offset": True}, deterministic=True)
VARIANTS = [
    CAUSAL_64,
    Variant(64, 64, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    Variant(64, 64, FP16, 3, {"window": (70, 9), "lengths": True}),
    Variant(8, 8, BF16, 7, {"causal": True, "lengths": True}),
    Variant(72, 40, FP16, 1, {"window": (None, 30), "offset": True}),
    Variant(72, 40, BF16, 3, {"lengths": True}),
    Variant(96, 96, BF16, 8, {"causal": True}),
    FULL_128,
    Variant(128, 128, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    Variant(128, 128, FP16, 3, {"causal": True, "window": (200, None)}),
    DETERMINISTIC,
    Variant(192, 128, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    Variant(256, 256, BF16, 1, {"causal": True}),
    Variant(256, 256, FP16, 3, {"window": (500, 100), "lengths": True}),
    Variant(64, 256, BF16, 1, {"window": (None, 0), "lengths": True}),
]


def case_of(variant: Variant, seqlen_q: int, seqlen_k: int, **sizes) -> Case:
    sizes = {"batch": 2, "kv_heads": 2 if variant.group == 1 else 1} | sizes
    return Case(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        group=variant.group,
        head_dim=variant.head_dim,
        head_dim_v=variant.head_dim_v,
        **variant.features,
        **sizes,
    )


def make_cases() -> list[list[Case]]:
    """For each variant its calls; every pair of edge lengths is met by four variants."""
    lengths = (*EDGE_LENGTHS, 1000)
    pairs = list(itertools.product(lengths, lengths))
    cases: list[list[Case]] = [[] for _ in VARIANTS]
    for i in range(4 * len(pairs)):
        v = (7 * i + i // len(pairs)) % len(VARIANTS)
        cases[v].append(case_of(VARIANTS[v], *pairs[i % len(pairs)]))
    for variant, seqlen_q, seqlen_k in (
        (CAUSAL_64, 4097, 4097),
        (FULL_128, 129, 4097),
        (DETERMINISTIC, 4097, 65),
        (VARIANTS[-2], 65, 4097),
    ):
        long = case_of(variant, seqlen_q, seqlen_k, batch=1, kv_heads=1)
        cases[VARIANTS.index(variant)].append(long)
    return cases


CASES = make_cases()


def test_there_are_enough_cases() -> None:
    assert sum(map(len, CASES)) >= 300


def cotangents_of(case: Case, dtype: str, seed: int, lengths) -> tuple[np.ndarray, np.ndarray]:
    """dO and dLSE, NaN beyond the query lengths; every other dLSE is 0."""
    rng = np.random.default_rng(1000 + seed)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    d_out = rng.standard_normal((*rows, case.head_dim_v)).astype(np.float32)
    d_lse = rng.standard_normal(rows).astype(np.float32) * (seed % 2)
    if lengths is not None:
        beyond = np.arange(case.seqlen_q)[None] >= lengths[:, None]
        d_out[beyond] = np.nan
        d_lse[beyond] = np.nan
    return d_out.astype(DTYPES[dtype]), d_lse


@dataclasses.dataclass(frozen=True)
class Exact:
    """Float64 gradients by operand, and how far rounding may take a result from each."""

    gradients: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]


def exact_gradients(case: Case, dtype: str, arrays: dict, d_out, d_lse) -> Exact:
    """Gradients in float64, and bounds of the error from the roundings that a kernel makes.

    A kernel rounds to ``dtype``: P and O in the forward pass, P and dS here, and the results.  Each
    is off by at most a unit roundoff u of its size, so with a variance of at most u^2/3 of its
    square, independently of the others; the variances add up through the products, and a bound is
    six standard deviations.  O's error enters through rowsum(dO * O), which a row's dS share.
    """
    B, T, N, H = arrays["query"].shape
    S = arrays["key"].shape[1]
    offset = arrays.get("q_offset", np.zeros(B, np.int32))
    q_lengths = arrays.get("query_seq_lengths", np.full(B, T))
    kv_lengths = arrays.get("key_value_seq_lengths", np.full(B, S))
    left, right = case.window or (None, None)
    scale = 1 / math.sqrt(H)
    # What float32 adds is small beside the unit roundoff of the 16-bit types.
    unit = UNIT_ROUNDOFF[dtype] + 2e-5
    # Below 2^-14 numbers of float16 keep an absolute precision only.
    smallest = 2.0**-25 if dtype == FP16 else 0.0

    def variance(x: np.ndarray) -> np.ndarray:
        return np.maximum(unit * np.abs(x), smallest) ** 2 / 3

    gradients = {name: np.zeros(arrays[name].shape) for name in OPERANDS}
    variances = {name: np.zeros(arrays[name].shape) for name in OPERANDS}
    seen = {name: np.zeros(arrays[name].shape[:3], bool) for name in OPERANDS}
    for b, n in itertools.product(range(B), range(N)):
        keys, k = slice(int(kv_lengths[b])), n // case.group
        key, value = (arrays[name][b, keys, k].astype(np.float64) for name in ("key", "value"))
        kv = np.arange(len(key))[None, :]
        for first in range(0, int(q_lengths[b]), 1024):
            rows = slice(first, min(first + 1024, int(q_lengths[b])))
            position = np.arange(rows.start, rows.stop)[:, None] + int(offset[b])
            query = arrays["query"][b, rows, n].astype(np.float64)
            dO = d_out[b, rows, n].astype(np.float64)
            visible = np.ones((len(query), len(key)), bool)
            if case.causal:
                visible &= kv <= position
            if left is not None:
                visible &= kv >= position - left
            if right is not None:
                visible &= kv <= position + right
            score = np.where(visible, query @ key.T * scale, -np.inf)
            row_max = np.max(score, axis=1, keepdims=True, initial=-np.inf)
            P = np.exp(score - np.where(np.isneginf(row_max), 0, row_max))
            total = P.sum(axis=1, keepdims=True)
            P /= np.where(total == 0, 1, total)
            out, dP = P @ value, dO @ value.T
            dP_sum = np.sum(dO * out, axis=1, keepdims=True) - d_lse[b, rows, n, None]
            dS = P * (dP - dP_sum)
            gradients["query"][b, rows, n] = scale * (dS @ key)
            gradients["key"][b, keys, k] += scale * (dS.T @ query)
            gradients["value"][b, keys, k] += P.T @ dO

            P_variance = np.where(visible, variance(P), 0)
            dS_variance = np.where(visible, variance(dS), 0)
            O_variance = P_variance @ value**2 + variance(out)
            sum_variance = np.sum(dO**2 * O_variance, axis=1, keepdims=True)
            variances["query"][b, rows, n] = scale**2 * (
                dS_variance @ key**2 + sum_variance * (P @ key) ** 2
            )
            variances["key"][b, keys, k] += scale**2 * (
                (dS_variance + P**2 * sum_variance).T @ query**2
            )
            variances["value"][b, keys, k] += P_variance.T @ dO**2
            seen["query"][b, rows, n] = visible.any(axis=1)
            for name in ("key", "value"):
                seen[name][b, keys, k] |= visible.any(axis=0)
    bounds = {
        name: 6 * np.sqrt(variances[name] + variance(gradients[name])) * seen[name][..., None]
        for name in OPERANDS
    }
    return Exact(gradients, bounds)


def what_is_wrong(exact: Exact, found) -> list[str]:
    """Which gradients are further from float64 than their bounds; a bound of 0 means exactly 0."""
    problems = []
    for name, got in zip(OPERANDS, found, strict=True):
        got, want, bound = np.asarray(got, np.float64), exact.gradients[name], exact.bounds[name]
        if got.shape != want.shape:
            problems.append(f"d{name}: shape {got.shape}, expected {want.shape}")
            continue
        excess = np.abs(got - want) - bound
        excess[np.isnan(excess)] = np.inf
        if excess.max() > 0:
            where = tuple(map(int, np.unravel_index(np.argmax(excess), excess.shape)))
            problems.append(
                f"d{name} at {where}: {got[where]}, expected {want[where]} within "
                f"{bound[where]:.3g}; {np.count_nonzero(excess > 0)} of {got.size} are wrong"
            )
    return problems


def attention_of(case: Case, *, deterministic: bool = False, **how):
    """(query, key, value, other arrays) -> (out, lse)."""
    attend = functools.partial(
        flash_attention,
        **case.static,
        implementation=IMPLEMENTATION,
        deterministic=deterministic,
        return_residual=True,
        **how,
    )
    return lambda query, key, value, others: attend(query, key, value, **others)


def gradients_of(attend):
    """(query, key, value, other arrays, cotangents) -> the three gradients, in ``jax.jit``."""

    @jax.jit
    def gradients(query, key, value, others, cotangents):
        _, vjp = jax.vjp(lambda *main: attend(*main, others), query, key, value)
        return vjp(cotangents)

    return gradients


def split(arrays: dict) -> tuple[list, dict]:
    """Query, key and value; the other arrays by name."""
    return [arrays[n] for n in OPERANDS], {n: x for n, x in arrays.items() if n not in OPERANDS}


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_in_parallel(
        key_of(case, variant.dtype, direction, deterministic=variant.deterministic)
        for variant, cases in zip(VARIANTS, CASES, strict=True)
        # Whether heads share a tile is all that depends on a length, in the forward pass.
        for case in {c.seqlen_q: c for c in cases}.values()
        for direction in ("fwd", "bwd")
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("v", range(len(VARIANTS)), ids=lambda v: "-".join(map(str, VARIANTS[v])))
def test_against_float64(v: int) -> None:
    variant, failures = VARIANTS[v], []
    for seed, case in enumerate(CASES[v]):
        arrays = host_arrays(case, variant.dtype, seed)
        cotangents = cotangents_of(case, variant.dtype, seed, arrays.get("query_seq_lengths"))
        main, others = split(arrays)
        attend = attention_of(case, deterministic=variant.deterministic)
        found = gradients_of(attend)(*main, others, cotangents)
        assert {str(x.dtype) for x in found} == {variant.dtype}
        exact = exact_gradients(case, variant.dtype, arrays, *cotangents)
        for problem in what_is_wrong(exact, found):
            failures.append(f"{case} seed {seed}: {problem}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


@pytest.mark.usefixtures("compiled")
def test_no_less_accurate_than_cudnn() -> None:
    compared, failures = 0, []
    for variant, seqlen_q, seqlen_k in (
        (CAUSAL_64, 1024, 1024),
        (CAUSAL_64, 1000, 1000),
        (FULL_128, 1024, 1024),
        (FULL_128, 256, 2048),
    ):
        case = case_of(variant, seqlen_q, seqlen_k)
        main, _ = split(host_arrays(case, variant.dtype))
        d_out, d_lse = cotangents_of(case, variant.dtype, 0, None)

        def by_cudnn(query, key, value, others, case=case):
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=case.causal, implementation="cudnn"
            )

        try:
            theirs = jax.block_until_ready(gradients_of(by_cudnn)(*main, {}, d_out))
        except (NotImplementedError, ValueError, RuntimeError) as error:
            print(f"cuDNN does not take {case}: {error}")
            continue
        compared += 1
        ours = gradients_of(attention_of(case))(*main, {}, (d_out, d_lse))
        arrays = dict(zip(OPERANDS, main, strict=True))
        exact = exact_gradients(case, variant.dtype, arrays, d_out, d_lse).gradients
        unit = UNIT_ROUNDOFF[variant.dtype]
        for name, our, their in zip(OPERANDS, ours, theirs, strict=True):
            want = exact[name]
            for label, norm, constant in (
                ("largest", lambda x: np.abs(x).max(), unit / 4),
                ("rms", lambda x: np.sqrt(np.mean(x**2)), unit / 50),
            ):
                our_error, their_error = (
                    norm(np.asarray(x, np.float64) - want) for x in (our, their)
                )
                if not our_error <= 1.1 * their_error + constant * norm(want):
                    failures.append(f"{case} d{name}: {label} {our_error}, cuDNN {their_error}")
    assert not failures, "\n".join(failures)
    assert compared >= 3


@pytest.mark.usefixtures("compiled")
def test_deterministic_gradients_repeat_bit_for_bit() -> None:
    case = case_of(DETERMINISTIC, 2049, 1500, batch=3, kv_heads=2)
    main, others = split(host_arrays(case, BF16))
    cotangents = cotangents_of(case, BF16, 1, None)
    arguments = jax.device_put((*main, others, cotangents))
    gradients = gradients_of(attention_of(case, deterministic=True))

    @jax.jit
    def differing(one, other):
        return sum(
            jnp.sum(
                jax.lax.bitcast_convert_type(a, jnp.uint16)
                != jax.lax.bitcast_convert_type(b, jnp.uint16)
            )
            for a, b in zip(one, other, strict=True)
        )

    first = gradients(*arguments)
    counts = jnp.stack([differing(first, gradients(*arguments)) for _ in range(1000)])
    assert not np.asarray(counts).any()
    assert all(np.asarray(x, np.float32).any() for x in first)


def test_keys_and_values_of_2_to_the_31_elements() -> None:
    """dQ of all, dK and dV of keys at both ends and around 2^30 elements, in float32 by chunks."""
    T, N, H, chunk = 100, 8, 128, 4096
    S = 2**31 // (N * H) + 2 * chunk
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((1, T, N, H), (1, S, N, H), (1, S, N, H), (1, T, N, H))
    query, key, value, d_out = (
        jax.jit(jax.random.normal, static_argnums=(1, 2))(k, shape, jnp.bfloat16)
        for k, shape in zip(keys, shapes, strict=True)
    )
    query, scale = query * 4, H**-0.5  # so that some keys stand out among two million

    @jax.jit
    def ours(query, key, value, d_out):
        def attend(*main):
            return flash_attention(*main, return_residual=True, implementation=IMPLEMENTATION)

        (out, lse), vjp = jax.vjp(attend, query, key, value)
        return out, lse, vjp((d_out, jnp.zeros_like(lse)))

    @jax.jit
    def of_chunk(first, query, key, value, d_out, out, lse):
        """What a chunk of keys gives: its part of dQ, its dK and dV, and how much of each row."""
        wide = [jax.lax.dynamic_slice_in_dim(x, first, chunk, 1)[0] for x in (key, value)]
        k, v, q, d, o = (x.astype(jnp.float32) for x in (*wide, query[0], d_out[0], out[0]))
        with jax.default_matmul_precision("highest"):
            P = jnp.exp(scale * jnp.einsum("tnh,snh->nts", q, k) - lse[0].T[..., None])
            dP = jnp.einsum("tnh,snh->nts", d, v) - jnp.sum(d * o, -1).T[..., None]
            dS = scale * P * dP
            dq, dk = jnp.einsum("nts,snh->tnh", dS, k), jnp.einsum("nts,tnh->snh", dS, q)
            return dq, dk, jnp.einsum("nts,tnh->snh", P, d), P.sum(-1)

    out, lse, (dq, dk, dv) = ours(query, key, value, d_out)
    want_dq, total = np.zeros((T, N, H)), np.zeros((N, T))
    for first in range(0, S, chunk):
        part, want_dk, want_dv, seen = of_chunk(first, query, key, value, d_out, out, lse)
        want_dq += np.asarray(part)
        total += np.asarray(seen)
        if first in (0, S // 2 // chunk * chunk, S - 2 * chunk, S - chunk):
            for got, want in ((dk, want_dk), (dv, want_dv)):
                got = np.asarray(got[0, first : first + chunk], np.float32)
                assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
    np.testing.assert_allclose(total, 1, atol=1e-3)
    assert np.linalg.norm(np.asarray(dq[0], np.float32) - want_dq) <= 0.01 * np.linalg.norm(want_dq)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "vmap of vmap of grad"])
def test_vmap(order: str) -> None:
    case = case_of(CAUSAL_64, 150, 200, batch=8)
    arrays = host_arrays(case, BF16)
    cotangents = cotangents_of(case, BF16, 1, None)
    exact = exact_gradients(case, BF16, arrays, *cotangents)
    attend = attention_of(case)

    def loss(main, cotangents):
        out, lse = attend(*main, {})
        d_out, d_lse = cotangents
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(lse * d_lse)

    if order == "grad of vmap":
        outer, transformed = (4, 2), jax.grad(lambda *args: jnp.sum(jax.vmap(loss)(*args)))
    elif order == "vmap of grad":
        outer, transformed = (4, 2), jax.vmap(jax.grad(loss))
    else:
        outer, transformed = (2, 2, 2), jax.vmap(jax.vmap(jax.grad(loss)))
    stacked = jax.tree.map(
        lambda x: x.reshape(*outer, *x.shape[1:]), (split(arrays)[0], cotangents)
    )
    found = jax.jit(transformed)(*stacked)
    problems = what_is_wrong(exact, [x.reshape(8, *x.shape[-3:]) for x in found])
    assert not problems, "\n".join(problems)


def kernel_calls(program: str) -> int:
    """Calls of kernels that the text of a lowered program makes, its functions being called."""
    parts = re.split(r"func\.func \w+ @(\w+)", program)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))

    def count(function: str) -> int:
        body = bodies[function]
        called = re.findall(r"(?<!_)call @(\w+)\(", body)
        return body.count(f"custom_call @{CALL_TARGET}(") + sum(map(count, called))

    return count("main")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (jax.checkpoint_policies.nothing_saveable, 3),
        (
            jax.checkpoint_policies.save_only_these_names(
                "flash_attention_out", "flash_attention_lse"
            ),
            2,
        ),
    ],
    ids=["nothing saved", "out and lse saved"],
)
def test_checkpoint_policies(policy, calls: int) -> None:
    """The gradients are right, and the forward kernel runs again only where nothing is saved."""
    case = case_of(CAUSAL_64, 150, 200)
    arrays = host_arrays(case, BF16)
    main, _ = split(arrays)
    cotangents = cotangents_of(case, BF16, 1, None)
    exact = exact_gradients(case, BF16, arrays, *cotangents)
    attend = attention_of(case)

    @jax.jit
    def step(main, cotangents):
        attend_again = jax.checkpoint(lambda *main: attend(*main, {}), policy=policy)
        # What the forward pass gives is used, so that it cannot be left to the backward pass.
        results, vjp = jax.vjp(attend_again, *main)
        return results, vjp(cotangents)

    lowered = step.trace(main, cotangents).lower(lowering_platforms=("cuda",))
    assert kernel_calls(lowered.as_text()) == calls
    problems = what_is_wrong(exact, step(main, cotangents)[1])
    assert not problems, "\n".join(problems)
