"""The forward kernel on a GPU, through ``flash_attention``, against float64 on the host.

The kernels of all cases are compiled by several processes first, into the store that users have.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention
from jax_flashcute.export import EXPORT_CHECKS
from jax_flashcute.ffi import store
from jax_flashcute.ffi.runtime import CALL_TARGET
from jax_flashcute.kernels import registry
from tests.cases import LONG_EDGE_LENGTHS, Case
from tests.kernels.gpu_cases import (
    BF16,
    FP16,
    UNIT_ROUNDOFF,
    compile_in_parallel,
    host_arrays,
    key_of,
)

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).resolve().parents[2]

# head_dim, value head_dim, dtype, group, and what else the call has.
VARIANTS = [
    (64, 64, BF16, 1, {}),
    (64, 64, BF16, 1, {"causal": True}),
    (64, 64, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    (64, 64, FP16, 3, {"window": (70, 9), "lengths": True}),
    (64, 64, FP16, 7, {"causal": True, "offset": True}),
    (128, 128, BF16, 1, {}),
    (128, 128, BF16, 1, {"causal": True, "lengths": True}),
    (128, 128, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    (128, 128, FP16, 3, {"lengths": True}),
    (128, 128, BF16, 7, {"causal": True, "offset": True, "window": (200, None)}),
    (128, 128, FP16, 8, {"window": (0, 0), "offset": True}),
    (8, 8, BF16, 1, {"causal": True}),
    (8, 8, FP16, 7, {"lengths": True}),
    (72, 40, BF16, 3, {"causal": True, "lengths": True}),
    (72, 40, FP16, 1, {"window": (None, 30), "offset": True}),
    (96, 96, BF16, 8, {"causal": True}),
    (96, 96, FP16, 1, {"lengths": True}),
    (192, 128, BF16, 1, {"causal": True}),
    (192, 128, BF16, 8, {"causal": True, "offset": True, "lengths": True}),
    (192, 128, FP16, 3, {}),
    (256, 256, BF16, 1, {"causal": True, "offset": True}),
    (256, 256, BF16, 7, {"lengths": True}),
    (256, 256, FP16, 3, {"window": (500, 100)}),
    (64, 256, BF16, 1, {"window": (None, 0), "lengths": True}),
    (256, 128, BF16, 3, {"causal": True}),
]


def make_cases() -> list[list[Case]]:
    """For each variant its calls; every pair of edge lengths is met by four variants."""
    pairs = list(itertools.product(LONG_EDGE_LENGTHS, LONG_EDGE_LENGTHS))
    cases: list[list[Case]] = [[] for _ in VARIANTS]
    for i in range(4 * len(pairs)):
        seqlen_q, seqlen_k = pairs[i % len(pairs)]
        v = (7 * i + i // len(pairs)) % len(VARIANTS)
        head_dim, head_dim_v, _, group, features = VARIANTS[v]
        cases[v].append(
            Case(
                batch=1 if seqlen_q * seqlen_k > 2**20 and not features.get("lengths") else 2,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                kv_heads=2 if group == 1 else 1,
                group=group,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                **features,
            )
        )
    return cases


CASES = make_cases()


def test_there_are_enough_cases() -> None:
    assert sum(map(len, CASES)) >= 300


@dataclasses.dataclass(frozen=True)
class Exact:
    """A float64 result and ``spread``, the same average of the values' magnitudes."""

    out: np.ndarray
    lse: np.ndarray
    spread: np.ndarray


def exact_attention(case: Case, arrays: dict[str, np.ndarray]) -> Exact:
    """Attention in float64, a head of a batch entry at a time, several at once."""
    B, T, N, _ = arrays["query"].shape
    S = arrays["key"].shape[1]
    offset = arrays.get("q_offset", np.zeros(B, np.int32))
    q_lengths = arrays.get("query_seq_lengths", np.full(B, T))
    kv_lengths = arrays.get("key_value_seq_lengths", np.full(B, S))
    left, right = case.window or (None, None)
    out = np.zeros((B, T, N, case.head_dim_v))
    spread = np.zeros_like(out)
    lse = np.full((B, T, N), -np.inf)

    def attend(b: int, n: int) -> None:
        keys = int(kv_lengths[b])
        key, value = (
            arrays[name][b, :keys, n // case.group].astype(np.float64) for name in ("key", "value")
        )
        kv = np.arange(keys)[None, :]
        for first in range(0, int(q_lengths[b]), 1024):
            rows = slice(first, min(first + 1024, int(q_lengths[b])))
            position = np.arange(rows.start, rows.stop)[:, None] + int(offset[b])
            query = arrays["query"][b, rows, n].astype(np.float64)
            score = query @ key.T / math.sqrt(case.head_dim)
            if case.causal:
                score[kv > position] = -np.inf
            if left is not None:
                score[kv < position - left] = -np.inf
            if right is not None:
                score[kv > position + right] = -np.inf
            row_max = np.max(score, axis=1, keepdims=True, initial=-np.inf)
            row_max[row_max == -np.inf] = 0
            weight = np.exp(score - row_max, out=score)
            total = weight.sum(axis=1, keepdims=True)
            with np.errstate(divide="ignore"):
                lse[b, rows, n] = (row_max + np.log(total))[:, 0]
            weight /= np.where(total == 0, 1, total)
            out[b, rows, n] = weight @ value
            spread[b, rows, n] = weight @ np.abs(value)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(attend, *zip(*itertools.product(range(B), range(N)), strict=True)))
    return Exact(out, lse, spread)


