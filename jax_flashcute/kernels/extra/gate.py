"""Gates of native sparse attention: a weighted sum of three branches, and its backward, one pass.

For a row of one query head, with the head's weights w_i:

    g_i = sigmoid(q . w_i)             O = sum_i g_i O_i
    dO_i = g_i dO                      e_i = (dO . O_i) g_i (1 - g_i)
    dq = sum_i e_i w_i                 dw_i = sum over rows of e_i q

all in float32.  A few lanes serve a row, 16 bytes each; they stay with one head and take every so
many'th of its rows, so that weights and their gradients stay in registers.  Neighbouring lanes
serve neighbouring heads, which lie side by side in memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass._mlir.dialects import arith

from jax_flashcute.kernels.common.softmax import LOG2_E, exp2
from jax_flashcute.kernels.common.tiles import round_pair
from jax_flashcute.kernels.common.traced import Traced

THREADS = 256
VECTOR = 8
"""16-bit elements a lane loads at once."""
BRANCHES = 3
ROWS_AT_ONCE = 8
"""Rows of the forward that the same lanes take: enough that loading the weights is little."""


class Rows(Traced):
    """Which rows these lanes serve, and their vectors of each."""

    def __init__(self, q_length: Int32, heads: Int32, chunks: Int32, batches: Int32, lanes: int):
        thread = cute.arch.thread_idx()[0]
        groups_of_lanes = THREADS // lanes
        group = cute.arch.block_idx()[0] * groups_of_lanes + thread // lanes
        groups = batches * chunks * heads
        self.is_present = group < groups
        # Lanes without rows of their own load the last group's, and store nothing.
        group = cutlass.min(group, groups - 1)
        entry = group // heads
        self.lane = thread % lanes
        self.head = group - entry * heads
        self.batch = entry // chunks
        self.chunk = entry - self.batch * chunks
        self.q_length = q_length
        self.heads = heads
        self.chunks = chunks
        self.steps = cute.ceil_div(q_length, chunks)

    def row(self, step: Int32) -> tuple[Int64, Boolean]:
        """The number of the step's row among all, and whether it is one of these lanes' own."""
        token = self.chunk + step * self.chunks
        is_own = self.is_present & (token < self.q_length)
        token = cutlass.min(token, self.q_length - 1)
        return (Int64(self.batch) * self.q_length + token) * self.heads + self.head, is_own

    def weights(self, mW: cute.Tensor) -> Int64:
        """The number of these lanes' (3, H) weights among all."""
        entry = cutlass.min(self.batch, mW.shape[0] - 1)
        return Int64(entry) * self.heads + self.head


