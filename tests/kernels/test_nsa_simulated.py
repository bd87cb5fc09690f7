"""The kernels of native sparse attention: in simulation against float64, and what ptxas made."""

import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.ffi.resources import find_tools, report
from jax_flashcute.kernels.nsa import KERNELS, NSAKernelKey
from tests.simulator import simulate
from tests.simulator.compiled import kernel_of as compiled

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}


def random(seed: int, dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype])


def assert_rounded(actual: np.ndarray, exact: np.ndarray, dtype: str, magnitude=1.0) -> None:
    """Within the result's rounding and float32's error of sums of this magnitude."""
    bound = ROUNDING[dtype] * np.abs(exact) + 1e-6 * magnitude
    assert (np.abs(actual.astype(np.float64) - exact) <= 1.01 * bound).all()


def slowly(cases: dict, *fast: str) -> list:
    return [
        pytest.param(*case, id=name, marks=() if name in fast else pytest.mark.slow)
        for name, case in cases.items()
    ]


# batch, length, heads, head_dim, value head_dim, entries of weights, parts of their gradient
GATES = {
    "96_64_group_of_lanes_idle": (2, 13, 3, 96, 64, 2, 4, "bfloat16"),
    "128": (1, 20, 5, 128, 128, 1, 3, "float16"),
    "8": (1, 9, 1, 8, 8, 1, 9, "bfloat16"),
    "64_256": (2, 3, 33, 64, 256, 1, 1, "bfloat16"),
    "one_row": (3, 1, 2, 192, 192, 1, 1, "bfloat16"),
}


@pytest.mark.parametrize(
    ("B", "T", "N", "H", "Hv", "W", "parts", "dtype"), slowly(GATES, "96_64_group_of_lanes_idle")
)
def test_gates(B, T, N, H, Hv, W, parts, dtype) -> None:
    query, weights = random(0, dtype, B, T, N, H), random(1, "float32", W, N, 3, H) / H**0.5
    outputs = [random(2 + i, dtype, B, T, N, Hv) for i in range(3)]
    d_out = random(5, dtype, B, T, N, Hv)
    q, w, o, do = (
        x.astype(np.float64)
        for x in (query, np.broadcast_to(weights, (B, N, 3, H)), np.stack(outputs, 3), d_out)
    )
    gates = 1 / (1 + np.exp(-np.einsum("btnh,bnch->btnc", q, w)))
    key = NSAKernelKey("nsa_gate", dtype, H, Hv, arch="sm_90a")
    out_type = ((B, T, N, Hv), DTYPES[dtype])
    (out,) = simulate(compiled(key), query, *outputs, weights, outputs=[out_type])
    assert_rounded(out, np.einsum("btnc,btnch->btnh", gates, o), dtype)

    key = NSAKernelKey("nsa_gate_backward", dtype, H, Hv, arch="sm_90a")
    shapes = [(query.shape, DTYPES[dtype]), *[out_type] * 3, ((B, parts, N, 3, H), np.float32)]
    d_query, *d_outputs, d_weights = simulate(
        compiled(key), query, *outputs, weights, d_out, outputs=shapes
    )
    e = np.einsum("btnh,btnch->btnc", do, o) * gates * (1 - gates)
    assert_rounded(d_query, np.einsum("btnc,bnch->btnh", e, w), dtype, Hv)
    for i, got in enumerate(d_outputs):
        assert_rounded(got, gates[..., i, None] * do, dtype)
    exact = np.einsum("btnc,btnh->bnch", e, q)
    assert_rounded(d_weights.sum(axis=1, dtype=np.float64), exact, "float32", Hv * T)


# batch, length, heads, head_dim, value head_dim, block, whether there are counts, dtypes
BLOCKS = {
    "uneven_counts": (2, 45, 3, 96, 136, 20, True, "bfloat16", "float32"),
    "64": (1, 150, 2, 128, 64, 64, False, "bfloat16", "bfloat16"),
    "loop": (1, 300, 1, 8, 8, 160, True, "float16", "float16"),
    "shorter_than_a_block": (2, 3, 1, 64, 64, 32, False, "bfloat16", "bfloat16"),
    "single": (1, 5, 1, 16, 8, 1, False, "bfloat16", "bfloat16"),
}


