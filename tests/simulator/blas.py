"""Keep numpy's OpenBLAS on one thread: the products here are too small to share."""

import contextlib
import ctypes
import functools
from pathlib import Path

import numpy as np


@functools.cache
def _controls():
    """(get, set) of the number of threads, or None where numpy has another BLAS."""
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for path in folder.glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", "_64_", ""):
                get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get and put:
                    return get, put
    return None


@contextlib.contextmanager
def one_thread():
    controls = _controls()
    if controls is None:
        yield
        return
    get, put = controls
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)
