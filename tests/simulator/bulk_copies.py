"""Asynchronous copies: TMA tensor copies and reductions, bulk copies, cp.async.

PTX ISA, "Data Movement and Conversion Instructions: Asynchronous Copy".  Every copy becomes an
operation that the schedule completes when it likes; only the waits that the program makes bound
that.  Ordering is checked at issue, with the clocks of that moment.
"""

import functools
import re

import numpy as np

from . import barriers
from .memory_access import addresses, check_shared, shared_target, use_global
from .number_types import dtype_of
from .program import PARAMETER_WINDOW, FormError, effect, instruction, integer
from .tensor_map import TensorMap, decode
from .trace import source as trace_source


class BulkGroups:
    """One thread's bulk groups: the open one and the committed ones, oldest first."""

    def __init__(self):
        self.open, self.committed = [], []
        self.statement = None

    def all(self):
        return [*self.committed, self.open]


class Copy:
    """An asynchronous copy in flight: ``read`` takes the source, ``write`` delivers it."""

    def __init__(self, read, write, token, statement):
        self._read, self._write = read, write
        self.token, self.statement = token, statement
        self.read_done = self.done = False
        self._data = None

    def read(self):
        if not self.read_done:
            self._data = self._read()
            self.read_done = True

    def complete(self):
        if not self.done:
            self.read()
            self._write(self._data)
            self.done = True


def _finish(machine, copy):
    """Complete a copy now, wherever it stands."""
    if not copy.done:
        if copy in machine.pending:
            machine.complete(copy)
        else:
            copy.complete()


# ---- tensor geometry


@functools.cache
def _box_indices(box: tuple[int, ...]) -> np.ndarray:
    """Outer coordinates within a box, in the order rows lie in shared memory: (rank - 1, rows)."""
    outer = box[1:]
    if not outer:
        return np.zeros((0, 1), np.int64)
    return np.indices(outer[::-1]).reshape(len(outer), -1)[::-1].astype(np.int64)


