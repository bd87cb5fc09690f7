"""A kernel that evaluates an element program, a thread an element, for tests of the lowering."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from jax_flashcute.kernels.lower_jaxpr import ElementProgram, arrays_as_views

THREADS = 64


class EvaluateProgram:
    """Launches over as many elements as there are, in blocks of ``THREADS``."""

    def __init__(self, program: ElementProgram):
        self.program = program

    @cute.jit
    def __call__(self, stream, mInputs, mScore: cute.Tensor, mIndices: cute.Tensor, mOut):
        """``mInputs``: the arrays; scores (n,), indices (4, n) int32, results (n,) float32."""
        self.kernel(mInputs, mScore, mIndices, mOut).launch(
            grid=[cute.ceil_div(mScore.shape[0], THREADS), 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mInputs, mScore: cute.Tensor, mIndices: cute.Tensor, mOut: cute.Tensor):
        i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        if i < mScore.shape[0]:
            known = self.program.start(arrays_as_views(self.program, mInputs, Int32(0)))
            given = dict(zip(("b", "h", "q_idx", "kv_idx"), range(4), strict=True))
            known = self.program.given(known, **{n: mIndices[k, i] for n, k in given.items()})
            if cutlass.const_expr("score" in self.program.arguments):
                known = self.program.given(known, score=mScore[i])
            if cutlass.const_expr("cotangent" in self.program.arguments):
                known = self.program.given(known, cotangent=Float32(1.0))
            mOut[i] = Float32(self.program.value(known))
