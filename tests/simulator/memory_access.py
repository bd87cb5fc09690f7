"""Loads, stores, atomics and matrix loads and stores: PTX ISA, "Data Movement and Conversion"."""

import re

import numpy as np

from . import registers as R
from .number_types import UNSIGNED, dtype_of, elements, width_of
from .program import (
    CLUSTER_SHIFT,
    CONSTANT_WINDOW,
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_BASE,
    SHARED_WINDOW,
    FormError,
    effect,
    instruction,
    put,
)

_SPACES = ("global", "shared", "local", "param", "const")


def space_of(parts) -> tuple[str, str]:
    """(state space, qualifier) of an opcode; generic when none is named."""
    for part in parts:
        name, _, qualifier = part.partition("::")
        if name in _SPACES:
            return name, qualifier
    return "generic", ""


def addresses(asm, text):
    """``f(group, mask) -> int64 addresses`` of the active threads."""
    view, row, offset = asm.address(text)

    def evaluate(g, m):
        a = g.v[view][row].astype(np.int64)
        if offset:
            a += offset
        return a if m is None else a[m]

    return evaluate


def uniform(g, m, view, row):
    """The value of an operand that must be the same in all active threads (the first's)."""
    values = g.v[view][row]
    return values[0] if m is None else values[m][0]


def threads_of(g, m):
    """(warps in the cluster, lanes) of the active threads."""
    lanes = _LANES[: g.n]
    return (g.lanes, lanes) if m is None else (g.lanes[m], lanes[m])


def lane_bits(mask) -> int:
    """The lanes of one warp's mask as a bit mask."""
    return int(np.packbits(mask, bitorder="little").view(np.uint32)[0])


_LANES = np.arange(1024) % 32

# ---- resolving addresses


def shared_target(block, a, statement):
    """(block, offsets) of shared addresses that may carry a block's rank."""
    if int(a.max(initial=0)) < 1 << CLUSTER_SHIFT:
        return block, a
    ranks = a >> CLUSTER_SHIFT
    if (ranks != ranks[0]).any():
        raise FormError("shared addresses of several blocks in one instruction")
    rank = int(ranks[0]) - 1
    if rank >= len(block.machine.blocks):
        block.machine.log.fatal(
            "out-of-bounds access", statement, f"shared memory of block {rank} of the cluster"
        )
    owner = block.machine.blocks[rank]
    if not owner.live.any():
        block.machine.log.add(
            "shared memory of an exited block", statement,
            f"all threads of block {rank} of the cluster have exited",
        )  # fmt: skip
    return owner, a & ((1 << CLUSTER_SHIFT) - 1)


def check_shared(block, a, size, statement):
    """Bounds and alignment of accesses to shared memory."""
    if len(a) == 0:
        return
    low, high = int(a.min()), int(a.max())
    if low < SHARED_BASE or high + size > block.shared.size:
        block.machine.log.fatal(
            "out-of-bounds access",
            statement,
            f"{size} bytes at {low if low < SHARED_BASE else high:#x} of shared memory, which has "
            f"[{SHARED_BASE:#x}, {block.shared.size:#x})",
        )
    if (a & (size - 1)).any():
        block.machine.log.fatal(
            "misaligned access", statement, f"{size} bytes at {low:#x} of shared memory"
        )


def find_global(block, a, size, statement):
    """(memory, offsets) of global addresses that all fall in one array, else None."""
    low, high = int(a.min()), int(a.max())
    memory = block.machine.memory.find(low)
    if memory is None or low - memory.base > memory.size + (1 << 34):
        _no_array(block, low, size, statement)
    if high + size > memory.base + memory.size:
        if block.machine.memory.find(high) is not memory:
            return None
        block.machine.log.fatal(
            "out-of-bounds access",
            statement,
            f"{size} bytes at byte {high - memory.base} of {memory.name}, which has {memory.size}",
        )
    if (a & (size - 1)).any():
        block.machine.log.fatal(
            "misaligned access", statement, f"{size} bytes at {low:#x} ({memory.name})"
        )
    return memory, a - memory.base


