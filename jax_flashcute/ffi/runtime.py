"""Finds the CuTe runtime library and registers its call target with XLA.

The target takes an object as an attribute, loads it once, and is aware of CUDA graphs, so calls
may be captured in command buffers.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

CALL_TARGET = "CuteDSLRT_NvJaxCutlassCall_v2"
"""Name of the XLA FFI target that runs an object."""

LIBRARY = "libcute_dsl_runtime.so"


@functools.cache
def find_library() -> Path:
    """Path of the CuTe runtime library for CUDA 13.

    Raises:
      ImportError: it is not installed.
    """
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "cu13" / "lib" / LIBRARY
        if path.exists():
            return path
    raise ImportError(
        f"{LIBRARY} for CUDA 13 was not found; install it with: "
        'pip install "nvidia-cutlass-dsl[cu13]>=4.8.1,<4.9"'
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """Loads the runtime; its symbols become visible to the objects that link against it."""
    return ctypes.CDLL(str(find_library()), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def register_call_target() -> None:
    """Makes the call target known to XLA's CUDA platform; safe to call again."""
    import jax

    library = load_library()

    def capsule(symbol: str, call: bool = False):
        function = getattr(library, symbol)
        function.restype = ctypes.c_void_p
        return jax.ffi.pycapsule(function() if call else function)

    prefix = CALL_TARGET.removesuffix("_v2")
    jax.ffi.register_ffi_type(
        f"{prefix}Types_v2",
        {
            "type_id": capsule(f"{prefix}StateTypeId_v2", call=True),
            "type_info": capsule(f"{prefix}StateTypeInfo_v2", call=True),
        },
        platform="CUDA",
    )
    jax.ffi.register_ffi_target(
        CALL_TARGET,
        {
            "instantiate": capsule(f"{prefix}Instantiate_v2"),
            "prepare": capsule(f"{prefix}Prepare_v2"),
            "execute": capsule(f"{prefix}Execute_v2"),
        },
        platform="CUDA",
    )
