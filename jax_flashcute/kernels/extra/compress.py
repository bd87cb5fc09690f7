"""Keys and values of native sparse attention compressed to one per block: means, and backwards.

A block of threads serves 256 columns of one block of tokens, heads after heads as they lie in
memory, keys' columns first and then values'.  Each warp takes every eighth token, 16 bytes a lane;
the warps' sums, in float32, meet in shared memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.tiles import round_pair

WARPS = 8
VECTOR = 8
"""16-bit elements a lane loads at once."""
COLUMNS = 32 * VECTOR
MOST_UNROLLED = 16
"""Tokens a warp that are summed without a loop."""


class Compress:
    """Compiles to one kernel; ``Compress.launch`` is the forward.

    A block's mean is over its first so many tokens: those that there are, or what ``counts`` says.
    """

    def __init__(self, dtype, mean_dtype, block: int, head_dim: int, head_dim_v: int):
        self.dtype = dtype
        self.mean_dtype = mean_dtype
        self.block = block
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v

    def launch(self, stream, mK, mV, mCounts, mMeanK, mMeanV) -> None:
        self.start(stream, mMeanK, mMeanV, mK, mV, mCounts)

    def start(self, stream, mMeanK, mMeanV, mK, mV, mCounts) -> None:
        heads, blocks = mMeanK.shape[2], mMeanK.shape[1]
        key_parts = cute.ceil_div(heads * self.head_dim, COLUMNS)
        value_parts = cute.ceil_div(heads * self.head_dim_v, COLUMNS)
        entries = mMeanK.shape[0] * blocks
        self.kernel(mMeanK, mMeanV, mK, mV, mCounts, key_parts, value_parts).launch(
            grid=[entries * (key_parts + value_parts), 1, 1],
            block=[32 * WARPS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mMeanK: cute.Tensor,  # (B, blocks, K, H)
        mMeanV: cute.Tensor,  # (B, blocks, K, Hv)
        mK: cute.Tensor,  # (B, S, K, H)
        mV: cute.Tensor,  # (B, S, K, Hv)
        mCounts: cute.Tensor | None,  # (B, blocks) int32
        key_parts: Int32,
        value_parts: Int32,
    ):
        parts = key_parts + value_parts
        blocks, heads = mMeanK.shape[1], mMeanK.shape[2]
        entry = cute.arch.block_idx()[0] // parts
        part = cute.arch.block_idx()[0] - entry * parts
        batch = entry // blocks
        block = entry - batch * blocks
        there = cutlass.min(mK.shape[1] - block * self.block, Int32(self.block))
        count = there
        if const_expr(mCounts is not None):
            count = cutlass.max(cutlass.min(mCounts[batch, block], there), Int32(0))
        token = Int64(batch) * mK.shape[1] + block * self.block
        if part < key_parts:
            self.serve(mMeanK, mK, entry, token, there, count, part, heads * self.head_dim)
        else:
            part = part - key_parts
            self.serve(mMeanV, mV, entry, token, there, count, part, heads * self.head_dim_v)

    @cute.jit
    def serve(
        self,
        means: cute.Tensor,
        tokens: cute.Tensor,
        entry: Int32,
        token: Int64,
        there: Int32,
        count: Int32,
        part: Int32,
        width: Int32,
    ):
        """The mean of ``count`` tokens from ``token`` on, in the part's columns."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        column = part * COLUMNS + lane * VECTOR
        sums = cute.make_rmem_tensor(VECTOR, Float32)
        sums.fill(0.0)
        if column < width:
            steps = -(-self.block // WARPS)
            if const_expr(steps <= MOST_UNROLLED):
                for i in cutlass.range_constexpr(steps):
                    self.add(sums, tokens, token, i * WARPS + warp, count, column, width)
            else:
                for i in cutlass.range(cute.ceil_div(count, WARPS), unroll=MOST_UNROLLED):
                    self.add(sums, tokens, token, i * WARPS + warp, count, column, width)

        @cute.struct
        class SharedStorage:
            sums: cute.struct.Align[cute.struct.MemRange[Float32, WARPS * COLUMNS], 16]

        shared = (
            SmemAllocator()
            .allocate(SharedStorage)
            .sums.get_tensor(cute.make_layout((VECTOR, 32, WARPS), stride=(1, VECTOR, COLUMNS)))
        )
        cute.autovec_copy(sums, shared[None, lane, warp])
        cute.arch.sync_threads()
        thread = cute.arch.thread_idx()[0]
        column = part * COLUMNS + thread
        if column < width:
            total = Float32(0.0)
            for i in cutlass.range_constexpr(WARPS):
                total += shared[thread % VECTOR, thread // VECTOR, i]
            mean = total / Float32(cutlass.max(count, Int32(1)))
            target = cute.make_tensor(
                means.iterator + (Int64(entry) * width + column), cute.make_layout(1)
            )
            target[0] = mean.to(self.mean_dtype)

    @cute.jit
    def add(
        self,
        sums: cute.Tensor,
        tokens: cute.Tensor,
        first: Int64,
        i: Int32,
        count: Int32,
        column: Int32,
        width: Int32,
    ):
        # Loaded whether or not it counts, so that loads need not wait for each other.
        token = first + cutlass.max(cutlass.min(i, count - 1), Int32(0))
        source = (tokens.iterator + (token * width + column)).align(16)
        loaded = cute.make_rmem_tensor(VECTOR, self.dtype)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(VECTOR)), loaded)
        values = loaded.load().to(Float32)
        for k in cutlass.range_constexpr(VECTOR):
            value = values[k]
            sums[k] = sums[k] + (value if i < count else Float32(0.0))


class CompressBackward(Compress):
    """Compiles to one kernel: each token's gradient is its block's, over the count."""

    def launch(self, stream, mdMeanK, mdMeanV, mCounts, mdK, mdV) -> None:
        self.start(stream, mdMeanK, mdMeanV, mdK, mdV, mCounts)

    @cute.jit
    def serve(
        self,
        means: cute.Tensor,
        tokens: cute.Tensor,
        entry: Int32,
        token: Int64,
        there: Int32,
        count: Int32,
        part: Int32,
        width: Int32,
    ):
        """The gradient of ``there`` tokens, 0 from ``count`` on."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        column = part * COLUMNS + lane * VECTOR
        if column < width:
            source = (means.iterator + (Int64(entry) * width + column)).align(16)
            loaded = cute.make_rmem_tensor(VECTOR, self.mean_dtype)
            cute.autovec_copy(cute.make_tensor(source, cute.make_layout(VECTOR)), loaded)
            values = loaded.load().to(Float32)
            factor = 1.0 / Float32(cutlass.max(count, Int32(1)))
            words = cute.make_rmem_tensor(VECTOR // 2, Uint32)
            nothing = cute.make_rmem_tensor(VECTOR // 2, Uint32)
            nothing.fill(0)
            for k in cutlass.range_constexpr(VECTOR // 2):
                pair = values[2 * k] * factor, values[2 * k + 1] * factor
                words[k] = round_pair(self.dtype, *pair)
            for i in cutlass.range(warp, there, WARPS, unroll=4):
                start = (token + i) * width + column
                target = cute.recast_ptr((tokens.iterator + start).align(16), dtype=Uint32)
                target = cute.make_tensor(target, cute.make_layout(VECTOR // 2))
                if i < count:
                    cute.autovec_copy(words, target)
                else:
                    cute.autovec_copy(nothing, target)