@functools.lru_cache(maxsize=4096)
def _shared_chunks(start: int, size: int, swizzle: int) -> np.ndarray:
    """Indices of the 16-byte chunks of a box in shared memory, swizzled."""
    a = start + 16 * np.arange(size // 16)
    if swizzle:
        a ^= ((a >> 7) & (swizzle // 16 - 1)) << 4
    return a >> 4


def _tensor_map(block, address, statement) -> TensorMap:
    maps = block.machine.tensor_maps
    found = maps.get(address)
    if found is None:
        offset = address - PARAMETER_WINDOW
        if not 0 <= offset <= len(block.parameters) - 128:
            block.machine.log.fatal(
                "bad tensor map", statement, f"no tensor map at {address:#x}: not a parameter"
            )
        try:
            found = maps[address] = decode(block.parameters[offset : offset + 128].tobytes())
        except (ValueError, NotImplementedError) as error:
            block.machine.log.fatal("bad tensor map", statement, str(error))
        inner = found.box[0] * found.dtype.itemsize
        if inner % 16 or (found.swizzle and inner != found.swizzle):
            block.machine.log.fatal(
                "bad tensor map", statement,
                f"inner box of {inner} bytes with a {found.swizzle}-byte swizzle",
            )  # fmt: skip
    return found


def _locate(block, tensor: TensorMap, coordinates, statement):
    """(memory, byte offset of each box row, rows in bounds, first and last inner byte)."""
    memory = block.machine.memory.find(tensor.address)
    index = _box_indices(tensor.box)
    rows = index.shape[1]
    inside = np.ones(rows, bool)
    offset = np.full(rows, tensor.address - memory.base, np.int64)
    for k in range(1, len(tensor.box)):
        c = index[k - 1] + coordinates[k]
        inside &= (c >= 0) & (c < tensor.extents[k])
        offset += c * tensor.strides[k]
    width = tensor.dtype.itemsize
    start = coordinates[0] * width
    limit = tensor.extents[0] * width
    if inside.any():
        last = int(offset[inside].max()) + min(start + tensor.box[0] * width, limit)
        if last > memory.size or int(offset[inside].min()) < 0:
            block.machine.log.fatal(
                "out-of-bounds access", statement,
                f"the tensor map reaches byte {last} of {memory.name}, which has {memory.size}",
            )  # fmt: skip
    return memory, offset, inside, start, limit


def _gather(block, tensor, coordinates, statement) -> np.ndarray:
    """The box as (rows * inner / 16, 16) bytes; out of bounds reads as zero."""
    memory, offset, inside, start, limit = _locate(block, tensor, coordinates, statement)
    inner = tensor.box[0] * tensor.dtype.itemsize
    if start % 16 == 0 and limit % 16 == 0 and (tensor.address - memory.base) % 16 == 0:
        column = start + 16 * np.arange(inner // 16)
        ok = inside[:, None] & ((column >= 0) & (column < limit))
        source = np.where(ok, offset[:, None] + column, 0) >> 4
        data = memory.view(np.uint64).reshape(-1, 2)[source]
        if not ok.all():
            data[~ok] = 0
        return data.reshape(-1, 2)
    column = start + np.arange(inner)
    ok = inside[:, None] & ((column >= 0) & (column < limit))
    source = np.where(ok, offset[:, None] + column, 0)
    data = np.where(ok, memory.data[source], np.uint8(0))
    return data.reshape(-1, 16).view(np.uint64)


def _scatter(block, tensor, coordinates, data, statement, reduction):
    """Write the box back, in bounds only; with a reduction, combine."""
    memory, offset, inside, start, limit = _locate(block, tensor, coordinates, statement)
    block.machine.memory.version += 1
    width = tensor.dtype.itemsize
    if reduction is None:
        element = np.uint8
        values = np.ascontiguousarray(data).view(np.uint8).reshape(len(offset), -1)
        step = 1
    else:
        element, step = tensor.dtype, width
        values = np.ascontiguousarray(data).view(element).reshape(len(offset), -1)
    column = start + step * np.arange(values.shape[1])
    ok = inside[:, None] & ((column >= 0) & (column < limit))
    target = ((offset[:, None] + column) // step)[ok]
    view = memory.view(element)
    if reduction is None:
        view[target] = values[ok]
    else:
        view[target] = _reduce(reduction, view[target], values[ok])


def _reduce(operation, old, new):
    return {
        "add": lambda: old + new, "min": lambda: np.minimum(old, new),
        "max": lambda: np.maximum(old, new), "and": lambda: old & new, "or": lambda: old | new,
        "xor": lambda: old ^ new,
        "inc": lambda: np.where(old >= new, 0, old + 1).astype(old.dtype),
        "dec": lambda: np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype),
    }[operation]()  # fmt: skip


# ---- issuing


def _one(g, thread, operand):
    return int(g.v[operand[0]][operand[1]][thread])


def _threads(g, m):
    if m is None:
        return range(g.n) if g.mask is None else np.flatnonzero(g.mask).tolist()
    return np.flatnonzero(m).tolist()


def _scalar(asm, text):
    """A one-thread reader of an address operand: ``f(group, thread) -> int``."""
    view, row, offset = asm.address(text)
    return lambda g, thread: int(g.v[view][row][thread]) + offset


def _begin(block, g, thread):
    if not block.ordering:
        return None
    return block.ordering.begin(int(g.lanes[thread]), 1 << thread % 32)


def _cells(owner, start, size):
    first = (start >> 2) + owner.cell_base
    return np.arange(first, first + size // 4)


def _aligned(block, address, size, what, statement):
    if address % size:
        block.machine.log.fatal(
            "misaligned access", statement, f"{what} {address:#x} is not a multiple of {size}"
        )


def _join_group(block, g, thread, copy, statement):
    """Add a copy to the thread's open bulk group and start it."""
    groups = block.bulk_groups.setdefault(g.lo + thread, BulkGroups())
    groups.open.append(copy)
    groups.statement = statement
    _submit(block, g, copy, statement)


def _submit(block, g, copy, statement):
    if block.machine.trace:
        block.machine.trace.asynchronous(block.machine, g, statement, copy)
    block.machine.submit(copy)


@instruction("cp")
def _cp(asm, st):
    opcode = st.opcode
    if opcode.startswith("cp.async.bulk.commit_group"):
        return _bulk_commit(asm, st)
    if opcode.startswith("cp.async.bulk.wait_group"):
        return _bulk_wait(asm, st)
    if "prefetch" in st.parts:
        return lambda v, m: None
    if opcode.startswith("cp.async.bulk.tensor"):
        return _tensor_copy(asm, st, None)
    if opcode.startswith("cp.reduce.async.bulk.tensor"):
        reduction = next(p for p in st.parts if p in _KINDS_OF_REDUCTION)
        return _tensor_copy(asm, st, reduction)
    if opcode.startswith("cp.reduce.async.bulk"):
        reduction = next(p for p in st.parts if p in _KINDS_OF_REDUCTION)
        return _bulk_copy(asm, st, reduction)
    if opcode.startswith("cp.async.bulk"):
        return _bulk_copy(asm, st, None)
    if opcode.startswith("cp.async"):
        return _cp_async(asm, st)
    raise FormError("unknown copy")


_KINDS_OF_REDUCTION = ("add", "min", "max", "and", "or", "xor", "inc", "dec")


def _tensor_copy(asm, st, reduction):
    parts = st.parts
    if any(p.startswith("im2col") or p.startswith("tile::") for p in parts):
        raise FormError("im2col and gather modes")
    operands = st.operands
    is_load = any(p.startswith("mbarrier") for p in parts)
    tensor_text = operands[1] if is_load else operands[0]
    match = re.match(r"\[\s*([%\w$]+)\s*,\s*\{([^}]*)\}\s*\]", tensor_text)
    if not match:
        raise FormError(f"tensor operand {tensor_text}")
    tensor_address = asm.source(match[1], "u64")
    coordinates = [asm.source(c.strip(), "s32") for c in match[2].split(",")]
    shared = _scalar(asm, operands[0] if is_load else operands[1])
    barrier = _scalar(asm, operands[2]) if is_load else None
    multicast = "multicast::cluster" in parts
    mask = asm.source(operands[3], "b16") if multicast else None
    two_blocks = "cta_group::2" in st.opcode

    def run(block, g, m):
        for t in _threads(g, m):
            tensor = _tensor_map(block, _one(g, t, tensor_address), st)
            at = [_one(g, t, c) for c in coordinates]
            if len(at) != len(tensor.box):
                block.machine.log.fatal(
                    "bad tensor map", st, f"{len(at)} coordinates for rank {len(tensor.box)}"
                )
            where = shared(g, t)
            if is_load:
                ranks = None
                if multicast:
                    bits = _one(g, t, mask)
                    ranks = [r for r in range(16) if bits >> r & 1]
                _tensor_load(block, g, t, tensor, at, where, barrier(g, t), ranks, two_blocks, st)
            else:
                _tensor_store(block, g, t, tensor, at, where, reduction, st)

    return effect(run)


def _tensor_load(block, g, t, tensor, at, where, barrier_at, ranks, two_blocks, st):
    machine = block.machine
    use_global(block, _array(block, tensor, st), g.lanes[t : t + 1], False, st)
    size = tensor.box_bytes
    owner, offset = shared_target(block, np.array([where]), st)
    offset = int(offset[0])
    _aligned(block, offset, 128, "the destination", st)
    targets = [owner] if ranks is None else [machine.blocks[r] for r in ranks]
    token = _begin(block, g, t)
    deliveries = []
    barrier_owner, barrier_offset = shared_target(block, np.array([barrier_at]), st)
    for target in targets:
        check_shared(target, np.array([offset, offset + size - 16]), 16, st)
        signal = target if ranks is not None else barrier_owner
        if two_blocks:
            signal = machine.blocks[signal.cluster_rank & ~1]
        barrier = barriers.find_mbarrier(signal, int(barrier_offset[0]), st)
        if token:
            cells = _cells(target, offset, size)
            block.ordering.async_write(token, cells, st, g.pc, "the bulk copy")
            barriers.use_asynchronously(block, token, barrier, st)
        chunks = _shared_chunks(offset, size, tensor.swizzle)
        deliveries.append((target, chunks, barrier))

    def write(data):
        for target, chunks, barrier in deliveries:
            target.shared.view(np.uint64).reshape(-1, 2)[chunks] = data
            barriers.complete_transactions(block, barrier, size, token, st)

    copy = Copy(lambda: _gather(block, tensor, at, st), write, token, st)
    _submit(block, g, copy, st)


def _array(block, tensor, st):
    """The array that a tensor map describes."""
    memory = block.machine.memory.find(tensor.address)
    if memory is None or tensor.address > memory.base + memory.size:
        block.machine.log.fatal(
            "out-of-bounds access", st, f"the tensor map's address {tensor.address:#x} is no array"
        )
    return memory


def _tensor_store(block, g, t, tensor, at, where, reduction, st):
    use_global(block, _array(block, tensor, st), g.lanes[t : t + 1], True, st)
    size = tensor.box_bytes
    _aligned(block, where, 128, "the source", st)
    check_shared(block, np.array([where, where + size - 16]), 16, st)
    token = _begin(block, g, t)
    if token:
        block.ordering.async_read(token, _cells(block, where, size), st, "the bulk copy")
    chunks = _shared_chunks(where, size, tensor.swizzle)

    def read():
        return block.shared.view(np.uint64).reshape(-1, 2)[chunks]

    def write(data):
        _scatter(block, tensor, at, data, st, reduction)

    _join_group(block, g, t, Copy(read, write, token, st), st)


def _bulk_copy(asm, st, reduction):
    parts = st.parts
    spaces = [p for p in parts if p.split("::")[0] in ("shared", "global")]
    into, source = spaces[0].split("::")[0], spaces[1].split("::")[0]
    if "cp_mask" in parts or "multicast::cluster" in parts:
        raise FormError("masked or multicast bulk copy")
    destination = _scalar(asm, st.operands[0])
    origin = _scalar(asm, st.operands[1])
    length = asm.source(st.operands[2], "u32")
    signals = any(p.startswith("mbarrier") for p in parts)
    barrier = _scalar(asm, st.operands[3]) if signals else None
    dtype = dtype_of(parts[-1]) if reduction else np.dtype(np.uint8)

    def run(block, g, m):
        for t in _threads(g, m):
            size = _one(g, t, length)
            if size % 16 or not size:
                block.machine.log.fatal(
                    "misaligned access", st, f"a bulk copy of {size} bytes: not a multiple of 16"
                )
            _bulk_one(
                block, g, t, destination(g, t), origin(g, t), size,
                barrier(g, t) if signals else None, into, source, reduction, dtype, st,
            )  # fmt: skip

    return effect(run)


def _bulk_one(block, g, t, to, at, size, barrier_at, into, source, reduction, dtype, st):
    token = _begin(block, g, t)
    ordering = block.ordering
    _aligned(block, to, 16, "the destination", st)
    _aligned(block, at, 16, "the source", st)

    def side(space, address):
        if space == "shared":
            owner, offset = shared_target(block, np.array([address]), st)
            offset = int(offset[0])
            check_shared(owner, np.array([offset, offset + size - 16]), 16, st)
            return owner, owner.shared, offset
        memory = block.machine.memory.find(address)
        if memory is None or address - memory.base + size > memory.size:
            block.machine.log.fatal(
                "out-of-bounds access", st,
                f"a bulk copy of {size} bytes at {address:#x}, beyond "
                f"{memory.name if memory else 'every array'}",
            )  # fmt: skip
        use_global(block, memory, g.lanes[t : t + 1], address == to, st)
        return None, memory, address - memory.base

    from_owner, from_memory, from_offset = side(source, at)
    to_owner, to_memory, to_offset = side(into, to)
    if token and from_owner:
        ordering.async_read(token, _cells(from_owner, from_offset, size), st, "the bulk copy")
    if token and to_owner:
        ordering.async_write(token, _cells(to_owner, to_offset, size), st, g.pc, "the bulk copy")
    barrier = None
    if barrier_at is not None:
        owner, offset = shared_target(block, np.array([barrier_at]), st)
        barrier = barriers.find_mbarrier(owner, int(offset[0]), st)
        if token:
            barriers.use_asynchronously(block, token, barrier, st)

    def read():
        return from_memory.data[from_offset : from_offset + size].copy()

    def write(data):
        block.machine.memory.version += 1
        if reduction is None:
            to_memory.data[to_offset : to_offset + size] = data
        else:
            view = to_memory.view(dtype)
            where = slice(to_offset // dtype.itemsize, (to_offset + size) // dtype.itemsize)
            view[where] = _reduce(reduction, view[where], data.view(dtype))
        if barrier is not None:
            barriers.complete_transactions(block, barrier, size, token, st)

    copy = Copy(read, write, token, st)
    if barrier is None:
        _join_group(block, g, t, copy, st)
    else:
        _submit(block, g, copy, st)


def _bulk_commit(asm, st):
    def run(block, g, m):
        for t in _threads(g, m):
            groups = block.bulk_groups.get(g.lo + t)
            if groups is not None:
                groups.committed.append(groups.open)
                groups.open = []

    return effect(run)


def _bulk_wait(asm, st):
    """Wait until at most N committed groups are pending; .read: until they have read."""
    pending = integer(st.operands[0])
    reading = "read" in st.parts

    def run(block, g, m):
        if not block.bulk_groups:
            return
        for t in _threads(g, m):
            groups = block.bulk_groups.get(g.lo + t)
            if groups is None:
                continue
            count = max(0, len(groups.committed) - pending)
            for group in groups.committed[:count]:
                for copy in group:
                    if reading:
                        copy.read()
                    else:
                        _finish(block.machine, copy)
                    if copy.token:
                        block.ordering.observe(int(g.lanes[t]), copy.token)
                    if block.machine.trace:
                        block.machine.trace.waited(
                            g,
                            getattr(copy, "time", 0),
                            "wait copy",
                            f"copy at {trace_source(copy.statement)}",
                        )
            if not reading:
                del groups.committed[:count]

    return effect(run)


# ---- cp.async


def _cp_async(asm, st):
    parts = st.parts
    if "commit_group" in parts:
        return effect(_copy_commit)
    if "wait_group" in parts or "wait_all" in parts:
        pending = integer(st.operands[0]) if "wait_group" in parts else 0
        every = "wait_all" in parts

        def wait(block, g, m):
            for warp in g.warps:
                _copy_wait(block, g, int(warp), pending, every)

        return effect(wait)
    if "mbarrier" in parts:
        return _copy_arrive(asm, st)
    destination, origin = (addresses(asm, x) for x in st.operands[:2])
    size = integer(st.operands[2])
    rest = st.operands[3:]
    hinted = any("cache_hint" in p for p in parts)
    if hinted:
        rest = rest[:-1]
    available = asm.source(rest[0], "u32") if rest else None

    def run(block, g, m):
        to, at = destination(g, m), origin(g, m)
        check_shared(block, to, size, st)
        have = np.full(len(to), size)
        if available:
            values = g.v[available[0]][available[1]]
            have = np.minimum(values if m is None else values[m], size).astype(np.int64)
        warps = g.lanes if m is None else g.lanes[m]
        for warp in np.unique(warps).tolist():
            mine = warps == warp
            token = block.ordering.begin_generic(warp) if block.ordering else None
            if token:
                cells = block.cells(to[mine], size).reshape(-1)
                block.ordering.async_write(token, cells, st, g.pc, "the cp.async")
            copy = _cp_async_copy(
                block, warps[mine], to[mine], at[mine], have[mine], size, token, st
            )
            groups = block.copy_groups.setdefault(warp, BulkGroups())
            groups.open.append(copy)
            _submit(block, g, copy, st)

    return effect(run)


def _cp_async_copy(block, warps, to, at, have, size, token, st):
    memory = None
    if (have > 0).any():
        low = at[have > 0]
        memory = block.machine.memory.find(int(low.min()))
        if memory is None or int((at + have)[have > 0].max()) > memory.base + memory.size:
            block.machine.log.fatal(
                "out-of-bounds access", st, f"cp.async of {size} bytes at {int(low.max()):#x}"
            )
        use_global(block, memory, warps, False, st)

    def read():
        column = np.arange(size)
        ok = column < have[:, None]
        if memory is None:
            return np.zeros((len(to), size), np.uint8)
        source = np.where(ok, at[:, None] - memory.base + column, 0)
        return np.where(ok, memory.data[source], np.uint8(0))

    def write(data):
        block.shared.data[to[:, None] + np.arange(size)] = data

    return Copy(read, write, token, st)


def _copy_commit(block, g, m):
    for warp in g.warps.tolist():
        groups = block.copy_groups.setdefault(warp, BulkGroups())
        groups.committed.append(groups.open)
        groups.open = []


def _copy_wait(block, g, warp, pending, every):
    groups = block.copy_groups.get(warp)
    if groups is None:
        return
    if every:
        groups.committed.append(groups.open)
        groups.open = []
    count = max(0, len(groups.committed) - pending)
    for group in groups.committed[:count]:
        for copy in group:
            _finish(block.machine, copy)
            if copy.token:
                block.ordering.observe(warp, copy.token)
    del groups.committed[:count]


def _copy_arrive(asm, st):
    """cp.async.mbarrier.arrive: an arrival when the thread's earlier cp.asyncs have completed."""
    no_increment = "noinc" in st.parts
    address = addresses(asm, st.operands[0])

    def run(block, g, m):
        a = address(g, m)
        warps = g.lanes if m is None else g.lanes[m]
        ordering = block.ordering
        for warp in np.unique(warps).tolist():
            groups = block.copy_groups.get(warp)
            copies = [c for group in groups.all() for c in group] if groups else []
            targets = a[warps == warp].tolist()
            pair = ordering.release(warp) if ordering else None
            for where in targets:
                barrier = barriers.find_mbarrier(block, where, st)
                if not no_increment:
                    barrier.pending += 1

            def write(_, targets=targets, copies=copies, pair=pair):
                for copy in copies:
                    _finish(block.machine, copy)
                for where in targets:
                    barrier = barriers.find_mbarrier(block, where, st)
                    if ordering:
                        for copy in copies:
                            ordering.finish(barrier.clocks, copy.token)
                    barriers.arrive(block, barrier, 1, 0, [pair] if pair else [], st)

            _submit(block, g, Copy(lambda: None, write, None, st), st)

    return effect(run)
