"""tcgen05: PTX ISA, "TensorCore 5th Generation Family Instructions".

Tensor memory is 128 lanes of 512 columns of 32 bits a block.  Matrix products, copies from shared
memory and commits of one thread run in order, as late or as early as the schedule says.  A store is
out of reach until ``tcgen05.wait::st``.  A load ends at ``tcgen05.wait::ld`` or where its registers
are first used: code that NVIDIA's compiler accepts leaves the wait out.  Ordering is checked at a
cell for each 32 lanes of a column.
"""

import re

import numpy as np

from . import barriers
from .memory_access import addresses, check_shared, shared_target
from .number_types import FLOATS, raw_dtype
from .ordering import ALWAYS, TENSOR_ACCESSES
from .program import SHARED_BASE, FormError, effect, instruction
from .warpgroup_mma import DEPTH_BYTES, as_operand, operand_addresses

LANES, COLUMNS = 128, 512
_POISON = np.uint32(0x7FF5CACE)
# Descriptor field "swizzle mode".
_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}
# Instruction descriptor fields "atype" and "btype".
_FORMATS = {
    "f16": {0: FLOATS["f16"], 1: FLOATS["bf16"]},
    "tf32": {2: FLOATS["tf32"]},
    "f8f6f4": {0: FLOATS["e4m3"], 1: FLOATS["e5m2"]},
}


