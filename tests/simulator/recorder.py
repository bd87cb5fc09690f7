"""Run an object's host launcher on the CPU and record the kernel launches it makes.

The object is linked with ``cuda_stand_in.c`` by the system's C compiler, and its entry point is
called as XLA's FFI would call it: a stream, then for each array ``{void* data; int64* dims}``.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_STAND_IN = Path(__file__).with_name("cuda_stand_in.c")
_ENTRY_PREFIX = "_mlir_cutlass_call__mlir_ciface_"
_LOAD = "cutlass_call_cuda_load"

# cudaDeviceAttr values that launchers ask for.
_MULTIPROCESSOR_COUNT = 16
_COMPUTE_CAPABILITY = (75, 76)
_ATTRIBUTES = {
    1: 1024,  # threads per block
    2: 1024, 3: 1024, 4: 64,  # block dimensions
    5: 2**31 - 1, 6: 65535, 7: 65535,  # grid dimensions
    8: 49152,  # shared memory per block
    10: 32,  # warp size
    12: 65536,  # registers per block
    39: 2048,  # threads per multiprocessor
    81: 233472,  # shared memory per multiprocessor
    97: 232448,  # shared memory per block, by opt-in
}  # fmt: skip

# cudaLaunchAttributeID
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch.

    Attributes:
      kernel: name of the PTX entry.
      grid, block, cluster: extents as (x, y, z).
      shared_bytes: dynamic shared memory of a block.
      parameters: the kernel's parameter bytes, in order.
      programmatic: launched with programmatic stream serialization.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple[bytes, ...]
    programmatic: bool


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dims", ctypes.POINTER(ctypes.c_int64))]


_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_ON_GET_KERNEL = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)


def _cache_dir() -> Path:
    path = Path(tempfile.gettempdir()) / f"ptx_simulator_{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    return path


def link(object_bytes: bytes) -> Path:
    """The shared library of an object and the stand-in, built once per content."""
    source = _STAND_IN.read_bytes()
    digest = hashlib.sha256(source + b"-Bsymbolic" + object_bytes).hexdigest()
    library = _cache_dir() / f"{digest[:32]}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("the simulator needs a C compiler: no `cc` on PATH and CC is not set")
    with tempfile.TemporaryDirectory() as directory:
        obj = Path(directory) / "kernel.o"
        obj.write_bytes(object_bytes)
        out = Path(directory) / "kernel.so"
        # -Bsymbolic: a CUDA runtime already loaded by the process must not take the calls.
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-Bsymbolic", "-o", out, _STAND_IN, obj]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"linking the launcher failed:\n{done.stderr}")
        scratch = library.with_suffix(f".{os.getpid()}")
        shutil.move(out, scratch)
        os.replace(scratch, library)
    return library


def entry_symbol(object_bytes: bytes) -> str:
    """The symbol that calls the launcher with packed arguments."""
    start = object_bytes.find(_ENTRY_PREFIX.encode())
    if start < 0:
        raise ValueError(f"the object exports no symbol that starts with {_ENTRY_PREFIX}")
    return object_bytes[start : object_bytes.index(b"\0", start)].decode()


def record(
    object_bytes: bytes,
    buffers: list[tuple[int, tuple[int, ...]]],
    parameter_sizes: dict[str, list[int]],
    *,
    arch: str = "sm_90a",
    num_sms: int = 132,
) -> list[Launch]:
    """Call the launcher and return its launches in order.

    Args:
      object_bytes: the ELF object.
      buffers: (address, dims) of each array; addresses are never dereferenced.
      parameter_sizes: for each kernel name, the byte size of each parameter.
      arch: the device that attribute queries describe.
      num_sms: number of multiprocessors it has.
    """
    library = ctypes.CDLL(str(link(object_bytes)))
    launches: list[Launch] = []
    errors: list[Exception] = []
    names: list[str] = []

    @_ON_GET_KERNEL
    def on_get_kernel(name):
        names.append(name.decode())
        return len(names)

    @_ON_LAUNCH
    def on_launch(config, kernel, arguments):
        try:
            launches.append(_read_launch(config.contents, names, kernel, arguments))
        except Exception as error:  # it cannot pass through C
            errors.append(error)
        return 0

    def _read_launch(config, names, kernel, arguments):
        if not kernel:
            raise RuntimeError("the launcher launched a kernel that it never looked up")
        name = names[kernel - 1]
        if name not in parameter_sizes:
            raise ValueError(f"launch of {name}, which the PTX does not define")
        cluster, programmatic = (1, 1, 1), False
        for i in range(config.num_attributes):
            attribute = config.attributes[i]
            if attribute.id == _CLUSTER_DIMENSION:
                cluster = tuple(attribute.value[:3])
            elif attribute.id == _PROGRAMMATIC_STREAM_SERIALIZATION:
                programmatic = bool(attribute.value[0])
        parameters = tuple(
            ctypes.string_at(arguments[i], size) for i, size in enumerate(parameter_sizes[name])
        )
        return Launch(
            name,
            tuple(config.grid),
            tuple(config.block),
            tuple(max(1, c) for c in cluster),
            config.shared_bytes,
            parameters,
            programmatic,
        )

    attributes = (ctypes.c_int * 256).in_dll(library, "sim_device_attributes")
    for key, value in _ATTRIBUTES.items():
        attributes[key] = value
    digits = arch.removeprefix("sm_").rstrip("abcdefghijklmnopqrstuvwxyz")
    attributes[_COMPUTE_CAPABILITY[0]] = int(digits[:-1])
    attributes[_COMPUTE_CAPABILITY[1]] = int(digits[-1])
    attributes[_MULTIPROCESSOR_COUNT] = num_sms
    ctypes.c_void_p.in_dll(library, "sim_on_launch").value = ctypes.cast(
        on_launch, ctypes.c_void_p
    ).value
    ctypes.c_void_p.in_dll(library, "sim_on_get_kernel").value = ctypes.cast(
        on_get_kernel, ctypes.c_void_p
    ).value

    # The loader follows one or two pointers to a library handle: a word that points at itself
    # serves either way.
    handle = ctypes.c_void_p()
    handle.value = ctypes.addressof(handle)
    if hasattr(library, _LOAD):
        getattr(library, _LOAD)(ctypes.byref(handle))

    stream = ctypes.c_void_p(0)
    status = ctypes.c_int32(0)
    dims = [(ctypes.c_int64 * max(1, len(d)))(*d) for _, d in buffers]
    structs = [_Buffer(a, d) for (a, _), d in zip(buffers, dims, strict=True)]
    pointers = [ctypes.c_void_p(ctypes.addressof(s)) for s in structs]
    values = [stream, *pointers, status]
    packed = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
    getattr(library, entry_symbol(object_bytes))(packed)
    if errors:
        raise errors[0]
    if status.value:
        raise RuntimeError(f"the launcher returned error {status.value}")
    return launches
