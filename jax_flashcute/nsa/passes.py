"""Kernels of native sparse attention in JAX programs: platforms, vmap and meshes.

A pass is a function of arrays that computes batch entries and heads each for itself.  Its arrays'
dimensions have letters, a letter each, the batch first; which letters may be sharded, the pass
says.  Everything else follows from the letters:

- vmap folds the mapped axis into the batch;
- on meshes, automatic or explicit, every device computes its own part, without communication but
  for sums over dimensions that a result does not have.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_flashcute import dispatch, plan
from jax_flashcute.dispatch import Implementation, ServedBy
from jax_flashcute.kernels import nsa
from jax_flashcute.kernels.nsa import NSAKernelKey
from jax_flashcute.promotion import of_any_rank
from jax_flashcute.sharding import axes_left_to_xla, axes_of, without_mesh

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Pass:
    """A pass by its static part; calling it computes the results where the arrays are.

    Attributes:
      served_by: the kernel, the XLA path, or what the platform has.
    """

    served_by: ServedBy

    inputs: ClassVar[tuple[str, ...]]
    """Letters of each input's dimensions; the last input may be absent."""
    results: ClassVar[tuple[str, ...]]
    """Letters of each result's dimensions."""
    local: ClassVar[str]
    """The letters that may be sharded."""
    shared: ClassVar[tuple[int, ...]] = ()
    """Inputs whose batch may be 1 and then holds for all entries."""

    def kernel(self, *arrays: Any) -> Sequence[jax.Array]:
        """The results by the kernel."""
        raise NotImplementedError

    def formula(self, *arrays: Any) -> Sequence[jax.Array]:
        """The results by XLA."""
        raise NotImplementedError

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return _results(self, *arrays)


