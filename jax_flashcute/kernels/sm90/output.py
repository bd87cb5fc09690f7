"""What leaves Hopper's forward: a slab's rows of O and their log-sum-exp.

Stored by the threads that hold them; or through shared memory, from where TMA stores O; or as one
part of several in float32, to be added up (extra/combine.py).
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32
from cutlass.cute.nvgpu import warp

from jax_flashcute.kernels.common.numbers import select, store_float_if
from jax_flashcute.kernels.common.pipeline import TmaPipeline
from jax_flashcute.kernels.common.softmax import OnlineSoftmax
from jax_flashcute.kernels.common.tiles import slab_tma_layout, swizzle_width, tma_partition
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.sm90.fragments import (
    ROWS_PER_THREAD,
    lines_of_quads,
    rounded_row,
    row_in_slab,
    rows_and_columns,
    store_lines,
)

WARPS = 4
"""Of a warpgroup."""


class SlabRows(Traced):
    """The rows of a slab that a thread holds.

    ``head`` is that of the tile, of ``heads_packed``; ``queries`` is how many of the batch entry's
    are valid, ``q_length`` how many the arrays have.
    """

    def __init__(
        self,
        batch: Int32,
        head: Int32,
        first_token: Int32,
        queries: Int32,
        q_length: Int32,
        thread: Int32,
        heads_packed: int,
    ):
        self.batch = batch
        self.first_head = head * heads_packed
        self.first_token = first_token
        self.queries = queries
        self.q_length = q_length
        self.thread = thread
        self.heads_packed = heads_packed

    def token(self, r: int) -> Int32:
        """Of register row r."""
        return self.first_token + row_in_slab(self.thread, r) // self.heads_packed

    def query_head(self, r: int) -> Int32:
        """Of register row r."""
        return self.first_head + row_in_slab(self.thread, r) % self.heads_packed


class SlabOutput:
    """Stores slabs of 64 rows, of which ``heads_packed`` are of one token."""

    def __init__(
        self, dtype: Any, head_dim_v: int, heads_packed: int, config: FwdConfig, width: int
    ):
        """``width``: columns of O in shared memory."""
        self.dtype = dtype
        self.head_dim_v = head_dim_v
        self.heads_packed = heads_packed
        self.slab_rows = 64 // heads_packed * heads_packed
        self.config = config
        self.width = width

    # ---- by the threads that hold them -------------------------------------------------------

    @cute.jit
    def store(
        self,
        out: cute.Tensor,
        row_scale: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        rows: SlabRows,
    ):
        """Stores a slab's rows of O and LSE."""
        for r in cutlass.range_constexpr(cute.size(out, mode=[0])):
            token = rows.token(r)
            is_valid = token < rows.queries
            words = rounded_row(out, r, row_scale[r], self.dtype)
            words = [select(is_valid, word, Uint32(0)) for word in words]
            lines = lines_of_quads(words, rows.thread)
            in_slab = row_in_slab(rows.thread, r) < self.slab_rows
            if in_slab and token < rows.q_length:
                q_head = rows.query_head(r)
                if rows.thread % 4 == 0:
                    mLSE[rows.batch, token, q_head] = lse[r] if is_valid else -Float32.inf
                start = cute.crd2idx((rows.batch, token, q_head, 0), mO.layout)
                store_lines(lines, mO.iterator + start, self.head_dim_v, rows.thread)

    @cute.jit
    def store_part(
        self,
        out: cute.Tensor,
        row_scale: cute.Tensor,
        lse: cute.Tensor,
        mOPartial: cute.Tensor,
        mLSEPartial: cute.Tensor,
        part: Int32,
        rows: SlabRows,
    ):
        """Stores a slab's rows of one part in float32, each normalised by its own LSE.

        O of a row whose LSE is -inf is never read, so what a padded row holds there is no matter.
        """
        for r in cutlass.range_constexpr(cute.size(out, mode=[0])):
            token = rows.token(r)
            in_slab = row_in_slab(rows.thread, r) < self.slab_rows
            if in_slab and token < rows.q_length:
                place = (part, rows.batch, token, rows.query_head(r))
                if rows.thread % 4 == 0:
                    is_valid = token < rows.queries
                    mLSEPartial[place] = lse[r] if is_valid else -Float32.inf
                start = cute.crd2idx((*place, 0), mOPartial.layout)
                for j in cutlass.range_constexpr(self.head_dim_v // 8):
                    target = cute.make_tensor(
                        (mOPartial.iterator + (start + 8 * j + 2 * (rows.thread % 4))).align(8),
                        cute.make_layout(2),
                    )
                    pair = cute.make_rmem_tensor(2, Float32)
                    for i in cutlass.range_constexpr(2):
                        pair[i] = out[r, 2 * j + i] * row_scale[r]
                    cute.autovec_copy(pair, target)

    # ---- through shared memory, by TMA -------------------------------------------------------

    @property
    def warp_box(self) -> tuple[int, int, int]:
        """(heads, tokens, columns) of the rows of O that a warp stores."""
        return self.heads_packed, 16 // self.heads_packed, self.width

    def warp_rows(self):
        """Layout of those rows in a slab, as TMA reads them."""
        return slab_tma_layout(self.dtype, 64, self.width, *self.warp_box[:2])

    def finish(
        self,
        softmax: OnlineSoftmax,
        row_scale: cute.Tensor,
        lse: cute.Tensor,
        mLSE: cute.Tensor,
        rows: SlabRows,
    ) -> None:
        """The last factor of a slab's rows of O, and their LSE, stored.

        Without branches, ahead of which the compiler would wait for the product that this runs
        beside.
        """
        softmax.finish(row_scale, lse)
        for r in range(ROWS_PER_THREAD):
            token = rows.token(r)
            place = (rows.batch, token, rows.query_head(r))
            target = mLSE.iterator + cute.crd2idx(place, mLSE.layout)
            value = select(token < rows.queries, lse[r], Float32(-Float32.inf))
            is_stored = (rows.thread % 4 == 0) & (token < rows.q_length)
            store_float_if(target, value, is_stored)

    def stage(
        self,
        acc_O: cute.Tensor,
        row_scale: cute.Tensor,
        mma: cute.TiledMma,
        sQ: cute.Tensor,
        slab: Int32,
        rows: SlabRows,
        hides: bool,
    ) -> None:
        """Leaves a slab's rows of O in shared memory, each warp where its own queries were.

        Args:
          slab: of ``sQ``.
          hides: rows may be invalid.
        """
        out, rounded = rows_and_columns(acc_O), cute.make_rmem_tensor(acc_O.layout, self.dtype)
        words = cute.recast_tensor(rounded, Uint32)
        for r in range(ROWS_PER_THREAD):
            row = rounded_row(out, r, row_scale[r], self.dtype)
            if hides:
                row = [select(rows.token(r) < rows.queries, word, Uint32(0)) for word in row]
            for j, word in enumerate(row):
                words[ROWS_PER_THREAD * j + r] = word
        copy = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma
        ).get_slice(rows.thread)
        target = copy.partition_D(sQ)[None, None, None, slab]
        cute.copy(copy, copy.retile(rounded), target)

    @cute.jit
    def send(
        self,
        tma_o: cute.CopyAtom,
        gO: cute.Tensor,
        sQ: cute.Tensor,
        slab: Int32,
        target: tuple,
    ):
        """Begins to store what ``stage`` left; each warp its own rows.

        Args:
          slab: of ``sQ``.
          target: that of O, its head and batch entry.
        """
        target_slab, head, batch = target
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx()) % WARPS
        rows = 16 * swizzle_width(self.dtype, self.width)
        slabs = self.config.warpgroups * self.config.q_stages
        sO = cute.make_tensor(
            sQ.iterator,
            cute.append(
                self.warp_rows().outer,
                cute.make_layout((WARPS, slabs), stride=(rows, 64 * self.width)),
            ),
        )  # (heads, tokens, columns, (warps, slabs))
        gO_part = cute.local_tile(
            gO[None, None, None, head, batch], self.warp_box, (0, None, 0)
        )  # (heads, tokens, columns, parts)
        tOsO, tOgO = tma_partition(tma_o, sO, gO_part)
        # TMA reads what the threads have written.
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        cute.copy(
            tma_o, tOsO[None, (warp_index, slab)], tOgO[None, target_slab * WARPS + warp_index]
        )
        cute.arch.cp_async_bulk_commit_group()

    def release_sent(self, pipeline_q: TmaPipeline, stage: Int32, warps: int) -> None:
        """Gives back a query tile from where O has left."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        pipeline_q.release(stage, warps, lanes_read=True)
