"""``simulate``: from a compiled kernel and arrays to arrays."""

import functools
from collections.abc import Collection, Sequence

import numpy as np

from . import (  # noqa: F401  (each registers its instructions)
    barriers,
    bit_operations,
    bulk_copies,
    comparisons,
    conversions,
    float_arithmetic,
    integer_arithmetic,
    memory_access,
    moves,
    tensor_memory,
    warp_operations,
    warpgroup_mma,
)
from .blas import one_thread
from .findings import FindingLog, SimulationError
from .machine import Dependence, Machine
from .memory import GlobalMemory
from .program import Program
from .ptx import Kernel, parse
from .recorder import Launch, record
from .schedule import Schedule


@functools.lru_cache(maxsize=64)
def _parsed(ptx: str) -> dict[str, Kernel]:
    return parse(ptx)


@functools.lru_cache(maxsize=64)
def _program(ptx: str, name: str) -> Program:
    return Program(_parsed(ptx)[name])


def record_launches(kernel, memory_buffers, *, num_sms=132) -> list[Launch]:
    """The launches that a compiled kernel's launcher makes for (address, dims) buffers."""
    if kernel.ptx is None:
        raise ValueError("kernel: compile it with its PTX kept")
    sizes = {name: k.parameter_sizes for name, k in _parsed(kernel.ptx).items()}
    return record(kernel.object, memory_buffers, sizes, arch=kernel.arch, num_sms=num_sms)


def simulate(
    kernel,
    *inputs: np.ndarray,
    outputs: Sequence[tuple[Sequence[int], np.dtype]],
    timing: str = "late",
    warps: str = "fair",
    seed: int = 0,
    num_sms: int = 132,
    check: bool = True,
    log: FindingLog | None = None,
    trace=None,
    coverage: set[int] | None = None,
    ignore: Collection[str] = (),
) -> list[np.ndarray]:
    """Run a compiled kernel on the CPU.

    Args:
      kernel: has ``object``, ``ptx`` and ``arch``, as ``ffi.compile_kernel`` returns them with the
        intermediates kept.  Where it has ``with_lines``, that is called for a kernel with line
        information once a finding or a trace needs it.
      inputs: the input arrays, in the kernel's order; copied, never written.
      outputs: (shape, dtype) of each output; they start as poison (NaN for floats).
      timing: when asynchronous copies complete: "late", "early" or "shuffled".
      warps: who runs: "fair", "adversarial" or "seeded".
      seed: of every random choice.
      num_sms: multiprocessors that the launcher is told of.
      check: whether to check the ordering of accesses to shared memory.
      log: collects findings instead of raising them at the end; those that end a run still raise.
      ignore: kinds of finding that are no reason to raise at the end.
      trace: a :class:`trace.Trace` to fill.
      coverage: filled with the PTX lines of the memory and synchronisation instructions that ran.

    Returns:
      The output arrays.

    Raises:
      SimulationError: the program misbehaved; its ``findings`` say how.
      PtxError: the PTX has something that the simulator does not know.
    """
    how = {
        "outputs": outputs, "timing": timing, "warps": warps, "seed": seed, "num_sms": num_sms,
        "check": check, "log": log, "trace": trace, "coverage": coverage, "ignore": ignore,
    }  # fmt: skip
    with_lines = getattr(kernel, "with_lines", None)
    if with_lines is None or log is not None:
        return _simulate(kernel, *inputs, **how)
    if trace is not None:
        return _simulate(with_lines(), *inputs, **how)
    try:
        return _simulate(kernel, *inputs, **how)
    except SimulationError:
        _simulate(with_lines(), *inputs, **how)  # raises the same, and names the Python lines
        raise


