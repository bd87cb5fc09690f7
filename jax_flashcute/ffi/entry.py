"""The traced entry point of every object.  Imports the compiler, so it is imported last."""

from collections.abc import Callable

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass.jax.types import JaxTracedArray


@cute.jit
def entry(
    stream: cuda.CUstream,
    *buffers: JaxTracedArray,
    build: cutlass.Constexpr[Callable],
    present: cutlass.Constexpr[tuple[bool, ...]],
):
    """Calls the launcher that ``build`` makes with a tensor, or None, for each argument."""
    given = iter(buffers)
    tensors = [next(given).get_tensor() if p else None for p in present]  # type: ignore[attr-defined]
    build()(stream, *tensors)  # type: ignore[operator]
