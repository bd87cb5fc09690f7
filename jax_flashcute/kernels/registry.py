"""Which kernel serves a call, every reason why one does not, and the kernels by name.

Works on shapes alone: nothing here needs a device, a compiler or JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from jax_flashcute.analysis import Interval, window, window_interval
from jax_flashcute.block_mask import BlockMask
from jax_flashcute.bounds import RowBounds
from jax_flashcute.kernels import nsa
from jax_flashcute.kernels.config.pages import (
    LARGEST_GATHERED_PAGE,
    LEAST_GATHERED_VISITS,
    MOST_GATHERED_BYTES,
    gathered_shapes,
    gathering,
    loads_pages_by_tma,
    paged_config,
)
from jax_flashcute.kernels.config.sm90 import (
    LEAST_FEW_ROWS_TILES,
    BwdConfig,
    FwdConfig,
    backward_config,
    dividing,
    dividing_backward,
    few_rows_config,
    forward_config,
    in_parts,
    staggered,
    staging_bias,
)
from jax_flashcute.kernels.config.sm100 import (
    BwdConfigSm100,
    FwdConfigSm100,
    backward_config_sm100,
    dividing_sm100,
    few_rows_config_sm100,
    forward_config_sm100,
)
from jax_flashcute.kernels.config.splits import (
    batch_invariant_splits,
    joining_pays,
    lone_tile_time,
    most_splits,
)
from jax_flashcute.kernels.config.workspace import workspace_shapes
from jax_flashcute.kernels.elements import (
    FLOAT_BYTES,
    ElementFunctions,
    element_functions,
    full_axes,
    in_fixed_point,
    is_over_pairs,
    reasons_against_elements,
    reasons_against_gradients,
    summed_arrays,
    with_elements_of_scores,
    with_table_as_bias,
    without_sinks,
)
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS, AnyKey, Direction, KernelKey
from jax_flashcute.kernels.launchers import (
    backward_arrays,
    backward_builder,
    forward_arrays,
    forward_builder,
)
from jax_flashcute.kernels.masking import (
    by_element,
    interval_of,
    rows_of,
    union_of,
    without_intervals,
)
from jax_flashcute.spec import AttentionSpec, Operands

ARCHITECTURES = {"fwd": ("sm_90a", "sm_100a", "sm_103a"), "bwd": ("sm_90a", "sm_100a", "sm_103a")}
"""The architectures that kernels exist for, by direction."""

BLACKWELL = ("sm_100a", "sm_103a")
"""Those with tcgen05 and tensor memory; no such GPU has run the kernels yet."""

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256
SERVED_OPERANDS = frozenset(
    (
        *("query", "key", "value", "q_offset", "query_seq_lengths", "key_value_seq_lengths"),
        *("bias", "mask", "sinks", "batch_index", "mask_mod_arrays", "score_mod_arrays"),
        *("page_table", "segment_ids", "block_mask", "packed_mask"),
    )
)
LEAST_SCORES_FOR_LISTS = 2**27
"""Scores of a call within its window, over all heads, from which lists of tiles are made in it: 32
heads of 2,048 by 2,048.  To make lists takes 26 to 39 us for one mask of 8,192 by 8,192 on an H200,
and kernels then take up to a fifth more where a mask leaves every tile partial."""

LEAST_HEADS_FOR_A_LIST = 4
"""Heads, of all batch entries, that share a list which is made in the call at least.  To make one,
each element of the mask is evaluated once."""

LEAST_SCORES_FOR_WORDS = 2**24
"""Scores of a call within its window, over all heads, from which its ``mask`` is packed into words
in it.  On an H200 bytes take 0.7 ps a score longer than words (32 heads of 8,192 by 8,192,
head_dim 128): 12 us of so many, where one more kernel in a call takes a few."""


class Shaped(Protocol):
    """An array, or anything with its shape and dtype."""

    shape: Any
    dtype: Any


def reasons_against_making_lists(
    spec: AttentionSpec, operands: Operands, arch: str | None
) -> list[str]:
    """Every reason why no lists of tiles are made of ``mask_mod`` in a call; empty where they are.

    All follow from the program and from shapes: what a mask hides is not known here.
    """
    mask_mod = without_intervals(spec, operands).mask_mod
    if operands.block_mask is not None or not spec.may_make_lists:
        return ["block_mask says what is visited"]
    if mask_mod is None:
        return ["no mask is evaluated score by score"]
    reasons = []
    if is_paged(operands) or operands.segment_ids is not None:
        reasons.append("pages and segments have no lists")
    if operands.packed_mask is not None:
        reasons.append("a packed mask has no lists")
    B, T, N, _ = operands.query.shape
    S = operands.kv_length
    if not all(isinstance(size, int) for size in (B, T, N, S)):
        return [*reasons, "a dimension is known at run time only"]
    scores = _scores(spec, operands)
    if scores < LEAST_SCORES_FOR_LISTS:
        reasons.append(f"{scores:,} scores are fewer than {LEAST_SCORES_FOR_LISTS:,}")
    per_batch = mask_mod.reads(0) or any(a.shape[0] != 1 for a in operands.mask_mod_arrays)
    per_batch = per_batch or operands.q_offset is not None
    lists = (B if per_batch else 1) * (N if mask_mod.reads(1) else 1)
    if B * N < lists * LEAST_HEADS_FOR_A_LIST:
        reasons.append(f"fewer than {LEAST_HEADS_FOR_A_LIST} heads would share a list")
    config = _forward_config(arch, operands)
    if config is not None and packing_pays(T, N // operands.key.shape[2], config):
        reasons.append("queries are so few that heads share a tile")
    if config is not None and T <= config.slab_rows:
        reasons.append("queries are so few that their keys may be divided among blocks")
    return reasons


def _scores(spec: AttentionSpec, operands: Operands) -> int:
    """Scores of a call within its window, over all heads; its dimensions must be numbers."""
    (B, T, N, _), S = operands.query.shape, operands.kv_length
    left, right = window((window_interval(*spec.reach),)) or (None, None)
    keys = S if left is None or right is None else min(S, left + right + 1)
    return B * N * T * keys


def packs_mask(spec: AttentionSpec, operands: Operands, direction: Direction, arch: str) -> bool:
    """Whether a kernel takes the call's ``mask`` as words of bits, which are made in the call.

    By shapes alone.  Not where other masks skip tiles at run time, for all of it is packed; nor
    where queries are so few that their keys may be divided among blocks, which wait for keys.
    """
    mask = operands.mask
    others = (operands.packed_mask, operands.block_mask, operands.segment_ids, spec.mask_mod)
    # Blackwell's forward spills registers where it takes words at head_dim 128.
    if mask is None or any(x is not None for x in others) or arch in BLACKWELL:
        return False
    B, T, N, _ = operands.query.shape
    sizes = (B, T, N, operands.kv_length, *mask.shape)
    if is_paged(operands) or not all(isinstance(size, int) for size in sizes):
        return False
    scores, elements = _scores(spec, operands), math.prod(mask.shape)
    if direction == "bwd":
        config = _backward_config(arch, spec, operands)
        if isinstance(config, BwdConfig) and config.dq_pass is not None:
            return False  # which knows no words
        # Bytes of keys alone, and of masks that heads do not share, measured no slower.
        if mask.shape[2] == 1 or scores < 2 * elements:
            return False
    few = _existing(_forward_config(arch, operands)).slab_rows
    is_large = scores >= max(LEAST_SCORES_FOR_WORDS, elements)
    return mask.shape[3] > 1 and T > few and is_large


def list_tile(spec: AttentionSpec, operands: Operands, arch: str | None) -> tuple[int, int]:
    """Query rows and keys of the tiles into which a call's mask is classified.

    They divide those of the forward and of the backward kernel, so that one serves both.
    """
    forward = _existing(_forward_config(arch, operands))
    backward = _existing(_backward_config(arch, spec, operands))
    return math.gcd(forward.tile_m, backward.tile_m), math.gcd(forward.tile_n, backward.tile_n)


def reasons_against(
    spec: AttentionSpec, operands: Operands, direction: Direction, arch: str | None = None
) -> list[str]:
    """Every reason why no kernel serves a call; empty where one does.

    Args:
      spec: the static part of the call.
      operands: its arrays, or anything with their shapes and dtypes.
      direction: ``"fwd"`` or ``"bwd"``.
      arch: the architecture it would run on; None for any that kernels exist for.
    """
    reasons = []
    if arch is not None and arch not in ARCHITECTURES[direction]:
        reasons.append(_no_kernel_for(arch, direction))
    dtype = str(operands.query.dtype)
    if dtype not in DTYPES:
        reasons.append(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    for name, dim in (
        ("head_dim", operands.query.shape[-1]),
        ("value head_dim", operands.value.shape[-1]),
    ):
        if not isinstance(dim, int):
            reasons.append(f"{name} must be a number, got the symbol {dim}")
        elif dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            reasons.append(f"{name} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}")
    for name in operands.present():
        if name not in SERVED_OPERANDS:
            reasons.append(f"no kernel takes {name} yet")
    has_lists = operands.block_mask is not None
    scores = without_intervals(spec, operands)
    reasons += reasons_against_elements(scores, operands)
    # 0 times -inf, the score of a hidden key, is NaN.
    if not (math.isfinite(spec.scale) and spec.scale > 0):
        reasons.append(f"scale must be finite and positive, got {spec.scale}")
    arrays = [*_main(operands), *([operands.page_table] if is_paged(operands) else [])]
    if any(dim == 0 for array in arrays for dim in array.shape):
        reasons.append("an operand is empty")
    if is_paged(operands):
        reasons += _reasons_against_pages(operands, direction)
    if has_lists and all(isinstance(x.shape[-1], int) for x in (operands.query, operands.value)):
        reasons += _reasons_against_lists(spec, operands, direction, arch)
    if direction == "bwd" and not reasons:
        dims = operands.query.shape[-1], operands.value.shape[-1]
        config = _existing(_backward_config(arch, spec, operands))
        reasons += config.reasons_invalid(*dims)
        reasons += reasons_against_gradients(scores)
    return reasons


def _no_kernel_for(arch: str, direction: Direction) -> str:
    reason = f"kernels exist for {', '.join(ARCHITECTURES[direction])}, not for {arch}"
    if arch.startswith("sm_12"):
        reason += ", which is a Blackwell without the tcgen05 instructions and the tensor memory"
    return reason


def is_paged(operands: Operands) -> bool:
    return operands.page_table is not None


def _reasons_against_pages(operands: Operands, direction: Direction) -> list[str]:
    if direction == "bwd":
        return ["no kernel computes gradients of keys and values in pages"]
    if operands.block_mask is not None or operands.segment_ids is not None:
        return ["no kernel takes block_mask or segment_ids with pages"]
    page_size = operands.key.shape[1]
    if not isinstance(page_size, int):
        return [f"page_size must be a number, got the symbol {page_size}"]
    num_pages = operands.key.shape[0]
    if not loads_pages_by_tma(page_size) and isinstance(num_pages, int):
        if num_pages * page_size >= 2**31:
            return [f"pages of {page_size} must hold fewer than 2^31 keys, got {num_pages} pages"]
    return []


def _reasons_against_lists(
    spec: AttentionSpec, operands: Operands, direction: Direction, arch: str | None
) -> list[str]:
    forward = direction == "fwd"
    config = _forward_config(arch, operands) if forward else _backward_config(arch, spec, operands)
    if config is not None:
        return []
    blocks = operands.block_mask
    tiles = "128 x 128" if arch in BLACKWELL else "64 x 64 or 128 x 128"
    return [
        f"block_mask's tiles must be multiples of tiles that a kernel has, such as {tiles}, "
        f"got {blocks.tile_m} x {blocks.tile_n}"
    ]


def _forward_config(arch: str | None, operands: Operands) -> FwdConfig | FwdConfigSm100 | None:
    """None where no tile divides those of the call's lists."""
    dims = operands.query.shape[3], operands.value.shape[3]
    blocks = operands.block_mask
    if arch in BLACKWELL:
        found = forward_config_sm100(*dims)
        if arch == "sm_103a":
            # Its special-function unit has twice the exponentials of sm_100a's.
            found = dataclasses.replace(found, polynomial_every=0)
        if blocks is None:
            return found
        return dividing_sm100(found, blocks.tile_m, blocks.tile_n, *dims)
    config = forward_config(*dims)
    return config if blocks is None else dividing(config, blocks.tile_m, blocks.tile_n, *dims)


