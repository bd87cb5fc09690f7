"""What a call would do: which implementation serves it, why, and how."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.typing import ArrayLike

from jax_flashcute import analysis, dispatch, plan
from jax_flashcute.arguments import (
    Blocks,
    Positions,
    Window,
    checked_call,
    checked_paged_call,
    known_implementation,
    reason_against_invariance,
    with_compression,
)
from jax_flashcute.dispatch import Implementation
from jax_flashcute.kernels import description, masking, registry
from jax_flashcute.kernels.key import Direction
from jax_flashcute.spec import AttentionSpec, Operands


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why.

    Attributes:
      implementation: what was asked for.
      forward: what serves the forward pass where the program is lowered for CUDA: ``"cute"``,
        ``"xla"``, ``"reference"``, or ``"refused"``.
      backward: what serves the backward pass there.
      forward_reasons: every reason why no kernel serves the forward pass; empty if one does.
      backward_reasons: likewise for the backward pass.
      elsewhere: what serves both on every other platform.
      keys: the intervals of keys that a position sees by ``is_causal``, the window and
        ``mask_mod``, such as ``"q - 127 <= kv < q + 1"`` or ``"kv < 4 or q - 127 <= kv < q + 1"``;
        None where they are not known to be intervals.
      tiles: what the forward kernel makes of those, Hopper's where there is no GPU:
        ``{"tile_m", "tile_n", "full", "partial", "skipped"}``, counted for one head; None where
        there is none, or where offsets or lengths known at run time alone decide.
      loads: the arrays that ``mask_mod`` and ``score_mod`` read, and how: ``"uniform"`` once a row,
        ``"contiguous"`` along the keys, with how many adjacent elements, from a key that is a
        multiple of their number on, lie aligned to as many, or ``"gather"``.
      splits: parts into which the forward kernel divides the keys of a row at most, Hopper's where
        there is no GPU; shorter sequences have fewer.  None where no kernel serves the call.
      page_copies: how that kernel loads pages: ``"TMA"``, ``"asynchronous copies"``, or ``"TMA,
        once gathered"`` into arrays that the call takes beside the pages; None
        without pages.
      bias: how that kernel, Hopper's, reads a bias over queries and keys: ``"TMA, to shared
        memory"`` or ``"loads of each thread"``; None without one.
      lists: whether that kernel visits tiles by lists: ``"given"``, ``"made from mask_mod in the
        call"``, or ``"none"`` and why not.
      bits: which arguments kernels take as words of bits that are made in the call, and in which
        pass where not in both, such as ``"mask: as bits, packed in the call"``.
      backward_blocks: how blocks of the backward kernel share its work on Blackwell: ``"in pairs,
        which share products"``, ``"each alone"`` and why where others pair, or ``"a kernel for each
        gradient"``; None on Hopper, and where no kernel serves the backward pass.
    """

    implementation: Implementation
    forward: str
    backward: str
    forward_reasons: tuple[str, ...]
    backward_reasons: tuple[str, ...]
    elsewhere: str
    keys: str | None
    tiles: dict[str, int] | None
    loads: tuple[str, ...]
    splits: int | None = None
    page_copies: str | None = None
    bias: str | None = None
    lists: str = "none"
    bits: tuple[str, ...] = ()
    backward_blocks: str | None = None

    def __str__(self) -> str:
        lines = [f"implementation={self.implementation!r}"]
        passes = (
            ("forward", self.forward, self.forward_reasons),
            ("backward", self.backward, self.backward_reasons),
        )
        for name, served_by, reasons in passes:
            lines.append(f"{name} on CUDA: {served_by}")
            if reasons:
                lines.append("  no kernel serves it:")
                lines.extend(f"  - {reason}" for reason in reasons)
        lines.append(f"forward and backward on other platforms: {self.elsewhere}")
        lines.append(f"keys seen: {self.keys or 'not known to be intervals'}")
        if self.tiles is not None:
            tiles = dict(self.tiles)
            size = f"{tiles.pop('tile_m')} x {tiles.pop('tile_n')}"
            counts = ", ".join(f"{count} {name}" for name, count in tiles.items())
            lines.append(f"tiles of {size} in a head: {counts}")
        if self.splits is not None and self.splits > 1:
            lines.append(f"keys of a row: divided into {self.splits} parts at most")
        if self.page_copies is not None:
            lines.append(f"pages: loaded by {self.page_copies}")
        if self.bias is not None:
            lines.append(f"bias over queries and keys: read by {self.bias}")
        if self.lists != "none":
            lines.append(f"lists of tiles: {self.lists}")
        lines.extend(self.bits)
        if self.backward_blocks is not None:
            lines.append(f"blocks of the backward: {self.backward_blocks}")
        lines.extend(self.loads)
        return "\n".join(lines)


def explain(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    packed_mask=None,
    scale: float | None = None,
    is_causal: bool = False,
    q_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks=None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    compress_factor: int | None = None,
    complete_only: bool = False,
    block_mask: Blocks = "auto",
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    positions: Positions = None,
    return_residual: bool = False,
    deterministic: bool | None = None,
    implementation: Implementation = None,
) -> Explanation:
    """Say which implementation ``flash_attention`` would take for these arguments, and why.

    Args are those of ``flash_attention``; arrays may be ``jax.ShapeDtypeStruct``.  Nothing is
    computed and no device is needed.

    Raises:
      ValueError: an argument does not fit; it is named.
    """
    del return_residual
    mask_mod = with_compression(
        mask_mod, compress_factor, complete_only, is_causal, local_window_size
    )
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "mask": mask,
        "packed_mask": packed_mask,
        "q_offset": q_offset,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "sinks": sinks,
        "block_mask": block_mask,
        "segment_ids": segment_ids,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    spec, operands = _abstract_call(
        checked_call,
        arrays,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        mask_mod=mask_mod,
        score_mod=score_mod,
        positions=positions,
        deterministic=deterministic,
    )
    return _explanation(spec, operands, known_implementation(implementation))


