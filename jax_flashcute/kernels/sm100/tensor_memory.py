"""Tensor memory on Blackwell: 128 lanes of 512 columns of 32 bits, and the products that use it.

A tile of 128 rows has a lane for each row.  A warpgroup's thread t reads and writes lane t alone,
so with one register for each column a thread owns a row.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import OperandMajorMode, tcgen05

from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.tiles import chunks

ROWS = 128
COLUMNS = 512
LANE_STRIDE = 1 << 16
CTA_GROUPS = {1: tcgen05.CtaGroup.ONE, 2: tcgen05.CtaGroup.TWO}


def tiled_mma(
    dtype,
    n: int,
    b_major: OperandMajorMode,
    a_source: tcgen05.OperandSource,
    a_major: OperandMajorMode = OperandMajorMode.K,
    m: int = ROWS,
    cta_group: int = 1,
):
    """The m x n product of a block, or of a pair of blocks, with float32 accumulation."""
    return blackwell.make_trivial_tiled_mma(
        dtype,
        dtype,
        a_major,
        b_major,
        Float32,
        CTA_GROUPS[cta_group],
        (m, n),
        a_source,
    )


def accumulator(mma: cute.TiledMma, n: int, pointer: cute.Pointer, m: int = ROWS) -> cute.Tensor:
    """The m x n accumulator at a place in tensor memory, as products take it."""
    shape = mma.partition_shape_C((m, n))
    return cute.make_tensor(pointer, mma.make_fragment_C(shape).layout)


def operand_a(mma: cute.TiledMma, n: int, k: int, dtype, pointer: cute.Pointer) -> cute.Tensor:
    """The 128 x k operand A at a place in tensor memory, two 16-bit numbers a column."""
    layout = blackwell.make_smem_layout_a(mma, (ROWS, n, k), dtype, 1)
    fragment = mma.make_fragment_A(cute.make_tensor(pointer, layout.outer))
    fragment = fragment[None, None, None, 0]
    return cute.make_tensor(cute.recast_ptr(pointer, dtype=dtype), fragment.layout)


def gemm(
    mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    accumulate,
    first_b: int = 0,
) -> None:
    """Issues acc (+)= a @ b over all k blocks of a, and b's from ``first_b`` on.

    One warp, asynchronous.
    """
    atom = cute.make_mma_atom(mma.op)
    atom.set(tcgen05.Field.ACCUMULATE, accumulate)
    for k in range(cute.size(a, mode=[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, first_b + k], acc)
        atom.set(tcgen05.Field.ACCUMULATE, True)


def _column_tile(pointer: cute.Pointer, columns: int) -> cute.Tensor:
    return cute.make_tensor(pointer, cute.make_layout((ROWS, columns), stride=(LANE_STRIDE, 1)))


def load_row(pointer: cute.Pointer, registers: cute.Tensor, thread: Int32) -> None:
    """Loads a row's columns, from ``pointer`` on, into this thread's 32-bit registers.

    The loads end at ``tcgen05.wait::ld`` (``cute.arch.fence_view_async_tmem_load``).
    """
    for first, size in chunks(cute.size(registers)):
        tile = _column_tile(pointer + first, size)
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(size)), Float32)
        copy = tcgen05.make_tmem_copy(atom, tile).get_slice(thread)
        shape = copy.partition_D(cute.make_identity_tensor((ROWS, size))).shape
        target = cute.make_tensor(registers.iterator + first, cute.make_layout(shape))
        cute.copy(copy, copy.partition_S(tile), target)


def store_row(pointer: cute.Pointer, registers: cute.Tensor, thread: Int32) -> None:
    """Stores this thread's 32-bit registers to a row's columns from ``pointer`` on.

    The stores end at ``tcgen05.wait::st`` (``cute.arch.fence_view_async_tmem_store``).
    """
    for first, size in chunks(cute.size(registers)):
        tile = _column_tile(pointer + first, size)
        atom = cute.make_copy_atom(tcgen05.St32x32bOp(tcgen05.Repetition(size)), Float32)
        copy = tcgen05.make_tmem_copy(atom, tile).get_slice(thread)
        shape = copy.partition_S(cute.make_identity_tensor((ROWS, size))).shape
        source = cute.make_tensor(registers.iterator + first, cute.make_layout(shape))
        cute.copy(copy, source, copy.partition_D(tile))


def fence_before_sync() -> None:
    """Orders this thread's accesses to tensor memory before what it signals next."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC)


def fence_after_sync() -> None:
    """Orders accesses to tensor memory after the signal this thread has waited for."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC)


@cute.jit
def compared_word(is_needed: Int32, seen: cutlass.Constexpr, first: cutlass.Constexpr[int]):
    """Which of 32 columns a row sees, by ``seen`` of each, as a word; all where 0 ``is_needed``.

    The loop is not unrolled: unrolled, its loads would want registers all at once.
    """
    word = select(is_needed != 0, Uint32(0), Uint32(0xFFFFFFFF))
    for i in cutlass.range(32 * is_needed, unroll=1):
        word = word | (Uint32(Int32(seen(first + i))) << Uint32(i))
    return word


@cute.jit
def hide_outside(scores: cute.Tensor, visible: list):
    """Sets to -inf the scores of row 0 whose bit in the words, one a column, is clear.

    The bit positions are constants, which lets ptxas turn a word into predicates at once (R2P).
    """
    for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
        word = visible[c // 32]
        scores[0, c] = scores[0, c] if (word & Uint32(1 << (c % 32))) != Uint32(0) else -Float32.inf