def _backward_config(
    arch: str | None, spec: AttentionSpec, operands: Operands
) -> BwdConfig | BwdConfigSm100 | None:
    dims = operands.query.shape[3], operands.value.shape[3]
    blocks = operands.block_mask
    if arch in BLACKWELL:
        found = backward_config_sm100(*dims, spec.deterministic)
        if blocks is not None and blocks.tile_n % found.tile_n:
            # A pair would visit what either of its blocks does.
            found = backward_config_sm100(*dims, spec.deterministic, may_pair=False)
        divides = blocks is None or not (
            blocks.tile_m % found.tile_m or blocks.tile_n % found.tile_n
        )
        return found if divides else None
    config = backward_config(*dims, spec.deterministic, may_part=_may_part(spec, operands))
    if blocks is None:
        return config
    return dividing_backward(config, blocks.tile_m, blocks.tile_n, *dims)


def _may_part(spec: AttentionSpec, operands: Operands) -> bool:
    """Whether a pass of its own for dQ can serve a call.

    It knows intervals by position alone, and sums no gradients of arrays.  Scores that cost more
    than a soft cap or an addition take longer to compute twice.
    """
    others = (operands.segment_ids, operands.block_mask, operands.packed_mask)
    if any(x is not None for x in others):
        return False
    scores = without_intervals(spec, operands)
    functions = element_functions(scores, operands)
    is_light = functions is None or functions.scores_follow_products
    has_sums = any(summed_arrays(scores, operands))
    return is_light and not has_sums and rows_of(spec, operands) is None


