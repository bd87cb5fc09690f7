"""Sequences over the devices of a mesh axis: equal to one device, forward and all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jax_flashcute import context, flash_attention, masks
from jax_flashcute.context import (
    context_parallel_attention,
    permute_sequence,
    permuted_positions,
    restore_sequence,
)
from tests.compare import assert_close, cotangent

B, T, K, GROUP, H = 2, 96, 2, 3, 8
N = K * GROUP
ROWS = ("query", "key", "value", "segment_ids")


def make_mesh(
    devices: int, data: int = 1, platform: str = "cpu", axis_types=AxisType.Auto
) -> jax.sharding.Mesh:
    chosen = jax.devices(platform)[: data * devices]
    types = (axis_types,) * 2
    return jax.make_mesh((data, devices), ("data", "context"), types, devices=chosen)


def inputs(feature: str, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(0)
    arrays = {
        "query": rng.standard_normal((B, T, N, H)),
        "key": rng.standard_normal((B, T, K, H)),
        "value": rng.standard_normal((B, T, K, 12)),
    }
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    if "sinks" in feature:
        arrays["sinks"] = jnp.asarray(rng.standard_normal(N), jnp.float32)
    if "lengths" in feature:
        arrays["query_seq_lengths"] = jnp.asarray([T, 37], jnp.int32)
        arrays["key_value_seq_lengths"] = jnp.asarray([0, 71], jnp.int32)
        beyond = np.arange(T)[None, :] >= np.asarray([0, 71])[:, None]
        for name in ("key", "value"):
            arrays[name] = jnp.where(beyond[:, :, None, None], jnp.nan, arrays[name])
    if "segments" in feature:
        ids = np.sort(rng.integers(0, 5, (B, T)), axis=1)
        ids[0, -9:], ids[1, :5] = -1, 7
        arrays["segment_ids"] = jnp.asarray(ids, jnp.int32)
    if "score" in feature:
        arrays["table"] = jnp.asarray(rng.standard_normal((N, 2 * T)), jnp.float32)
    return arrays


BITS = np.random.default_rng(3).integers(0, 2**32, (1, N, T, -(-T // 32)), np.uint32)
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (13, 5)},
    "window_causal_sinks": {"local_window_size": (30, 4), "is_causal": True},
    "lengths_sinks": {},
    "segments_causal": {"is_causal": True},
    "interval": {"mask_mod": masks.chunked(17) & masks.causal},
    "not_interval": {"mask_mod": masks.dilated(40, 3)},
    "score_soft_cap": {"is_causal": True, "logits_soft_cap": 1.5},
    "bits": {"mask_mod": masks.from_bits(BITS)},
}


def options_of(feature: str, arrays: dict) -> dict:
    options = dict(OPTIONS[feature])
    if "table" in arrays:
        table = arrays.pop("table")
        options["score_mod"] = lambda s, b, h, q, kv: s + table[h, q - kv + T] * (b + 1)
    return options


def on_one(feature: str, arrays: dict):
    options = options_of(feature, arrays := dict(arrays))
    return flash_attention(**arrays, **options, implementation="reference", return_residual=True)


def on_many(feature: str, mesh, parallel: dict, arrays: dict):
    """Permuted, attended to by the mesh, and restored."""
    devices, order = mesh.shape["context"], parallel["order"]
    options = options_of(feature, arrays := dict(arrays))
    for name in set(ROWS) & set(arrays):
        arrays[name] = permute_sequence(arrays[name], devices, order=order)
    found = context_parallel_attention(
        **arrays,
        **options,
        **parallel,
        mesh=mesh,
        axis_name="context",
        return_residual=True,
    )
    return tuple(restore_sequence(x, devices, order=order) for x in found)


def run(attend, arrays: dict) -> dict:
    """Out, LSE and gradients for fixed, uneven cotangents."""
    floating = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    (out, lse), vjp = jax.vjp(lambda given: attend(arrays | given), floating)
    (gradients,) = vjp((cotangent(out, 1), cotangent(lse, 2)))
    return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in gradients.items()}


@functools.cache
def expected(feature: str) -> dict:
    return jax.jit(functools.partial(run, functools.partial(on_one, feature)))(inputs(feature))


def compiled(call, arrays: dict):
    # Each program runs once, so its code need not be good.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(run, call), compiler_options=options).lower(arrays).compile()


def check(feature: str, devices: int, method: str, order: str, data: int = 1) -> None:
    parallel = {"context_parallel": method, "order": order, "implementation": "xla"}
    if data > 1:
        parallel["batch_axes"] = "data"
    call = functools.partial(on_many, feature, make_mesh(devices, data), parallel)
    arrays = inputs(feature)
    assert_close(compiled(call, arrays)(arrays), expected(feature), 3e-5)


# The features, methods and orders, and eight devices; ``EVERY_CASE`` has them in every combination.
CASES = [
    ("causal", 2, "ring", "zigzag", 1),
    ("window", 8, "ring", "contiguous", 1),
    ("lengths_sinks", 2, "ring", "zigzag", 2),
    ("segments_causal", 2, "ring", "zigzag", 1),
    ("score_soft_cap", 2, "ring", "striped", 2),
    ("interval", 2, "all_gather", "zigzag", 1),
    ("bits", 2, "ring", "zigzag", 1),
]
EVERY_CASE = [
    (feature, 4, method, order, 2)
    for feature in OPTIONS
    for method in context.METHODS
    for order in context.ORDERS
] + [("causal", 8, method, order, 1) for method in context.METHODS for order in context.ORDERS]


@pytest.mark.parametrize(("feature", "devices", "method", "order", "data"), CASES)
def test_equal_to_one_device(feature, devices, method, order, data) -> None:
    check(feature, devices, method, order, data)


@pytest.mark.slow
@pytest.mark.parametrize(("feature", "devices", "method", "order", "data"), EVERY_CASE)
def test_every_feature_method_and_order(feature, devices, method, order, data) -> None:
    check(feature, devices, method, order, data)


@pytest.mark.parametrize("axes", ["batch_axes", "head_axes"])
def test_what_is_alone_is_on_every_device(axes: str) -> None:
    """One batch entry of one head, over a mesh axis of two devices."""
    array = inputs("causal")["query"][:1, :, :1]
    found = context_parallel_attention(
        *[array] * 3,
        is_causal=True,
        mesh=make_mesh(2, 2),
        axis_name="context",
        order="contiguous",
        implementation="xla",
        **{axes: "data"},
    )
    wanted = flash_attention(*[array] * 3, is_causal=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "implementation must be"),
        ({"batch_axes": "data"}, "mesh is None"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    array = jnp.ones((1, 8, 1, 8))
    options = {"context_parallel": "ring"} | change
    with pytest.raises(ValueError, match=message):
        jax.vmap(
            lambda x: context_parallel_attention(x, x, x, axis_name="context", **options),
            axis_name="context",
        )(array[None])


@pytest.mark.slow
def test_heads_over_another_axis() -> None:
    """Scores see the numbers of all heads."""
    parallel = {"head_axes": "data", "implementation": "xla"}
    call = functools.partial(on_many, "score_soft_cap", make_mesh(2, 2), parallel | ZIGZAG)
    arrays = inputs("score_soft_cap")
    assert_close(compiled(call, arrays)(arrays), expected("score_soft_cap"), 3e-5)


ZIGZAG = {"order": "zigzag"}


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_a_shard_map(check_vma: bool) -> None:
    """Sinks are replicated: their gradient is summed over the devices."""
    feature, devices, mesh = "window_causal_sinks", 2, make_mesh(2)
    rows, whole = PartitionSpec("data", "context"), PartitionSpec()

    def on_device(arrays):
        return context_parallel_attention(
            **arrays,
            **OPTIONS[feature],
            axis_name="context",
            implementation="xla",
            return_residual=True,
        )

    def call(arrays):
        arrays = {
            name: permute_sequence(x, devices) if name in ROWS else x for name, x in arrays.items()
        }
        specs = {name: rows if name in ROWS else whole for name in arrays}
        found = jax.shard_map(
            on_device, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows), check_vma=check_vma
        )(arrays)
        return tuple(restore_sequence(x, devices) for x in found)

    arrays = inputs(feature)
    assert_close(compiled(call, arrays)(arrays), expected(feature), 3e-5)


def test_an_explicit_mesh() -> None:
    """Out's type says over which axis its rows lie."""
    mesh = make_mesh(2, axis_types=AxisType.Explicit)
    arrays = inputs("causal")
    with jax.set_mesh(mesh):
        permuted = {
            name: permute_sequence(jax.device_put(x, PartitionSpec(None, "context")), 2)
            for name, x in arrays.items()
        }
        call = functools.partial(
            context_parallel_attention, mesh=mesh, axis_name="context", is_causal=True
        )
        options = {"xla_backend_optimization_level": 0}
        found = jax.jit(call, compiler_options=options)(**permuted)
        restored = restore_sequence(found, 2)
    assert tuple(found.sharding.spec)[:2] == (None, "context")
    assert restored.sharding == found.sharding
    assert_close({"out": restored}, {"out": expected("causal")["out"]}, 3e-5)


