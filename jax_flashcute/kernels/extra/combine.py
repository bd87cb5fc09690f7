"""After a forward pass with split-KV: O and LSE of each row from those of its parts.

With LSE_i and O_i of part i, LSE = log sum_i exp(LSE_i) and O = sum_i exp(LSE_i - LSE) O_i.  A
sink is one more LSE_i, with O_i = 0: it belongs to a row, not to each of its parts.
"""

from collections.abc import Callable
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.elements import sink_of
from jax_flashcute.kernels.common.lengths import entry_lengths
from jax_flashcute.kernels.common.numbers import select
from jax_flashcute.kernels.common.softmax import LN2, LOG2_E, exp2
from jax_flashcute.kernels.common.tiles import round_pair

WARPS = 4
"""Of a block: a row each, or all of one row where there may be many parts."""
MANY_PARTS = 16
WARP_COLUMNS = 128
"""Columns of O that a warp takes at a time, four a lane."""
PARTS_AT_ONCE = 8
"""Parts on their way to a lane's registers together; one after the other, each would cost the
latency of memory."""


class Combine:
    """A kernel in which a warp, or four of them, serve one row of one query head; or a step of the
    forward's own, in which a warpgroup serves a tile's rows."""

    def __init__(self, dtype, head_dim_v: int, splits_of_entry: Callable[..., Int32]):
        """``splits_of_entry``: a function of (lengths, shape of ``mOPartial``), for a whole warp,
        that gives a batch entry's number of parts, as the forward has it."""
        self.dtype = dtype
        self.head_dim_v = head_dim_v
        self.splits_of_entry = splits_of_entry

    def launch(
        self,
        stream,
        length_arrays: tuple,
        kv_length: Int32,
        mOPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mSinks: cute.Tensor | None = None,
    ) -> None:
        rows = mO.shape[0] * mO.shape[1] * mO.shape[2]
        sharing = select(mOPartial.shape[0] < MANY_PARTS, Int32(1), Int32(WARPS))
        self.kernel(
            *(*length_arrays, kv_length, mOPartial, mLSEPartial, mO, mLSE, mSinks), sharing
        ).launch(
            grid=[cute.ceil_div(rows * sharing, WARPS), 1, 1],
            block=[32 * WARPS, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mQOffset: cute.Tensor | None,
        mQLengths: cute.Tensor | None,
        mKVLengths: cute.Tensor | None,
        kv_length: Int32,
        mOPartial: cute.Tensor,  # (splits, B, T, N, Hv) float32
        mLSEPartial: cute.Tensor,  # (splits, B, T, N) float32
        mO: cute.Tensor,  # (B, T, N, Hv)
        mLSE: cute.Tensor,  # (B, T, N) float32
        mSinks: cute.Tensor | None,  # (1|B, N) float32
        sharing: Int32,  # warps of a row: 1, or all
    ):
        warp = cute.arch.warp_idx()
        row = (cute.arch.block_idx()[0] * WARPS + warp) // sharing
        batches, q_length, heads = mO.shape[0], mO.shape[1], mO.shape[2]
        entry = row // heads
        head = row - entry * heads
        batch = entry // q_length
        token = entry - batch * q_length
        lengths = partial(entry_lengths, mQOffset, mQLengths, mKVLengths, q_length, kv_length)
        splits = Int32(0)
        if batch < batches:
            splits = self.splits_of_entry(lengths, mOPartial.shape)(batch)
        # The parts are written by the kernel before this one.
        cute.arch.griddepcontrol_wait()
        # A row of one part was written by the forward kernel itself.
        if splits > 1:
            is_valid = token < lengths(batch)[1]
            sink = self.sink_of_row(mSinks, batch, head, is_valid)
            warps = (warp % sharing, sharing)
            self.combine_row(
                mOPartial, mLSEPartial, mO, mLSE, (batch, token, head), splits, sink, warps
            )

    def sink_of_row(
        self, mSinks: cute.Tensor | None, batch: Int32, head: Int32, is_valid: Boolean
    ) -> Float32 | None:
        """A row's sink, if there are any; none of a padded row, whose LSE stays -inf."""
        if mSinks is None:
            return None
        return select(is_valid, sink_of(mSinks, batch, head), Float32(-Float32.inf))

    @cute.jit
    def combine_tile(
        self,
        mOPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        mSinks: cute.Tensor | None,
        rows,
        splits: Int32,
    ):
        """A warpgroup of the forward adds up the parts of a tile's rows, all of them stored.

        ``rows``: the ``SlabRows`` of its threads.
        """
        count = rows.q_length * rows.heads_packed
        for row in cutlass.range(rows.thread // 32, count, WARPS, unroll=1):
            token = row // rows.heads_packed
            head = rows.first_head + row - token * rows.heads_packed
            sink = self.sink_of_row(mSinks, rows.batch, head, token < rows.queries)
            place = (rows.batch, token, head)
            self.combine_row(mOPartial, mLSEPartial, mO, mLSE, place, splits, sink)

    @cute.jit
    def combine_row(
        self,
        mOPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        row: tuple,
        splits: Int32,
        sink: Float32 | None,
        warps: tuple = (0, 1),
    ):
        """O and LSE of one row; ``warps``: which of the row's it is, and of how many."""
        warp, sharing = warps
        lane = cute.arch.lane_idx()
        batch, token, head = row
        may_share = const_expr(not isinstance(sharing, int))
        sums = None
        if const_expr(may_share):
            layout = cute.make_layout((WARP_COLUMNS, WARPS))
            sums = SmemAllocator().allocate_tensor(Float32, layout)
        begin, step = warp * PARTS_AT_ONCE, sharing * PARTS_AT_ONCE
        chunks = [c * WARP_COLUMNS + 4 * lane for c in range(-(-self.head_dim_v // WARP_COLUMNS))]
        parts = cute.make_rmem_tensor((4, PARTS_AT_ONCE), Float32)
        # On their way while the weights are found.
        self.read_parts(parts, mOPartial, row, chunks[0], begin, splits - 1)
        largest = -Float32.inf if const_expr(sink is None) else sink
        for i in cutlass.range(lane, splits, 32, unroll=1):
            largest = cute.arch.fmax(largest, mLSEPartial[i, batch, token, head])
        for offset in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_bfly(largest, offset=1 << offset)
            largest = cute.arch.fmax(largest, other)
        # Without a visible key the maximum is -inf, and -inf - -inf is NaN.
        base = Float32(0.0) if largest == -Float32.inf else largest
        total = Float32(0.0)
        for i in cutlass.range(lane, splits, 32, unroll=1):
            total += exp2((mLSEPartial[i, batch, token, head] - base) * LOG2_E)
        for offset in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << offset)
        if const_expr(sink is not None):
            total += exp2((sink - base) * LOG2_E)
        is_empty = total == 0.0
        lse = -Float32.inf if is_empty else base + cute.math.log2(total, fastmath=True) * LN2
        factor = Float32(0.0) if is_empty else cute.arch.rcp_approx(total)
        if lane == 0 and warp == 0:
            mLSE[batch, token, head] = lse

        for c in cutlass.range_constexpr(len(chunks)):
            column = chunks[c]
            acc = cute.make_rmem_tensor(4, Float32)
            acc.fill(0.0)
            if const_expr(c > 0):
                self.read_parts(parts, mOPartial, row, column, begin, splits - 1)
            for first in cutlass.range(begin, splits, step, unroll=1):
                self.add_parts(acc, parts, mLSEPartial, row, base, first, splits - 1)
                if first + step < splits:
                    self.read_parts(parts, mOPartial, row, column, first + step, splits - 1)
            if const_expr(may_share):
                if sharing > 1:
                    self.add_warps(acc, sums, warp, lane)
            if column < self.head_dim_v and warp == 0:
                words = cute.make_rmem_tensor(2, Uint32)
                for k in cutlass.range_constexpr(2):
                    words[k] = round_pair(self.dtype, acc[2 * k] * factor, acc[2 * k + 1] * factor)
                start = cute.crd2idx((batch, token, head, 0), mO.layout)
                target = cute.recast_ptr((mO.iterator + (start + column)).align(8), dtype=Uint32)
                cute.autovec_copy(words, cute.make_tensor(target, cute.make_layout(2)))

    @cute.jit
    def add_warps(self, acc: cute.Tensor, sums: cute.Tensor, warp: Int32, lane: Int32):
        """Adds what the warps of a block have of the same columns."""
        cute.arch.sync_threads()
        for k in cutlass.range_constexpr(4):
            sums[4 * lane + k, warp] = acc[k]
        cute.arch.sync_threads()
        for k in cutlass.range_constexpr(4):
            own = [sums[4 * lane + k, w] for w in range(WARPS)]
            acc[k] = (own[0] + own[1]) + (own[2] + own[3])

    @cute.jit
    def read_parts(
        self,
        parts: cute.Tensor,
        mOPartial: cute.Tensor,
        row: tuple,
        column: Int32,
        first: Int32,
        last: Int32,
    ):
        """Reads four columns of a few parts of a row.

        Args:
          parts: (4, ``PARTS_AT_ONCE``), for what is read.
          mOPartial: the parts.
          row: batch, token and head.
          column: the first of the four.
          first: the first part to read; behind the last one, that is read again.
          last: the last part there is.
        """
        # Lanes without columns read others', so that all of them tell weights.
        readable = cutlass.min(column, Int32(self.head_dim_v - 4))
        for i in cutlass.range_constexpr(PARTS_AT_ONCE):
            start = cute.crd2idx((cutlass.min(first + i, last), *row, 0), mOPartial.layout)
            source = (mOPartial.iterator + (start + readable)).align(16)
            cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), parts[None, i])

    @cute.jit
    def add_parts(
        self,
        acc: cute.Tensor,
        parts: cute.Tensor,
        mLSEPartial: cute.Tensor,
        row: tuple,
        base: Float32,
        first: Int32,
        last: Int32,
    ):
        """Adds what ``read_parts`` has read to four columns.

        Args:
          acc: the columns' sums.
          parts: what was read.
          mLSEPartial: LSE of the parts.
          row: batch, token and head.
          base: what the parts' LSE are relative to.
          first, last: as they were read.
        """
        part = first + cute.arch.lane_idx() % PARTS_AT_ONCE
        part_lse = mLSEPartial[cutlass.min(part, last), *row]
        weight = select(part <= last, exp2((part_lse - base) * LOG2_E), Float32(0.0))
        for i in cutlass.range_constexpr(PARTS_AT_ONCE):
            factor = cute.arch.shuffle_sync(weight, i)
            # What a part without a visible key left may be NaN.
            for k in cutlass.range_constexpr(4):
                acc[k] = acc[k] + factor * select(factor > 0.0, parts[k, i], Float32(0.0))