def _existing[T](config: T | None) -> T:
    if config is None:
        raise ValueError("config must exist for a call that nothing speaks against; got None")
    return config


def _may_pack(operands: Operands, group: int, config: FwdConfig | FwdConfigSm100) -> bool:
    """Whether a group's heads may share a tile, as far as lists of tiles go."""
    blocks = operands.block_mask
    if blocks is None:
        return True
    tokens = _packed_tokens(group, config)
    return _are_shared(blocks) and tokens > 0 and blocks.tile_m % tokens == 0


def _are_shared(blocks: BlockMask) -> bool:
    """Whether all heads have the same lists of tiles."""
    return all(x.shape[1] == 1 for x in (blocks.partial_counts, blocks.full_counts))


def _in_pairs(
    config: FwdConfig, spec: AttentionSpec, operands: Operands, has_lists: bool
) -> FwdConfig:
    """The configuration for an even group: two heads that visit the same tiles load together."""
    blocks = operands.block_mask
    if not has_lists:
        are_shared = True
    elif blocks is None:
        # Lists made of the mask.
        are_shared = spec.mask_mod is not None and not spec.mask_mod.reads(1)
    else:
        are_shared = _are_shared(blocks)
    # What lies beyond a length is cleared by one block alone.
    may_pair = are_shared and operands.key_value_seq_lengths is None
    return dataclasses.replace(config, cluster=2) if may_pair else config