class TensorMemory:
    """A block's tensor memory and who owns which columns."""

    def __init__(self, block):
        self.data = np.full((LANES, COLUMNS), _POISON, np.uint32)
        self.allocated: dict[int, int] = {}  # first column -> columns
        self.relinquished = False
        self.cells = block.cell_base + block.machine.shared_cells

    def cells_of(self, first_lane, lanes, column, columns):
        quadrants = np.arange(first_lane // 32, (first_lane + lanes - 1) // 32 + 1)
        grid = quadrants[:, None] * COLUMNS + np.arange(column, column + columns)
        return (grid + self.cells).reshape(-1)

    def owns(self, column, columns) -> bool:
        return any(c <= column and column + columns <= c + n for c, n in self.allocated.items())


def tensor_memory(block) -> TensorMemory:
    found = block.extensions.get("tensor memory")
    if found is None:
        found = block.extensions["tensor memory"] = TensorMemory(block)
    return found


def _check_columns(block, memory, column, columns, statement):
    if column + columns > COLUMNS or not memory.owns(column, columns):
        block.machine.log.fatal(
            "out-of-bounds access", statement,
            f"columns {column}..{column + columns - 1} of tensor memory; allocated: "
            f"{memory.allocated or 'none'}",
        )  # fmt: skip


@instruction("tcgen05")
def _tcgen05(asm, st):
    action = st.parts[1]
    name = action.split("::")[0]
    compiler = {
        "alloc": _alloc, "dealloc": _dealloc, "relinquish_alloc_permit": _relinquish, "ld": _load,
        "st": _store, "wait": _wait, "mma": _mma, "cp": _copy, "commit": _commit,
    }.get(name)  # fmt: skip
    if name == "fence":
        return _fence(st)
    if compiler is None:
        raise FormError(f"tcgen05.{action}")
    return compiler(asm, st)


def _fence(st):
    before = st.parts[1] == "fence::before_thread_sync"

    def run(block, g, m):
        if block.ordering:
            for warp in g.warps:
                if before:
                    block.ordering.fence_before_sync(warp)
                else:
                    block.ordering.fence_after_sync(warp)

    return effect(run)


# ---- allocation


def _alloc(asm, st):
    address = addresses(asm, st.operands[0])
    count = asm.source(st.operands[1], "u32")

    def run(block, g, m):
        columns = int(g.v[count[0]][count[1]][0])
        memory = tensor_memory(block)
        if columns < 32 or columns > COLUMNS or columns & (columns - 1):
            block.machine.log.fatal("bad tensor memory allocation", st, f"{columns} columns")
        if memory.relinquished:
            block.machine.log.add(
                "bad tensor memory allocation", st, "after relinquish_alloc_permit"
            )
        start = 0
        for first, size in sorted(memory.allocated.items()):
            if start + columns > first:
                start = first + size
        if start + columns > COLUMNS:
            block.machine.log.fatal(
                "bad tensor memory allocation", st,
                f"{columns} columns asked for, allocated: {memory.allocated}",
            )  # fmt: skip
        memory.allocated[start] = columns
        where = address(g, m)[:1]
        check_shared(block, where, 4, st)
        block.shared.view(np.uint32)[where >> 2] = start
        if block.ordering:
            block.ordering.write(g.warps[:1], block.cells(where, 4), st, g.pc)

    return effect(run, converge=True)


def _dealloc(asm, st):
    address = asm.source(st.operands[0], "b32")
    count = asm.source(st.operands[1], "u32")

    def run(block, g, m):
        memory = tensor_memory(block)
        start = int(g.v[address[0]][address[1]][0]) & 0xFFFF
        columns = int(g.v[count[0]][count[1]][0])
        if memory.allocated.get(start) != columns:
            block.machine.log.add(
                "bad tensor memory allocation", st,
                f"deallocates {columns} columns at {start}; allocated: {memory.allocated}",
            )  # fmt: skip
        memory.allocated.pop(start, None)

    return effect(run, converge=True)


def _relinquish(asm, st):
    def run(block, g, m):
        tensor_memory(block).relinquished = True

    return effect(run, converge=True)


# ---- loads and stores


def _positions(shape, repeat):
    """(lanes, columns) of the registers of a warp's access: each (registers, 32)."""
    t = np.arange(32)
    if shape == "32x32b":
        column = np.arange(repeat)[:, None] + np.zeros(32, int)
        return np.broadcast_to(t, column.shape), column
    if shape == "16x256b":
        r = np.arange(4 * repeat)[:, None]
        return t // 4 + 8 * (r % 4 // 2), 8 * (r // 4) + 2 * (t % 4) + r % 2
    if shape == "16x128b":
        r = np.arange(2 * repeat)[:, None]
        return t // 4 + 8 * (r % 2), 4 * (r // 2) + t % 4
    raise FormError(f"tensor memory shape {shape}")


def _access(asm, st, address_text, register_text, *, write):
    if any(p.startswith(("pack", "unpack", "red")) for p in st.parts):
        raise FormError("packed or reducing tensor memory access")
    shape = next(p for p in st.parts if re.match(r"^\d+x\d+b", p))
    repeat = int(next(p for p in st.parts if re.match(r"^x\d+$", p))[1:])
    lanes, columns = _positions(shape, repeat)
    view, row, offset = asm.address(address_text)
    registers = np.array(
        [asm.register_row(x, read=not write, write=write)[1] for x in asm.vector(register_text)]
    )
    if len(registers) != len(columns):
        raise FormError(f"{len(registers)} registers for {shape}.x{repeat}")
    return lanes, columns, (view, row, offset), registers


def _places(block, g, address, lanes, columns, st):
    """For each warp of a group: (warp in block, first lane, first column)."""
    memory = tensor_memory(block)
    view, row, offset = address
    width = int(columns.max()) + 1
    out = []
    for lo in range(0, g.n, 32):
        value = int(g.v[view][row][lo]) + offset
        lane, column = value >> 16, value & 0xFFFF
        warp = (g.lo + lo) >> 5
        if lane // 32 != warp % 4 or lane % 32 + int(lanes.max()) >= 32:
            block.machine.log.fatal(
                "out-of-bounds access", st,
                f"warp {warp} reaches lane {lane} of tensor memory; it has "
                f"{32 * (warp % 4)}..{32 * (warp % 4) + 31}",
            )  # fmt: skip
        _check_columns(block, memory, column, width, st)
        out.append((warp, lane, column))
    return memory, width, out


def _token(block, warp):
    """The actor of a warp's products and copies, which are ordered after its own earlier ones."""
    return _in_order(block.ordering.wgmma(warp + block.first_warp))


def _access_token(block, warp):
    """The actor of a warp's loads and stores: nothing orders them after its products."""
    return _in_order(block.ordering.wgmma(warp + block.first_warp, TENSOR_ACCESSES))


def _in_order(token):
    token[2][token[0]] = token[3][token[0]] = ALWAYS
    return token


def _load(asm, st):
    lanes, columns, address, registers = _access(
        asm, st, st.operands[1], st.operands[0], write=True
    )
    mask = sum(1 << int(i) for i in registers)

    def run(block, g, m):
        memory, width, places = _places(block, g, address, lanes, columns, st)
        rows = block.registers.rows["r"]
        for warp, lane, column in places:
            if block.ordering:
                cells = memory.cells_of(lane, 32, column, width)
                token = _access_token(block, warp)
                issuer = warp + block.first_warp
                block.ordering.tensor_read(token, issuer, cells, st, "the tcgen05.ld")
            values = memory.data[lane + lanes, column + columns]
            state = block.wgmma[warp]
            state.loads.append((registers, values, mask))
            state.accumulators |= mask
            rows[registers, 32 * warp : 32 * warp + 32] = _POISON
        g.refresh()

    return effect(run, converge=True)


def _store(asm, st):
    lanes, columns, address, registers = _access(
        asm, st, st.operands[0], st.operands[1], write=False
    )

    def run(block, g, m):
        memory, width, places = _places(block, g, address, lanes, columns, st)
        rows = block.registers.rows["r"]
        for warp, lane, column in places:
            if block.ordering:
                cells = memory.cells_of(lane, 32, column, width)
                token = _access_token(block, warp)
                issuer = warp + block.first_warp
                block.ordering.tensor_write(token, issuer, cells, st, g.pc, "the tcgen05.st")
            values = rows[registers, 32 * warp : 32 * warp + 32].copy()
            if block.machine.schedule.late_reads:
                block.wgmma[warp].stores.append((lane + lanes, column + columns, values))
            else:
                memory.data[lane + lanes, column + columns] = values

    return effect(run, converge=True)


def _wait(asm, st):
    loads = st.parts[1] == "wait::ld"

    def run(block, g, m):
        if loads:
            block.machine.deliver_loads(g)
            return
        memory = tensor_memory(block)
        for warp in range(g.lo >> 5, g.hi >> 5):
            state = block.wgmma[warp]
            for lanes, columns, values in state.stores:
                memory.data[lanes, columns] = values
            state.stores.clear()
            if block.ordering:
                block.ordering.wgmma_commit(warp + block.first_warp, TENSOR_ACCESSES)
                block.ordering.wgmma_wait(warp + block.first_warp, 0, TENSOR_ACCESSES)

    return effect(run, converge=True)


# ---- products


class TensorOperation:
    """A product, copy or commit in a thread's queue; completing one completes those before it."""

    def __init__(self, queue, run):
        self.queue, self.run = queue, run
        queue.append(self)

    def complete(self):
        while self in self.queue:
            self.queue.pop(0).run()


def _queue(block, thread):
    return block.extensions.setdefault(("tensor queue", thread), [])


def _descriptor(value: int):
    if value >> 46 & 7 != 1 or value >> 49 & 7 or value >> 52 & 1:
        raise FormError(f"matrix descriptor {value:#x}")
    swizzle = value >> 61 & 7
    if swizzle not in _SWIZZLE:
        raise FormError(f"swizzle mode {swizzle} of a matrix descriptor")
    return (
        (value & 0x3FFF) << 4,
        (value >> 16 & 0x3FFF) << 4,
        (value >> 32 & 0x3FFF) << 4,
        _SWIZZLE[swizzle],
    )


def _mma(asm, st):
    parts = st.parts
    kind = next(p for p in parts if p.startswith("kind::")).removeprefix("kind::")
    if kind not in _FORMATS or "sp" in parts or "ws" in parts or "block_scale" in st.opcode:
        raise FormError(f"tcgen05.mma of kind {kind}")
    blocks = 2 if "cta_group::2" in parts else 1
    d = asm.address(st.operands[0])
    from_tensor = st.operands[1].startswith("[")
    a = asm.address(st.operands[1]) if from_tensor else asm.source(st.operands[1], "b64")
    b = asm.source(st.operands[2], "b64")
    form = asm.source(st.operands[3], "b32")
    rest = st.operands[4:]
    disabled = []
    if rest[0].startswith("{"):
        disabled = [asm.source(x, "b32") for x in asm.vector(rest.pop(0))]
    if len(rest) != 1:
        raise FormError("tcgen05.mma with a scale")
    enable = asm.source(rest[0], "pred")

    def run(block, g, m):
        threads = np.flatnonzero(g.active() if m is None else m).tolist()
        for t in threads:
            value = lambda operand, t=t: int(g.v[operand[0]][operand[1]][t])  # noqa: E731
            if any(value(x) for x in disabled):
                raise FormError("tcgen05.mma with disabled lanes")
            bits = value(form)
            shape = ((bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8)
            _issue(
                block, g, t, kind, blocks, shape, bits,
                value(d[:2]) + d[2],
                value(a[:2]) + a[2] if from_tensor else value(a), from_tensor, value(b),
                bool(value(enable)), st,
            )  # fmt: skip

    return effect(run)


def _issue(block, g, t, kind, blocks, shape, bits, d, a, from_tensor, b, adds, st):
    machine = block.machine
    rows, columns = shape
    if (bits >> 4 & 3) != 1 or bits >> 13 & 3:
        raise FormError(f"instruction descriptor {bits:#x}: not float32, or negated")
    a_type = _FORMATS[kind].get(bits >> 7 & 7)
    b_type = _FORMATS[kind].get(bits >> 10 & 7)
    if a_type is None or b_type is None or rows not in (128, 128 * blocks):
        raise FormError(f"instruction descriptor {bits:#x}: types, or M = {rows}")
    if blocks == 2 and block.cluster_rank % 2:
        machine.log.fatal(
            "tcgen05 of a pair", st, "issued by the block of odd rank: the even one must"
        )
    group = _group(block, blocks, st)
    column = d & 0xFFFF
    depth = DEPTH_BYTES // a_type.itemsize
    held = rows // blocks
    if held == 64 and from_tensor:
        raise FormError("tcgen05.mma of a pair with M = 128 and A in tensor memory")
    # With 64 rows a block, the second half of the columns lies in lanes 64 to 127.
    width = columns * held // LANES
    sources = []
    for member in group:
        memory = tensor_memory(member)
        _check_columns(member, memory, column, width, st)
        b_fields = (
            *_descriptor(b),
            columns // blocks,
            depth,
            b_type.itemsize,
            bool(bits >> 16 & 1),
        )
        b_matrix = _Shared(member, b_fields, b_type, st)
        if from_tensor:
            _check_columns(member, memory, a & 0xFFFF, DEPTH_BYTES // 4, st)
            a_matrix = _Tensor(memory, a & 0xFFFF, DEPTH_BYTES // 4, a_type)
        else:
            fields = (*_descriptor(a), held, depth, a_type.itemsize, bool(bits >> 15 & 1))
            a_matrix = _Shared(member, fields, a_type, st)
        sources.append((memory, a_matrix, b_matrix))
    warp = (g.lo + t) >> 5
    if block.ordering:
        token, issuer, name = _token(block, warp), warp + block.first_warp, "the tcgen05.mma"
        for memory, a_matrix, b_matrix in sources:
            if from_tensor:
                block.ordering.tensor_read(token, issuer, a_matrix.cells, st, name)
            else:
                block.ordering.async_read(token, a_matrix.cells, st, name)
            block.ordering.async_read(token, b_matrix.cells, st, name)
            cells = memory.cells_of(0, LANES, column, width)
            if adds:
                block.ordering.tensor_read(token, issuer, cells, st, name)
            block.ordering.tensor_write(token, issuer, cells, st, g.pc, name)
    if machine.trace:
        machine.trace.wgmma(machine, g, st)

    def multiply():
        right = np.concatenate([b_matrix.read() for _, _, b_matrix in sources]).T
        for memory, a_matrix, _ in sources:
            product = a_matrix.read() @ right
            product = np.concatenate(np.split(product, LANES // held, axis=1))
            accumulator = memory.data[:, column : column + width].view(np.float32)
            if adds:
                product = product + accumulator
            accumulator[...] = product

    machine.submit(TensorOperation(_queue(block, g.lo + t), multiply))


def _group(block, blocks, st):
    """The blocks whose memories an instruction of ``cta_group::blocks`` uses."""
    if blocks == 1:
        return [block]
    first = block.cluster_rank & ~1
    pair = block.machine.blocks[first : first + 2]
    if len(pair) < 2:
        block.machine.log.fatal(
            "tcgen05 of a pair", st,
            f"block {block.cluster_rank} of a cluster of {len(block.machine.blocks)} has no peer",
        )  # fmt: skip
    return pair


class _Shared:
    def __init__(self, block, fields, dtype, statement):
        self.block, self.dtype = block, dtype
        where = operand_addresses(*fields)
        low, high = int(where.min()), int(where.max()) + dtype.itemsize
        if low < SHARED_BASE or high > block.shared.size:
            block.machine.log.fatal(
                "out-of-bounds access", statement,
                f"a matrix operand in [{low:#x}, {high:#x}) of shared memory",
            )  # fmt: skip
        self.index = where // dtype.itemsize
        self.cells = np.unique(where >> 2) + block.cell_base

    def bits(self):
        return self.block.shared.view(raw_dtype(self.dtype))[self.index]

    def read(self):
        return as_operand(self.bits(), self.dtype)


class _Tensor:
    def __init__(self, memory, column, columns, dtype):
        self.memory, self.column, self.columns, self.dtype = memory, column, columns, dtype
        self.cells = memory.cells_of(0, LANES, column, columns)

    def read(self):
        words = np.ascontiguousarray(self.memory.data[:, self.column : self.column + self.columns])
        return as_operand(words.view(raw_dtype(self.dtype)), self.dtype)


# ---- copies from shared memory


def _copied_lanes(shape, multicast):
    """(lanes (replicas, rows), columns): where the rows of a copy go, from the address's lane on.

    PTX ISA, "Data Movement Shape" and tcgen05.cp's multicast: warps are quarters of the lanes.
    """
    half, quarter = np.arange(64), np.arange(32)
    apart = 64 * (half // 32) + half % 32
    forms = {
        ("128x256b", None): (np.arange(128)[None], 8),
        ("128x128b", None): (np.arange(128)[None], 4),
        ("4x256b", None): (32 * np.arange(4)[None], 8),
        ("64x128b", "warpx2::02_13"): (np.stack([half, half + 64]), 4),
        ("64x128b", "warpx2::01_23"): (np.stack([apart, apart + 32]), 4),
        ("32x128b", "warpx4"): (32 * np.arange(4)[:, None] + quarter, 4),
    }
    if (shape, multicast) not in forms:
        raise FormError(f"tcgen05.cp of shape {shape}, multicast {multicast}")
    return forms[shape, multicast]


def _copy(asm, st):
    """Shared memory to tensor memory through a matrix descriptor, of 32-bit words, K-major."""
    formats = [p for p in st.parts if re.match(r"^b[468]x16", p)]
    if formats:
        raise FormError(f"tcgen05.cp that decompresses: {'.'.join(formats)}")
    shape = next(p for p in st.parts if re.match(r"^\d+x\d+b$", p))
    multicast = next((p for p in st.parts if p.startswith("warpx")), None)
    lanes, columns = _copied_lanes(shape, multicast)
    blocks = 2 if "cta_group::2" in st.parts else 1
    view, row, offset = asm.address(st.operands[0])
    descriptor = asm.source(st.operands[1], "b64")

    def run(block, g, m):
        for t in np.flatnonzero(g.active() if m is None else m).tolist():
            to = int(g.v[view][row][t]) + offset
            fields = _descriptor(int(g.v[descriptor[0]][descriptor[1]][t]))
            _start_copy(block, g, t, blocks, lanes + (to >> 16), to & 0xFFFF, columns, fields, st)

    return effect(run)


def _start_copy(block, g, t, blocks, lanes, column, columns, fields, st):
    if lanes.max() >= LANES:
        block.machine.log.fatal(
            "out-of-bounds access", st, f"reaches lane {lanes.max()} of tensor memory"
        )
    moves = []
    for member in _group(block, blocks, st):
        memory = tensor_memory(member)
        _check_columns(member, memory, column, columns, st)
        layout = (*fields, lanes.shape[1], columns, 4, False)
        moves.append((memory, _Shared(member, layout, np.dtype(np.uint32), st)))
    if block.ordering:
        warp = (g.lo + t) >> 5
        token, issuer = _token(block, warp), warp + block.first_warp
        for memory, source in moves:
            block.ordering.async_read(token, source.cells, st, "the tcgen05.cp")
            # Every shape reaches all four quarters of the lanes.
            cells = memory.cells_of(0, LANES, column, columns)
            block.ordering.tensor_write(token, issuer, cells, st, g.pc, "the tcgen05.cp")

    def copy():
        for memory, source in moves:
            memory.data[lanes, column : column + columns] = source.bits()

    block.machine.submit(TensorOperation(_queue(block, g.lo + t), copy))


# ---- commits


def _commit(asm, st):
    """Arrive at an mbarrier once the thread's earlier products and copies are done."""
    view, row, offset = asm.address(st.operands[0])
    multicast = "multicast::cluster" in st.parts
    mask = asm.source(st.operands[1], "b16") if multicast else None

    def run(block, g, m):
        machine = block.machine
        for t in np.flatnonzero(g.active() if m is None else m).tolist():
            where = int(g.v[view][row][t]) + offset
            owner, at = shared_target(block, np.array([where]), st)
            owners = [owner]
            if multicast:
                chosen = int(g.v[mask[0]][mask[1]][t])
                owners = [b for r, b in enumerate(machine.blocks) if chosen >> r & 1]
            targets = [barriers.find_mbarrier(o, int(at[0]), st) for o in owners]
            token = published = None
            if block.ordering:
                warp = ((g.lo + t) >> 5) + block.first_warp
                token = block.ordering.wgmma(warp)
                published = block.ordering.published[warp].copy()
                block.ordering.wgmma_commit(warp)
                for target in targets:
                    barriers.use_asynchronously(block, token, target, st)

            def signal(targets=targets, token=token, published=published):
                for target in targets:
                    if token:
                        block.ordering.finish_with_history(target.clocks, token, published)
                    barriers.arrive(target.block, target, 1, 0, [], st)

            machine.submit(TensorOperation(_queue(block, g.lo + t), signal))

    return effect(run)