# ---- what is communicated ------------------------------------------------------------------


def forward_text(devices: int, order: str, length: int = 8 * 32, method="ring", **options) -> str:
    mesh = make_mesh(devices)
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "context"))
    call = functools.partial(
        context_parallel_attention,
        mesh=mesh,
        axis_name="context",
        order=order,
        context_parallel=method,
        implementation="xla",
        **options,
    )
    query = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32, sharding=rows)
    return jax.jit(call).lower(query, query, query).as_text()


def test_steps_that_see_nothing_are_left_out() -> None:
    """Keys and values travel once a step: to the neighbours that a window reaches, and no further.

    256 positions over 8 devices, 32 or twice 16 each.
    """

    def steps(**options) -> int:
        text = forward_text(8, **options)
        assert "all_gather" not in text
        return text.count("stablehlo.collective_permute") // 2

    assert steps(order="contiguous", is_causal=True) == 7
    assert steps(order="contiguous", local_window_size=(31, 0)) == 1
    assert steps(order="contiguous", local_window_size=(33, 0)) == 2
    assert steps(order="contiguous", local_window_size=(1, 1)) == 2  # one from either side
    # Halves of a zig-zag have their predecessors on either side.
    assert steps(order="zigzag", local_window_size=(15, 0)) == 2
    assert steps(order="contiguous", mask_mod=masks.chunked(32)) == 0
    assert steps(order="contiguous", mask_mod=masks.prefix_lm(32)) == 7