def _gathered_sizes(operands: Operands) -> tuple[Any, ...]:
    """Batch entries, keys, key/value heads and head_dims of what pages are gathered into."""
    _, _, K, H = operands.key.shape
    return operands.query.shape[0], operands.kv_length, K, H, operands.value.shape[3]


def _gathering_pays(operands: Operands, config: FwdConfig, pack_gqa: bool) -> bool:
    """Whether small pages are better gathered than loaded by each tile that visits them.

    Where lengths of queries are given, nothing is known of how many visit a page.
    """
    if operands.key.shape[1] > LARGEST_GATHERED_PAGE or operands.query_seq_lengths is not None:
        return False
    _, T, N, _ = operands.query.shape
    sizes = _gathered_sizes(operands)
    if not all(isinstance(size, int) for size in (T, N, *sizes)):
        return False
    visits = _tiles_of_group(T, N // operands.key.shape[2], config, pack_gqa)
    *arrays, _ = gathered_shapes(config.tile_n, *sizes)
    gathered_bytes = 2 * sum(map(math.prod, arrays))
    return visits >= LEAST_GATHERED_VISITS and gathered_bytes <= MOST_GATHERED_BYTES


def _staging_bias(
    config: FwdConfig, functions: ElementFunctions | None, operands: Operands
) -> tuple[FwdConfig, ElementFunctions | None]:
    """With a bias over queries and keys in shared memory, where TMA can bring it and there is room.

    Its rows begin at multiples of 16 bytes.  So may an array that a score adds elements of.
    """
    if functions is None:
        return config, functions
    found, keys = with_table_as_bias(functions, operands), operands.kv_length
    itemsize = 0 if found.bias is None else FLOAT_BYTES.get(found.bias.dtype, 0)
    is_aligned = isinstance(keys, int) and keys * itemsize % 16 == 0
    if not (itemsize and is_aligned and is_over_pairs(found.bias)):
        return config, functions
    staging = staging_bias(config, itemsize, operands.query.shape[3], operands.value.shape[3])
    return staging, found if staging.bias_itemsize else functions


def _main(operands: Operands) -> tuple[Shaped, Shaped, Shaped]:
    return operands.query, operands.key, operands.value


def kernel_key(
    spec: AttentionSpec, operands: Operands, direction: Direction, arch: str, num_sms: int
) -> KernelKey:
    """The kernel that serves a call that nothing speaks against."""
    query, key, value = _main(operands)
    passes = {"fwd": "forward", "bwd": "backward"}[direction]
    group = query.shape[2] // key.shape[2]
    dims = query.shape[3], value.shape[3]
    present = operands.present()
    makes_lists = not reasons_against_making_lists(spec, operands, arch)
    has_lists = operands.block_mask is not None or makes_lists
    words = None
    if operands.packed_mask is not None:
        words = full_axes("bnt", operands.packed_mask.shape)
    if packs_mask(spec, operands, direction, arch):
        words = full_axes("bnt", operands.mask.shape)
        operands = dataclasses.replace(operands, mask=None)
    functions = element_functions(without_intervals(spec, operands), operands)
    config: FwdConfig | FwdConfigSm100 | BwdConfig | BwdConfigSm100
    split_kv = False
    interval = interval_of(spec, has_lists=has_lists)
    row_bounds = RowBounds.of(operands.segment_ids)
    if rows_of(spec, operands) is not None:
        row_bounds = RowBounds(False, False, compares_bounds=direction == "bwd")
    union = union_of(spec, operands)
    if row_bounds is not None and union:
        # Within segments these, too, are computed before the kernel.
        row_bounds, union = dataclasses.replace(row_bounds, intervals=len(union)), ()
    if direction == "fwd":
        config = _existing(_forward_config(arch, operands))
        pack_gqa = packing_pays(query.shape[1], group, config)
        in_ranges = words is None and not has_lists
        plain = in_ranges and functions is None
        if row_bounds is not None and plain and isinstance(config, FwdConfig):
            # Tiles of fewer positions visit fewer keys that only some of their rows see.
            pack_gqa |= group > 1 and config.slab_rows % group == 0
        if in_ranges and not is_paged(operands) and isinstance(config, FwdConfig):
            if functions is None or functions.only_adds(pack_gqa):
                config = staggered(config)
        pack_gqa = pack_gqa and _may_pack(operands, group, config)
        # Bounds from arrays and lists are not tried yet.
        may_split = operands.segment_ids is None and not has_lists
        # A part is a stretch of tiles that are computed from positions; other masks go by element,
        # if they can.
        alone = (
            without_intervals(spec, operands) if union else by_element(spec, has_lists=has_lists)
        )
        may_split = may_split and not reasons_against_elements(alone, operands)
        few = _few_rows(arch, operands) if may_split else None
        if few is not None:
            few_config, rows, packs_few = few
            splits = partial(num_splits, arch, batch_invariant=spec.batch_invariant)
            parts = splits(interval, operands, num_sms)
            alike = dataclasses.replace(operands, key_value_seq_lengths=None)
            usual = splits(interval, alike, num_sms)
            # Heads of a group that share no tile would each load keys: only for want of blocks.
            is_alone = packs_few or group == 1
            split_kv = parts > 1 and (is_alone or usual > 1)
            is_long = operands.kv_length >= LEAST_FEW_ROWS_TILES * few_config.tile_n
            is_served = is_alone and is_long and isinstance(few_config, FwdConfig)
            if split_kv or (is_served and row_bounds is None):
                config, pack_gqa = few_config, packs_few
                if isinstance(config, FwdConfig):
                    config = dataclasses.replace(config, reads_keys_once=is_alone)
            if split_kv:
                row_bounds = None
                functions = element_functions(alone, operands)
                if isinstance(config, FwdConfig):
                    joins = joining_pays(usual, 4 * parts * rows * dims[1])
                    config = dataclasses.replace(config, joins_parts=joins)
        if is_paged(operands) and isinstance(config, FwdConfig):
            config = paged_config(config, key.shape[1], *dims)
            by_position = plain and not split_kv and not union and interval.low is None
            if by_position and _gathering_pays(operands, config, pack_gqa):
                config = gathering(config)
        if isinstance(config, FwdConfig) and not (pack_gqa or split_kv or is_paged(operands)):
            config, functions = _staging_bias(config, functions, operands)
        if isinstance(config, FwdConfig) and (has_lists or config.bias_itemsize):
            if not (pack_gqa or group % 2):
                config = _in_pairs(config, spec, operands, has_lists)
    else:
        config, pack_gqa, num_sms = _existing(_backward_config(arch, spec, operands)), False, 0
        if has_lists and group > 1 and isinstance(config, BwdConfig):
            config = in_parts(config)
        functions = without_sinks(functions, spec.constants)
        functions = with_elements_of_scores(functions, query.shape[0])
        if isinstance(config, BwdConfigSm100) and config.passes and functions is not None:
            is_fixed = any(in_fixed_point(functions, spec.deterministic))
            config = dataclasses.replace(config, deterministic=is_fixed)
    return KernelKey(
        kernel=f"{'sm100' if arch in BLACKWELL else 'sm90'}_{passes}",
        arch=arch,
        dtype=str(query.dtype),
        head_dim=dims[0],
        head_dim_v=dims[1],
        group=group,
        pack_gqa=pack_gqa,
        scale=spec.scale,
        interval=interval,
        optional=tuple(name for name in OPTIONAL_OPERANDS if name in present),
        config=config,
        num_sms=num_sms,
        split_kv=split_kv,
        elements=functions,
        page_size=key.shape[1] if is_paged(operands) else None,
        batch_invariant=spec.batch_invariant and split_kv,
        row_bounds=row_bounds,
        has_lists=has_lists,
        union=union,
        packed_mask=words,
    )


def _few_rows_config(
    arch: str, head_dim: int, head_dim_v: int, rows: int
) -> FwdConfig | FwdConfigSm100:
    if arch in BLACKWELL:
        return few_rows_config_sm100(head_dim, head_dim_v)
    return few_rows_config(head_dim, head_dim_v, rows)


def _few_rows(arch: str, operands: Operands) -> tuple[FwdConfig | FwdConfigSm100, int, bool] | None:
    """Where all queries of a head, or of a group's heads, fit in one product: the configuration,
    how many rows they fill, and whether these are a group's.

    None where they do not, or a dimension is known at run time only.
    """
    T, N, head_dim = operands.query.shape[1:]
    head_dim_v = operands.value.shape[3]
    sizes = (operands.query.shape[0], T, N, operands.kv_length, operands.key.shape[2])
    if not all(isinstance(size, int) for size in sizes):
        return None
    group = N // operands.key.shape[2]
    pack_gqa = packing_pays(T, group, _few_rows_config(arch, head_dim, head_dim_v, T))
    rows = T * (group if pack_gqa else 1)
    config = _few_rows_config(arch, head_dim, head_dim_v, rows)
    return (config, rows, pack_gqa) if rows <= config.slab_rows else None


def num_splits(
    arch: str,
    interval: Interval,
    operands: Operands,
    num_sms: int,
    *,
    batch_invariant: bool = False,
) -> int:
    """Parts into which the forward kernel divides a row's keys at most; by shapes alone.

    With ``batch_invariant``, whatever the number of batch entries.  1 where the queries fill more
    than one row of tiles, or a dimension is known at run time only.
    """
    few = _few_rows(arch, operands)
    if few is None:
        return 1
    config, _, pack_gqa = few
    (B, T, N, _), K, S = operands.query.shape, operands.key.shape[2], operands.kv_length
    left, right = window((interval,)) or (None, None)
    keys = S if left is None or right is None else min(S, left + right + T + config.tile_n)
    key_tiles = -(-max(keys, 1) // config.tile_n)
    if batch_invariant:
        return batch_invariant_splits(key_tiles)
    lengths_vary = operands.key_value_seq_lengths is not None and B > 1
    dims = operands.query.shape[3], operands.value.shape[3]
    tiles, part_bytes = B * (K if pack_gqa else N), 4 * B * T * N * dims[1]
    # As if there were no pages, with which parts are joined as without; docs/lab-notebook.md.
    lone = lone_tile_time(config, *dims, num_sms)
    return most_splits(tiles, key_tiles, num_sms, lengths_vary, lone, part_bytes)


def splits_of(key: KernelKey, operands: Operands) -> int:
    """Parts into which the forward kernel of a call divides a row's keys at most."""
    if not key.split_kv:
        return 1
    return num_splits(
        key.arch, key.interval, operands, key.num_sms, batch_invariant=key.batch_invariant
    )


def packing_pays(q_length: Any, group: int, config: FwdConfig | FwdConfigSm100) -> bool:
    """Whether a tile of several heads' rows wastes clearly fewer rows than one head's.

    A length that is only known at run time is taken to be long.
    """
    if group == 1 or group > config.slab_rows or not isinstance(q_length, int):
        return False
    unpacked, packed = (_tiles_of_group(q_length, group, config, x) for x in (False, True))
    return packed <= 0.9 * unpacked


def _tiles_of_group(
    q_length: int, group: int, config: FwdConfig | FwdConfigSm100, pack_gqa: bool
) -> int:
    """Tiles of query rows that a group's heads have, each its own or together."""
    if pack_gqa:
        return math.ceil(q_length / _packed_tokens(group, config))
    return group * math.ceil(q_length / config.tile_m)


def _packed_tokens(group: int, config: FwdConfig | FwdConfigSm100) -> int:
    """Tokens of a tile that holds the rows of all heads of a group."""
    return config.slab_rows // group * (config.tile_m // config.slab_rows)


def arrays_of(key: AnyKey) -> Sequence[tuple[Any, tuple[int, ...]] | None]:
    """Element type and divisibility of each array a kernel takes, None for an absent one."""
    return KERNELS[key.kernel].arrays(key)


def builder(key: AnyKey) -> Callable[[], Callable[..., None]]:
    """What makes the launcher; to be called while tracing."""
    return KERNELS[key.kernel].builder(key)


def scratch_shapes(key: KernelKey, operands: Operands) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a kernel's scratch outputs, which follow its results."""
    return KERNELS[key.kernel].scratch(key, operands)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a kernel is built and called; each field is a function of its key."""

    arrays: Callable[[Any], Sequence[tuple[Any, tuple[int, ...]] | None]]
    builder: Callable[[Any], Callable[[], Callable[..., None]]]
    scratch: Callable[[Any, Operands], list[tuple[tuple[int, ...], str]]]


def _forward_scratch(key: KernelKey, operands: Operands):
    """The tile counter; O and LSE of each part of the keys; how many parts of a tile are stored."""
    shapes: list[tuple[tuple[int, ...], str]] = [((1,), "int32")]
    if key.split_kv:
        B, T, N, _ = operands.query.shape
        rows = (splits_of(key, operands), B, T, N)
        shapes += [((*rows, key.head_dim_v), "float32"), (rows, "float32")]
        if key.joins_parts:
            shapes.append(((B, N // key.group if key.pack_gqa else N), "int32"))
    if key.gathers_pages:
        *arrays, counts = gathered_shapes(key.config.tile_n, *_gathered_sizes(operands))
        shapes += [*((x, key.dtype) for x in arrays), (counts, "int32")]
    return shapes


def _backward_scratch(key: KernelKey, operands: Operands):
    B, T, N, H = operands.query.shape
    _, S, K, Hv = operands.value.shape
    return workspace_shapes(key.config, B, T, S, N, K, H, Hv)


KERNELS = {
    "sm90_forward": Kernel(forward_arrays, forward_builder, _forward_scratch),
    "sm100_forward": Kernel(forward_arrays, forward_builder, _forward_scratch),
    "sm90_backward": Kernel(backward_arrays, backward_builder, _backward_scratch),
    "sm100_backward": Kernel(backward_arrays, backward_builder, _backward_scratch),
    **{name: Kernel(nsa.arrays_of, nsa.builder, nsa.no_scratch) for name in nsa.KERNELS},
}
"""Every kernel by name."""
