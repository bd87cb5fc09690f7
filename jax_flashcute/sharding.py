"""Meshes: every device computes its own batch entries and heads, with no communication.

Each pass is one primitive, whose types and partitions follow one rule, so that no operand of a
kernel is gathered unawares:

- automatic meshes: Shardy propagates shardings through the call, and its partition is that call
  on each device's part;
- explicit meshes: out and lse carry the sharding of batch and heads, gradients their operands';
- ``shard_map``: the call is as local as everything else; with ``check_vma`` the results vary over
  the axes over which the operands vary.

The batch is sharded as query's is, and heads as query's are, or as key's where only key's are.
Key/value heads that do not divide among the devices are replicated: each device takes those that
its query heads read, and their gradients are summed over the devices.  Lengths and head_dims cannot
be sharded, which is refused.  Arrays that masks and scores close over are replicated, but for a
batch dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from jax_flashcute import dispatch
from jax_flashcute.dispatch import Direction, Implementation, ServedBy
from jax_flashcute.promotion import of_any_rank, own_sharding
from jax_flashcute.spec import AttentionSpec, Operands, Residuals

LAYOUTS: Mapping[str, str] = {
    "query": "btnh",
    "key": "bskh",
    "value": "bskh",
    "q_offset": "b",
    "query_seq_lengths": "b",
    "key_value_seq_lengths": "b",
    "bias": "bnts",
    "mask": "bnts",
    "packed_mask": "bnt",
    "sinks": "bn",
    "batch_index": "b",
    "head_index": "n",
    "mask_mod_arrays": "b",
    "score_mod_arrays": "b",
    "page_table": "b",
    "segment_ids": "b",
    "block_mask": "bn",
    "out": "btnh",
    "lse": "btn",
}
"""The dimensions of every array of a call, by name; what follows those listed has no name."""

PAGED_LAYOUTS: Mapping[str, str] = {**LAYOUTS, "key": "pskh", "value": "pskh"}
"""Those of a call whose keys and values lie in pages, which no batch entry owns."""

_NAMES = {"t": "query length", "s": "key length", "h": "head_dim"}
Axes = tuple[str, ...]


def forward(spec: AttentionSpec, implementation: Implementation, operands: Operands) -> Residuals:
    """The forward pass by ``"cute"``, ``"xla"`` or, for None, what the platform has; on any mesh.

    Raises:
      NotImplementedError: no kernel serves a call that asked for one; or a length or head_dim is
        sharded (on automatic meshes, compiling fails with these words).
    """
    return _bind("fwd", spec, implementation, operands)


def backward(
    spec: AttentionSpec,
    implementation: Implementation,
    operands: Operands,
    residuals: Residuals,
    dout: jax.Array,
    dlse: jax.Array,
) -> Operands:
    """The backward pass, likewise; the residuals may come from any implementation."""
    cotangents = Residuals(out=dout, lse=dlse)
    return _bind("bwd", spec, implementation, operands, residuals, cotangents)


def with_automatic_axes(
    function: Callable[..., jax.Array], query: jax.Array, *others: Any
) -> jax.Array:
    """``function(query, *others)``, computed as on an automatic mesh if it is on an explicit one.

    There the result's type has the sharding of the query's batch and heads.

    Args:
      function: gives (B, T, N, Hv) of arrays (B, T, N, H) and trees of arrays.

    Raises:
      NotImplementedError: the query's length or head_dim is sharded.
    """
    sharding = own_sharding(query)
    if sharding is None:
        return function(query, *others)
    batch, length, heads, head_dim = sharding.spec
    for letter, entry in (("t", length), ("h", head_dim)):
        if entry is not None:
            raise _only_batch_and_heads(letter, "query", axes_of(entry))
    out = NamedSharding(sharding.mesh, PartitionSpec(batch, None, heads))
    automatic = cast(Callable[..., jax.Array], jax.sharding.auto_axes(function, out_sharding=out))
    return automatic(query, *others)


def axes_of(entry: str | tuple[str, ...] | None) -> Axes:
    """The mesh axes of an entry of a partition spec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _only_batch_and_heads(letter: str, name: str, over: Axes) -> NotImplementedError:
    return NotImplementedError(
        f"the {_NAMES[letter]} of {name} is sharded over the mesh axis {', '.join(over)}: only "
        "batch and heads can be sharded; reshard it first"
    )


