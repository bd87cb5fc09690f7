"""When each kernel and copy of this process ran on its GPUs, from CUPTI's activity records.

CUPTI, the CUDA profiling interface, sees the work of every framework in the process and stamps it
with the GPU's clock, so that kernels launched by JAX and by PyTorch are timed alike.  The library
comes with CUDA and as the wheel that JAX and PyTorch depend on.
"""

import ctypes
import importlib.util
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 8 << 20
FLUSH_FORCED = 1

# CUpti_ActivityKind
MEMCPY, MEMSET, CONCURRENT_KERNEL = 1, 2, 10

# Byte offsets that CUpti_ActivityKernel4 to 10, CUpti_ActivityMemcpy5 and 6 and
# CUpti_ActivityMemset4 share (CUDA 11 to 13); later versions of a record only append to it.
KIND_OFFSET, START_OFFSET, END_OFFSET, KERNEL_NAME_OFFSET = 0, 16, 24, 104

BufferRequested = ctypes.CFUNCTYPE(
    None,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.POINTER(ctypes.c_size_t),
)
BufferCompleted = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
)


class CuptiError(RuntimeError):
    """A call into CUPTI failed, or the library was not found."""


@dataclass(frozen=True, order=True)
class Activity:
    """One kernel, copy or fill; times in nanoseconds of the GPU's clock."""

    start: int
    end: int
    name: str


class DeviceTimeline:
    """Collects the activity of all GPUs of this process from its creation on.

    Raises:
      CuptiError: the library is missing or refuses.
    """

    def __init__(self, library: str | os.PathLike[str] | None = None):
        path = str(library or find_library())
        try:
            self._cupti = ctypes.CDLL(path)
        except OSError as error:
            raise CuptiError(f"{path} cannot be loaded: {error}") from None
        self._cupti.cuptiActivityGetNextRecord.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.POINTER(ctypes.c_void_p),
        ]
        self._lock = threading.Lock()
        self._buffers: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._activities: list[Activity] = []
        # CUPTI calls these from its own threads for as long as the process lives.
        self._requested = BufferRequested(self._request_buffer)
        self._completed = BufferCompleted(self._complete_buffer)
        self._call("cuptiActivityRegisterCallbacks", self._requested, self._completed)
        for kind in (CONCURRENT_KERNEL, MEMCPY, MEMSET):
            self._call("cuptiActivityEnable", kind)

    def read(self) -> list[Activity]:
        """The activities since the last call, by start; wait for the device before."""
        self._call("cuptiActivityFlushAll", FLUSH_FORCED)
        with self._lock:
            activities, self._activities = self._activities, []
        return sorted(activities)

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._cupti, function)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._cupti.cuptiGetResultString(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else "no reason given"
            raise CuptiError(f"{function} failed with {status}: {reason}")

    def _request_buffer(self, buffer, size, max_records) -> None:
        storage = ctypes.create_string_buffer(BUFFER_BYTES)
        address = ctypes.addressof(storage)
        with self._lock:
            self._buffers[address] = storage
        buffer[0] = address
        size[0] = BUFFER_BYTES
        max_records[0] = 0  # as many as fit

    def _complete_buffer(self, _context, _stream, buffer, _size, valid_bytes) -> None:
        activities = []
        record = ctypes.c_void_p()
        while valid_bytes and not self._cupti.cuptiActivityGetNextRecord(
            buffer, valid_bytes, ctypes.byref(record)
        ):
            activity = parse_record(record.value or 0)
            if activity:
                activities.append(activity)
        with self._lock:
            self._activities += activities
            self._buffers.pop(buffer, None)


def parse_record(address: int) -> Activity | None:
    """The activity that a record at an address tells of; None for an unfinished or other one."""

    def read(kind, offset):
        return kind.from_address(address + offset).value

    kind = read(ctypes.c_uint32, KIND_OFFSET)
    if kind == CONCURRENT_KERNEL:
        name = (read(ctypes.c_char_p, KERNEL_NAME_OFFSET) or b"").decode(errors="replace")
    elif kind in (MEMCPY, MEMSET):
        name = "memcpy" if kind == MEMCPY else "memset"
    else:
        return None
    start, end = read(ctypes.c_uint64, START_OFFSET), read(ctypes.c_uint64, END_OFFSET)
    return Activity(start, end, name) if 0 < start <= end else None


def find_library() -> str:
    """The CUPTI that the process has loaded already, else a wheel's, else the CUDA toolkit's."""
    maps = Path("/proc/self/maps")
    if maps.exists() and (loaded := re.search(r"(/\S*/libcupti\.so\S*)", maps.read_text())):
        return loaded[1]
    nvidia = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (nvidia.submodule_search_locations or [])] if nvidia else []
    for folder in folders:
        for library in sorted(folder.glob("*/lib/libcupti.so.*"), reverse=True):
            return str(library)
    for root in filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]):
        for place in ("extras/CUPTI/lib64", "lib64", "lib"):
            library = Path(root) / place / "libcupti.so"
            if library.exists():
                return str(library)
    raise CuptiError("libcupti was found neither in the process, nor as a wheel, nor with CUDA")
