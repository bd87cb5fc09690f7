"""Before the backward: row sums of dO * O less dLSE, LSE in base 2, sums set to zero.

    dPsum[i] = sum_j dO[i, j] O[i, j] - dLSE[i]        LSE2[i] = LSE[i] log2(e)

Rows are padded to whole query tiles, so that the main kernel loads a tile's statistics with one
bulk copy.  Rows without a visible key (LSE -inf), rows at or beyond the query length and padding
get LSE2 = +inf and dPsum = 0: then P = exp2(S - LSE2) is exactly 0.  So do rows
below ``LEAST_LSE`` where scores are changed.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from jax_flashcute.kernels.common.softmax import LOG2_E
from jax_flashcute.kernels.elements import ElementFunctions
from jax_flashcute.spec import LEAST_LSE

THREADS = 128
LANES_PER_ROW = 8
VECTOR = 8
"""16-bit elements a thread loads at once."""


class Preprocess:
    """Compiles to one kernel; a block serves one query tile of one head."""

    def __init__(
        self,
        dtype,
        head_dim_v: int,
        tile_m: int,
        accumulator_width: int,
        turns: int,
        functions: ElementFunctions | None = None,
    ):
        """``accumulator_width``: columns of the float32 dQ; ``turns``: counters a tile has."""
        self.dtype = dtype
        self.head_dim_v = head_dim_v
        self.tile_m = tile_m
        self.accumulator_width = accumulator_width
        self.turns = turns
        self.any_scores = functions is not None and functions.changes_scores

    def launch(
        self,
        stream,
        m_blocks: Int32,
        mO,
        mdO,
        mLSE,
        mdLSE,
        mQLengths,
        out,
        mSums: tuple = (),
        cleared_heads: Int32 | None = None,
    ) -> None:
        """``out``: (LSE2, dPsum, dQ accumulator or None, turns or None).

        ``mSums``: arrays of 32-bit elements that are cleared; ``cleared_heads``: so many heads' dQ
        is cleared, of the first entries of the batch; all where None.
        """
        heads, batch = mO.shape[2], mO.shape[0]
        self.kernel(mO, mdO, mLSE, mdLSE, mQLengths, *out, mSums, m_blocks, cleared_heads).launch(
            grid=[m_blocks * heads * batch, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    def row_vectors(self, x: cute.Tensor) -> cute.Tensor:
        """(B, T, N, Hv) as ((VECTOR, vectors), T, N, B) with 64-bit strides."""
        b, t, n = x.shape[0], x.shape[1], x.shape[2]
        row = Int64(n) * self.head_dim_v
        return cute.make_tensor(
            x.iterator.align(16),
            cute.make_layout(
                ((VECTOR, self.head_dim_v // VECTOR), t, n, b),
                stride=(
                    (1, VECTOR),
                    cute.assume(row, VECTOR),
                    self.head_dim_v,
                    cute.assume(row * t, VECTOR),
                ),
            ),
        )

    @cute.kernel
    def kernel(
        self,
        mO: cute.Tensor,  # (B, T, N, Hv)
        mdO: cute.Tensor,  # (B, T, N, Hv)
        mLSE: cute.Tensor,  # (B, T, N) float32
        mdLSE: cute.Tensor | None,  # (B, T, N) float32
        mQLengths: cute.Tensor | None,  # (B,) int32
        mLSE2: cute.Tensor,  # (B, N, m_blocks * tile_m) float32
        mdPsum: cute.Tensor,  # (B, N, m_blocks * tile_m) float32
        mdQAccum: cute.Tensor | None,  # (B, N, m_blocks * tile_m * width) float32
        mTurns: cute.Tensor | None,  # (B, N, m_blocks * turns) int32
        mSums: tuple,
        m_blocks: Int32,
        cleared_heads: Int32 | None,
    ):
        # The next kernel waits for this one before it reads what this one writes.
        cute.arch.griddepcontrol_launch_dependents()
        thread = cute.arch.thread_idx()[0]
        block = cute.arch.block_idx()[0]
        q_length, heads = mO.shape[1], mO.shape[2]
        entry = block // m_blocks
        m_block = block - entry * m_blocks
        batch = entry // heads
        head = entry - batch * heads
        queries = Int32(q_length)
        if const_expr(mQLengths is not None):
            queries = cutlass.max(cutlass.min(mQLengths[batch], queries), Int32(0))

        if const_expr(mdQAccum is not None):
            if const_expr(cleared_heads is None):
                self.clear_tile(mdQAccum, Int64(block), thread)
            else:
                if entry < cleared_heads:
                    self.clear_tile(mdQAccum, Int64(block), thread)
        if const_expr(mTurns is not None):
            if thread < self.turns:
                mTurns[batch, head, m_block * self.turns + thread] = Int32(0)
        for i in cutlass.range_constexpr(len(mSums)):
            self.clear(mSums[i], Int64(block) * THREADS + thread)

        gO, gdO = self.row_vectors(mO), self.row_vectors(mdO)
        lane = thread % LANES_PER_ROW
        vectors = self.head_dim_v // VECTOR
        rows_at_once = THREADS // LANES_PER_ROW
        for i in cutlass.range_constexpr(self.tile_m // rows_at_once):
            row = i * rows_at_once + thread // LANES_PER_ROW
            token = m_block * self.tile_m + row
            total = Float32(0.0)
            lse2 = Float32.inf
            if token < queries:
                for v in cutlass.range_constexpr(-(-vectors // LANES_PER_ROW)):
                    vector = lane + v * LANES_PER_ROW
                    if vector < vectors:
                        rO = cute.make_rmem_tensor(VECTOR, self.dtype)
                        rdO = cute.make_rmem_tensor(VECTOR, self.dtype)
                        cute.autovec_copy(gO[(None, vector), token, head, batch], rO)
                        cute.autovec_copy(gdO[(None, vector), token, head, batch], rdO)
                        o, do = rO.load().to(Float32), rdO.load().to(Float32)
                        for j in cutlass.range_constexpr(VECTOR):
                            total += o[j] * do[j]
                lse = mLSE[batch, token, head]
                is_told = lse != -Float32.inf
                if const_expr(self.any_scores):
                    is_told = lse > LEAST_LSE
                if is_told:
                    lse2 = lse * LOG2_E
            for offset in (4, 2, 1):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
            if lane == 0:
                if token < queries:
                    if const_expr(mdLSE is not None):
                        total = total - mdLSE[batch, token, head]
                    if lse2 == Float32.inf:
                        total = Float32(0.0)
                mLSE2[batch, head, token] = lse2
                mdPsum[batch, head, token] = total

    def clear_tile(self, mdQAccum: cute.Tensor, index: Int64, thread: Int32) -> None:
        """Sets the dQ of a query tile to zero."""
        tile = self.tile_m * self.accumulator_width
        cleared = cute.make_tensor(
            (mdQAccum.iterator + index * tile).align(16),
            cute.make_layout((4, THREADS, tile // (4 * THREADS)), stride=(1, 4, 4 * THREADS)),
        )
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        for i in range(tile // (4 * THREADS)):
            cute.autovec_copy(zeros, cleared[None, thread, i])

    @cute.jit
    def clear(self, mSum: cute.Tensor, first: Int64):
        """Sets an array to zero; every thread of the grid does, ``first`` its number."""
        count = math.prod((Int64(mSum.shape[i]) for i in range(cute.rank(mSum))), start=Int64(1))
        at_once = Int64(cute.arch.grid_dim()[0]) * THREADS
        zero = cute.make_rmem_tensor(1, mSum.element_type)
        zero.fill(0)
        turns = Int32((count - first + at_once - 1) // at_once)
        for i in cutlass.range(turns, unroll=1):
            place = mSum.iterator + (first + i * at_once)
            cute.autovec_copy(zero, cute.make_tensor(place, cute.make_layout(1)))