@dataclass(frozen=True)
class _Pass:
    """The static part of a pass.

    Attributes:
      direction: forward or backward.
      spec: the static part of the call.
      implementation: what was asked for.
      served_by: what that is for the whole call.
      tree: structure of the arguments: ``(operands,)`` or ``(operands, residuals, cotangents)``.
    """

    direction: Direction
    spec: AttentionSpec
    implementation: Implementation
    served_by: ServedBy
    tree: Any

    @staticmethod
    def of(direction: Direction, spec: AttentionSpec, implementation: Implementation, arguments):
        """The pass for these arguments, be it the whole call or one device's part of it."""
        served_by = dispatch.served_by(spec, implementation, arguments[0], direction)
        tree = jax.tree.structure(arguments)
        return _Pass(direction, spec, implementation, served_by, tree)

    def __call__(self, *leaves: jax.Array) -> Residuals | Operands:
        """The results, computed where the arguments are."""
        operands, *rest = self.tree.unflatten(leaves)
        if self.direction == "fwd":
            return dispatch.forward(self.spec, self.served_by, operands)
        residuals, cotangents = rest
        return dispatch.backward(
            self.spec, self.served_by, operands, residuals, cotangents.out, cotangents.lse
        )

    def reads_heads(self) -> bool:
        """Whether a mask or a score depends on the number of the head."""
        mask_mod, score_mod = self.spec.mask_mod, self.spec.score_mod
        return (mask_mod is not None and mask_mod.reads(1)) or (
            score_mod is not None and score_mod.reads(2)
        )


def _bind(direction: Direction, spec: AttentionSpec, implementation: Implementation, *arguments):
    left_to_xla = axes_left_to_xla()
    if left_to_xla and implementation == "cute":
        raise NotImplementedError(
            'implementation="cute" inside a shard_map over some axes of a mesh: the axes '
            f"{', '.join(left_to_xla)} are left to XLA, which cannot partition a kernel there; "
            "map over all axes of the mesh"
        )
    one = _Pass.of(direction, spec, "xla" if left_to_xla else implementation, arguments)
    leaves = jax.tree.leaves(arguments)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    # The program knows nothing of the mesh around it, nor of types that vary over it.
    function = one if left_to_xla else _partitioned(one, shapes)
    program, results = without_mesh(jax.make_jaxpr(function, return_shape=True))(*shapes)
    flat = _attention_p.bind(*leaves, one=one, program=program)
    return jax.tree.structure(results).unflatten(flat)


def axes_left_to_xla() -> Axes:
    """The axes of a mesh over which a ``shard_map`` does not map, inside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return ()
    return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1)


def without_mesh(function):
    """``function``, traced as if no mesh were around: a device's part of a program has none."""

    @functools.wraps(function)
    @of_any_rank
    def wrapped(*arguments):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return function(*arguments)

    return wrapped


# ---- types ---------------------------------------------------------------------------------


def _abstract_eval(*avals: Any, one: _Pass, program):
    del program
    arguments = one.tree.unflatten(avals)
    operands: Any = arguments[0]  # of abstract arrays
    query, value = operands.query, operands.value
    specs = [tuple(aval.sharding.spec) for aval in avals]
    axes = _Sharding.of(one, avals, specs, dict(query.sharding.mesh.shape))
    if one.direction == "bwd":
        gradients = _gradients_of(operands)
        return [x.update(weak_type=False) for x in jax.tree.leaves(gradients)]

    def result(name: str, shape, dtype):
        spec = axes.spec(name, shape)
        sharding = query.sharding.update(spec=spec)
        return query.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

    B, T, N, _ = query.shape
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    out = result("out", (B, T, N, value.shape[3]), query.dtype)
    return [out, result("lse", (B, T, N), statistics)]


def _gradients_of(operands: Operands) -> Operands:
    """Those of the operands that have a gradient, None in the others' places."""

    def floating(x):
        return x if jnp.issubdtype(x.dtype, jnp.floating) else None

    return jax.tree.map(floating, dataclasses.replace(operands, mask_mod_arrays=()))


