"""The Hopper forward kernel, whole, against a dense reference."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.kernels.config.sm90 import forward_config, staggered
from tests.simulator import SimulationError, compiled, mutation, reference, simulate
from tests.simulator.compiled import forward
from tests.simulator.simulation import record_launches

BF16 = ml_dtypes.bfloat16


def run(kernel, shape, *, seed=0, dtype=BF16, **how):
    """Simulate (B, T, N, S, K, H) with normal inputs: (inputs, out, lse)."""
    b, t, n, s, heads, h = shape
    random = np.random.default_rng(seed)
    q = random.standard_normal((b, t, n, h)).astype(dtype)
    k = random.standard_normal((b, s, heads, h)).astype(dtype)
    v = random.standard_normal((b, s, heads, h)).astype(dtype)
    outputs = [(q.shape, dtype), ((b, t, n), np.float32), ((1,), np.int32)]
    out, lse, _ = simulate(kernel, q, k, v, outputs=outputs, seed=seed, **how)
    return (q, k, v), out, lse


def check(kernel, shape, *, window=(None, None), dtype=BF16, **how):
    inputs, out, lse = run(kernel, shape, dtype=dtype, **how)
    expected, expected_lse = reference.attention(*inputs, shape[-1] ** -0.5, window)
    np.testing.assert_allclose(out.astype(np.float64), expected, atol=0.02, rtol=0.01)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"timing": "early"},
        {"timing": "shuffled", "warps": "adversarial"},
        {"timing": "shuffled", "warps": "seeded"},
        {"timing": "late", "warps": "adversarial"},
    ],
    ids=lambda how: "-".join(how.values()) or "default",
)
def test_schedules(how):
    check(forward(), (1, 128, 1, 256, 1, 128), **how)


def test_tails_and_groups_on_few_blocks():
    window = (None, 0)
    check(forward(group=2, window=window), (2, 200, 4, 300, 2, 128), window=window)


def test_rows_that_see_nothing():
    """T > S under a window: the last rows lie beyond every key."""
    window = (16, 0)
    check(forward(64, window=window), (1, 300, 1, 100, 1, 64), window=window)


@pytest.mark.parametrize(
    ("group", "length", "how"),
    [
        (1, 130, {"timing": "late", "warps": "adversarial"}),
        (4, 45, {"timing": "shuffled", "warps": "seeded"}),
    ],
    ids=["apart", "packed"],
)
def test_two_query_tiles(group, length, how):
    """Rows of no, one and more key tiles, with O stored from where queries were."""
    window = (None, None) if group == 1 else (100, 0)
    kernel = forward(
        group=group,
        pack_gqa=group > 1,
        window=window,
        optional=("query_seq_lengths", "key_value_seq_lengths"),
        config=staggered(forward_config(128, 128)),
    )
    queries, keys = np.array([[length, length, 37, 40], [0, 1, 290, 130]], np.int32)
    random = np.random.default_rng(0)
    q = random.standard_normal((4, length, group, 128)).astype(BF16)
    k, v = (random.standard_normal((4, 290, 1, 128)).astype(BF16) for _ in range(2))
    for b in range(4):
        q[b, queries[b] :] = k[b, keys[b] :] = v[b, keys[b] :] = np.nan
    outputs = [(q.shape, BF16), (q.shape[:3], np.float32), ((1,), np.int32)]
    out, lse, _ = simulate(kernel, q, k, v, queries, keys, outputs=outputs, **how)
    for b in range(4):
        t, s = queries[b], keys[b]
        assert not out[b, t:].any()
        assert np.isneginf(lse[b, t:]).all()
        if s == 0:
            assert not out[b].any()
            assert np.isneginf(lse[b]).all()
            continue
        inputs = (x[b : b + 1, :n] for x, n in ((q, t), (k, s), (v, s)))
        expected, expected_lse = reference.attention(*inputs, 128**-0.5, window)
        np.testing.assert_allclose(out[b, :t].astype(np.float64), expected[0], atol=0.02, rtol=0.01)
        np.testing.assert_allclose(lse[b, :t], expected_lse[0], atol=1e-4, rtol=1e-5)


def test_packed_heads_in_half_precision():
    kernel = forward(64, 8, pack_gqa=True, dtype="float16")
    check(kernel, (1, 17, 8, 200, 1, 64), dtype=np.float16)


def test_a_dependent_launch_must_wait_for_the_one_before():
    """Without griddepcontrol.wait the tile counter may be drawn from before it is reset.

    Only then is the kernel compiled with line information, for the finding to name the Python line.
    """

    def without_wait(kernel):
        wait = next(m for m in mutation.mutants(kernel.ptx) if "griddepcontrol.wait" in m.what)
        return dataclasses.replace(kernel, ptx=wait.apply(kernel.ptx))

    kernel = forward()
    assert ".loc" not in kernel.ptx
    broken = without_wait(kernel)
    assert broken.with_lines is None
    object.__setattr__(broken, "with_lines", lambda: without_wait(kernel.with_lines()))
    with pytest.raises(SimulationError) as raised:
        run(broken, (1, 128, 4, 128, 4, 128))
    finding, at_end = raised.value.findings
    assert {finding.kind, at_end.kind} == {"missing griddepcontrol.wait"}
    assert ".py:" in finding.where
    assert "no thread" in at_end.detail


@pytest.mark.parametrize("heads", [1, compiled.NUM_SMS, compiled.NUM_SMS + 1])
def test_the_tile_counter_is_reset_for_those_who_draw(heads):
    dims = [(1, 128, heads, 128)] * 4 + [(1, 128, heads), (1,)]
    buffers = [(256 * (i + 1) << 32, shape) for i, shape in enumerate(dims)]
    *before, main = record_launches(forward(), buffers)
    draws = heads > compiled.NUM_SMS
    assert len(before) == draws
    assert main.programmatic == draws
    assert main.grid == (min(heads, compiled.NUM_SMS), 1, 1)


def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    made = []

    def compile_kernel(build, arrays, arch, **options):
        made.append(arch)
        return CompiledKernel(b"object", arch, "ptx", b"cubin")

    monkeypatch.setattr(compiled, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "kernels")
    monkeypatch.setattr(compiled, "_folder", compiled._folder.__wrapped__)
    (tmp_path / "kernels" / "of_other_sources").mkdir(parents=True)

    def get(identity="one"):
        return compiled.compile_to_simulate(lambda: None, [], "sm_90a", identity)

    first = get()
    assert (first.object, first.ptx, first.cubin) == (b"object", "ptx", b"cubin")
    assert get() == first
    assert len(made) == 1
    get("two")
    assert len(made) == 2
    for file in (tmp_path / "kernels").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:-40])
    assert get() == first
    assert len(made) == 3
    assert not (tmp_path / "kernels" / "of_other_sources").exists()