@pytest.mark.parametrize(
    ("B", "S", "K", "H", "Hv", "block", "has_counts", "dtype", "mean_dtype"),
    slowly(BLOCKS, "uneven_counts"),
)
def test_compression(B, S, K, H, Hv, block, has_counts, dtype, mean_dtype) -> None:
    blocks = -(-S // block)
    there = np.minimum(block, S - block * np.arange(blocks))
    counts = np.broadcast_to(there, (B, blocks)).astype(np.int32)
    if has_counts:
        counts = counts.copy()
        counts[0, 0], counts[-1, -1] = 3, 0
    is_counted = np.arange(S) % block < np.repeat(counts, block, axis=1)[:, :S]
    tokens = [random(i, dtype, B, S, K, dim) for i, dim in enumerate((H, Hv))]
    given = [np.where(is_counted[..., None, None], x, np.nan).astype(x.dtype) for x in tokens]
    extra = [counts] if has_counts else []
    key = NSAKernelKey("nsa_compress", dtype, H, Hv, block, mean_dtype, has_counts, "sm_90a")
    shapes = [((B, blocks, K, dim), DTYPES[mean_dtype]) for dim in (H, Hv)]
    means = simulate(compiled(key), *given, *extra, outputs=shapes)
    for x, got in zip(tokens, means, strict=True):
        padded = np.zeros((B, blocks * block, *x.shape[2:]))
        padded[:, :S] = np.where(is_counted[..., None, None], x, 0)
        sums = padded.reshape(B, blocks, block, *x.shape[2:]).sum(2)
        assert_rounded(got, sums / np.maximum(counts, 1)[..., None, None], mean_dtype)

    kernel = "nsa_compress_backward"
    key = NSAKernelKey(kernel, dtype, H, Hv, block, mean_dtype, has_counts, "sm_90a")
    d_means = [random(7 + i, mean_dtype, *shape) for i, (shape, _) in enumerate(shapes)]
    shapes = [(x.shape, x.dtype) for x in tokens]
    gradients = simulate(compiled(key), *d_means, *extra, outputs=shapes)
    for d_mean, got in zip(d_means, gradients, strict=True):
        share = d_mean.astype(np.float64) / np.maximum(counts, 1)[..., None, None]
        exact = np.repeat(share, block, axis=1)[:, :S] * is_counted[..., None, None]
        assert_rounded(got, exact, dtype)
        assert (got[~is_counted] == 0).all()


CODE = {
    f"{arch}_{name}_{H}_{block}_{'counts' * has_counts}": (arch, name, H, block, has_counts)
    for arch in ("sm_90a", "sm_100a")
    for name in KERNELS
    for H in (64, 128, 256)
    for block in ((64, 256) if "compress" in name else (0,))
    for has_counts in ((False, True) if "compress" in name else (False,))
}


@pytest.mark.parametrize(
    ("arch", "name", "head_dim", "block", "has_counts"),
    slowly(CODE, "sm_90a_nsa_gate_backward_128_0_", "sm_100a_nsa_compress_128_64_"),
)
def test_code(arch, name, head_dim, block, has_counts) -> None:
    """No spills, 16 bytes a load, and registers for at least two blocks on a multiprocessor."""
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))
    mean_dtype = "bfloat16" if block else ""
    key = NSAKernelKey(name, "bfloat16", head_dim, head_dim, block, mean_dtype, has_counts, arch)
    (found,) = report(compiled(key).cubin)
    assert (found.spill_loads, found.spill_stores) == (0, 0)
    assert (found.stack_bytes, found.local_bytes) == (0, 0)
    assert found.registers <= 128
    assert found.count("LDG.E.128") >= 2
    if name != "nsa_compress":
        assert found.count("STG.E.128") >= 1
