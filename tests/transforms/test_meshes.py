"""Automatic and explicit meshes and ``shard_map``, over eight devices of a CPU.

What a call computes is compared with one device's reference, and what it communicates is read from
the compiled program.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flashcute import (
    PagedKVCache,
    dispatch,
    flash_attention,
    paged_attention,
    plan,
    sharding,
    xla,
)
from jax_flashcute.ffi.runtime import CALL_TARGET
from jax_flashcute.spec import Operands
from tests.cases import Case
from tests.compare import assert_close, cotangent

DATA, MODEL = 2, 4

# Head counts, of query and of key: that divide among the devices, and other ones; "straddling" has
# devices that read parts of two groups.
DIVIDED = (8, 4)
HEADS = {
    "replicated": (8, 2),
    "multi_query": (4, 1),
    "group_3": (12, 4),
    "group_7_replicated": (28, 2),
    "straddling": (24, 6),
}
FEATURES = {
    "dense": Case(causal=True, offset=True),
    "arrays": Case(lengths=True, window=(20, 3), bias="bnts", mask="bts", sinks=True),
    "bias_heads": Case(bias="n", causal=True),
    "functions": Case(),
}
KINDS = ("auto", "explicit", "shard_map", "shard_map_check_vma")


def make_mesh(types: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    devices = jax.devices("cpu")[: DATA * MODEL]
    return jax.make_mesh((DATA, MODEL), ("data", "model"), (types, types), devices=devices)


def inputs(feature: str, heads: tuple[int, int] = DIVIDED) -> dict[str, jax.Array]:
    N, K = heads
    changes = {"batch": 4, "seqlen_q": 33, "seqlen_k": 45, "kv_heads": K, "group": N // K}
    arrays = Case(**(vars(FEATURES[feature]) | changes)).arrays()
    rng = np.random.default_rng(1)
    if feature == "functions":
        arrays["reach"] = jnp.asarray(rng.integers(1, 30, N), jnp.int32)
        arrays["slopes"] = jnp.asarray(rng.random(N), jnp.float32)
    return arrays


def attend(feature: str, implementation: str | None, arrays: dict, first=(0, 0)):
    """Out and LSE; ``first`` is where a device's batch and heads start, in a ``shard_map``."""
    first_batch, first_head = first
    arrays = dict(arrays)
    options = {}
    if feature == "functions":
        reach, slopes = arrays.pop("reach"), arrays.pop("slopes")
        options["mask_mod"] = lambda b, h, q, kv: q - kv < reach[h + first_head]
        options["score_mod"] = lambda s, b, h, q, kv: (
            s - slopes[h + first_head] * jnp.abs(q - kv) * (b + first_batch + 1)
        )
    return flash_attention(
        **arrays,
        **(FEATURES[feature].static | options),
        implementation=implementation,
        return_residual=True,
    )


def partition(name: str, array: jax.Array, heads: tuple[int, int]) -> PartitionSpec:
    """Batch over ``data`` and heads over ``model``, wherever there are as many as that takes."""
    dimensions = sharding.LAYOUTS.get(name, "").ljust(array.ndim)
    axes = {"b": "data", "n": "model", "k": "model" if heads[1] % MODEL == 0 else None}
    if name == "sinks":
        dimensions = "n"
    entries = zip(dimensions, array.shape, strict=True)
    return PartitionSpec(*(axes.get(d) if size > 1 else None for d, size in entries))


def floating(arrays: dict) -> dict:
    return {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}


def run(function, arrays: dict) -> dict:
    """Out, LSE and gradients for fixed, uneven cotangents."""

    def of_floating(given):
        return function(arrays | given)

    (out, lse), vjp = jax.vjp(of_floating, floating(arrays))
    (gradients,) = vjp((cotangent(out, 1), cotangent(lse, 2)))
    return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in gradients.items()}


@functools.cache
def expected(feature: str, heads: tuple[int, int]) -> dict:
    call = functools.partial(attend, feature, "reference")
    return jax.jit(functools.partial(run, call))(inputs(feature, heads))


def collectives(compiled) -> set[str]:
    names = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast"
    return set(re.findall(rf" ({names}|reduce-scatter)(?:-start)?\(", compiled.as_text()))


