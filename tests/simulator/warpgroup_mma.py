"""wgmma: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

Each warp of a warpgroup computes its own 16 rows.  Accumulators are out of reach from issue to the
wait that covers the group: the registers hold poison, and touching them is a finding.  Operands in
shared memory are read at the latest moment the program allows, or at issue, as the schedule says.
"""

import functools
import re

import numpy as np

from . import registers as R
from .machine import SPLIT
from .memory_access import uniform
from .number_types import FLOATS, raw_dtype, to_single
from .program import SHARED_BASE, FormError, effect, instruction, integer

DEPTH_BYTES = 32
"""Of a row of an operand that one instruction takes."""
_OPERANDS = ("f16", "bf16", "tf32", "e4m3", "e5m2")
# Descriptor field "layout type": 0 none, 1 128-byte, 2 64-byte, 3 32-byte swizzle.
_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}
_POISON = np.uint32(0x7FF5CACE)  # a NaN


@functools.lru_cache(maxsize=8192)
def operand_addresses(
    start: int, leading: int, stride: int, swizzle: int, rows: int, depth: int, width: int,
    mn_major: bool,
) -> np.ndarray:  # fmt: skip
    """Byte addresses (rows, depth) of a matrix operand, from its descriptor's fields.

    PTX ISA, "Shared Memory Matrix Layout".  K-major: rows in groups of eight, ``stride`` bytes
    apart.  MN-major: runs of one swizzle span along MN, ``leading`` bytes apart, in groups of
    eight along K, ``stride`` bytes apart.  Without swizzle the units are 8x16-byte core matrices.
    """
    r = np.arange(rows)[:, None]
    k = np.arange(depth)[None]
    if not mn_major:
        if swizzle:
            a = start + (r // 8) * stride + (r % 8) * swizzle + k * width
        else:
            per = 16 // width
            a = start + (r // 8) * stride + (r % 8) * 16 + (k // per) * leading + (k % per) * width
    elif swizzle:
        span = swizzle // width
        a = (
            start + (r // span) * leading + (r % span) * width
            + (k // 8) * stride + (k % 8) * swizzle
        )  # fmt: skip
    else:
        per = 16 // width
        a = start + (r // per) * stride + (r % per) * width + (k // 8) * leading + (k % 8) * 16
    if swizzle:
        a = a ^ (((a >> 7) & (swizzle // 16 - 1)) << 4)
    return a


@functools.lru_cache(maxsize=8192)
def _operand_index(*fields):
    """(element indices, cells, cells by 16 rows, lowest, highest address) of an operand."""
    a = operand_addresses(*fields)
    width = fields[6]
    by_warp = [np.unique(a[i : i + 16] >> 2) for i in range(0, len(a), 16)]
    return a // width, np.unique(a >> 2), by_warp, int(a.min()), int(a.max()) + width


class SharedOperand:
    """A matrix in shared memory, read when asked."""

    def __init__(self, block, fields, dtype):
        self.block, self.dtype = block, dtype
        self.index, self.cells, self.by_warp, self.low, self.high = _operand_index(*fields)

    def read(self) -> np.ndarray:
        raw = self.block.shared.view(raw_dtype(self.dtype))
        return as_operand(raw[self.index], self.dtype)


def as_operand(raw, dtype) -> np.ndarray:
    """Raw matrix elements as float32."""
    if dtype.itemsize == 4:  # tf32: the low 13 bits are ignored
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)
    return to_single(raw, dtype)


def hopper_descriptor(value: int):
    """(start, leading, stride, swizzle) in bytes."""
    if value >> 49 & 7:
        raise FormError("matrix descriptor with a base offset")
    return (
        (value & 0x3FFF) << 4,
        (value >> 16 & 0x3FFF) << 4,
        (value >> 32 & 0x3FFF) << 4,
        _SWIZZLE[value >> 62 & 3],
    )


class Accumulation:
    """Wgmmas of one commit group that add to the same registers, in order."""

    def __init__(self, block, g, registers, columns, initial, previous):
        self.block, self.lo, self.hi = block, g.lo, g.hi
        self.registers, self.columns = registers, columns
        self.initial, self.previous = initial, previous
        self.superseded: set[int] = set()  # warps in which a later accumulation goes on
        self.terms: list = []
        self.fragments = 0
        self.result = None
        self.mask = 0

    def fetch(self):
        """Read the operands that have not been read yet."""
        for i, (a, b, sign) in enumerate(self.terms):
            if not isinstance(b, np.ndarray):
                self.terms[i] = (a if isinstance(a, np.ndarray) else a.read(), b.read(), sign)

    def compute(self) -> np.ndarray:
        """(rows, columns) float32."""
        if self.result is None:
            self.fetch()
            a = np.concatenate([x * s if s != 1 else x for x, _, s in self.terms], axis=1)
            b = np.concatenate([y for _, y, _ in self.terms], axis=1)
            # A warp at a time: BLAS rounds otherwise where warps run together.
            warps = a.reshape(-1, 16, a.shape[1])
            total = (warps @ b.T).reshape(len(a), -1)
            if self.previous is not None:
                first = (self.lo - self.previous.lo) // 2
                total += self.previous.compute()[first : first + len(total)]
            elif self.initial is not None:
                total += self.initial
            self.result = total
            self.terms = []
        return self.result

    def deliver(self, warp):
        """Write one warp's rows of the result to its registers, unless a later one goes on."""
        if warp in self.superseded:
            return
        lo = 32 * warp
        rows = self.compute()[(lo - self.lo) // 2 : (lo - self.lo) // 2 + 16]
        data = self.block.registers.rows["r"].view(np.float32)
        data[self.registers, lo : lo + 32] = to_fragment(rows)


def to_fragment(matrix) -> np.ndarray:
    """A (16 w, n) accumulator as registers (n / 2, 32 w): PTX ISA "wgmma D fragment"."""
    rows, columns = matrix.shape
    x = matrix.reshape(rows // 16, 2, 8, columns // 8, 4, 2)  # w, half, l/4, c, l%4, pair
    return x.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, rows * 2)


def from_fragment(registers) -> np.ndarray:
    """The inverse of :func:`to_fragment`."""
    count, lanes = registers.shape
    x = registers.reshape(count // 4, 2, 2, lanes // 32, 8, 4)  # c, half, pair, w, l/4, l%4
    return x.transpose(3, 1, 4, 0, 5, 2).reshape(lanes // 2, count * 2)


def _a_fragment(raw, dtype) -> np.ndarray:
    """A registers (4, lanes) as a matrix (16 w, depth): PTX ISA "wgmma A fragment"."""
    lanes = raw.shape[1]
    per = 4 // dtype.itemsize
    x = np.ascontiguousarray(raw.reshape(2, 2, lanes // 32, 8, 4, 1))  # k half, row half
    x = x.view(raw_dtype(dtype)).reshape(2, 2, lanes // 32, 8, 4, per)
    x = x.transpose(2, 1, 3, 0, 4, 5).reshape(lanes // 2, 8 * per)
    return as_operand(np.ascontiguousarray(x), dtype)


@instruction("wgmma")
def _wgmma(asm, st):
    action = st.parts[1]
    if action == "mma_async":
        return _mma(asm, st)
    if action == "fence":
        return effect(_fence, converge=True)
    if action == "commit_group":
        return effect(_commit, converge=True)
    if action == "wait_group":
        return _wait(asm, st)
    raise FormError(f"wgmma.{action}")


def _fence(block, g, m):
    g.touched = g.written = 0


def _mma(asm, st):
    shape = re.search(r"m64n(\d+)k(\d+)", st.opcode)
    n, k = int(shape[1]), int(shape[2])
    into, a_name, b_name = st.parts[-3:]
    if "sp" in st.parts or into != "f32" or a_name not in _OPERANDS or b_name not in _OPERANDS:
        raise FormError("wgmma of these types")
    a_type, b_type = FLOATS[a_name], FLOATS[b_name]
    if k * a_type.itemsize != DEPTH_BYTES:
        raise FormError("wgmma depth")
    d = [asm.register_row(x, write=True)[1] for x in asm.vector(st.operands[0])]
    if len(d) != n // 2:
        raise FormError("wgmma accumulator count")
    registers = np.array(d)
    key = tuple(d)
    accumulator_mask = sum(1 << i for i in d)
    from_registers = st.operands[1].startswith("{")
    fragment_mask = 0
    if from_registers:
        fragments = np.array([asm.register_row(x)[1] for x in asm.vector(st.operands[1])])
        fragment_mask = sum(1 << int(i) for i in fragments)
        asm._reads |= fragment_mask
    else:
        a_descriptor = asm.source(st.operands[1], "b64")
    b_descriptor = asm.source(st.operands[2], "b64")
    rest = st.operands[3:]
    if not rest[0].startswith("%") and asm.statement.register(rest[0]) is None:
        scale = bool(integer(rest[0]))
        scale_row = asm.constant_row("p", scale, scale)
    else:
        scale_row = asm.source(rest[0], "pred")[1]
    numbers = [integer(x) for x in rest[1:]]
    sign = numbers[0] * numbers[1] if numbers else 1
    transposes = numbers[2:]
    if from_registers:
        a_transposed, b_transposed = False, bool(transposes and transposes[0])
    else:
        a_transposed = bool(transposes and transposes[0])
        b_transposed = bool(len(transposes) > 1 and transposes[1])

    scalars = [b_descriptor, (R.P, scale_row)]
    if not from_registers:
        scalars.append(a_descriptor)

    def operand(block, g, m, descriptor, rows, dtype, transposed):
        value = int(uniform(g, m, *descriptor))
        start, leading, stride, swizzle = hopper_descriptor(value)
        fields = (start, leading, stride, swizzle, rows, k, dtype.itemsize, transposed)
        matrix = SharedOperand(block, fields, dtype)
        if matrix.low < SHARED_BASE or matrix.high > block.shared.size:
            block.machine.log.fatal(
                "out-of-bounds access", st,
                f"a matrix operand in [{matrix.low:#x}, {matrix.high:#x}) of shared memory, which "
                f"has [{SHARED_BASE:#x}, {block.shared.size:#x})",
            )  # fmt: skip
        return matrix

    def run(block, g, m):
        if m is not None:
            block.machine.log.fatal("wgmma by a part of a warp", st, "all threads must execute it")
        if not _uniform(g, scalars):
            # Warps of different iterations may have met here; the threads of one may not differ.
            if g.n > 32:
                return SPLIT
            block.machine.log.add("descriptor not uniform", st, "its threads pass different values")
        if g.n > 32 and not _in_step(block, g):
            return SPLIT
        ordering = block.ordering
        first_row = (g.lo % 128) // 2
        rows = g.n // 2
        b = operand(block, g, m, b_descriptor, n, b_type, b_transposed)
        if from_registers:
            raw = block.registers.rows["r"][fragments, g.lo : g.hi]
            a = _a_fragment(raw, a_type)
        else:
            a = operand(block, g, m, a_descriptor, 64, a_type, a_transposed)
            if rows != 64:
                a = _RowsOf(a, first_row, rows)
        if ordering:
            for warp in g.warps.tolist():
                token = ordering.wgmma(warp)
                cells = b.cells + block.cell_base
                ordering.async_read(token, cells, st, "the wgmma")
                if not from_registers:
                    rows_of_warp = a.by_warp[(warp - block.first_warp) % 4] + block.cell_base
                    ordering.async_read(token, rows_of_warp, st, "the wgmma")
        if g.touched & accumulator_mask or g.written & fragment_mask:
            block.machine.log.add(
                "missing wgmma.fence",
                st,
                "uses registers that other instructions accessed after the last wgmma.fence",
            )
        adds = bool(uniform(g, m, R.P, scale_row))
        accumulation = _find(block, g, key, accumulator_mask, adds, registers, n, st)
        if not block.machine.schedule.late_reads:
            b = b.read()
            a = a if isinstance(a, np.ndarray) else a.read()
        accumulation.terms.append((a, b, sign))
        accumulation.fragments |= fragment_mask
        for warp in range(g.lo >> 5, g.hi >> 5):
            state = block.wgmma[warp]
            state.accumulators |= accumulator_mask
            state.fragments |= fragment_mask
        g.accumulators |= accumulator_mask
        g.fragments |= fragment_mask
        if block.machine.trace:
            block.machine.trace.wgmma(block.machine, g, st)

    return effect(run, converge=True)


def _uniform(g, scalars) -> bool:
    for view, row in scalars:
        x = g.v[view][row]
        if not (x == x[0]).all():
            return False
    return True


def _in_step(block, g) -> bool:
    """Whether the warps of a group have the same wgmmas in flight."""
    first = block.wgmma[g.lo >> 5]
    return all(
        block.wgmma[w].open == first.open and block.wgmma[w].committed == first.committed
        for w in range((g.lo >> 5) + 1, g.hi >> 5)
    )


class _RowsOf:
    """Some rows of a shared operand."""

    def __init__(self, operand, first, rows):
        self.operand, self.first, self.rows = operand, first, rows
        self.by_warp = operand.by_warp

    def read(self):
        return self.operand.read()[self.first : self.first + self.rows]


def _find(block, g, key, mask, adds, registers, n, st):
    """The accumulation that a wgmma of a group joins, or a new one."""
    states = [block.wgmma[w] for w in range(g.lo >> 5, g.hi >> 5)]
    state = states[0]
    previous = None
    warps = range(g.lo >> 5, g.hi >> 5)
    for candidate in [a for group in state.committed for a in group] + state.open:
        current = warps[0] not in candidate.superseded
        if candidate.mask == mask and current:
            previous = candidate
        elif candidate.mask & mask and current:
            block.machine.log.add(
                "register of a wgmma in flight", st,
                "accumulates in registers that another wgmma of another shape still uses",
            )  # fmt: skip
        if candidate.fragments & mask:
            block.machine.log.add(
                "register of a wgmma in flight", st,
                "writes registers that another wgmma still reads as its A operand",
            )  # fmt: skip
    same_warps = previous is not None and (previous.lo, previous.hi) == (g.lo, g.hi)
    if same_warps and adds and any(previous is a for a in state.open):
        return previous
    rows = block.registers.rows["r"].view(np.float32)
    initial = None
    if adds and previous is None:
        initial = from_fragment(rows[registers, g.lo : g.hi])
    new = Accumulation(block, g, registers, n, initial, previous if adds else None)
    if previous is not None:
        # Its result goes on in the new one, or is overwritten before anyone can see it.
        previous.superseded.update(warps)
    new.mask = mask
    for s in states:
        s.open.append(new)
    block.registers.rows["r"][registers, g.lo : g.hi] = _POISON
    return new


def _commit(block, g, m):
    for warp in range(g.lo >> 5, g.hi >> 5):
        state = block.wgmma[warp]
        state.committed.append(state.open)
        state.open = []
        if block.ordering:
            block.ordering.wgmma_commit(warp + block.first_warp)
        if block.machine.trace:
            block.machine.trace.wgmma_commit(warp)


def _wait(asm, st):
    pending = integer(st.operands[0])

    def run(block, g, m):
        if block.machine.trace:
            block.machine.trace.wgmma_wait(g, pending, st)
        for warp in range(g.lo >> 5, g.hi >> 5):
            state = block.wgmma[warp]
            count = max(0, len(state.committed) - pending)
            for group in state.committed[:count]:
                for accumulation in group:
                    accumulation.compute()
                    accumulation.deliver(warp)
            del state.committed[:count]
            left = [a for group in state.committed for a in group] + state.open
            state.accumulators = state.fragments = 0
            for a in left:
                state.accumulators |= a.mask
                state.fragments |= a.fragments
            if block.ordering:
                block.ordering.wgmma_wait(
                    warp + block.first_warp, min(pending, len(state.committed))
                )
        g.refresh()

    return effect(run, converge=True)