def what_is_wrong(case: Case, dtype: str, exact: Exact, out, lse) -> list[str]:
    """What is further from float64 than rounding P and O to ``dtype`` explains."""
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    problems = []
    if (out.shape, lse.shape) != (exact.out.shape, exact.lse.shape):
        return [f"shapes {out.shape} and {lse.shape}"]
    # Each weight is rounded once, relative to itself, and so is the result; sums are in float32.
    unit = UNIT_ROUNDOFF[dtype]
    bound = 1.01 * unit * (exact.spread + np.abs(exact.out)) + 1e-4 * exact.spread
    if dtype == FP16:
        # Weights below 2^-14, the largest being at least 1, keep an absolute precision only.
        bound = bound + 2.0**-25 * (1 + case.seqlen_k * 5.0)
    empty = np.isneginf(exact.lse)
    bound = np.where(empty[..., None], 0, bound)
    excess = np.abs(out - exact.out) - bound
    excess[np.isnan(excess)] = np.inf
    if excess.size and excess.max() > 0:
        where = np.unravel_index(np.argmax(excess), excess.shape)
        problems.append(
            f"out at {tuple(map(int, where))}: {out[where]}, expected {exact.out[where]} "
            f"within {bound[where]:.3g}; {np.count_nonzero(excess > 0)} of {out.size} are wrong"
        )
    with np.errstate(invalid="ignore"):
        close = np.abs(lse - exact.lse) <= 5e-5 + 1e-5 * np.abs(exact.lse)
    wrong = ~np.where(empty, np.isneginf(lse), close)
    if wrong.any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        problems.append(
            f"lse at {where}: {lse[where]}, expected {exact.lse[where]}; "
            f"{np.count_nonzero(wrong)} of {lse.size} are wrong"
        )
    return problems


