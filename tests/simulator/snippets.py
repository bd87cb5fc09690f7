"""Run a few lines of PTX without a launcher."""

from collections.abc import Sequence

import numpy as np
import pytest

from .findings import FindingLog, SimulationError
from .memory import GlobalMemory
from .program import Program
from .ptx import parse
from .recorder import Launch
from .schedule import Schedule
from .simulation import run_launch
from .tensor_map import encode

_HEAD = """
.version 9.0
.target {arch}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel({parameters})
.reqntid {threads}, 1, 1
{{
  .reg .pred %p<16>;
  .reg .b16 %h<64>;
  .reg .b32 %r<256>;
  .reg .b64 %rd<64>;
  .reg .b32 %tid;
  .reg .b64 %a<8>;
  .reg .b64 %t<4>;
{loads}
  mov.u32 %tid, %tid.x;
"""


def execute(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    shared: int = 4096,
    cluster: int = 1,
    grid: int = 1,
    arch: str = "sm_90a",
    tensor_maps: Sequence[dict] = (),
    log: FindingLog | None = None,
    **how,
) -> list[np.ndarray]:
    """Run PTX statements and return the arrays as they are afterwards.

    ``%a0``, ``%a1``, ... hold the arrays' addresses, ``%tid`` the thread's index, ``smem`` names
    the dynamic shared memory; ``%p``, ``%h``, ``%r`` and ``%rd`` registers are declared.
    ``tensor_maps`` are arguments of ``tensor_map.encode``, with ``array`` (an index) in place of
    the address; ``%t0``, ``%t1``, ... hold their addresses.
    """
    memory = GlobalMemory()
    held = []
    for i, array in enumerate(arrays):
        block = memory.allocate(array.nbytes, f"array {i}", 0xFF)
        block.data[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        held.append(block)
    ptx = _HEAD.format(
        arch=arch,
        threads=threads,
        parameters=", ".join(
            [f".param .u64 p{i}" for i in range(len(arrays))]
            + [f".param .align 64 .b8 map{i}[128]" for i in range(len(tensor_maps))]
        ),
        loads="\n".join(
            [f"  ld.param.u64 %a{i}, [p{i}];" for i in range(len(arrays))]
            + [f"  mov.b64 %t{i}, map{i};" for i in range(len(tensor_maps))]
        ),
    )
    maps = []
    for fields in tensor_maps:
        fields = dict(fields)
        maps.append(encode(held[fields.pop("array")].base, **fields))
    program = Program(parse(ptx + body + "\n  ret;\n}\n")["kernel"])
    launch = Launch(
        "kernel",
        (grid, 1, 1),
        (threads, 1, 1),
        (cluster, 1, 1),
        shared,
        (*(int(b.base).to_bytes(8, "little") for b in held), *maps),
        False,
    )
    own = log is None
    log = FindingLog() if own else log
    schedule = Schedule(how.pop("timing", "late"), how.pop("warps", "fair"), how.pop("seed", 0))
    run_launch(launch, program, memory, schedule, log, **how)
    if own and log.findings:
        raise SimulationError(log.findings)
    return [
        block.data[: array.nbytes].copy().view(array.dtype).reshape(array.shape)
        for block, array in zip(held, arrays, strict=True)
    ]


LANES = np.arange(32)
MBARRIER = """
  mov.u32 %r1, smem;
  setp.eq.u32 %p7, %tid, 0;
  @%p7 mbarrier.init.shared.b64 [%r1], {count};
  @%p7 fence.mbarrier_init.release.cluster;
  bar.sync 0;
"""
"""Initialises the one at the start of shared memory, ``%r1``; ``%p7`` is the first thread's."""
STORE_WORD = """
  mul.wide.u32 %rd60, %tid, 4;
  add.s64 %rd60, %rd60, %a0;
  st.global.b32 [%rd60], %r0;
"""


def per_thread(body: str, *arrays: np.ndarray, threads: int = 32, **how) -> np.ndarray:
    """Run ``body``, which leaves a word in %r0, and return it for every thread."""
    words = np.zeros(threads, np.uint32)
    return execute(body + STORE_WORD, words, *arrays, threads=threads, **how)[0]


def findings(body: str, *arrays: np.ndarray, **how) -> list[str]:
    """The kinds of finding that a program raises."""
    with pytest.raises(SimulationError) as raised:
        execute(body, *arrays, **how)
    return [f.kind for f in raised.value.findings]


_PREFIX = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}


def evaluate(
    instruction: str, *operands: Sequence | np.ndarray, out: np.dtype | type
) -> np.ndarray:
    """Apply one instruction to arrays, an element a thread.

    ``instruction`` names its destination ``d`` and its sources ``a``, ``b``, ``c``, ``e``; a
    predicate destination is ``p`` and is returned as 0 or 1.
    """
    arrays = [np.atleast_1d(np.asarray(x)) for x in operands]
    count = max(len(x) for x in arrays)
    padded = -(-count // 32) * 32
    arrays = [np.resize(x, count) for x in arrays]
    arrays = [np.concatenate([x, np.zeros(padded - count, x.dtype)]) for x in arrays]
    out = np.dtype(out)
    result = np.zeros(padded, out)
    lines = []
    names = {}
    for i, array in enumerate(arrays):
        width = array.dtype.itemsize
        register = f"{_PREFIX[width]}{i + 1}"
        names["abce"[i]] = register
        lines += [
            f"  mul.wide.u32 %rd{40 + i}, %tid, {width};",
            f"  add.s64 %rd{40 + i}, %rd{40 + i}, %a{i};",
            f"  ld.global.b{8 * width} {register}, [%rd{40 + i}];",
        ]
    names["d"] = f"{_PREFIX[out.itemsize]}10"
    names["p"] = "%p1"
    text = " ".join(names.get(word, word) for word in _words(instruction))
    lines.append(f"  {text};")
    if " p " in f" {' '.join(_words(instruction))} ":
        lines.append(f"  selp.b{8 * out.itemsize} {names['d']}, 1, 0, %p1;")
    lines += [
        f"  mul.wide.u32 %rd50, %tid, {out.itemsize};",
        f"  add.s64 %rd50, %rd50, %a{len(arrays)};",
        f"  st.global.b{8 * out.itemsize} [%rd50], {names['d']};",
    ]
    return execute("\n".join(lines), *arrays, result, threads=padded)[-1][:count]


def _words(text: str) -> list[str]:
    for mark in ",{}|[]":
        text = text.replace(mark, f" {mark} ")
    return text.split()