def use_global(block, memory, warps, writes, statement):
    """Note a launch's use of an array, which must wait for the launches that still overlap it."""
    machine = block.machine
    last = max(memory.written_by, memory.read_by if writes else -1)
    if (
        machine.overlaps_from <= last < machine.launch_index
        and block.ordering
        and not block.ordering.clock[warps, block.ordering.prerequisites].all()
    ):
        machine.log.add(
            "missing griddepcontrol.wait", statement,
            f"{'writes' if writes else 'reads'} {memory.name}, which launch {last} used, while "
            "that launch may still run",
        )  # fmt: skip
    if writes:
        memory.written_by = machine.launch_index
    else:
        memory.read_by = machine.launch_index


def acquire_global(block, memory, warps):
    """Note an acquiring load: of what the launch before counts by releases, it is a wait for that.

    Where that launch alone may overlap.  Launches run one after another, so a count that is waited
    for is the last one, and one that is not reached is a deadlock.
    """
    machine = block.machine
    if block.ordering and memory.released_by == machine.overlaps_from == machine.launch_index - 1:
        block.ordering.clock[warps, block.ordering.prerequisites] = 1


def _no_array(block, address, size, statement):
    block.machine.log.fatal(
        "out-of-bounds access", statement, f"{size} bytes at {address:#x}: no array is there"
    )


def _generic_space(block, a, statement):
    """Split generic addresses: the space of all of them and addresses in that space."""
    low = int(a.min())
    for window, name in (
        (PARAMETER_WINDOW, "param"), (LOCAL_WINDOW, "local"),
        (SHARED_WINDOW, "shared"), (CONSTANT_WINDOW, "const"),
    ):  # fmt: skip
        if low >= window:
            return name, a - (0 if name in ("param", "const") else window)
    return "global", a