def _simulate(
    kernel, *inputs, outputs, timing, warps, seed, num_sms, check, log, trace, coverage, ignore
):
    own_log = log is None
    log = FindingLog() if own_log else log
    random = np.random.default_rng(seed)
    memory = GlobalMemory()
    buffers, held = [], []
    for i, array in enumerate(inputs):
        array = np.ascontiguousarray(array)
        block = memory.allocate(array.nbytes, f"input {i}", 0xFF)
        block.data[: array.nbytes] = array.reshape(-1).view(np.uint8)
        buffers.append((block.base, array.shape))
    for i, (shape, dtype) in enumerate(outputs):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = memory.allocate(size, f"output {i}", 0xFF)
        buffers.append((block.base, tuple(shape)))
        held.append((block, tuple(shape), np.dtype(dtype), size))
    schedule = Schedule(timing, warps, seed)
    # Registers hold NaNs in every float width; which ones, the seed says.
    poison = 2**64 - 1 if seed == 0 else int(random.integers(1, 2**63)) | 0x7FC0FFC07FC0FFC0
    overlaps_from, before = 0, Dependence()
    for index, launch in enumerate(record_launches(kernel, buffers, num_sms=num_sms)):
        if not launch.programmatic:
            overlaps_from = index  # it starts when all before it have completed
        dependence = run_launch(
            launch, _program(kernel.ptx, launch.kernel), memory, schedule, log,
            check=check, poison=poison, num_sms=num_sms, trace=trace, coverage=coverage,
            order=(index, overlaps_from),
        )  # fmt: skip
        if check and launch.programmatic and before.triggers and not dependence.waited:
            log.add(
                "missing griddepcontrol.wait", None,
                f"no thread of launch {index} waits for the one before, which let it start early: "
                "it may be done, and what follows begin, while that one still runs",
            )  # fmt: skip
        before = dependence
        if dependence.triggers == {True}:
            overlaps_from = index  # the next one starts when all before this one have completed
    findings = [f for f in log.findings if f.kind not in ignore]
    if own_log and findings:
        raise SimulationError(findings)
    return [
        block.data[:size].copy().view(dtype).reshape(shape) for block, shape, dtype, size in held
    ]


def run_launch(
    launch,
    program,
    memory,
    schedule,
    log,
    *,
    check=True,
    poison=0,
    num_sms=132,
    trace=None,
    coverage=None,
    order=(0, 0),
):
    """Run every block of one launch.

    Clusters run one after another; one that waits for another one's writes stands aside until the
    others have run.

    Returns:
      What its threads did by griddepcontrol.
    """
    dependence = Dependence()
    if 0 in launch.grid:
        return dependence
    threads = program.kernel.num_threads
    if threads is not None and threads != int(np.prod(launch.block)):
        raise ValueError(f"{launch.kernel}: launched with {launch.block}, compiled for {threads}")

    def new_machine():
        machine = Machine(
            launch, program, memory, schedule, log,
            check_ordering=check, poison=poison, num_sms=num_sms, trace=trace,
        )  # fmt: skip
        machine.coverage = coverage
        machine.launch_index, machine.overlaps_from = order
        machine.dependence = dependence
        return machine

    machine, waiting = new_machine(), []
    with np.errstate(all="ignore"), one_thread():
        for indices in _clusters(launch.grid, launch.cluster):
            running = machine.run_cluster(indices)
            if not _finishes(running):
                waiting.append((machine, running))
                machine = new_machine()
                if len(waiting) * machine.cluster_size >= num_sms:
                    _take_turns(waiting, memory, log, until=len(waiting) - 1)
        _take_turns(waiting, memory, log, until=0)
    return dependence


def _clusters(grid, cluster):
    """Block indices of each cluster, x fastest."""
    for z in range(0, grid[2], cluster[2]):
        for y in range(0, grid[1], cluster[1]):
            for x in range(0, grid[0], cluster[0]):
                yield [
                    (x + i, y + j, z + k)
                    for k in range(cluster[2])
                    for j in range(cluster[1])
                    for i in range(cluster[0])
                ]


def _finishes(running) -> bool:
    """Run a cluster until it ends or spins."""
    return next(running, _ENDED) is _ENDED


_ENDED = object()
_ROUNDS = 100
"""Turns of all waiting clusters without any progress, here or there, that count as deadlock.

Many: a warp may compute for several turns between two of its waits.
"""


def _take_turns(waiting, memory, log, until):
    """Resume spinning clusters in turn until at most ``until`` of them are left."""
    idle = 0
    while len(waiting) > until:
        before = _progress(waiting, memory)
        waiting[:] = [pair for pair in waiting if not _finishes(pair[1])]
        idle = idle + 1 if _progress(waiting, memory) == before else 0
        if idle > _ROUNDS:
            groups = [g for machine, _ in waiting for g in machine.groups]
            statement = groups[0].block.program.operations[groups[0].pc].statement
            lines = "\n      ".join(g.describe() for g in groups)
            log.fatal("deadlock", statement, f"blocks spin and nothing changes:\n      {lines}")


def _progress(waiting, memory):
    """What changes unless all that clusters do is to compute or to spin."""
    return memory.version, [machine.progress for machine, _ in waiting]
