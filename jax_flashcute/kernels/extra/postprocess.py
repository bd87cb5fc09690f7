"""After the backward: dQ from float32, in the order of the main kernel's registers, to 16 bits.

On Hopper these are a warpgroup product's; on Blackwell a thread has a row.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.tiles import (
    chunks,
    round_pairs,
    smem_layout,
    store_pairs,
    tma_partition,
)
from jax_flashcute.kernels.config.sm90 import BwdConfig
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100
from jax_flashcute.kernels.sm90.fragments import (
    convert_pairs,
    tiled_mma,
)
from jax_flashcute.kernels.sm90.query_sums import QuerySums


class Postprocess:
    """Compiles to one kernel; a block serves one query tile of one head.

    ``query_sums``: whose counters say when all has been added to a head; without, that is when the
    kernel before has ended.
    """

    def __init__(
        self,
        config: BwdConfig | BwdConfigSm100,
        dtype,
        head_dim: int,
        scale: float,
        query_sums: QuerySums | None = None,
    ):
        self.config = config
        self.by_rows = isinstance(config, BwdConfigSm100)
        self.dtype = dtype
        self.head_dim = head_dim
        self.scale = scale
        self.query_sums = query_sums
        self.smem_h = config.padded_head_dim(head_dim)
        self.parts = config.dq_parts(head_dim) if isinstance(config, BwdConfig) else 1

    def launch(
        self,
        stream,
        m_blocks: Int32,
        mdQAccum: cute.Tensor,
        mdQ: cute.Tensor,
        added: tuple[cute.Tensor, Int32] | None = None,
    ) -> None:
        """``added``: the counters, and how many blocks add to a head."""
        cfg = self.config
        b, t, n = mdQ.shape[0], mdQ.shape[1], mdQ.shape[2]
        row = Int64(n) * self.head_dim
        dq_tensor = cute.make_tensor(
            mdQ.iterator,
            cute.make_layout((t, self.head_dim, n, b), stride=(row, 1, self.head_dim, row * t)),
        )
        tma_dq = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(),
            dq_tensor,
            smem_layout(self.dtype, cfg.tile_m, self.smem_h),
            (cfg.tile_m, self.smem_h),
        )
        self.kernel(*tma_dq, mdQAccum, m_blocks, n, added).launch(
            grid=[m_blocks * n * b, 1, 1],
            block=[128 * self.parts, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        tma_dq: cute.CopyAtom,
        gdQ: cute.Tensor,
        mdQAccum: cute.Tensor,
        m_blocks: Int32,
        heads: Int32,
        added: tuple[cute.Tensor, Int32] | None,
    ):
        cfg = self.config
        thread = cute.arch.thread_idx()[0] % 128
        part = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        block = cute.arch.block_idx()[0]
        entry = block // m_blocks
        m_block = block - entry * m_blocks
        batch = entry // heads
        head = entry - batch * heads

        dq_layout = smem_layout(self.dtype, cfg.tile_m, self.smem_h)

        @cute.struct
        class SharedStorage:
            sdQ: cute.struct.Align[cute.struct.MemRange[self.dtype, cfg.tile_m * self.smem_h], 1024]

        storage = SmemAllocator().allocate(SharedStorage)
        sdQ = storage.sdQ.get_tensor(dq_layout.outer, swizzle=dq_layout.inner)

        first = (Int64(entry) * m_blocks + m_block) * (cfg.tile_m * self.smem_h)
        tile = (mdQAccum.iterator + first).align(16)
        if const_expr(self.query_sums is None):
            cute.arch.griddepcontrol_wait()
        else:
            # Its blocks were all at work, and counters clear, before the first of these began.
            if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
                self.query_sums.wait_until_added(added[0], entry, added[1])
            cute.arch.sync_threads()
        if const_expr(self.by_rows):
            self.round_row(tile, sdQ, thread)
        else:
            self.round_part(tile, sdQ, thread, part)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            target = cute.local_tile(
                gdQ[None, None, head, batch], (cfg.tile_m, self.smem_h), (None, 0)
            )
            tQsQ, tQgQ = tma_partition(tma_dq, sdQ, target)
            cute.copy(tma_dq, tQsQ, tQgQ[None, m_block])
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        if const_expr(self.query_sums is not None):
            # What follows this kernel may take for granted that the one before has ended, too.
            if block + 1 == cute.arch.grid_dim()[0]:
                cute.arch.griddepcontrol_wait()

    def round_row(self, tile: cute.Pointer, sdQ: cute.Tensor, thread: Int32) -> None:
        """A thread's row; 32 rows lie together, four columns of each at a time."""
        source = cute.make_tensor(
            tile,
            cute.make_layout(
                (4, (32, 4), self.smem_h // 4), stride=(1, (4, 32 * self.smem_h), 128)
            ),
        )
        for first, size in chunks(self.smem_h):
            values = cute.make_rmem_tensor(size, Float32)
            cute.autovec_copy(
                cute.local_tile(source[None, thread, None], (4, size // 4), (0, first // size)),
                cute.make_tensor(values.iterator, cute.make_layout((4, size // 4))),
            )
            for i in range(size):
                values[i] = values[i] * self.scale
            store_pairs(sdQ, thread, first // 8, round_pairs(self.dtype, values))

    @cute.jit
    def round_part(self, tile: cute.Pointer, sdQ: cute.Tensor, thread: Int32, part: Int32):
        """A warpgroup's part, in the order of the registers of the product that made it."""
        cfg = self.config
        rows, columns = cfg.dq_part_shape(self.head_dim)
        values = rows * columns // 128
        mma = tiled_mma(self.dtype, columns, OperandMajorMode.MN, warpgroup.OperandSource.SMEM)
        acc = cute.make_rmem_tensor(mma.partition_shape_C((rows, columns)), Float32)
        source = cute.make_tensor(
            tile,
            cute.make_layout((4, 128, values // 4, self.parts), stride=(1, 4, 512, rows * columns)),
        )
        target = cute.make_tensor(acc.iterator, cute.make_layout((4, values // 4), stride=(1, 4)))
        cute.autovec_copy(source[None, thread, None, part], target)
        for i in cutlass.range_constexpr(values):
            acc[i] = acc[i] * self.scale
        rdQ = cute.make_rmem_tensor(acc.layout, self.dtype)
        convert_pairs(acc, rdQ)
        sdQ_part = cute.local_tile(sdQ, (rows, columns), (0, part))
        copy = cute.make_tiled_copy_C(
            cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), self.dtype), mma
        ).get_slice(thread)
        cute.copy(copy, copy.retile(rdQ), copy.partition_D(sdQ_part))