def run(case: Case, arrays: dict, implementation: str | None = "cute"):
    """(out, lse) of ``flash_attention`` in ``jax.jit``."""
    attend = functools.partial(
        flash_attention, **case.static, implementation=implementation, return_residual=True
    )
    return jax.jit(attend)(**arrays)


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_in_parallel(
        key_of(case, variant[2])
        for variant, cases in zip(VARIANTS, CASES, strict=True)
        # Packing is all that depends on a length.
        for case in {c.seqlen_q: c for c in cases}.values()
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("v", range(len(VARIANTS)), ids=lambda v: "-".join(map(str, VARIANTS[v])))
def test_against_float64(v: int) -> None:
    dtype = VARIANTS[v][2]
    failures = []
    for seed, case in enumerate(CASES[v]):
        arrays = host_arrays(case, dtype, seed)
        out, lse = run(case, arrays)
        assert out.dtype == dtype
        assert lse.dtype == jnp.float32
        for problem in what_is_wrong(case, dtype, exact_attention(case, arrays), out, lse):
            failures.append(f"{case} {dtype} seed {seed}: {problem}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


# Even lengths, the same heads in query and key where cuDNN asks for them.
CUDNN_CASES = [
    (BF16, Case(seqlen_q=1024, seqlen_k=1024, head_dim=128, head_dim_v=128, group=4)),
    (BF16, Case(seqlen_q=1000, seqlen_k=1000, head_dim=128, head_dim_v=128, causal=True)),
    (FP16, Case(seqlen_q=512, seqlen_k=2048, head_dim=128, head_dim_v=128)),
    (BF16, Case(seqlen_q=2048, seqlen_k=2048, head_dim=64, head_dim_v=64, causal=True, group=2)),
    (FP16, Case(seqlen_q=128, seqlen_k=128, head_dim=64, head_dim_v=64, causal=True)),
    (BF16, Case(seqlen_q=256, seqlen_k=4096, head_dim=96, head_dim_v=96)),
    (BF16, Case(seqlen_q=1024, seqlen_k=1024, head_dim=256, head_dim_v=256, causal=True)),
    (BF16, Case(seqlen_q=64, seqlen_k=64, head_dim=128, head_dim_v=128)),
]


def test_no_less_accurate_than_cudnn() -> None:
    compared, failures = 0, []
    for dtype, case in CUDNN_CASES:
        arrays = host_arrays(case, dtype)
        cudnn = functools.partial(
            jax.nn.dot_product_attention, is_causal=case.causal, implementation="cudnn"
        )
        try:
            theirs = jax.jit(cudnn)(arrays["query"], arrays["key"], arrays["value"])
            theirs.block_until_ready()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            print(f"cuDNN does not take {case} {dtype}: {error}")
            continue
        compared += 1
        exact = exact_attention(case, arrays).out
        ours = np.asarray(run(case, arrays)[0], np.float64) - exact
        theirs = np.asarray(theirs, np.float64) - exact
        unit = UNIT_ROUNDOFF[dtype]
        for name, norm, constant in (
            ("largest", lambda x: np.abs(x).max(), unit / 4),
            ("rms", lambda x: np.sqrt(np.mean(x**2)), unit / 100),
        ):
            if not norm(ours) <= 1.1 * norm(theirs) + constant:
                failures.append(f"{case} {dtype}: {name} {norm(ours)}, cuDNN {norm(theirs)}")
    assert not failures, "\n".join(failures)
    assert compared >= 4


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, seqlen_q=2049, seqlen_k=3000, group=4, causal=True, offset=True),
        Case(batch=2, seqlen_q=33, seqlen_k=5000, kv_heads=4, group=8, lengths=True),
    ],
    ids=["causal", "packed"],
)
def test_repeats_bit_for_bit(case: Case) -> None:
    case = dataclasses.replace(case, head_dim=128, head_dim_v=128)
    arrays = jax.device_put(host_arrays(case, BF16))
    attend = jax.jit(
        functools.partial(
            flash_attention, **case.static, implementation="cute", return_residual=True
        )
    )

    @jax.jit
    def differing(one, other):
        bits = [
            jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
            for x in (*one, *other)
        ]
        return sum(jnp.sum(a != b) for a, b in zip(bits[:2], bits[2:], strict=True))

    first = attend(**arrays)
    counts = [differing(first, attend(**arrays)) for _ in range(100)]
    assert [int(count) for count in counts] == [0] * 100


