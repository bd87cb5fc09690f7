"""What ``explain`` tells of the kernels that serve a call: tiles, loads, how blocks share work."""

from jax_flashcute.analysis import Linear, evaluate
from jax_flashcute.kernels.config.pages import loads_pages_by_tma, shares_boxes
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100, backward_config_sm100
from jax_flashcute.kernels.elements import is_over_pairs
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS, KernelKey
from jax_flashcute.kernels.registry import kernel_key
from jax_flashcute.spec import AttentionSpec, Operands


def backward_blocks(key: KernelKey) -> str | None:
    """How blocks of a Blackwell backward share its work; None on Hopper."""
    config = key.config
    if not isinstance(config, BwdConfigSm100):
        return None
    if config.passes:
        return "a kernel for each gradient"
    if config.cta_group == 2:
        return "in pairs, which share products"
    if backward_config_sm100(key.head_dim, key.head_dim_v).cta_group == 2:
        return "each alone, for block_mask's tiles are not multiples of 256 keys"
    return "each alone"


def page_copies(key: KernelKey) -> str | None:
    """How a kernel loads pages; None where there are none."""
    if key.page_size is None:
        return None
    by_tma = loads_pages_by_tma(key.page_size)
    if isinstance(key.config, FwdConfig):
        if key.gathers_pages:
            return "TMA, once gathered"
        by_tma |= shares_boxes(key.page_size, key.head_dim, key.head_dim_v)
    return "TMA" if by_tma else "asynchronous copies"


def bias_copies(key: KernelKey) -> str | None:
    """How Hopper's forward reads a bias over queries and keys; None where there is none."""
    bias = None if key.elements is None else key.elements.bias
    if not (is_over_pairs(bias) and isinstance(key.config, FwdConfig)):
        return None
    return "TMA, to shared memory" if key.config.bias_itemsize else "loads of each thread"


def tile_counts(
    spec: AttentionSpec, operands: Operands, arch: str, num_sms: int
) -> dict[str, int] | None:
    """What the intervals of keys make of a head's tiles, in the forward kernel of a call.

    Keys are ``tile_m``, ``tile_n``, ``full``, ``partial`` and ``skipped``.  None where lengths, an
    offset, pages or bits decide at run time, or where the mask is no union of intervals.
    """
    runtime = {*OPTIONAL_OPERANDS, "page_table", "segment_ids", "block_mask", "packed_mask"}
    T, S = operands.query.shape[1], operands.kv_length
    known = isinstance(T, int) and isinstance(S, int) and T * S > 0
    if not known or runtime & set(operands.present()):
        return None
    key = kernel_key(spec, operands, "fwd", arch, num_sms)
    by_element = key.elements is not None and key.elements.mask_mod is not None
    if by_element or key.row_bounds is not None:
        return None
    tile_m, tile_n = key.tile
    total, full, visited = 0, 0, 0
    for first in range(0, T, tile_m):
        # Bounds rise with q, so the ends of a tile's rows bound them all.
        ends = first, min(first + tile_m, T) - 1
        of_visited, of_full = [], []
        for interval in key.union or (key.interval,):
            lows = [_clipped(interval.low, q, 0, S) for q in ends]
            highs = [_clipped(interval.high, q, S, S) for q in ends]
            if lows[0] < highs[1]:
                of_visited.append((lows[0] // tile_n, -(-highs[1] // tile_n)))
            last = S if highs[0] == S else highs[0] // tile_n * tile_n
            of_full.append((-(-lows[1] // tile_n), -(-last // tile_n)))
        total += -(-S // tile_n)
        visited += _covered(of_visited)
        full += _covered(of_full)
    return {
        "tile_m": tile_m,
        "tile_n": tile_n,
        "full": full,
        "partial": visited - full,
        "skipped": total - visited,
    }


def _covered(ranges: list[tuple[int, int]]) -> int:
    """How many numbers lie in one of some ranges."""
    count, reached = 0, 0
    for begin, end in sorted(ranges):
        count += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return count


def _clipped(bound: Linear | None, q: int, if_open: int, S: int) -> int:
    if bound is None:
        return if_open
    return max(0, min(evaluate(bound, {"q": q}, {}, min, max), S))
