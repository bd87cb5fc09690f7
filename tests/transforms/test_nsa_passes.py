"""Gates and compression under vmap and on meshes over eight devices of a CPU, with gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flashcute.ffi import call, store
from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.ffi.runtime import CALL_TARGET
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.nsa import KERNELS
from jax_flashcute.nsa import NSAConfig, compress_kv, gate, native_sparse_attention
from tests.compare import cotangent

P = PartitionSpec
DATA, MODEL = 2, 4
B, T, N, H, Hv, BLOCK = 4, 13, 8, 8, 16, 5
LAYOUTS = {"query": "btnh", "outputs": "btnv", "weights": "n", "key": "btnh", "value": "btnv"}


def inputs() -> dict:
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "query": random(B, T, N, H),
        "outputs": [random(B, T, N, Hv) for _ in range(3)],
        "weights": random(N, 3, H),
        "key": random(B, T, N, H),
        "value": random(B, T, N, Hv),
    }


def both(arrays: dict, implementation=None):
    """The gates' output, and keys and values compressed."""
    return (
        gate(arrays["query"], arrays["outputs"], arrays["weights"], implementation=implementation),
        compress_kv(arrays["key"], arrays["value"], BLOCK, implementation=implementation),
    )


def run(function, arrays: dict):
    """Results and gradients for cotangents that differ everywhere."""
    results, vjp = jax.vjp(function, arrays)
    cotangents = jax.tree.map(lambda x: cotangent(x, 1), results)
    return results, vjp(cotangents)[0]


@functools.cache
def expected():
    return jax.jit(functools.partial(run, functools.partial(both, implementation="reference")))(
        inputs()
    )


def assert_equal(actual, wanted) -> None:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, wanted
    )


def partition(arrays: dict) -> dict:
    axes = {"b": "data", "n": "model"}

    def of(name, x):
        letters = LAYOUTS[name].ljust(x.ndim)
        return P(*(axes.get(letter) for letter in letters))

    return {n: jax.tree.map(functools.partial(of, n), x) for n, x in arrays.items()}


@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map", "shard_map_check_vma"])
def test_meshes(kind: str) -> None:
    arrays, types = inputs(), AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(
        (DATA, MODEL), ("data", "model"), (types,) * 2, devices=jax.devices("cpu")[:8]
    )
    specs = partition(arrays)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), arrays, specs)
    call = both
    if kind.startswith("shard_map"):
        out = P("data", None, "model")
        call = jax.shard_map(
            both, mesh=mesh, in_specs=(specs,), out_specs=(out, (out, out)),
            check_vma=kind.endswith("vma"),
        )  # fmt: skip
    with jax.set_mesh(mesh):
        forward = jax.jit(call).lower(placed).compile()
        assert "all-" not in forward.as_text()
        actual = jax.jit(functools.partial(run, call))(placed)
    assert_equal(actual, expected())
    for result in jax.tree.leaves(actual[0]):
        assert result.sharding.spec[:3] == ("data", None, "model")


def test_rows_may_be_sharded_in_the_gates() -> None:
    """The weights' gradient is then summed over the devices."""
    arrays = inputs()
    rows = {n: jax.tree.map(lambda x: x[:, :12], arrays[n]) for n in ("query", "outputs")}
    arrays = rows | {"weights": arrays["weights"]}
    mesh = jax.make_mesh((4,), ("rows",), (AxisType.Auto,), devices=jax.devices("cpu")[:4])
    placed = arrays | {
        n: jax.device_put(arrays[n], NamedSharding(mesh, P(None, "rows")))
        for n in ("query", "outputs")
    }

    def gated(arrays, implementation=None):
        return gate(**arrays, implementation=implementation)

    reference = functools.partial(run, functools.partial(gated, implementation="reference"))
    wanted = jax.jit(reference)(arrays)
    assert_equal(jax.jit(functools.partial(run, gated))(placed), wanted)