def test_all_gather_communicates_once() -> None:
    text = forward_text(4, "zigzag", method="all_gather", is_causal=True)
    assert "collective_permute" not in text
    assert text.count('"stablehlo.all_gather"') == 2


def test_zigzag_balances_a_causal_mask() -> None:
    """Visible pairs of every device, of 64 positions over 4."""

    def visible(order: str) -> np.ndarray:
        positions = permuted_positions(64, 4, order=order)
        return (positions + 1).reshape(4, -1).sum(axis=1)

    assert np.ptp(visible("zigzag")) == 0
    assert np.ptp(visible("striped")) < 0.1 * visible("striped").mean()
    assert np.ptp(visible("contiguous")) > visible("contiguous").mean()


# ---- orders and refusals -------------------------------------------------------------------


@pytest.mark.parametrize("order", context.ORDERS)
def test_permuted_sequences_are_restored(order: str) -> None:
    tokens = jnp.arange(2 * 24).reshape(2, 24)
    permuted = permute_sequence(tokens, 3, order=order)
    assert order == "contiguous" or not np.array_equal(permuted, tokens)
    np.testing.assert_array_equal(permuted[0], permuted_positions(24, 3, order=order))
    np.testing.assert_array_equal(restore_sequence(permuted, 3, order=order), tokens)


