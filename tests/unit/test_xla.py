"""The XLA path against the reference: forward, every gradient, every edge; and its memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_flashcute import flash_attention, masks, xla
from tests.cases import EDGE_LENGTHS, FEATURES, GROUPS, Case
from tests.compare import assert_close, cotangent, out_lse_and_gradients


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 64, so that short sequences have several."""
    monkeypatch.setattr(xla, "_TILE_ELEMENTS_CPU", 1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", FEATURES)
def test_agrees_with_reference(name: str) -> None:
    case = FEATURES[name]
    arrays = case.arrays()
    actual = out_lse_and_gradients(case, arrays, "xla")
    expected = out_lse_and_gradients(case, arrays, "reference")
    assert_close(actual, expected, 2e-5)


def test_agrees_with_reference_in_one_tile() -> None:
    case = FEATURES["everything"]
    arrays = case.arrays(seed=1)
    actual = out_lse_and_gradients(case, arrays, "xla")
    assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 2e-5)


def subset_of_dimensions() -> st.SearchStrategy[str | None]:
    return st.none() | st.sets(st.sampled_from("bnts")).map(lambda s: "".join(sorted(s)))


lengths = st.sampled_from(EDGE_LENGTHS) | st.integers(1, 200)
sides = st.none() | st.integers(0, 150)
cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    seqlen_q=lengths,
    seqlen_k=lengths,
    kv_heads=st.integers(1, 2),
    group=st.sampled_from(GROUPS),
    head_dim=st.sampled_from((1, 8, 20)),
    head_dim_v=st.sampled_from((1, 8, 20)),
    causal=st.booleans(),
    window=st.none() | st.tuples(sides, sides),
    soft_cap=st.sampled_from((None, 0.5, 20.0)),
    offset=st.booleans(),
    lengths=st.booleans(),
    bias=subset_of_dimensions(),
    mask=subset_of_dimensions(),
    sinks=st.booleans(),
)


@pytest.mark.usefixtures("small_tiles")
@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases, seed=st.integers(0, 2**16))
def test_agrees_with_reference_on_any_call(case: Case, seed: int) -> None:
    arrays = case.arrays(seed=seed)
    actual = out_lse_and_gradients(case, arrays, "xla")
    assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 5e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@settings(
    max_examples=500,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases, seed=st.integers(0, 2**16))
def test_agrees_with_reference_on_many_calls(case: Case, seed: int) -> None:
    arrays = case.arrays(seed=seed)
    actual = out_lse_and_gradients(case, arrays, "xla")
    assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 5e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_exact_as_jax_nn(dtype) -> None:
    """Error against float64, relative to the error of jax.nn in the same dtype."""
    case = Case(causal=True, group=2, seqlen_q=256, seqlen_k=256, head_dim=32, head_dim_v=32)
    inputs = tuple(case.arrays(dtype).values())
    dout = cotangent(jax.ShapeDtypeStruct((2, 256, 4, 32), dtype), seed=1)

    def out_and_gradients(attend, *inputs):
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, is_causal=True), *inputs[:3])
        return [np.asarray(x, np.float64) for x in (out, *vjp(inputs[3]))]

    def implementation(name: str):
        return functools.partial(flash_attention, implementation=name)

    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x, np.float64)) for x in (*inputs, dout)]
        exact = out_and_gradients(implementation("reference"), *exact)
    ours = out_and_gradients(implementation("xla"), *inputs, dout)
    # Not under jit, where jax.nn asks for a precision that CPUs lack in float16.
    peer = out_and_gradients(jax.nn.dot_product_attention, *inputs, dout)
    out, dquery, dkey, dvalue = (
        np.linalg.norm(ours - exact) / np.linalg.norm(peer - exact)
        for ours, peer, exact in zip(ours, peer, exact, strict=True)
    )
    assert out <= 1
    assert dvalue <= 1.01
    # rowsum(dO * O) is taken from the rounded O, as in every flash attention; jax.nn keeps it all.
    assert dquery <= 1.2
    assert dkey <= 1.2


@pytest.mark.usefixtures("small_tiles")
def test_bias_and_mask_in_float64() -> None:
    """One loop counts between numbers of Python, the other between bounds of int32."""
    case = Case(seqlen_q=70, seqlen_k=130, bias="nts", mask="ts", causal=True, lengths=True)
    with jax.enable_x64(True):
        arrays = case.arrays(jnp.float64)
        actual = out_lse_and_gradients(case, arrays, "xla")
        assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 1e-12)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend(seqlen_q: int, seqlen_k: int) -> None:
    case = Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, sinks=True, bias="ts", mask="n")
    arrays = case.arrays()
    actual = out_lse_and_gradients(case, arrays, "xla")
    assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 1e-6)


def test_empty_batch() -> None:
    case = Case(batch=0, causal=True, lengths=False)
    actual = out_lse_and_gradients(case, case.arrays(), "xla")
    assert actual["out"].shape == (0, 129, 2, 16)
    assert actual["d_key"].shape == (0, 150, 2, 16)


def test_a_bias_of_minus_infinity_hides() -> None:
    """Where it hides a whole row, that row is empty like any other."""
    case = Case(bias="ts")
    arrays = case.arrays()
    hidden = np.random.default_rng(0).random(arrays["bias"].shape) < 0.5
    hidden[:, :, 7] = True
    arrays["bias"] = jnp.where(hidden, -jnp.inf, arrays["bias"])
    actual = out_lse_and_gradients(case, arrays, "xla")
    assert_close(actual, out_lse_and_gradients(case, arrays, "reference"), 2e-5)
    assert np.all(np.isneginf(actual["lse"][:, 7]))
    assert np.all(actual["out"][:, 7] == 0)
    assert np.all(actual["d_query"][:, 7] == 0)
    # By a number so large that the LSE does not tell how many keys there are, too.
    arrays["bias"] = arrays["bias"].at[:, :, 7].set(-1e9)
    of_number = out_lse_and_gradients(case, arrays, "xla")
    assert np.all(of_number["out"][:, 7] != 0)
    for name in ("d_query", "d_key", "d_bias"):
        np.testing.assert_array_equal(of_number[name], actual[name])


