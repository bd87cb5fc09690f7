"""The exponential that is a polynomial on the FMA pipes: how far it is from 2**x."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import numpy as np

from jax_flashcute.ffi.compile import ArrayType
from jax_flashcute.kernels.common.softmax import SMALLEST_EXPONENT, exp2_pair
from tests.simulator import simulate
from tests.simulator.compiled import compile_to_simulate

COUNT = 4096


class ExponentialsOfPairs:
    """y = 2**x of ``COUNT`` numbers, two a thread at a time."""

    @cute.jit
    def __call__(self, stream: cuda.CUstream, mX: cute.Tensor, mY: cute.Tensor):
        self.kernel(mX, mY).launch(grid=[1, 1, 1], block=[128, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mY: cute.Tensor):
        thread = cute.arch.thread_idx()[0]
        for i in cutlass.range(COUNT // 256, unroll=1):
            first = 2 * (128 * i + thread)
            mY[first], mY[first + 1] = exp2_pair((mX[first], mX[first + 1]))


def exponentials(x: np.ndarray) -> np.ndarray:
    arrays = [ArrayType(cutlass.Float32, (1,))] * 2
    kernel = compile_to_simulate(ExponentialsOfPairs, arrays, "sm_100a", "exponentials of pairs")
    return simulate(kernel, x, outputs=[(x.shape, np.float32)])[0]


def test_error_is_bounded() -> None:
    """From the smallest exponent to beyond what the lag of the maximum allows, and both ends."""
    x = np.linspace(SMALLEST_EXPONENT, 16.0, COUNT).astype(np.float32)
    x[:4] = -0.5, 0.5, -126.0, 8.0
    want = np.exp2(x.astype(np.float64))
    assert np.abs(exponentials(x) / want - 1).max() < 7.6e-5


def test_what_is_no_number_stays_none_and_what_is_too_small_is_tiny() -> None:
    x = np.full(COUNT, -1.0, np.float32)
    x[:4] = np.nan, -np.inf, -1000.0, SMALLEST_EXPONENT - 1
    found = exponentials(x)
    assert np.isnan(found[0])
    assert (np.abs(found[1:4] * 2.0**126 - 1) < 1e-4).all()
    assert np.allclose(found[4:], 0.5, rtol=1e-4, atol=0)