REFUSALS = {
    "rows": ({"order": "zigzag"}, 12, "positive multiple of 8 rows for 4 devices in zigzag"),
    "contiguous_rows": ({"order": "contiguous"}, 10, "positive multiple of 4 rows"),
    "no_such_axis": ({"batch_axes": "model"}, 16, "batch_axes must be among mesh's other axes"),
    "axis_twice": ({"head_axes": "context"}, 16, "head_axes must be among mesh's other axes"),
    "batch": ({"batch_axes": "data"}, 16, "must divide 3 batch entries"),
    "heads": ({"head_axes": ("data",)}, 16, "must divide 3 heads"),
    "axis": ({"axis_name": "model"}, 16, "axis_name must be one of mesh's axes"),
    "order": ({"order": "spiral"}, 16, "order must be one of"),
    "method": ({"context_parallel": "broadcast"}, 16, "context_parallel must be one of"),
    "reference": ({"implementation": "reference"}, 16, "computed on one device"),
    "no_mesh": ({"mesh": None}, 16, "outside of one, pass mesh"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused(case: str) -> None:
    changes, length, message = REFUSALS[case]
    devices = (2, 2) if changes.keys() & {"batch_axes", "head_axes"} else (4,)
    options = {"mesh": make_mesh(*devices), "axis_name": "context"} | changes
    query = jnp.zeros((3, length, 3, 8))
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(query, query, query, **options)


def test_forward_mode_and_second_derivatives_are_refused() -> None:
    query = jnp.ones((1, 8, 1, 8))
    call = functools.partial(context_parallel_attention, mesh=make_mesh(2), axis_name="context")
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jax.jvp(lambda q: call(q, query, query), (query,), (query,))
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        jax.eval_shape(jax.grad(lambda q: jax.grad(lambda q: call(q, q, q).sum())(q).sum()), query)


# ---- on GPUs -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("method", context.METHODS)
@pytest.mark.parametrize("order", context.ORDERS)
@pytest.mark.parametrize("feature", ["causal", "window_causal"])
def test_kernels_on_several_gpus(feature: str, order: str, method: str, devices: int) -> None:
    """Odd rows in every tile, bfloat16, against the float32 reference on one device."""
    if len(jax.devices("cuda")) < devices:
        pytest.skip(f"needs {devices} CUDA devices; there are {len(jax.devices('cuda'))}")
    options = {"is_causal": True}
    if feature == "window_causal":
        options["local_window_size"] = (300, 0)
    rng = np.random.default_rng(0)
    length = 2 * devices * 331
    arrays = {
        name: jnp.asarray(rng.standard_normal((2, length, heads, 64)), jnp.bfloat16)
        for name, heads in (("query", 6), ("key", 2), ("value", 2))
    }
    mesh = make_mesh(devices, platform="cuda")

    def on_gpus(arrays):
        permuted = {n: permute_sequence(x, devices, order=order) for n, x in arrays.items()}
        # A window in striped order is a mask by element; the kernels or XLA may serve that.
        by_element = order == "striped" and feature == "window_causal"
        found = context_parallel_attention(
            **permuted,
            **options,
            mesh=mesh,
            axis_name="context",
            order=order,
            context_parallel=method,
            implementation=None if by_element else "cute",
            return_residual=True,
        )
        return tuple(restore_sequence(x, devices, order=order) for x in found)

    def on_one_gpu(arrays):
        return flash_attention(
            **arrays, **options, implementation="reference", return_residual=True
        )

    actual = jax.jit(functools.partial(run, on_gpus))(arrays)
    want = jax.jit(functools.partial(run, on_one_gpu))(arrays)
    assert_close(actual, want, 2e-2)
