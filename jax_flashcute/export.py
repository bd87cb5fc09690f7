"""Programs that are exported on one machine and run on another, with ``jax.export``.

Exporting for CUDA needs no GPU: ``JAX_FLASHCUTE_ARCH`` names the architecture, and dimensions may
be symbolic.  A program holds its kernels; the process that runs it calls ``register_call_target``
first, and needs the CuTe runtime library and no compiler.
"""

from jax_flashcute.ffi.call import EXPORT_CHECKS
from jax_flashcute.ffi.runtime import register_call_target

__all__ = ["EXPORT_CHECKS", "register_call_target"]