def test_the_whole_on_an_explicit_mesh() -> None:
    """What comes with the queries may lie elsewhere."""
    config = NSAConfig(block=8, num_selected=2, window=6, query_tile=8)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (
        jax.random.normal(k, shape)
        for k, shape in zip(
            keys, [(2, 24, 4, 8), (2, 24, 2, 8), (2, 24, 2, 8), (4, 3, 8)], strict=True
        )
    )
    ids = np.asarray([[0] * 10 + [1] * 14, [2] * 20 + [-1] * 4], np.int32)

    def out_and_gradients(query, key, value, weights):
        def attend(query, key, value, weights):
            out = native_sparse_attention(
                *(query, key, value),
                gate_weights=weights,
                segment_ids=ids,
                max_segments=2,
                config=config,
            )
            return jnp.sum(jnp.sin(out)), out

        gradient = jax.grad(attend, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(gradient)(query, key, value, weights)

    expected = out_and_gradients(query, key, value, weights)
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:4]
    )
    specs = (P("data", None, "model"), P("data", None, "model"), P(None, None, "model"), P())
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((query, key, value, weights), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = out_and_gradients(*placed)
    assert found[1].sharding.spec[:3] == ("data", None, "model")
    for given, gradient in zip(placed, found[0], strict=True):
        assert jax.typeof(gradient).sharding == jax.typeof(given).sharding
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "call", [lambda x: compress_kv(x, x, 4), lambda x: native_sparse_attention(x, x, x)]
)
def test_a_sharded_length_is_refused(call) -> None:
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices("cpu")[:2])
    array = jax.device_put(jnp.ones((1, 8, 2, 8)), NamedSharding(mesh, P(None, "rows")))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="only batch and heads can be sharded"),
    ):
        call(array)


@pytest.mark.parametrize("mapped", [("query", "outputs", "key", "value"), ("weights", "key")])
def test_vmap(mapped: tuple[str, ...]) -> None:
    """Over an axis that every named array has and the others share, in front or elsewhere."""
    arrays = inputs()
    batched = {
        n: jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x], axis=1), arrays[n]) for n in mapped
    }
    axes = {n: jax.tree.map(lambda _, n=n: 1 if n in mapped else None, arrays[n]) for n in arrays}
    mapping = jax.vmap(functools.partial(run, both), in_axes=(axes,))
    actual = jax.jit(mapping)(arrays | batched)
    reference = jax.jit(functools.partial(run, functools.partial(both, implementation="reference")))
    for i in range(3):
        one = arrays | {n: jax.tree.map(lambda x, i=i: x[:, i], batched[n]) for n in mapped}
        assert_equal(jax.tree.map(lambda x, i=i: x[i], actual), reference(one))


def test_gradient_of_a_vmap_sums_what_is_shared() -> None:
    arrays = inputs()

    def loss(weights, implementation):
        def of_one(query, *outputs):
            arguments = query[None], [x[None] for x in outputs], weights
            return gate(*arguments, implementation=implementation)

        return jnp.sum(jax.vmap(of_one)(arrays["query"], *arrays["outputs"]) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    actual, wanted = (gradient(arrays["weights"], i) for i in (None, "reference"))
    np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-4)


def test_lowered_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a pass, of the kernel that its arrays fit, and nothing of XLA beside it."""
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", "sm_90a")
    keys = []

    def get(key):
        keys.append(key)
        return CompiledKernel(b"object", key.arch)

    monkeypatch.setattr(store, "get", get)
    monkeypatch.setattr(call, "register_call_target", lambda: None)
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs())
    arrays["weights"] = inputs()["weights"]
    program = jax.jit(functools.partial(run, both)).trace(arrays)
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert sorted(key.kernel for key in keys) == sorted(KERNELS)
    calls = re.findall(rf"custom_call @{CALL_TARGET}\((.*?)\).*-> (.*)", text)
    for key, (operands, results) in zip(keys, calls, strict=True):
        arrays_of_key = [a for a in registry.arrays_of(key) if a is not None]
        assert operands.count("%") + results.count("tensor<") == len(arrays_of_key)
    assert "stablehlo.logistic" not in text


def test_what_the_kernels_refuse() -> None:
    arrays = inputs()
    with pytest.raises(NotImplementedError, match="has no kernel for the gates") as refusal:
        gate(arrays["query"], arrays["outputs"], arrays["weights"], implementation="cute")
    assert "the dtype of query must be one of bfloat16, float16, got float32" in str(refusal.value)
    key = jnp.ones((1, 0, 1, 12), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="has no kernel for the compression") as refusal:
        compress_kv(key, key, 4, implementation="cute")
    for reason in ("head_dim must be a multiple of 8 from 8 to 256, got 12", "key is empty"):
        assert reason in str(refusal.value)