def load(block, g, m, space, a, dtype, count, statement, pc):
    """Elements (n, count) of ``dtype`` at addresses (n,) of a space."""
    width = dtype.itemsize
    size = width * count
    if space == "generic":
        space, a = _generic_space(block, a, statement)
    if space == "shared":
        owner, offsets = shared_target(block, a, statement)
        check_shared(owner, offsets, size, statement)
        if block.ordering and width * count >= 4:
            warps, lanes = threads_of(g, m)
            block.ordering.read(warps, owner.cells(offsets, size), statement, pc, lanes)
        data = owner.shared.view(dtype)
    elif space == "global":
        found = find_global(block, a, size, statement)
        if found is None:
            parts = [load(block, g, m, space, a[i : i + 1], dtype, count, statement, pc)
                     for i in range(len(a))]  # fmt: skip
            return np.concatenate(parts)
        memory, offsets = found
        use_global(block, memory, g.warps, False, statement)
        data = memory.view(dtype)
    elif space == "param":
        offsets = a - PARAMETER_WINDOW
        data = block.parameters.view(dtype)
    elif space == "const":
        offsets = a - CONSTANT_WINDOW
        raw = np.frombuffer(bytes(block.program.constant_bytes) + b"\0" * 16, np.uint8)
        data = raw[: len(raw) // 8 * 8].view(dtype)
    else:
        return _local(block, g, m, a, dtype, count)
    index = offsets // width
    if count == 1:
        return data[index][:, None]
    return data[index[:, None] + np.arange(count)]


def _local_index(block, g, m, a, width, count):
    threads = np.arange(g.lo, g.hi)
    if m is not None:
        threads = threads[m]
    base = threads * (block.program.local_bytes // width) + a // width
    return base[:, None] + np.arange(count)


def _local(block, g, m, a, dtype, count):
    width = dtype.itemsize
    flat = block.local.reshape(-1).view(dtype)
    return flat[_local_index(block, g, m, a, width, count)]


def store(block, g, m, space, a, values, statement, pc):
    """Store elements (n, count) at addresses (n,)."""
    dtype = values.dtype
    width, count = dtype.itemsize, values.shape[1]
    size = width * count
    if space == "generic":
        space, a = _generic_space(block, a, statement)
    if space == "shared":
        owner, offsets = shared_target(block, a, statement)
        check_shared(owner, offsets, size, statement)
        if block.ordering:
            cells = owner.cells(offsets, size)
            if size >= 4:
                warps, lanes = threads_of(g, m)
                block.ordering.write(warps, cells, statement, pc, lanes)
            else:
                block.ordering.written[cells] = True
        data = owner.shared.view(dtype)
    elif space == "global":
        found = find_global(block, a, size, statement)
        if found is None:
            for i in range(len(a)):
                store(block, g, m, space, a[i : i + 1], values[i : i + 1], statement, pc)
            return
        memory, offsets = found
        use_global(block, memory, g.warps, True, statement)
        block.machine.memory.version += 1
        block.machine.progress += 1
        data = memory.view(dtype)
    elif space == "local":
        flat = block.local.reshape(-1).view(dtype)
        flat[_local_index(block, g, m, a, width, count)] = values
        return
    else:
        raise FormError(f"store to {space}")
    index = offsets // width
    if count == 1:
        data[index] = values[:, 0]
    else:
        data[index[:, None] + np.arange(count)] = values


# ---- ld, st


def _vector_count(parts):
    for part in parts:
        if re.match(r"^v[248]$", part):
            return int(part[1:])
    return 1


@instruction("ld", "ldu")
def _ld(asm, st):
    kind = st.parts[-1]
    count = _vector_count(st.parts)
    space, _ = space_of(st.parts[1:])
    width = width_of(kind)
    names = asm.vector(st.operands[0])
    if len(names) != count:
        raise FormError("vector of another length")
    if width == 128:
        raise FormError("128-bit elements")
    outs = [None if n == "_" else asm.register_row(n, write=True) for n in names]
    signed = kind[0] == "s"
    dtype = dtype_of(kind) if signed else np.dtype(UNSIGNED[width])
    if space == "param":
        found = re.match(r"^\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]$", st.operands[1])
        if found and found[1] in asm.kernel.parameters:
            offset = asm.kernel.parameters[found[1]][0] + int(found[2] or 0)

            def load_parameter(block, g, m):
                data = block.parameters.view(dtype)
                for i, out in enumerate(outs):
                    if out:
                        value = data[offset // dtype.itemsize + i]
                        put(g.v[out[0]][out[1]], R.extended(value, out[0], signed=signed), m)

            return effect(load_parameter)
    address = addresses(asm, st.operands[1])
    acquires = space == "global" and "acquire" in st.parts

    def run(block, g, m):
        found = find_global(block, address(g, m), width // 8, st) if acquires else None
        if found is not None:
            acquire_global(block, found[0], g.warps)
        values = load(block, g, m, space, address(g, m), dtype, count, st, g.pc)
        for i, out in enumerate(outs):
            if out:
                row = g.v[out[0]][out[1]]
                value = R.extended(values[:, i], out[0], signed=signed)
                if m is None:
                    row[...] = value
                else:
                    row[m] = value

    return effect(run)


@instruction("st")
def _st(asm, st):
    if st.parts[1] == "async" or st.parts[1] == "bulk":
        return _st_async(asm, st)
    kind = st.parts[-1]
    count = _vector_count(st.parts)
    space, _ = space_of(st.parts[1:])
    width = width_of(kind)
    names = asm.vector(st.operands[1])
    if len(names) != count:
        raise FormError("vector of another length")
    rows = []
    for name in names:
        if asm.statement.register(name):
            rows.append(asm.register_row(name, read=True))
        else:
            rows.append(asm.source(name, f"b{width}"))
    address = addresses(asm, st.operands[0])

    def run(block, g, m):
        a = address(g, m)
        values = np.empty((len(a), count), UNSIGNED[width])
        for i, (view, row) in enumerate(rows):
            column = g.v[view][row]
            values[:, i] = column if m is None else column[m]
        store(block, g, m, space, a, values, st, g.pc)

    return effect(run)


def _st_async(asm, st):
    raise FormError("st.async")


# ---- atomics


def _combine(operation, kind):
    """``f(old, operand...) -> new`` on scalars of a type."""
    if operation == "add":
        return lambda old, x: old + x
    if operation == "min":
        return np.minimum if kind[0] in "us" else np.fmin
    if operation == "max":
        return np.maximum if kind[0] in "us" else np.fmax
    if operation == "exch":
        return lambda old, x: x
    if operation == "and":
        return lambda old, x: old & x
    if operation == "or":
        return lambda old, x: old | x
    if operation == "xor":
        return lambda old, x: old ^ x
    if operation == "inc":
        return lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1)
    if operation == "dec":
        return lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1)
    raise FormError(f"atomic {operation}")


@instruction("atom", "red")
def _atomic(asm, st):
    parts, kind = st.parts, st.parts[-1]
    if parts[1] == "async":
        raise FormError("red.async")
    count = _vector_count(parts)
    space, _ = space_of(parts[1:])
    operation = next(
        p for p in parts[1:]
        if p in ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
    )  # fmt: skip
    returns = parts[0] == "atom"
    operands = st.operands[1:] if returns else st.operands
    address = addresses(asm, operands[0])
    dtype = dtype_of(kind)
    _, lanes = elements(kind)

    def rows_of(text):
        rows = []
        for name in asm.vector(text):
            if asm.statement.register(name):
                rows.append(asm.register_row(name, read=True))
            else:
                rows.append(asm.source(name, kind))
        return rows

    sources = [rows_of(text) for text in operands[1:3]]
    if len(sources[0]) != count:
        raise FormError("vector of another length")
    outs = None
    if returns:
        outs = [
            None if n == "_" else asm.register_row(n, write=True)
            for n in asm.vector(st.operands[0])
        ]
    combine = None if operation == "cas" else _combine(operation, kind)
    total = count * lanes

    def gather(g, m, rows):
        columns = []
        for view, row in rows:
            column = g.v[view][row]
            column = np.ascontiguousarray(column if m is None else column[m])
            columns.append(column.view(dtype).reshape(len(column), -1)[:, :lanes])
        return np.concatenate(columns, axis=1)

    def run(block, g, m):
        a = address(g, m)
        operand = gather(g, m, sources[0])
        other = gather(g, m, sources[1]) if operation == "cas" else None
        old = np.empty_like(operand)
        where = space
        if where == "generic":
            where, a = _generic_space(block, a, st)
        if where == "shared":
            owner, offsets = shared_target(block, a, st)
            check_shared(owner, offsets, total * dtype.itemsize, st)
            data = owner.shared.view(dtype)
            if block.ordering:  # atomics order themselves; the cells count as written
                block.ordering.written[owner.cells(offsets, total * dtype.itemsize)] = True
        else:
            found = find_global(block, a, total * dtype.itemsize, st)
            if found is None:
                raise FormError("atomics on several arrays in one instruction")
            memory, offsets = found
            use_global(block, memory, g.warps, True, st)
            if "release" in st.parts:
                memory.released_by = block.machine.launch_index
            data = memory.view(dtype)
        index = offsets // dtype.itemsize
        if (
            not returns and operation == "add" and dtype.kind in "fui"
            and dtype.itemsize >= 4
        ):  # fmt: skip
            np.add.at(data, index[:, None] + np.arange(total), operand)
            block.machine.memory.version += 1
            block.machine.progress += 1
            return None
        changed = False
        for i in range(len(index)):
            for j in range(total):
                k = index[i] + j
                before = old[i, j] = data[k]
                if operation == "cas":
                    if data[k] == operand[i, j]:
                        data[k] = other[i, j]
                else:
                    data[k] = combine(data[k], operand[i, j])
                changed = changed or data[k] != before
        if changed:
            block.machine.memory.version += 1
            block.machine.progress += 1
        if outs:
            for i, out in enumerate(outs):
                if out is None:
                    continue
                piece = np.ascontiguousarray(old[:, i * lanes : (i + 1) * lanes])
                row = g.v[out[0]][out[1]]
                value = piece.view(UNSIGNED[8 * dtype.itemsize * lanes])[:, 0]
                if m is None:
                    row[...] = value
                else:
                    row[m] = value
        return None

    return effect(run)


# ---- matrices


def _matrix_rows(g, m, address, count):
    """Row addresses of 8x8 matrices: (warps, count, 8)."""
    if m is not None:
        raise FormError("a matrix load or store by a part of a warp")
    a = address(g, None).reshape(-1, 32)
    return a[:, : 8 * count].reshape(-1, count, 8)


@instruction("ldmatrix")
def _ldmatrix(asm, st):
    """Thread i holds elements 2i and 2i+1 of each 8x8 matrix, in row-major order."""
    parts = st.parts
    if "m8n8" not in parts or parts[-1] != "b16":
        raise FormError("matrix shape")
    count = int(next(p for p in parts if re.match(r"^x[124]$", p))[1:])
    transpose = "trans" in parts
    outs = [asm.register_row(n, write=True) for n in asm.vector(st.operands[0])]
    address = addresses(asm, st.operands[1])

    def run(block, g, m):
        rows = _matrix_rows(g, m, address, count)
        flat = rows.reshape(-1)
        owner, flat = shared_target(block, flat, st)
        check_shared(owner, flat, 16, st)
        if block.ordering:
            warps = np.repeat(g.warps, 8 * count)
            block.ordering.read(warps, owner.cells(flat, 16), st, g.pc)
        data = owner.shared.view(np.uint16)
        values = data[(flat[:, None] >> 1) + np.arange(8)].reshape(-1, count, 8, 8)
        if transpose:
            values = values.swapaxes(2, 3)
        pairs = np.ascontiguousarray(values).view(np.uint32).reshape(-1, count, 32)
        for i, (view, row) in enumerate(outs):
            g.v[view][row][...] = pairs[:, i].reshape(-1)

    return effect(run, converge=True)


@instruction("stmatrix")
def _stmatrix(asm, st):
    parts = st.parts
    if "m8n8" not in parts or parts[-1] != "b16":
        raise FormError("matrix shape")
    count = int(next(p for p in parts if re.match(r"^x[124]$", p))[1:])
    transpose = "trans" in parts
    sources = [asm.register_row(n, read=True) for n in asm.vector(st.operands[1])]
    address = addresses(asm, st.operands[0])

    def run(block, g, m):
        rows = _matrix_rows(g, m, address, count)
        flat = rows.reshape(-1)
        owner, flat = shared_target(block, flat, st)
        check_shared(owner, flat, 16, st)
        if block.ordering:
            warps = np.repeat(g.warps, 8 * count)
            block.ordering.write(warps, owner.cells(flat, 16), st, g.pc)
        values = np.stack([g.v[view][row] for view, row in sources])  # (count, n)
        values = values.reshape(count, -1, 32).swapaxes(0, 1)
        matrix = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if transpose:
            matrix = matrix.swapaxes(2, 3)
        data = owner.shared.view(np.uint16)
        data[(flat[:, None] >> 1) + np.arange(8)] = matrix.reshape(-1, 8)

    return effect(run, converge=True)


@instruction("prefetch", "prefetchu", "applypriority", "discard")
def _hint(asm, st):
    return lambda v, m: None


@instruction("createpolicy")
def _createpolicy(asm, st):
    out = asm.destination(st.operands[0], "b64")
    return lambda v, m: put(v[out[0]][out[1]], 0, m)


@instruction("mapa")
def _mapa(asm, st):
    """mapa: the address in another block's shared memory that corresponds to one's own."""
    kind = st.parts[-1]
    source = asm.source(st.operands[1], kind)
    rank = asm.source(st.operands[2], "u32")
    out = asm.destination(st.operands[0], kind)

    def run(v, m):
        a = v[source[0]][source[1]]
        r = v[rank[0]][rank[1]].astype(a.dtype) + a.dtype.type(1)
        low = a & ~a.dtype.type(0xFF << CLUSTER_SHIFT)
        put(v[out[0]][out[1]], low | (r << a.dtype.type(CLUSTER_SHIFT)), m)

    return run