# Under jit, so that lowering it inside a ``shard_map`` does not trace its primitives again, with
# types that vary over a mesh.
@functools.partial(jax.jit, static_argnums=0)
def _results(one: Pass, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    def kernel(*arrays):
        return tuple(one.kernel(*arrays))

    @of_any_rank
    def formula(*arrays):
        return tuple(one.formula(*arrays))

    return dispatch.choose(one.served_by, kernel, formula, *arrays)


def served_by(
    implementation: Implementation,
    what: str,
    shapes: Sequence[tuple[str, Any]],
    head_dims: Sequence[Any],
    key: NSAKernelKey,
) -> ServedBy:
    """What serves a pass; see ``dispatch.served_by``.

    Args:
      implementation: ``"cute"``, ``"xla"`` or None.
      what: the pass in words, for a refusal.
      shapes: the arrays of one 16-bit dtype, by name.
      head_dims: the head_dims among their dimensions.
      key: the kernel.

    Raises:
      NotImplementedError: ``"cute"`` cannot serve it.
    """
    if implementation not in dispatch.IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {dispatch.IMPLEMENTATIONS}; got {implementation!r}"
        )
    if implementation == "xla":
        return "xla"
    target = plan.target()
    reasons = nsa.reasons_against(shapes, head_dims, target.arch if target else None)
    if not reasons and target is not None:
        from jax_flashcute.ffi import store

        reasons = store.reasons_against(plan.make_nsa_plan(key))
    if not reasons:
        return "cute" if implementation == "cute" else "platform"
    if implementation == "cute":
        raise NotImplementedError(
            f'implementation="cute" has no kernel for {what}:\n'
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    return "xla"


def run(one: Pass, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """A pass under any vmap and on any mesh; it has no derivatives."""
    folded = custom_vmap(functools.partial(_bind, one))

    @folded.def_vmap
    def rule(axis_size, in_batched, *arrays):  # pyright: ignore[reportUnusedFunction]
        B = arrays[0].shape[1 if in_batched[0] else 0]
        fold = functools.partial(_fold, axis_size, B)
        pairs = enumerate(zip(arrays, in_batched, strict=True))
        results = run(one, *(fold(*x, is_shared=i in one.shared) for i, x in pairs))
        results = tuple(x.reshape(axis_size, B, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return folded(*arrays)


def _fold(
    axis_size: int, B: int, array: jax.Array, is_batched: bool, *, is_shared: bool
) -> jax.Array:
    """(axis_size, 1|B, ...) if batched, else (1|B, ...), to (axis_size * B, ...).

    One that is shared and neither batched nor of several entries stays as it is.
    """
    if is_shared and not is_batched and array.shape[0] == 1:
        return array
    array = array if is_batched else array[None]
    shape = (axis_size, B, *array.shape[2:])
    return jnp.broadcast_to(array, shape).reshape(axis_size * B, *shape[2:])


def _bind(one: Pass, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    left_to_xla = axes_left_to_xla()
    if left_to_xla:
        if one.served_by == "cute":
            raise NotImplementedError(
                'implementation="cute" inside a shard_map over some axes of a mesh: the axes '
                f"{', '.join(left_to_xla)} are left to XLA, which cannot partition a kernel there; "
                "map over all axes of the mesh"
            )
        one = dataclasses.replace(one, served_by="xla")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    # The program knows nothing of the mesh around it, nor of types that vary over it.
    function = one if left_to_xla else _partitioned(one, shapes)
    program = without_mesh(jax.make_jaxpr(function))(*shapes)
    return tuple(_pass_p.bind(*arrays, one=one, program=program))


# ---- meshes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sharding:
    """Over which mesh axes each letter is sharded, and how long its dimension is."""

    axes: Mapping[str, Axes]
    sizes: Mapping[str, int]

    @staticmethod
    def of(one: Pass, arrays: Sequence, specs: Sequence[tuple], mesh: Mapping[str, int]):
        """From the inputs' shapes and partition specs.

        Raises:
          NotImplementedError: a dimension that a pass needs whole is sharded, or does not divide.
        """
        sizes = _sizes(one, arrays)
        axes: dict[str, Axes] = {}
        for letters, array, spec in zip(one.inputs, arrays, specs, strict=False):
            for letter, size, entry in zip(letters, array.shape, spec, strict=False):
                over = axes_of(entry)
                if over and letter not in one.local:
                    raise NotImplementedError(
                        f"dimension {letters.index(letter)} of an array {array.shape} is sharded "
                        f"over the mesh axis {', '.join(over)}: only batch and heads can be "
                        "sharded; reshard it first"
                    )
                taken = {a for other, axes_ in axes.items() if other != letter for a in axes_}
                if over and size == sizes[letter] and letter not in axes:
                    axes[letter] = tuple(a for a in over if a not in taken)
        for letter, over in axes.items():
            devices = math.prod(mesh[a] for a in over)
            if sizes[letter] % devices:
                raise NotImplementedError(
                    f"{sizes[letter]} batch entries or heads cannot be divided among the {devices} "
                    f"devices of the mesh axis {', '.join(over)}"
                )
        return _Sharding(axes, sizes)

    def spec(self, letters: str, shape) -> PartitionSpec:
        """The partition of an array of this global shape."""
        pairs = zip(letters, shape, strict=True)
        return PartitionSpec(
            *((self.axes.get(x) or None) if self.sizes.get(x) == n else None for x, n in pairs)
        )

    def summed_over(self, letters: str) -> Axes:
        """The axes over whose devices a result is to be summed."""
        return tuple(a for x, axes in self.axes.items() if x not in letters for a in axes)


def _sizes(one: Pass, arrays: Sequence) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for letters, array in zip(one.inputs, arrays, strict=False):
        for letter, size in zip(letters, array.shape, strict=True):
            sizes.setdefault(letter, size)
    return sizes


def _partitioned(one: Pass, shapes: Sequence[jax.ShapeDtypeStruct]):
    """The pass as a function that XLA's partitioner runs on each device's part."""

    def partition(mesh, arguments, results):
        for x in arguments:
            if not isinstance(x.sharding, NamedSharding):
                raise NotImplementedError(
                    "native sparse attention's operands are sharded over a mesh without names; "
                    "put the program's arrays on one mesh, or call it under jax.set_mesh"
                )
        specs = [tuple(x.sharding.spec) for x in arguments]
        sharding = _Sharding.of(one, arguments, specs, dict(mesh.shape))

        def placed(all_letters, arrays):
            pairs = zip(all_letters, arrays, strict=False)
            return tuple(NamedSharding(mesh, sharding.spec(s, x.shape)) for s, x in pairs)

        def on_device(*arrays):
            found = zip(one.results, without_mesh(one)(*arrays), strict=True)
            axes = [(sharding.summed_over(letters), x) for letters, x in found]
            return tuple(lax.psum(x, over) if over else x for over, x in axes)

        return mesh, on_device, placed(one.results, results), placed(one.inputs, arguments)

    function = custom_partitioning(one)
    sizes = _sizes(one, shapes)
    fresh = (f"x{i}" for i in range(10_000))

    def mapping(letters: str, shape) -> str:
        return " ".join(
            x if x in one.local and sizes[x] == n else next(fresh)
            for x, n in zip(letters, shape, strict=True)
        )

    results = jax.eval_shape(one, *shapes)
    rule = " -> ".join(
        ", ".join(mapping(*x) for x in zip(all_letters, (a.shape for a in arrays), strict=False))
        for all_letters, arrays in ((one.inputs, shapes), (one.results, results))
    )
    function.def_partition(partition, sharding_rule=rule)
    return function


# ---- the primitive -------------------------------------------------------------------------


def _abstract_eval(*avals: Any, one: Pass, program):
    specs = [tuple(aval.sharding.spec) for aval in avals]
    sharding = _Sharding.of(one, avals, specs, dict(avals[0].sharding.mesh.shape))
    return [
        avals[0].update(
            shape=x.shape,
            dtype=x.dtype,
            weak_type=False,
            sharding=avals[0].sharding.update(spec=sharding.spec(letters, x.shape)),
        )
        for letters, x in zip(one.results, program.out_avals, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="one")
def _compiled(*arrays, one: Pass):
    return list(_bind(one, *arrays))


def _impl(*arrays, one: Pass, program):
    del program  # a new object every time; the rest says it all
    with jax.disable_jit(False):
        return _compiled(*arrays, one=one)


def _lowering(ctx: mlir.LoweringRuleContext, *args, one: Pass, program):
    del one
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(ctx, *args)


_pass_p = Primitive("native_sparse_attention_pass")
_pass_p.multiple_results = True
_pass_p.def_impl(_impl)
_pass_p.def_abstract_eval(_abstract_eval)
mlir.register_lowering(_pass_p, _lowering)
