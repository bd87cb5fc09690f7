"""Register fragments of wgmma on Hopper.

In a 64 x N accumulator, warp w and lane l of a warpgroup hold rows 16 w + l // 4 + {0, 8} and
columns 8 j + 2 (l % 4) + {0, 1}; flat register 4 j + 2 r + b is row r of the two, column bit b.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from jax_flashcute.kernels.common.intervals import low_bits
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.tiles import round_pair

ROWS_PER_THREAD = 2
ADJACENT_COLUMNS = 2
"""Of a thread, from an even one on."""


def tiled_mma(
    dtype,
    n: int,
    b_major: OperandMajorMode,
    a_source: warpgroup.OperandSource,
    a_major: OperandMajorMode = OperandMajorMode.K,
):
    """One warpgroup's 64 x n product with float32 accumulation."""
    return hopper.make_trivial_tiled_mma(
        dtype,
        dtype,
        a_major,
        b_major,
        Float32,
        atom_layout_mnk=(1, 1, 1),
        tiler_mn=(64, n),
        a_source=a_source,
    )


def gemm(
    mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    accumulate,
    begins: bool = True,
    ends: bool = True,
) -> None:
    """Issues acc (+)= a @ b over all k blocks of the fragments and commits them as one group.

    ``begins``, ``ends``: it is the first, and the last, of the products in a group.
    """
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    if begins:
        warpgroup.fence()
    for k in range(cute.size(a, mode=[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    if ends:
        warpgroup.commit_group()


def rows_and_columns(acc: cute.Tensor, rows: int = ROWS_PER_THREAD) -> cute.Tensor:
    """View of a 64 x N accumulator as (2, N / 4): this thread's rows, this thread's columns.

    ``rows``: 1 for the first of the two alone.
    """
    eighths = cute.size(acc) // 4
    layout = cute.make_layout((rows, (2, eighths)), stride=(2, (1, 4)))
    return cute.make_tensor(acc.iterator, layout)


def as_operand_a(fragment: cute.Tensor) -> cute.Tensor:
    """View of a 64 x N fragment as the A operand of a product over N, 16 columns a k block."""
    return cute.make_tensor(
        fragment.iterator,
        cute.make_layout(((2, 2, 2), 1, cute.size(fragment) // 8), stride=((1, 2, 4), 0, 8)),
    )


def lines_of_quads(words: list[Uint32], thread: Int32) -> list[list[Uint32]]:
    """Regroups a row's 16-bit pairs so that each lane holds 16 contiguous bytes.

    Args:
      words: this thread's column pairs of one row; pair i is columns 8 i + 2 (lane % 4) + {0, 1}.

    Returns:
      For each four pairs from i = 4 k on, the four words of the eight columns from
      8 (4 k + lane % 4) on.  Where the pairs run out, lanes hold zeros.
    """
    is_odd = (thread & 1) != 0
    is_high = (thread & 2) != 0
    lines = []
    for first in range(0, len(words), 4):
        a = words[first : first + 4]
        a = a + [Uint32(0)] * (4 - len(a))
        # A 4 x 4 transpose in two exchanges: with the neighbour, then with the neighbours' pair.
        for offset, swap, step in ((1, is_odd, 1), (2, is_high, 2)):
            for i in (0, 1) if step == 2 else (0, 2):
                low, high = a[i], a[i + step]
                given = cute.arch.shuffle_sync_bfly(select(swap, low, high), offset=offset)
                a[i], a[i + step] = select(swap, given, low), select(swap, high, given)
        lines.append(a)
    return lines


def row_in_slab(thread: Int32, r: int) -> Int32:
    """Row 0..63 that register row ``r`` of thread 0..127 of the warpgroup stands for."""
    return thread // 32 * 16 + thread % 32 // 4 + 8 * r


def first_column(thread: Int32) -> Int32:
    """The column that register column 0 stands for."""
    return 2 * (thread % 4)


def column_step(c: int) -> int:
    """How far from its first one a thread's c-th column lies."""
    return c // 2 * 8 + c % 2


def column_words(limit: Int32, thread: Int32, columns: int) -> list[Uint32]:
    """Which of a thread's columns lie below ``limit``, as 32-bit words over its column registers.

    A thread's i-th column is 8 (i // 2) + 2 (lane % 4) + i % 2, so the number of them below a
    limit is 2 (x // 8) + min(x % 8, 2) with x the limit less the lane's own offset.
    """
    x = limit - 2 * (thread % 4)
    below = 2 * (x >> 3) + cutlass.min(x & 7, Int32(2))
    return [low_bits(below - 32 * w) for w in range((columns // 4 + 31) // 32)]


def interval_words(
    limits: list[tuple[Int32 | None, Int32]], start: Int32, thread: Int32, columns: int
) -> list[Uint32]:
    """Which of a thread's columns lie in one of a row's intervals, as ``column_words`` has them.

    Args:
      limits: the first of each interval (None: open) and one past its last.
      start: what column 0 stands for.
    """
    found: list[Uint32] = []
    for low, high in limits:
        words = column_words(high - start, thread, columns)
        if low is not None:
            hidden = column_words(low - start, thread, columns)
            words = [w & ~h for w, h in zip(words, hidden, strict=True)]
        found = [f | w for f, w in zip(found, words, strict=True)] if found else words
    return found


def own_bits(words: list[Uint32], first: Int32 | None, thread: Int32, columns: int) -> list[Uint32]:
    """A thread's columns among bits in the order of columns, as ``column_words`` has them.

    Args:
      words: consecutive ones that hold the bits.
      first: the bit of the first word that is column 0, an even one up to 16; None for 0.
    """
    shift = Uint32(first_column(thread) if first is None else first + first_column(thread))
    eights = []
    for i in range(-(-columns // 32)):
        bits = words[i] >> shift
        if first is not None:
            # A shift by 32 is not defined in the compiler's IR.
            bits = bits | ((words[i + 1] << Uint32(1)) << (Uint32(31) - shift))
        # Two bits of each eight are the thread's.
        bits = bits & Uint32(0x03030303)
        bits = (bits | (bits >> Uint32(6))) & Uint32(0x000F000F)
        eights.append((bits | (bits >> Uint32(12))) & Uint32(0xFF))
    found = []
    for w in range(0, len(eights), 4):
        word = eights[w]
        for i, bits in enumerate(eights[w + 1 : w + 4], 1):
            word = word | (bits << Uint32(8 * i))
        found.append(word)
    return found


def compared_words(is_needed: Int32, seen: Callable, thread: Int32, columns: int) -> list:
    """Which of a thread's columns each of its rows sees, as words; all where 0 ``is_needed``.

    Args:
      is_needed: 0 or 1.
      seen: of a column, for each row.

    Returns:
      For each row, words like those of ``column_words``.
    """
    count = columns // 4
    words = [
        _compared_word(is_needed, seen, thread, first, min(count - first, 32))
        for first in range(0, count, 32)
    ]
    return [list(of_row) for of_row in zip(*words, strict=True)]


@cute.jit
def _compared_word(
    is_needed: Int32,
    seen: cutlass.Constexpr,
    thread: Int32,
    first: cutlass.Constexpr[int],
    count: cutlass.Constexpr[int],
):
    words = (select(is_needed != 0, Uint32(0), Uint32(0xFFFFFFFF)),) * ROWS_PER_THREAD
    low, high = words
    # A loop that is not unrolled: unrolled, its loads would want registers all at once.
    for i in cutlass.range(count * is_needed, unroll=1):
        c = i + first
        is_seen = seen(first_column(thread) + column_step(c))
        low = low | (Uint32(Int32(is_seen[0])) << Uint32(i))
        high = high | (Uint32(Int32(is_seen[1])) << Uint32(i))
    return low, high


@cute.jit
def hide_outside(scores: cute.Tensor, r: cutlass.Constexpr[int], visible: list):
    """Sets to -inf the scores of row ``r`` whose bit in the words is clear.

    The bit positions are constants, which lets ptxas turn a word into predicates at once (R2P).
    """
    for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
        word = visible[c // 32]
        scores[r, c] = scores[r, c] if (word & Uint32(1 << (c % 32))) != Uint32(0) else -Float32.inf


def rounded_row(rows: cute.Tensor, r: int, factor: Float32, dtype) -> list[Uint32]:
    """This thread's column pairs of row ``r`` of (rows, columns), multiplied and rounded."""
    return [
        round_pair(dtype, rows[r, c] * factor, rows[r, c + 1] * factor)
        for c in range(0, cute.size(rows, mode=[1]), 2)
    ]


@cute.jit
def store_lines(lines: list, row: cute.Pointer, columns: cutlass.Constexpr[int], thread: Int32):
    """Stores this lane's share of a row of so many columns, of ``lines_of_quads``."""
    for k in cutlass.range_constexpr(len(lines)):
        column = 32 * k + 8 * (thread % 4)
        line = cute.make_rmem_tensor(4, Uint32)
        for i in cutlass.range_constexpr(4):
            line[i] = lines[k][i]
        target = cute.make_tensor(
            cute.make_ptr(Uint32, (row + column).toint(), cute.AddressSpace.gmem, assumed_align=16),
            cute.make_layout(4),
        )
        if const_expr(32 * (k + 1) <= columns):
            cute.autovec_copy(line, target)
        else:
            if column < columns:
                cute.autovec_copy(line, target)


def convert_pairs(source: cute.Tensor, target: cute.Tensor) -> None:
    """Rounds float32 registers to the target's 16-bit type, two an instruction."""
    size = cute.size(target)
    pairs = cute.make_tensor(
        cute.recast_ptr(target.iterator, dtype=Uint32), cute.make_layout(size // 2)
    )
    flat = cute.make_tensor(source.iterator, cute.make_layout(size))
    for i in range(size // 2):
        pairs[i] = round_pair(target.element_type, flat[2 * i], flat[2 * i + 1])
