"""Every transform of JAX over every feature, one table: each cell passes or raises what is written.

``--record-transforms FILE`` writes the table of a run, from which a page of the documentation is
made.  With workers, ``--dist loadgroup`` keeps the cells of a feature together, whose references
and kernels are then compiled once.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_flashcute import flash_attention, make_block_mask, masks, paged_attention
from jax_flashcute.export import EXPORT_CHECKS, register_call_target
from jax_flashcute.nsa import NSAConfig, native_sparse_attention
from tests.arrays import random
from tests.compare import assert_close, cotangent

B, T, N, K = 2, 24, 4, 2
PAGE = 8
NO_DERIVATIVES = "paged_attention has no derivatives"
BATCHED = ("query", "key", "value", "segment_ids", "page_table", "kv_lengths")


@functools.cache
def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


@dataclass(frozen=True)
class Feature:
    """A call: ``attend(arrays, implementation) -> out``, and what it takes besides q, k and v."""

    attend: Callable[[dict, str | None], jax.Array]
    more: Callable[[], dict[str, jax.Array]] = dict
    derivatives: str | None = None  # what is raised in their place


def dense(arrays: dict, implementation: str | None, **options) -> jax.Array:
    return flash_attention(**arrays, **options, implementation=implementation)


def without(arrays: dict, name: str) -> tuple[jax.Array, dict]:
    return arrays[name], {n: x for n, x in arrays.items() if n != name}


def masked(arrays, implementation):
    reach, arrays = without(arrays, "reach")
    visible = masks.Mask(lambda b, h, q, kv: q - kv < reach[h]) | masks.dilated(T, 5)
    return dense(arrays, implementation, mask_mod=visible)


def scored(arrays, implementation):
    table, arrays = without(arrays, "table")
    return dense(arrays, implementation, score_mod=lambda s, b, h, q, kv: s + table[h, q - kv + T])


def in_blocks(arrays, implementation):
    visible = masks.sliding_window(6)
    listed = make_block_mask(visible, arrays["query"].shape[0], N, T, T, tile_m=8, tile_n=8)
    return dense(arrays, implementation, mask_mod=visible, block_mask=listed)


def paged(arrays, implementation):
    return paged_attention(**arrays, implementation=implementation)


def sparse(arrays, implementation):
    config = NSAConfig(block=8, num_selected=2, window=6, query_tile=8)
    return native_sparse_attention(**arrays, config=config, implementation=implementation)


FEATURES = {
    "dense": Feature(functools.partial(dense, is_causal=True)),
    "mask": Feature(
        masked,
        lambda: {"reach": jnp.asarray([3, 9, 1, 20], jnp.int32)},
    ),
    "score": Feature(scored, lambda: {"table": random(3, N, 2 * T)}),
    "bias": Feature(dense, lambda: {"bias": random(4, 1, N, T, T)}),
    "block mask": Feature(in_blocks),
    "segments": Feature(
        functools.partial(dense, is_causal=True),
        lambda: {"segment_ids": jnp.asarray([[0] * 9 + [1] * 15, [2] * 20 + [-1] * 4], jnp.int32)},
    ),
    "sinks": Feature(dense, lambda: {"sinks": random(5, N)}),
    "paged": Feature(
        paged,
        lambda: {
            "page_table": jnp.asarray([[1, 0, 2], [0, 1, 2]], jnp.int32),
            "kv_lengths": jnp.asarray([T, 13], jnp.int32),
        },
        NO_DERIVATIVES,
    ),
    "NSA": Feature(sparse),
}


def inputs(feature: str) -> dict[str, jax.Array]:
    dtype, H = (jnp.bfloat16, 64) if on_gpu() else (jnp.float32, 8)
    shapes = {"query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, H)}
    if feature == "paged":
        pages = (2 * T // PAGE, PAGE, K, H)
        shapes = {"query": (B, 5, N, H), "k_pages": pages, "v_pages": pages}
    arrays = {
        name: random(i, *shape, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())
    }
    return arrays | FEATURES[feature].more()


def is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def gradients(attend, arrays: dict) -> dict:
    """Of every floating-point array, for a fixed, uneven cotangent."""

    def loss(floating):
        out = attend(arrays | floating).astype(jnp.float32)
        return jnp.sum(out * cotangent(out, 1))

    return jax.grad(loss)({n: x for n, x in arrays.items() if is_floating(x)})


MAPPED = ("query", "key", "value")


def stacked(arrays: dict) -> tuple[dict, dict]:
    """Two calls along an axis in front, and which of the arrays have it."""
    axes = {name: 0 if name in MAPPED else None for name in arrays}
    return {n: jnp.stack([x, -x]) if axes[n] == 0 else x for n, x in arrays.items()}, axes


# ---- transforms ----------------------------------------------------------------------------
#
# Each takes a call and its arrays and returns a tree of results; the reference computes the same
# by other means (``PLAIN``) where the transform is no part of what is computed.


def vmap(attend, arrays):
    batch, axes = stacked(arrays)
    return jax.vmap(attend, in_axes=(axes,))(batch)


def vmap_of_grad(attend, arrays):
    batch, axes = stacked(arrays)
    return jax.vmap(functools.partial(gradients, attend), in_axes=(axes,))(batch)


def grad_of_vmap(attend, arrays):
    batch, axes = stacked(arrays)
    return gradients(jax.vmap(attend, in_axes=(axes,)), batch)


def one_by_one(of_one, attend, arrays):
    """``vmap`` without it."""
    batch, axes = stacked(arrays)
    each = [{n: x[i] if axes[n] == 0 else x for n, x in batch.items()} for i in range(2)]
    return jax.tree.map(lambda *x: jnp.stack(x), *(of_one(attend, x) for x in each))


def grad_of_both(attend, arrays):
    batch, axes = stacked(arrays)

    def both(batch):
        each = [{n: x[i] if axes[n] == 0 else x for n, x in batch.items()} for i in range(2)]
        return jnp.stack([attend(x) for x in each])

    return gradients(both, batch)


def checkpoint(attend, arrays):
    kept = jax.checkpoint_policies.save_only_these_names("flash_attention_lse")
    return gradients(jax.checkpoint(attend, policy=kept), arrays)


def scan(attend, arrays):
    def layer(query, scale):
        return attend(arrays | {"query": query}) * scale.astype(query.dtype), None

    return jax.lax.scan(layer, arrays["query"], jnp.asarray([1.0, 0.5]))[0]


def layers(attend, arrays):
    query = attend(arrays)
    return attend(arrays | {"query": query}) * jnp.asarray(0.5, query.dtype)


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    return jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])


def partitions(arrays: dict) -> dict:
    return {n: PartitionSpec("data") if n in BATCHED else PartitionSpec() for n in arrays}


def with_gradients(feature: str):
    """Out, and gradients where there are any."""
    if FEATURES[feature].derivatives:
        return lambda attend, arrays: {"out": attend(arrays)}
    return lambda attend, arrays: {"out": attend(arrays)} | gradients(attend, arrays)


def on_mesh(axis_type: AxisType, compute, attend, arrays):
    mesh = mesh_of(axis_type)
    placed = {
        n: jax.device_put(arrays[n], NamedSharding(mesh, p)) for n, p in partitions(arrays).items()
    }
    context = jax.set_mesh(mesh) if axis_type == AxisType.Explicit else contextlib.nullcontext()
    with context:
        found = run(compute, attend, placed)
    assert found["out"].sharding.spec[0] == "data"
    return found


def shard_map(compute, attend, arrays):
    mesh, batch = mesh_of(AxisType.Auto), PartitionSpec("data")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(partitions(arrays),), out_specs=batch)
    return run(compute, mapped, arrays)


def export(attend, arrays):
    if on_gpu():
        register_call_target()
    exported = jax.export.export(jax.jit(attend), disabled_checks=EXPORT_CHECKS)(arrays)
    return jax.export.deserialize(exported.serialize()).call(arrays)


def donation(attend, arrays):
    query, others = without(arrays, "query")
    donated = jnp.array(query)
    call = jax.jit(lambda q, others: attend(others | {"query": q}), donate_argnums=0)
    out = call(donated, others)
    assert donated.is_deleted()
    return out


def forward(attend, arrays):
    return attend(arrays)


OPTIONS = {"xla_backend_optimization_level": 0}


def run(compute, attend, arrays):
    """Compiled as a whole; each program runs once, so its code need not be good."""
    options = None if on_gpu() else OPTIONS
    call = jax.jit(functools.partial(compute, attend), compiler_options=options)
    return call(arrays)


def jitted(compute):
    return functools.partial(run, compute)


@dataclass(frozen=True)
class Transform:
    """How the call is transformed, what the reference computes for it, and whether that takes
    derivatives."""

    apply: Callable
    plain: Callable
    derivatives: bool = False


def transforms(feature: str) -> dict[str, Transform]:
    both = with_gradients(feature)
    each, each_gradient = (functools.partial(one_by_one, f) for f in (forward, gradients))
    return {
        "jit": Transform(jitted(forward), forward),
        "grad": Transform(jitted(gradients), gradients, True),
        "vmap": Transform(jitted(vmap), each),
        "vmap(grad)": Transform(jitted(vmap_of_grad), each_gradient, True),
        "grad(vmap)": Transform(jitted(grad_of_vmap), grad_of_both, True),
        "checkpoint": Transform(jitted(checkpoint), gradients, True),
        "scan over layers": Transform(jitted(scan), layers),
        "shard_map": Transform(functools.partial(shard_map, both), both),
        "auto mesh": Transform(functools.partial(on_mesh, AxisType.Auto, both), both),
        "explicit mesh": Transform(functools.partial(on_mesh, AxisType.Explicit, both), both),
        "export": Transform(export, forward),
        "donation": Transform(donation, forward),
    }


@functools.cache
def expected(feature: str) -> dict:
    """What the reference gives for every transform that has derivatives where the call has."""
    attend = functools.partial(FEATURES[feature].attend, implementation="reference")
    plain = {
        name: t.plain
        for name, t in transforms(feature).items()
        if not (t.derivatives and FEATURES[feature].derivatives)
    }

    def every(attend, arrays):
        results = {}
        for name, compute in plain.items():
            same = next((n for n in results if plain[n] == compute), None)
            results[name] = results[same] if same else compute(attend, arrays)
        return results

    return run(every, attend, inputs(feature))


TRANSFORMS = tuple(transforms("dense"))


def cells() -> list:
    return [
        pytest.param(f, t, marks=pytest.mark.xdist_group(f), id=f"{f}-{t}")
        for f, t in itertools.product(FEATURES, TRANSFORMS)
    ]


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> list:
    """The cell as ``--record-transforms`` writes it; the test replaces the last item."""
    feature, transform = (request.getfixturevalue(name) for name in ("feature", "transform"))
    place = [list(FEATURES).index(feature), TRANSFORMS.index(transform)]
    noted = [place, feature, transform, "fails"]
    request.node.user_properties.append(("transform", noted))
    return noted


@pytest.mark.parametrize(("feature", "transform"), cells())
def test_cell(feature: str, transform: str, outcome: list) -> None:
    cell = transforms(feature)[transform]
    attend = functools.partial(FEATURES[feature].attend, implementation=None)
    error = FEATURES[feature].derivatives if cell.derivatives else None
    if error is not None:
        with pytest.raises(NotImplementedError, match=error):
            cell.apply(attend, inputs(feature))
        outcome[-1] = f"NotImplementedError: {error}"
        return
    found, want = cell.apply(attend, inputs(feature)), expected(feature)[transform]
    flat, flat_want = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (found, want)
    )
    assert_close(flat, flat_want, 4e-2 if on_gpu() else 3e-5)
    outcome[-1] = "passes"
