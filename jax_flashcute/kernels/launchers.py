"""The arrays that the attention kernels take, and how their launchers are built.

What needs the CuTe DSL is imported as it is built.
"""

from collections.abc import Callable
from typing import Any

from jax_flashcute.kernels.config.sm90 import BwdConfig
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100
from jax_flashcute.kernels.config.workspace import counts_heads, has_dq_sums, takes_turns
from jax_flashcute.kernels.elements import in_fixed_point, measures
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS, KernelKey


def _element_type(key: KernelKey):
    import cutlass

    return {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[key.dtype]


def forward_arrays(key: KernelKey):
    import cutlass

    qk = (_element_type(key), (1, 1, 1, key.head_dim))
    v = (_element_type(key), (1, 1, 1, key.head_dim_v))
    lse, counter = (cutlass.Float32, (1, 1, 1)), (cutlass.Int32, (1,))
    partials = []
    if key.split_kv:
        partials = [
            (cutlass.Float32, (1, 1, 1, 1, key.head_dim_v)),
            (cutlass.Float32, (1, 1, 1, 1)),
        ]
        if key.joins_parts:
            partials.append((cutlass.Int32, (1, 1)))
    gathered = [qk, v, (cutlass.Int32, (1,))] if key.gathers_pages else []
    inputs = [qk, qk, v, *_optional_arrays(key), *_table_arrays(key)]
    inputs += [*_element_arrays(key), *_bound_arrays(key), *_list_arrays(key)]
    inputs += _packed_arrays(key)
    return [*inputs, v, lse, counter, *partials, *gathered]


def backward_arrays(key: KernelKey):
    import cutlass

    qk = (_element_type(key), (1, 1, 1, key.head_dim))
    v = (_element_type(key), (1, 1, 1, key.head_dim_v))
    rows = (cutlass.Float32, (1, 1, 1))
    counts = [(cutlass.Int32, (1, 1)) if counts_heads(key.config) else None]
    counts = counts if isinstance(key.config, BwdConfig) else []
    turns = [(cutlass.Int32, (1, 1, 1))] if takes_turns(key.config) else []
    carried = [(cutlass.Int32, (1, 1, 1)), rows] if _carries(key) else []
    others = [*_optional_arrays(key), *_element_arrays(key), *_bound_arrays(key)]
    others += [*_list_arrays(key), *_rank_arrays(key), *_packed_arrays(key)]
    others += [(cutlass.Int32, (1,))] * has_fixed_sums(key)
    sums = _gradient_arrays(key)
    of_dq = rows if has_dq_sums(key.config) else None
    results = [qk, qk, v, *sums]
    scratch = [of_dq, rows, rows, *counts, *turns, *carried]
    return [qk, qk, v, v, rows, v, rows, *others, *results, *scratch]


def _carries(key: KernelKey) -> bool:
    """Whether blocks of the backward are in parts, which carry dK and dV on."""
    return isinstance(key.config, BwdConfig) and key.config.resident_bytes > 0


def has_fixed_sums(key: KernelKey) -> bool:
    """Whether the backward sums gradients in fixed point."""
    return key.elements is not None and any(in_fixed_point(key.elements, key.config.deterministic))


def _gradient_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    """Of the gradients that the backward sums, after those of query, key and value.

    In fixed point a sum is two words of 32 bits; magnitudes of addends that are measured come last.
    """
    import cutlass

    if key.elements is None:
        return []
    found: list[tuple[Any, tuple[int, ...]]] = []
    fixed = in_fixed_point(key.elements, key.config.deterministic)
    for rank, is_fixed in zip(key.elements.summed_ranks, fixed, strict=True):
        one = (1,) * rank
        found.append((cutlass.Uint32, (*one, 2)) if is_fixed else (cutlass.Float32, one))
    return found + [(cutlass.Uint32, (1,))] * measures(key.elements, key.config.deterministic)


def _optional_arrays(key: KernelKey):
    import cutlass

    return [(cutlass.Int32, (1,)) if n in key.optional else None for n in OPTIONAL_OPERANDS]


def _table_arrays(key: KernelKey):
    """The page table, where there is one."""
    import cutlass

    return [] if key.page_size is None else [(cutlass.Int32, (1, 1))]


def _element_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    import cutlass

    element_types = {
        "bool": cutlass.Uint8,
        "int8": cutlass.Int8,
        "int16": cutlass.Int16,
        "int32": cutlass.Int32,
        "uint8": cutlass.Uint8,
        "uint16": cutlass.Uint16,
        "uint32": cutlass.Uint32,
        "float16": cutlass.Float16,
        "bfloat16": cutlass.BFloat16,
        "float32": cutlass.Float32,
    }
    types = key.elements.array_types() if key.elements is not None else []
    return [(element_types[dtype], (1,) * rank) for dtype, rank in types]


def _bound_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    import cutlass

    arrays = 0
    if key.row_bounds is not None:
        arrays = key.row_bounds.arrays()
        arrays += key.row_bounds.arrays_beside() * key.visits_both_ways
    return [(cutlass.Int32, (1, 1))] * arrays


def _list_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    import cutlass

    counts = 3 if key.direction == "fwd" else 4  # with starts: the backward's are packed
    ranks = (counts, 4) * 2 + (3, 4) * 2 * key.visits_both_ways
    return [(cutlass.Int32, (1,) * rank) for rank in ranks * key.has_lists]


def _rank_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    import cutlass

    return [(cutlass.Int32, (1, 1, 1, 1))] if key.has_ranks else []


def _packed_arrays(key: KernelKey) -> list[tuple[Any, tuple[int, ...]]]:
    import cutlass

    return [] if key.packed_mask is None else [(cutlass.Uint32, (1, 1, 1, 1))]


def _taking_named(launcher: Callable[..., None], key: KernelKey, first: int):
    """``launcher``, which takes the page table and groups of arrays by name, with these from
    ``first`` on; gradients that are summed after three others; what is carried or gathered last."""
    paged = len(_table_arrays(key))
    is_backward = key.direction == "bwd"
    sums = len(_gradient_arrays(key)) if is_backward else 0
    carries, gathers = _carries(key), key.gathers_pages
    groups = {
        "mElements": len(_element_arrays(key)),
        "mBounds": len(_bound_arrays(key)),
        "mLists": len(_list_arrays(key)),
        "mRanks": len(_rank_arrays(key)),
        "mPacked": len(_packed_arrays(key)),
        "mExponents": int(is_backward and has_fixed_sums(key)),
    }
    groups = {name: count for name, count in groups.items() if count}
    if not groups and not paged and not carries:
        return launcher

    def launch(stream, *arrays):
        named: dict[str, Any] = {"mPageTable": arrays[first]} if paged else {}
        rest = arrays[first + paged :]
        for name, count in groups.items():
            named[name], rest = rest[:count], rest[count:]
        if sums:
            named["mGradients"], rest = rest[3 : 3 + sums], rest[:3] + rest[3 + sums :]
        if gathers:
            named["mGathered"], rest = rest[-3:], rest[:-3]
        if carries:
            named["mCarried"], rest = rest[-2:], rest[:-2]
        launcher(stream, *arrays[:first], *rest, **named)

    return launch


def forward_builder(key: KernelKey):
    from jax_flashcute.kernels.common.intervals import mask_of
    from jax_flashcute.kernels.sm90.forward import ForwardSm90
    from jax_flashcute.kernels.sm100.forward import ForwardSm100

    forward = {"sm90_forward": ForwardSm90, "sm100_forward": ForwardSm100}[key.kernel]
    # Not where a sequence's parts must not follow from the others.
    lengths_vary = "key_value_seq_lengths" in key.optional and not key.batch_invariant

    def build():
        launcher = forward(
            key.config,
            _element_type(key),
            key.head_dim,
            key.head_dim_v,
            key.group,
            key.pack_gqa,
            key.scale,
            mask_of(key.interval, key.union),
            key.num_sms,
            split_kv=key.split_kv,
            lengths_vary=key.split_kv and lengths_vary,
            functions=key.elements,
            page_size=key.page_size,
            row_bounds=key.row_bounds,
            has_lists=key.has_lists,
            packed_mask=key.packed_mask,
        )
        return _taking_named(launcher, key, 6)

    return build


def backward_class(config: BwdConfig | BwdConfigSm100) -> type:
    """What makes the launcher of a configuration."""
    from jax_flashcute.kernels.sm90.backward import BackwardSm90
    from jax_flashcute.kernels.sm100.backward import BackwardSm100
    from jax_flashcute.kernels.sm100.passes import BackwardInPassesSm100

    if isinstance(config, BwdConfig):
        return BackwardSm90
    return BackwardInPassesSm100 if config.passes else BackwardSm100


def backward_builder(key: KernelKey):
    from jax_flashcute.kernels.common.intervals import mask_of

    def build():
        launcher = backward_class(key.config)(
            key.config,
            _element_type(key),
            key.head_dim,
            key.head_dim_v,
            key.group,
            key.scale,
            mask_of(key.interval, key.union),
            functions=key.elements,
            row_bounds=key.row_bounds,
            has_lists=key.has_lists,
            packed_mask=key.packed_mask,
        )
        return _taking_named(launcher, key, 10)

    return build