class Gate:
    """Compiles to one kernel; ``Gate.launch`` is the forward."""

    def __init__(self, dtype, head_dim: int, head_dim_v: int):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        vectors = max(head_dim, head_dim_v) // VECTOR
        self.lanes = 1 << (vectors - 1).bit_length()

    def blocks(self, groups: Int32) -> Int32:
        return cute.ceil_div(groups, THREADS // self.lanes)

    def launch(self, stream, mQ, mO1, mO2, mO3, mW, mO) -> None:
        batches, q_length, heads = mQ.shape[0], mQ.shape[1], mQ.shape[2]
        chunks = cute.ceil_div(q_length, ROWS_AT_ONCE)
        self.kernel(mQ, mO1, mO2, mO3, mW, mO, chunks).launch(
            grid=[self.blocks(batches * chunks * heads), 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    def load(self, x: cute.Tensor, row: Int64, width: int, lane: Int32) -> list[Float32]:
        """This lane's vector of a row, 0 beyond its end."""
        vector = lane
        if const_expr(width < VECTOR * self.lanes):
            vector = cutlass.min(lane, width // VECTOR - 1)
        source = (x.iterator + (row * width + vector * VECTOR)).align(16)
        loaded = cute.make_rmem_tensor(VECTOR, x.element_type)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(VECTOR)), loaded)
        values = loaded.load().to(Float32)
        values = [values[i] for i in range(VECTOR)]
        if const_expr(width < VECTOR * self.lanes):
            is_within = lane * VECTOR < width
            zero = Float32(0.0).ir_value()
            values = [
                Float32(arith.select(is_within.ir_value(), x.ir_value(), zero)) for x in values
            ]
        return values

    @cute.jit
    def store(self, x: cute.Tensor, row: Int64, width: int, lane: Int32, values: list):
        """Rounds this lane's vector of a row and stores it."""
        words = cute.make_rmem_tensor(VECTOR // 2, Uint32)
        for i in cutlass.range_constexpr(VECTOR // 2):
            words[i] = round_pair(self.dtype, values[2 * i], values[2 * i + 1])
        if lane * VECTOR < width:
            target = (x.iterator + (row * width + lane * VECTOR)).align(16)
            target = cute.recast_ptr(target, dtype=Uint32)
            cute.autovec_copy(words, cute.make_tensor(target, cute.make_layout(VECTOR // 2)))

    def dot(self, a: list[Float32], b: list[Float32]) -> Float32:
        """The product of two rows, in all of their lanes."""
        total = a[0] * b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            total = total + x * y
        offset = 1
        while offset < self.lanes:
            total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
            offset *= 2
        return total

    def gates(self, q: list[Float32], w: list[list[Float32]]) -> list[Float32]:
        logits = [self.dot(q, each) for each in w]
        return [cute.arch.rcp_approx(1.0 + exp2(x * -LOG2_E)) for x in logits]

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,  # (B, T, N, H)
        mO1: cute.Tensor,  # (B, T, N, Hv)
        mO2: cute.Tensor,  # (B, T, N, Hv)
        mO3: cute.Tensor,  # (B, T, N, Hv)
        mW: cute.Tensor,  # (1|B, N, 3, H) float32
        mO: cute.Tensor,  # (B, T, N, Hv)
        chunks: Int32,
    ):
        rows = Rows(mQ.shape[1], mQ.shape[2], chunks, mQ.shape[0], self.lanes)
        lane, first = rows.lane, rows.weights(mW) * BRANCHES
        w = [self.load(mW, first + i, self.head_dim, lane) for i in range(BRANCHES)]
        for step in cutlass.range(rows.steps, unroll=2):
            row, is_own = rows.row(step)
            q = self.load(mQ, row, self.head_dim, lane)
            o = [self.load(x, row, self.head_dim_v, lane) for x in (mO1, mO2, mO3)]
            g = self.gates(q, w)
            total = [g[0] * o[0][i] + g[1] * o[1][i] + g[2] * o[2][i] for i in range(VECTOR)]
            if is_own:
                self.store(mO, row, self.head_dim_v, lane, total)


class GateBackward(Gate):
    """Compiles to one kernel; the weights' gradient comes in parts, one for each chunk of rows."""

    def launch(self, stream, mQ, mO1, mO2, mO3, mW, mdO, mdQ, mdO1, mdO2, mdO3, mdW) -> None:
        groups = mdW.shape[0] * mdW.shape[1] * mdW.shape[2]
        self.kernel(mQ, mO1, mO2, mO3, mW, mdO, mdQ, mdO1, mdO2, mdO3, mdW).launch(
            grid=[self.blocks(groups), 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,  # (B, T, N, H)
        mO1: cute.Tensor,  # (B, T, N, Hv)
        mO2: cute.Tensor,  # (B, T, N, Hv)
        mO3: cute.Tensor,  # (B, T, N, Hv)
        mW: cute.Tensor,  # (1|B, N, 3, H) float32
        mdO: cute.Tensor,  # (B, T, N, Hv)
        mdQ: cute.Tensor,  # (B, T, N, H)
        mdO1: cute.Tensor,  # (B, T, N, Hv)
        mdO2: cute.Tensor,  # (B, T, N, Hv)
        mdO3: cute.Tensor,  # (B, T, N, Hv)
        mdW: cute.Tensor,  # (B, chunks, N, 3, H) float32
    ):
        rows = Rows(mQ.shape[1], mQ.shape[2], mdW.shape[1], mQ.shape[0], self.lanes)
        lane, first = rows.lane, rows.weights(mW) * BRANCHES
        w = [self.load(mW, first + i, self.head_dim, lane) for i in range(BRANCHES)]
        dw = cute.make_rmem_tensor((VECTOR, BRANCHES), Float32)
        dw.fill(0.0)
        for step in cutlass.range(rows.steps, unroll=1):
            row, is_own = rows.row(step)
            q = self.load(mQ, row, self.head_dim, lane)
            do = self.load(mdO, row, self.head_dim_v, lane)
            o = [self.load(x, row, self.head_dim_v, lane) for x in (mO1, mO2, mO3)]
            g = self.gates(q, w)
            e = [self.dot(do, o[i]) * g[i] * (1.0 - g[i]) for i in range(BRANCHES)]
            if is_own:
                for i in cutlass.range_constexpr(BRANCHES):
                    for k in cutlass.range_constexpr(VECTOR):
                        dw[k, i] = dw[k, i] + e[i] * q[k]
                dq = [e[0] * w[0][k] + e[1] * w[1][k] + e[2] * w[2][k] for k in range(VECTOR)]
                self.store(mdQ, row, self.head_dim, lane, dq)
                self.store(mdO1, row, self.head_dim_v, lane, [g[0] * x for x in do])
                self.store(mdO2, row, self.head_dim_v, lane, [g[1] * x for x in do])
                self.store(mdO3, row, self.head_dim_v, lane, [g[2] * x for x in do])
        if rows.is_present & (lane * VECTOR < self.head_dim):
            part = (Int64(rows.batch) * rows.chunks + rows.chunk) * rows.heads + rows.head
            for i in cutlass.range_constexpr(BRANCHES):
                start = (part * BRANCHES + i) * self.head_dim + lane * VECTOR
                target = cute.make_tensor(
                    (mdW.iterator + start).align(16), cute.make_layout(VECTOR)
                )
                cute.autovec_copy(dw[None, i], target)
