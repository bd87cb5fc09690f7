"""How a kernel takes a call's mask: intervals by position, bounds of rows, or score by score."""

import dataclasses

from jax_flashcute.analysis import (
    Interval,
    KeySet,
    Program,
    RowInterval,
    analyse,
    intersection,
    rising_interval,
    rising_union,
    row_interval,
    window_interval,
)
from jax_flashcute.bounds import RowBounds
from jax_flashcute.spec import AttentionSpec, Operands

MOST_INTERVALS = 4
"""Of a mask whose intervals a kernel takes; more are looked at element by element."""


def interval_of(spec: AttentionSpec, *, has_lists: bool = False) -> Interval:
    """The keys that the kernel visits by a query's position: causal is ``kv < q + 1``.

    ``mask_mod`` is a part of it where the analysis finds one interval whose bounds rise with q;
    elsewhere it is left to single scores, and so it is with lists of tiles, of which it holds in
    some alone.
    """
    of_window, of_mask = _intervals(spec)
    return of_window if of_mask is None or has_lists else of_mask


def _intervals(spec: AttentionSpec) -> tuple[Interval, Interval | None]:
    """The interval of the window, and that of ``mask_mod`` within it, where there is one."""
    of_window = window_interval(*spec.reach)
    found = _keys(spec)
    return of_window, None if found is None else rising_interval(found[1])


def _keys(spec: AttentionSpec) -> tuple[Program, KeySet | None] | None:
    """``mask_mod`` and its keys within the window, where they are known; None without one."""
    if spec.mask_mod is None:
        return None
    program = analyse(spec.mask_mod.jaxpr)
    return program, intersection((window_interval(*spec.reach),), program.intervals())


def _other_keys(spec: AttentionSpec, operands: Operands) -> tuple[Program, KeySet | None] | None:
    """``_keys`` that are not one interval by position alone, where kernels take others.

    None with lists of tiles.
    """
    found = _keys(spec)
    if operands.block_mask is not None or found is None:
        return None
    return None if rising_interval(found[1]) is not None else found


def union_of(spec: AttentionSpec, operands: Operands) -> tuple[Interval, ...]:
    """The intervals within the window whose union ``mask_mod`` shows, where a kernel takes them.

    Empty where it is one interval, or something else; and where keys are compared with windows by
    positions within segments that may be scattered.
    """
    found, bounds = _other_keys(spec, operands), RowBounds.of(operands.segment_ids)
    if bounds is not None and bounds.compares_ids and bounds.has_positions:
        return ()
    return () if found is None else rising_union(found[1], MOST_INTERVALS) or ()


def rows_of(spec: AttentionSpec, operands: Operands) -> RowInterval | None:
    """``mask_mod`` within the window as an interval for each row, where a kernel takes its bounds.

    They are computed before the kernel, which reads them from arrays.  None with segments.
    """
    found = None if operands.segment_ids is not None else _other_keys(spec, operands)
    return None if found is None or rising_union(found[1], MOST_INTERVALS) else row_interval(*found)


def keys_of(spec: AttentionSpec, operands: Operands) -> str | None:
    """The keys that a position sees, in words; None where they are not known to be intervals."""
    if operands.packed_mask is not None:
        return None
    union = union_of(spec, operands)
    if union:
        return " or ".join(map(str, union))
    if rows_of(spec, operands) is not None:
        return "one interval for each row, computed from arrays"
    has_lists = operands.block_mask is not None
    if by_element(spec, has_lists=has_lists).mask_mod is not None:
        return None
    return str(interval_of(spec, has_lists=has_lists))


def by_element(spec: AttentionSpec, *, has_lists: bool = False) -> AttentionSpec:
    """The call without a ``mask_mod`` that ``interval_of`` holds in full."""
    if spec.mask_mod is None or _intervals(spec)[1] is None or has_lists:
        return spec
    return dataclasses.replace(spec, mask_mod=None)


def without_intervals(spec: AttentionSpec, operands: Operands) -> AttentionSpec:
    """The call without a ``mask_mod`` that the kernel takes as intervals."""
    if union_of(spec, operands) or rows_of(spec, operands) is not None:
        return dataclasses.replace(spec, mask_mod=None)
    return by_element(spec, has_lists=operands.block_mask is not None)