def _named(tree) -> Iterator[tuple[str, Any]]:
    """Every array of arguments or results with the name of its field."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield next(k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)), leaf


def _layouts(operands: Operands) -> Mapping[str, str]:
    return LAYOUTS if operands.page_table is None else PAGED_LAYOUTS


@dataclass(frozen=True)
class _Sharding:
    """Over which mesh axes batch, query heads and key/value heads are sharded.

    ``sizes`` are the lengths of these dimensions by their letters, ``layouts`` those of the call.
    """

    axes: Mapping[str, Axes]
    sizes: Mapping[str, int]
    layouts: Mapping[str, str]

    @staticmethod
    def of(one: _Pass, arrays: Sequence, specs: Sequence[tuple], mesh: Mapping[str, int]):
        """From the arguments' shapes and partition specs.

        Raises:
          NotImplementedError: something else is sharded, or a length does not divide.
        """
        operands: Operands = one.tree.unflatten(arrays)[0]
        B, _, N, _ = operands.query.shape
        sizes = {"b": B, "n": N, "k": operands.key.shape[2]}
        layouts = _layouts(operands)
        axes: dict[str, Axes] = {}
        for (name, array), spec in zip(_named(one.tree.unflatten(arrays)), specs, strict=True):
            for letter, size, entry in zip(layouts[name], array.shape, spec, strict=False):
                over = axes_of(entry)
                if not over:
                    continue
                if letter in _NAMES:
                    raise _only_batch_and_heads(letter, name, over)
                if size == sizes[letter]:
                    axes.setdefault(letter, over)
        axes["n"] = axes.get("n", axes.get("k", ()))
        axes["n"] = tuple(a for a in axes["n"] if a not in axes.get("b", ()))
        axes["b"] = axes.get("b", ())
        for letter, name in (("b", "batch"), ("n", "query heads")):
            devices = math.prod(mesh[a] for a in axes[letter])
            if devices > 1 and sizes[letter] % devices:
                raise NotImplementedError(
                    f"{sizes[letter]} {name} cannot be divided among the {devices} devices of the "
                    f"mesh axis {', '.join(axes[letter])}"
                )
        devices = math.prod(mesh[a] for a in axes["n"])
        axes["k"] = axes["n"] if devices > 1 and sizes["k"] % devices == 0 else ()
        return _Sharding(axes, sizes, layouts)

    def spec(self, name: str, shape) -> PartitionSpec:
        """The partition of an array of this name and global shape."""
        return PartitionSpec(*(axes or None for axes in self._entries(name, shape)))

    def summed_over(self, name: str, shape) -> Axes:
        """The axes over whose devices a gradient of this global shape is to be summed."""
        kept = {axis for axes in self._entries(name, shape) for axis in axes}
        return tuple(a for a in (*self.axes["b"], *self.axes["n"]) if a not in kept)

    def _entries(self, name: str, shape) -> list[Axes]:
        letters = self.layouts[name].ljust(len(shape))
        return [
            self.axes[letter] if letter in self.axes and size == self.sizes[letter] else ()
            for letter, size in zip(letters, shape, strict=True)
        ]


# ---- partitions ----------------------------------------------------------------------------


def _partitioned(one: _Pass, shapes: Sequence[jax.ShapeDtypeStruct]):
    """The pass as a function that XLA's partitioner runs on each device's part."""

    def partition(mesh, arguments, results):
        specs = []
        for x in arguments:
            if not isinstance(x.sharding, NamedSharding):
                raise NotImplementedError(
                    "flash_attention's operands are sharded over a mesh without names; put the "
                    "program's arrays on one mesh, or call it under jax.set_mesh"
                )
            specs.append(tuple(x.sharding.spec))
        sharding = _Sharding.of(one, arguments, specs, dict(mesh.shape))

        def placed(tree):
            specs = [sharding.spec(name, x.shape) for name, x in _named(tree)]
            placed = [NamedSharding(mesh, spec) for spec in specs]
            return jax.tree.structure(tree).unflatten(placed)

        wanted = placed(one.tree.unflatten(arguments))
        return (
            mesh,
            functools.partial(_on_device, one, sharding, shapes),
            placed(results),
            tuple(jax.tree.leaves(wanted)),
        )

    function = custom_partitioning(one)
    function.def_partition(partition, sharding_rule=functools.partial(_sharding_rule, one, shapes))
    return function


def _sharding_rule(one: _Pass, shapes, mesh, argument_types, result_types):
    """The dimensions that Shardy may identify: batch and heads, each with itself.

    A group's heads are tied to their key/value head only where any sharding of the mesh divides the
    key/value heads: otherwise Shardy would cut a mesh axis in two, which JAX cannot express.
    """
    del argument_types, result_types
    operands: Operands = one.tree.unflatten(shapes)[0]
    N, K = operands.query.shape[2], operands.key.shape[2]
    tied = not mesh.empty and K % mesh.size == 0 and 1 < K < N
    factors = {"b": "b", "n": "(k g)" if tied else "n", "k": "n" if K == N else "k"}
    sizes = {"b": operands.query.shape[0], "n": N, "k": K}
    layouts = _layouts(operands)
    fresh = (f"x{i}" for i in range(10_000))

    def mapping(name: str, shape) -> str:
        letters = layouts[name].ljust(len(shape), "x")
        return " ".join(
            factors[letter] if letter in factors and size == sizes[letter] else next(fresh)
            for letter, size in zip(letters, shape, strict=True)
        )

    arguments = one.tree.unflatten(shapes)
    results = jax.eval_shape(one, *shapes)
    rule = " -> ".join(
        ", ".join(mapping(name, x.shape) for name, x in _named(tree))
        for tree in (arguments, results)
    )
    # The size of k is that of key's dimension.
    return rule, ({"g": N // K} if tied else {})


@without_mesh
def _on_device(one: _Pass, sharding: _Sharding, shapes, *leaves: jax.Array):
    """The pass on one device's part of the arguments, with sums over the devices where due."""
    operands, *rest = one.tree.unflatten(leaves)
    global_shapes: Operands = one.tree.unflatten(shapes)[0]
    heads = None
    if sharding.axes["n"]:
        N = operands.query.shape[2]
        first = lax.axis_index(sharding.axes["n"]) * N
        if one.reads_heads():
            operands = dataclasses.replace(operands, head_index=first + jnp.arange(N))
        if not sharding.axes["k"]:
            group = sharding.sizes["n"] // sharding.sizes["k"]
            # As many neighbouring heads as always read the same key/value head.
            together = math.gcd(N, group)
            heads = (first + together * jnp.arange(N // together)) // group
            operands = dataclasses.replace(
                operands,
                key=jnp.take(operands.key, heads, axis=2),
                value=jnp.take(operands.value, heads, axis=2),
            )
    local = (operands, *rest)
    results = _Pass.of(one.direction, one.spec, one.implementation, local)(*jax.tree.leaves(local))
    if isinstance(results, Residuals):
        return results
    if heads is not None:

        def all_heads(gradient: jax.Array) -> jax.Array:
            B, S, _, H = gradient.shape
            dtype = jnp.promote_types(gradient.dtype, jnp.float32)
            zeros = jnp.zeros((B, S, sharding.sizes["k"], H), dtype)
            return zeros.at[:, :, heads].add(gradient.astype(dtype))

        results = dataclasses.replace(
            results, key=all_heads(results.key), value=all_heads(results.value)
        )
    summed = []
    wholes = jax.tree.leaves(_gradients_of(global_shapes))
    for (name, gradient), whole in zip(_named(results), wholes, strict=True):
        axes = sharding.summed_over(name, whole.shape)
        summed.append((lax.psum(gradient, axes) if axes else gradient).astype(whole.dtype))
    return jax.tree.structure(results).unflatten(summed)


# ---- the primitive -------------------------------------------------------------------------


def _impl(*leaves, one: _Pass, program):
    del program  # a new object every time; the rest says it all
    # Without it, a primitive that is evaluated would come here again and again.
    with jax.disable_jit(False):
        return _compiled(*leaves, one=one)


@functools.partial(jax.jit, static_argnames="one")
def _compiled(*leaves, one: _Pass):
    arguments = one.tree.unflatten(leaves)
    return jax.tree.leaves(_bind(one.direction, one.spec, one.implementation, *arguments))


def _lowering(ctx: mlir.LoweringRuleContext, *args, one: _Pass, program):
    del one
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(ctx, *args)


_attention_p = Primitive("flash_attention")
_attention_p.multiple_results = True
_attention_p.def_impl(_impl)
_attention_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(_attention_p, _lowering)