def on_mesh(kind: str, feature: str, heads: tuple[int, int]):
    """A context, the call for this kind of mesh, and its arrays, sharded."""
    mesh = make_mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    arrays = inputs(feature, heads)
    specs = {name: partition(name, x, heads) for name, x in arrays.items()}
    sharded = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    call = functools.partial(attend, feature, "xla")
    if kind == "explicit":
        return jax.set_mesh(mesh), call, sharded
    if kind == "auto":
        return contextlib.nullcontext(), call, sharded

    def on_device(arrays: dict):
        B, _, N, _ = arrays["query"].shape
        first = jax.lax.axis_index("data") * B, jax.lax.axis_index("model") * N
        return attend(feature, "xla", arrays, first)

    heads_over = PartitionSpec("data", None, "model")
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(heads_over, heads_over),
        check_vma=kind == "shard_map_check_vma",
    )
    return contextlib.nullcontext(), mapped, sharded


def check(kind: str, feature: str, heads: tuple[int, int]) -> None:
    context, call, arrays = on_mesh(kind, feature, heads)
    with context:
        gradient = jax.jit(functools.partial(run, call)).lower(arrays).compile()
        actual = gradient(arrays)
    assert_close(actual, expected(feature, heads), 2e-5)
    assert tuple(actual["out"].sharding.spec)[:3] == ("data", None, "model")
    assert tuple(actual["lse"].sharding.spec) == ("data", None, "model")
    # Only the gradient of what is shared by several devices is summed over them.
    replicated = any(
        not {"data", "model"} <= set(partition(n, a, heads)) for n, a in floating(arrays).items()
    )
    assert collectives(gradient) == ({"all-reduce"} if replicated else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, kind: str) -> None:
    check(kind, feature, DIVIDED)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    check("auto", "functions" if heads == HEADS["group_7_replicated"] else "dense", heads)


def test_replicated_keys_on_an_explicit_mesh() -> None:
    check("explicit", "dense", HEADS["straddling"])


# ---- what cannot be sharded ----------------------------------------------------------------

REFUSED = {
    "query length": ("query", PartitionSpec(None, "model")),
    "key length": ("key", PartitionSpec(None, "model")),
    "head_dim": ("value", PartitionSpec(None, None, None, "model")),
}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("dimension", REFUSED)
def test_other_dimensions_are_refused(dimension: str, kind: str) -> None:
    name, spec = REFUSED[dimension]
    mesh = make_mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    case = Case(batch=4, seqlen_q=32, seqlen_k=48, kv_heads=4)
    specs = dict.fromkeys(("query", "key", "value"), PartitionSpec("data")) | {name: spec}
    arrays = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in case.arrays().items()}
    message = f"the {dimension} of {name} is sharded over the mesh axis model"
    context = jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext()
    with context, pytest.raises((NotImplementedError, jax.errors.JaxRuntimeError), match=message):
        jax.jit(functools.partial(flash_attention, implementation="xla"))(**arrays)


def test_heads_that_do_not_divide_are_refused() -> None:
    mesh = make_mesh()
    arrays = Case(batch=4, kv_heads=6).arrays()

    def attend(query, key, value):
        heads = NamedSharding(mesh, PartitionSpec("data", None, "model"))
        query = jax.lax.with_sharding_constraint(query, heads)
        return flash_attention(query, key, value, implementation="xla")

    message = "6 query heads cannot be divided among the 4 devices"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.jit(attend)(**arrays)


def test_a_shard_map_over_some_axes_takes_the_xla_path() -> None:
    mesh = make_mesh()
    arrays = inputs("dense")
    batch = PartitionSpec("data")

    def attend(implementation):
        def on_device(query, key, value, q_offset):
            return flash_attention(
                query, key, value, q_offset=q_offset, is_causal=True, implementation=implementation
            )

        return jax.jit(
            jax.shard_map(
                on_device, mesh=mesh, in_specs=batch, out_specs=batch, axis_names={"data"}
            )
        )(*arrays.values())

    want = expected("dense", DIVIDED)["out"]
    assert_close({"out": attend(None)}, {"out": want}, 2e-5)
    with pytest.raises(NotImplementedError, match="the axes model are left to XLA"):
        attend("cute")


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_pages(types: AxisType) -> None:
    """Batch and heads where they lie; pages belong to no batch entry, be they as many."""
    mesh, rng = make_mesh(types), np.random.default_rng(2)
    P = PartitionSpec
    shapes = {"query": (DATA, 5, 8, 16), "k_pages": (DATA, 8, 4, 16), "v_pages": (DATA, 8, 4, 16)}
    arrays = {n: jnp.asarray(rng.standard_normal(x), jnp.float32) for n, x in shapes.items()}
    arrays["page_table"] = jnp.asarray(rng.integers(0, DATA, (DATA, 2)), jnp.int32)
    arrays["kv_lengths"] = jnp.asarray(rng.integers(5, 17, DATA), jnp.int32)
    heads = P(None, None, "model")
    specs = {"query": P("data", None, "model"), "k_pages": heads, "v_pages": heads}
    placed = {
        n: jax.device_put(x, NamedSharding(mesh, specs.get(n, P("data"))))
        for n, x in arrays.items()
    }
    with jax.set_mesh(mesh) if types == AxisType.Explicit else contextlib.nullcontext():
        compiled = jax.jit(lambda x: paged_attention(**x)).lower(placed).compile()
        found = compiled(placed)
    want = paged_attention(**arrays, implementation="reference")
    assert_close({"out": found}, {"out": want}, 2e-5)
    assert tuple(found.sharding.spec)[:3] == ("data", None, "model")
    assert not collectives(compiled)