def array_sizes(compiled_text: str) -> list[int]:
    """Elements of every array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[sfu]\d+|bf16)\[([\d,]+)\]", compiled_text)
    return [int(np.prod([int(length) for length in shape.split(",")])) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear_in_the_lengths(causal: bool, direction: str) -> None:
    """At 65,536 by 65,536 no array has as many elements; twice the length is twice the memory."""

    def attend(query, key, value, bias, sinks):
        out = flash_attention(
            query, key, value, is_causal=causal, bias=bias, sinks=sinks, implementation="xla"
        )
        return jnp.sum(out.astype(jnp.float32))

    function = attend if direction == "forward" else jax.grad(attend, argnums=(0, 1, 2, 3, 4))

    def compiled(length: int):
        def array(*shape: int, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype)

        query, key = array(1, length, 4, 64), array(1, length, 2, 64)
        bias, sinks = array(1, 1, length, 1), array(4, dtype=jnp.float32)
        return jax.jit(function).lower(query, key, key, bias, sinks).compile()

    program = compiled(65_536)
    sizes = array_sizes(program.as_text())
    assert len(sizes) > 100
    assert max(sizes) <= 65_536 * 4 * 64
    memory = program.memory_analysis().temp_size_in_bytes
    half = compiled(32_768).memory_analysis().temp_size_in_bytes
    assert memory < 2.2 * half
    assert memory < 300 * 2**20


def test_the_dense_reference_would_fail_the_memory_test() -> None:
    """The measure above sees a T by S array where there is one."""
    query = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.float32)
    program = jax.jit(
        lambda q: flash_attention(q, q, q, is_causal=True, implementation="reference")
    )
    sizes = array_sizes(program.lower(query).compile().as_text())
    assert max(sizes) >= 2048 * 2048


def test_hidden_tiles_take_no_time() -> None:
    """Tiles hidden from the whole batch are not computed: NaN in them does not come out."""
    query = jnp.ones((1, 2048, 1, 8))
    key = jnp.ones((1, 2048, 1, 8)).at[:, 1024:].set(jnp.nan)

    def attend(query, key, **kwargs):
        return flash_attention(query, key, key, implementation="xla", **kwargs)

    out = attend(query[:, :1024], key, is_causal=True)
    assert not np.isnan(out).any()
    out = attend(query, key, local_window_size=(0, 0))
    assert not np.isnan(out[:, :1024]).any()


def test_export_of_segments_and_documents_with_symbolic_lengths() -> None:
    """Ids sorted or not, and as arrays that a mask closes over."""

    def run(query, key, ids):
        segments = flash_attention(query, key, key, is_causal=True, segment_ids=ids)
        return segments, flash_attention(query, key, key, mask_mod=masks.documents(ids))

    B, T = jax.export.symbolic_shape("b, t")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 37, heads, 8), np.float32) for heads in (6, 2)]
    ids = np.stack([rng.integers(-1, 4, 37), np.sort(rng.integers(0, 4, 37))]).astype(np.int32)
    signature = [jax.ShapeDtypeStruct((B, T, *x.shape[2:]), x.dtype) for x in (*arrays, ids)]
    found = jax.export.export(jax.jit(run))(*signature).call(*arrays, ids)
    wanted = {
        "segments": flash_attention(
            *arrays, arrays[1], is_causal=True, segment_ids=ids, implementation="reference"
        ),
        "documents": flash_attention(
            *arrays, arrays[1], mask_mod=masks.documents(ids), implementation="reference"
        ),
    }
    assert_close(dict(zip(wanted, found, strict=True)), wanted, 2e-5)


def test_export_with_symbolic_dimensions() -> None:
    """One exported program, traced once, serves every batch and both lengths."""
    case = Case(causal=True, offset=True, bias="s", sinks=True, group=2)

    def run(arrays):
        def loss(floating):
            out, lse = flash_attention(**(arrays | floating), **case.static, return_residual=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0))

        floating = {name: a for name, a in arrays.items() if a.dtype == jnp.float32}
        return jax.value_and_grad(loss)(floating)

    b, t, s = jax.export.symbolic_shape("b, t, s")
    symbols = {case.batch: b, case.seqlen_q: t, case.seqlen_k: s}
    axes = {"query": 2, "key": 2, "value": 2, "q_offset": 1, "bias": 4, "sinks": 0}
    signature = {
        name: jax.ShapeDtypeStruct(
            tuple(
                symbols.get(length, length) if axis < axes[name] else length
                for axis, length in enumerate(array.shape)
            ),
            array.dtype,
        )
        for name, array in case.arrays().items()
    }
    exported = jax.export.export(jax.jit(run))(signature)
    for batch, seqlen_q, seqlen_k in [(5, 1, 3), (3, 257, 300)]:
        sized = Case(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            causal=True,
            offset=True,
            bias="s",
            sinks=True,
            group=2,
        )
        arrays = sized.arrays()
        value, gradients = exported.call(arrays)
        expected, expected_gradients = jax.jit(run)(arrays)
        assert_close({"value": value} | gradients, {"value": expected} | expected_gradients, 2e-5)