def explain_paged_attention(
    query,
    k_pages,
    v_pages,
    page_table,
    kv_lengths,
    *,
    q_lengths=None,
    cu_seqlens_q=None,
    max_q_length: int | None = None,
    q_offset=None,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks=None,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    batch_invariant: bool = False,
    checked: bool = False,
    return_residual: bool = False,
    implementation: Implementation = None,
) -> Explanation:
    """Say which implementation ``paged_attention`` would take for these arguments, and why.

    Args are those of ``paged_attention``; arrays may be ``jax.ShapeDtypeStruct``.  Nothing is
    computed and no device is needed.

    Raises:
      ValueError: an argument does not fit; it is named.
    """
    del checked, return_residual
    arrays = {
        "query": query,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "page_table": page_table,
        "kv_lengths": kv_lengths,
        "q_lengths": q_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "q_offset": q_offset,
        "sinks": sinks,
    }
    spec, operands = _abstract_call(
        checked_paged_call,
        arrays,
        max_q_length=max_q_length,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        mask_mod=mask_mod,
        score_mod=score_mod,
        batch_invariant=batch_invariant,
        checked=False,
    )
    return _explanation(spec, operands, known_implementation(implementation))


def _abstract_call(
    make: Callable[..., tuple[AttentionSpec, Operands]], arrays: dict[str, Any], **options
) -> tuple[AttentionSpec, Operands]:
    """What ``make`` gives for arrays or their shapes, without computing anything."""
    static = {name: x for name, x in arrays.items() if x is None or isinstance(x, (int, str))}
    shaped = {name: x for name, x in arrays.items() if name not in static}
    specs = []

    def operands_of(shaped):
        spec, operands = make(**static, **shaped, **options)
        specs.append(spec)
        return operands

    operands = jax.eval_shape(operands_of, shaped)
    return specs[0], operands


def _explanation(
    spec: AttentionSpec, operands: Operands, implementation: Implementation
) -> Explanation:
    reasons = {
        direction: tuple(dispatch.reasons_against_kernel(spec, operands, direction))
        for direction in ("fwd", "bwd")
    }
    invariance = reason_against_invariance(spec, implementation)

    def served_by(direction: str) -> str:
        if invariance or (operands.page_table is not None and direction == "bwd"):
            # Attention over pages has no derivatives, but for the reference's.
            return "reference" if implementation == "reference" and not invariance else "refused"
        match implementation:
            case None:
                return "xla" if reasons[direction] else "cute"
            case "cute":
                return "refused" if reasons[direction] else "cute"
            case _:
                return implementation

    elsewhere = {None: "xla", "cute": "refused"}.get(implementation, str(implementation))
    target = plan.target() or plan.Target("sm_90a", plan.DEFAULT_NUM_SMS)
    key = tiles = blocks = None
    if not reasons["fwd"]:
        key = registry.kernel_key(spec, operands, "fwd", target.arch, target.num_sms)
        tiles = description.tile_counts(spec, operands, target.arch, target.num_sms)
    if not reasons["bwd"]:
        backward = registry.kernel_key(spec, operands, "bwd", target.arch, target.num_sms)
        blocks = description.backward_blocks(backward)
    return Explanation(
        implementation=implementation,
        forward=served_by("fwd"),
        backward=served_by("bwd"),
        forward_reasons=(*([invariance] if invariance else []), *reasons["fwd"]),
        backward_reasons=reasons["bwd"],
        elsewhere="refused" if invariance else elsewhere,
        keys=masking.keys_of(spec, operands),
        tiles=tiles,
        loads=tuple(_loads(spec)),
        splits=None if key is None else registry.splits_of(key, operands),
        page_copies=None if key is None else description.page_copies(key),
        bias=None if key is None else description.bias_copies(key),
        lists="none" if key is None else _lists(spec, operands, target.arch),
        bits=tuple(_bits(spec, operands, target.arch, reasons)),
        backward_blocks=blocks,
    )


def _lists(spec: AttentionSpec, operands: Operands, arch: str) -> str:
    """Whether the forward kernel visits tiles by lists, and why not where it might."""
    if operands.block_mask is not None:
        return "given"
    reasons = registry.reasons_against_making_lists(spec, operands, arch)
    if not reasons:
        return "made from mask_mod in the call"
    return f"none, for {' and '.join(reasons)}" if spec.may_make_lists else "none"


def _bits(
    spec: AttentionSpec, operands: Operands, arch: str, reasons: dict[str, tuple[str, ...]]
) -> Iterator[str]:
    """``Explanation.bits``; ``reasons``: why no kernel serves a direction."""
    names: dict[Direction, str] = {"fwd": "forward", "bwd": "backward"}
    packs = partial(registry.packs_mask, spec, operands, arch=arch)
    passes = [
        name for direction, name in names.items() if not reasons[direction] and packs(direction)
    ]
    if passes:
        where = "" if len(passes) == len(names) else f" in the {passes[0]}"
        yield f"mask: as bits{where}, packed in the call"


def _loads(spec: AttentionSpec) -> Iterator[str]:
    """How the arrays that a mask and a score close over are read, in words."""
    for name, function in (("mask_mod", spec.mask_mod), ("score_mod", spec.score_mod)):
        if function is not None:
            for load in analysis.loads(analysis.analyse(function.jaxpr)):
                shape = ", ".join(str(size) for size in load.shape)
                aligned = f", {load.width} aligned" if load.width > 1 else ""
                yield f"{name} reads {load.dtype}[{shape}]: {load.kind}{aligned}"