def test_a_paged_cache_on_an_explicit_mesh() -> None:
    """Every device has the pages of its heads, and tokens of its batch entries to append."""
    mesh, layout = make_mesh(AxisType.Explicit), PartitionSpec(None, None, "model")
    sizes = {"num_pages": 8, "page_size": 4, "max_pages": 2, "kv_heads": 4, "head_dim": 3}
    cache = PagedKVCache.empty(layers=1, batch=4, dtype=jnp.float32, **sizes)
    cache = cache.with_sequences(np.arange(8).reshape(4, 2), [3, 0, 1, 5])
    tokens, counts = np.random.default_rng(0).random((2, 4, 3, 4, 3), np.float32), [3, 2, 0, 1]
    want = cache.append([tokens[0]], [tokens[1]], counts)

    def placed(x):
        spec = layout if x.ndim == 4 else PartitionSpec("data")
        return jax.device_put(x, NamedSharding(mesh, spec))

    rows = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    tokens = [jax.device_put(x, rows) for x in tokens]
    found = jax.jit(PagedKVCache.append)(
        jax.tree.map(placed, cache), *([x] for x in tokens), counts
    )
    assert {tuple(x.sharding.spec)[:3] for x in (*found.k_pages, *found.v_pages)} == {tuple(layout)}
    jax.tree.map(np.testing.assert_array_equal, found, want)


# ---- kernels -------------------------------------------------------------------------------


def test_a_kernel_is_called_on_each_devices_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for the whole call, and then for a device's share of batch and heads."""
    seen = []

    def kernel_forward(spec, operands):
        seen.append((operands.query.shape, operands.key.shape))
        return xla.forward(spec, operands)

    monkeypatch.setattr(dispatch, "_kernel_forward", kernel_forward)
    monkeypatch.setattr(dispatch, "reasons_against_kernel", lambda *arguments: [])
    mesh = make_mesh()
    arrays = Case(batch=4, seqlen_q=37, seqlen_k=41, kv_heads=2, group=4).arrays()
    sharded = {
        n: jax.device_put(x, NamedSharding(mesh, partition(n, x, (8, 2))))
        for n, x in arrays.items()
    }
    call = jax.jit(functools.partial(flash_attention, implementation="cute"))
    compiled = call.lower(**sharded).compile()
    assert seen == [
        ((4, 37, 8, 16), (4, 41, 2, 16)),
        ((4 // DATA, 37, 8 // MODEL, 16), (4 // DATA, 41, 1, 16)),
    ]
    assert not collectives(compiled)


def test_a_program_for_cuda_leaves_the_call_to_the_partitioner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")
    mesh = make_mesh()
    arrays = Case(batch=4, kv_heads=4, group=2, head_dim=64, head_dim_v=64).arrays(jnp.bfloat16)
    sharded = {
        n: jax.device_put(x, NamedSharding(mesh, partition(n, x, (8, 4))))
        for n, x in arrays.items()
    }
    call = jax.jit(functools.partial(flash_attention, implementation="cute"))
    text = call.trace(**sharded).lower(lowering_platforms=("cuda",)).as_text()
    assert "@CustomSPMDPartitioning" in text
    assert "sdy.sharding_rule" in text
    assert CALL_TARGET not in text  # a device's part alone calls the kernel


# ---- the rule itself -----------------------------------------------------------------------


def test_every_operand_has_a_layout() -> None:
    fields = {field.name for field in dataclasses.fields(Operands)}
    assert fields | {"out", "lse"} == set(sharding.LAYOUTS)