@pytest.mark.parametrize("group", [3, 8])
def test_packed_against_unpacked(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []
    for seqlen_q in (1, 17, 100, 260):
        case = Case(
            batch=3,
            seqlen_q=seqlen_q,
            seqlen_k=333,
            kv_heads=2,
            group=group,
            head_dim=128,
            head_dim_v=128,
            causal=True,
            offset=True,
            lengths=True,
        )
        arrays = host_arrays(case, BF16)
        exact = exact_attention(case, arrays)
        results = []
        for packs in (True, False):
            monkeypatch.setattr(registry, "packing_pays", lambda *_, packs=packs: packs)
            assert key_of(case, BF16).pack_gqa == packs
            results.append(run(case, arrays))
            for problem in what_is_wrong(case, BF16, exact, *results[-1]):
                failures.append(f"{case} packed={packs}: {problem}")
        with np.errstate(invalid="ignore"):
            apart = np.abs(np.asarray(results[0][1]) - np.asarray(results[1][1]))
        if np.nanmax(apart, initial=0) > 1e-5:
            failures.append(f"{case}: the LSEs are {np.nanmax(apart)} apart")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("group", [1, 2])
def test_new_shapes_compile_nothing(group: int) -> None:
    """After the first; where heads may share tiles, after one call that does and one that does not.

    Packing is what a plan takes from a length, and whether there are few queries.
    """
    rng = np.random.default_rng(group)
    case = Case(causal=True, lengths=True, head_dim=128, head_dim_v=128, group=group)
    shapes = [(2, 40, 200), (2, 1280, 200)][-group:]
    lengths = zip(*(rng.integers(least, 1500, 50) for least in (65, 1)), strict=True)
    shapes += [(int(rng.integers(1, 5)), int(T), int(S)) for T, S in lengths]
    assert len(set(shapes)) == len(shapes)
    counts, packed = [], set()
    for B, T, S in shapes:
        case = dataclasses.replace(case, batch=B, seqlen_q=T, seqlen_k=S)
        packed.add(key_of(case, BF16).pack_gqa)
        arrays = host_arrays(case, BF16)
        out, lse = run(case, arrays)
        if len(counts) % 10 == 0:
            wrong = what_is_wrong(case, BF16, exact_attention(case, arrays), out, lse)
            assert not wrong, f"{case}: {wrong}"
        counts.append(store.compiles())
    assert len(packed) == group
    assert counts[group:] == [counts[group - 1]] * 50


TRANSFORMED = Case(
    batch=2, seqlen_q=150, seqlen_k=200, group=2, head_dim=64, head_dim_v=64, causal=True
)


def test_default_implementation_takes_the_kernel_eagerly_and_in_jit() -> None:
    arrays = host_arrays(TRANSFORMED, BF16)
    attend = functools.partial(flash_attention, **TRANSFORMED.static)
    assert CALL_TARGET in jax.jit(attend).lower(**arrays).as_text()
    by_kernel = run(TRANSFORMED, arrays)[0]
    np.testing.assert_array_equal(jax.jit(attend)(**arrays), by_kernel)
    np.testing.assert_array_equal(attend(**arrays), by_kernel)
    by_name = functools.partial(attend, implementation="cute")
    np.testing.assert_array_equal(by_name(**arrays), by_kernel)


def test_vmap() -> None:
    """Over every operand, over some, and twice."""
    arrays = host_arrays(dataclasses.replace(TRANSFORMED, batch=6), BF16)
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    attend = functools.partial(flash_attention, is_causal=True, implementation="cute")
    flat = np.asarray(attend(query, key, value))
    stacked = [x.reshape(3, 2, *x.shape[1:]) for x in (query, key, value)]
    np.testing.assert_array_equal(jax.vmap(attend)(*stacked).reshape(flat.shape), flat)
    twice = jax.jit(jax.vmap(jax.vmap(attend)))(*stacked)
    np.testing.assert_array_equal(twice.reshape(flat.shape), flat)
    over_queries = jax.vmap(attend, in_axes=(0, None, None))(stacked[0], key[:2], value[:2])
    for i in range(3):
        alone = attend(stacked[0][i], key[:2], value[:2])
        np.testing.assert_array_equal(over_queries[i], alone)


def test_grad() -> None:
    """Gradients by the kernels, and by the XLA path throughout."""
    arrays = host_arrays(TRANSFORMED, BF16)

    def gradients(dtype, implementation):
        def loss(query, key, value):
            out = flash_attention(
                query, key, value, **TRANSFORMED.static, implementation=implementation
            )
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        operands = [jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value")]
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands)

    expected = gradients(jnp.float32, "reference")
    for implementation in (None, "cute", "xla"):
        for name, got, want in zip("qkv", gradients(BF16, implementation), expected, strict=True):
            got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert error < 0.01, f"d{name} by {implementation}: {error}"


CALL_EXPORTED = """
import sys
import jax, numpy as np
from jax_flashcute.export import register_call_target
register_call_target()
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/program", "rb").read()))
for name in "012":
    arrays = {
        n: x.astype("bfloat16") if x.ndim == 4 else x
        for n, x in np.load(f"{folder}/in{name}.npz").items()
    }
    out, lse = program.call(**arrays)
    np.savez(f"{folder}/out{name}.npz", out=np.asarray(out, np.float32), lse=lse)
assert "cutlass" not in sys.modules
"""


def test_an_exported_program_runs(tmp_path: Path) -> None:
    """With symbolic batch and lengths, in a process without the compiler."""
    case = Case(causal=True, lengths=True, group=2, head_dim=64, head_dim_v=64)
    attend = functools.partial(
        flash_attention, **case.static, implementation="cute", return_residual=True
    )
    B, T, S = jax.export.symbolic_shape("b, t, s")
    N, K, H = case.q_heads, case.kv_heads, case.head_dim
    shapes = {
        "query": jax.ShapeDtypeStruct((B, T, N, H), BF16),
        "key": jax.ShapeDtypeStruct((B, S, K, H), BF16),
        "value": jax.ShapeDtypeStruct((B, S, K, H), BF16),
        "query_seq_lengths": jax.ShapeDtypeStruct((B,), jnp.int32),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    export = jax.export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=EXPORT_CHECKS)
    (tmp_path / "program").write_bytes(export(**shapes).serialize())
    calls = []
    for i, (batch, seqlen_q, seqlen_k) in enumerate(((2, 129, 150), (1, 1000, 65), (3, 1, 2))):
        case = dataclasses.replace(case, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        arrays = host_arrays(case, BF16)
        calls.append((case, arrays))
        wide = {n: x.astype(np.float32) if x.ndim == 4 else x for n, x in arrays.items()}
        np.savez(tmp_path / f"in{i}.npz", **wide)
    done = subprocess.run(
        [sys.executable, "-c", CALL_EXPORTED, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for i, (case, arrays) in enumerate(calls):
        results = np.load(tmp_path / f"out{i}.npz")
        exact = exact_attention(case, arrays)
        wrong = what_is_wrong(case, BF16, exact, results["out"], results["lse"])
        assert not wrong, f"{case}: {wrong}"
