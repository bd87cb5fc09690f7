"""Compile parsed PTX into closures.

A statement becomes one of

  simple   ``fn(frame, mask)``: registers only; runs of them are executed back to back;
  effect   ``fn(block, group, mask)``: memory, barriers, shuffles; may return an action;
  branch   handled by the machine.

``mask`` is None when every thread of the group takes part.  Instructions register themselves with
``@instruction``; an opcode that nobody claims is an error that names its line.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import registers as R
from .ptx import Kernel, PtxError, Statement

# Where state spaces appear in the 64-bit generic address space.  Real windows differ; a program
# that depends on them is wrong.
SHARED_WINDOW = 1 << 52
LOCAL_WINDOW = 1 << 53
PARAMETER_WINDOW = 1 << 54
CONSTANT_WINDOW = 1 << 51
SHARED_BASE = 1024
"""First byte of a block's own variables: Hopper reserves the kilobyte below it."""
CLUSTER_SHIFT = 24
"""Bits of an offset in one block's shared memory; above them stands the block's rank plus one."""

SIMPLE, EFFECT, BRANCH, RETURN, BRANCH_TABLE = range(5)


class FormError(Exception):
    """Raised by an instruction's compiler for a form it does not implement."""


@dataclass
class Operation:
    """A compiled statement."""

    kind: int
    run: Callable | None
    statement: Statement
    guard: tuple[bool, int] | None
    reads: int  # bit masks over the 32-bit registers
    writes: int
    converge: bool = False  # needs every live thread of the warp
    is_wgmma: bool = False
    targets: tuple[int, ...] = ()
    index: Callable | None = None


@dataclass
class Run:
    """Consecutive simple operations."""

    functions: list
    next: int
    touches: int
    writes: int
    first: int


_INSTRUCTIONS: dict[str, list[tuple[Callable[[str], bool] | None, Callable]]] = {}


def instruction(*names, types: Callable[[str], bool] | None = None):
    """Register the compiler of the opcodes whose first part is one of ``names``.

    ``types`` says of their last part whether they are meant: integers and floats share names.
    """

    def add(function):
        for name in names:
            _INSTRUCTIONS.setdefault(name, []).append((types, function))
        return function

    return add


def _compiler(parts: list[str]) -> Callable:
    for types, compiler in _INSTRUCTIONS.get(parts[0], ()):
        if types is None or types(parts[-1]):
            return compiler
    raise FormError("unknown opcode")


def effect(function, *, converge: bool = False):
    """Mark a compiled closure as an effect."""
    function.effect = True
    function.converge = converge
    return function


def put(out, value, mask):
    """Write ``value`` to a row, where the mask allows it."""
    if mask is None:
        out[...] = value
    else:
        np.copyto(out, value, where=mask, casting="unsafe")


_ADDRESS = re.compile(r"^\[\s*([%\w$]+)\s*(?:\+\s*(-?(?:0x)?[0-9a-fA-F]+))?\s*\]$")
_INTEGER = re.compile(r"^-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def integer(text: str) -> int:
    text = text.rstrip("U")
    if re.match(r"^-?0[0-7]+$", text):
        return int(text, 8)
    return int(text, 0)


class Program:
    """A kernel ready to run.

    Attributes:
      kernel: the parsed kernel.
      operations: one per statement.
      runs: for a statement that starts a run of simple ones, that run; None elsewhere.
      joins: statements that are branch targets.
      counts, constants: the shape of the register file.
      shared: address of each shared variable; ``shared_static`` bytes lie below the dynamic part.
      local: offset of each local variable; ``local_bytes`` a thread.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.counts = kernel.register_counts
        self.constants: dict[str, list] = {"p": [], "h": [], "r": [], "d": []}
        self._constant_index: dict = {}
        self._place_variables()
        self.statement: Statement | None = None
        self._reads = self._writes = 0
        self.operations = [self._compile(s) for s in kernel.statements]
        self.uses_tensor_memory = any(s.parts[0] == "tcgen05" for s in kernel.statements)
        self.joins = {t for op in self.operations for t in op.targets}
        self._make_runs()

    def _place_variables(self):
        self.shared, self.local, self.constant = {}, {}, {}
        self.constant_bytes = bytearray()
        address, local = SHARED_BASE, 0
        dynamic = []
        for variable in self.kernel.variables.values():
            align = max(1, variable.align)
            if variable.space == "shared":
                if variable.size == 0:
                    dynamic.append(variable)
                    continue
                address = -(-address // align) * align
                self.shared[variable.name] = address
                address += variable.size
            elif variable.space == "local":
                local = -(-local // align) * align
                self.local[variable.name] = local
                local += variable.size
            else:
                self.constant_bytes += b"\0" * (-len(self.constant_bytes) % align)
                self.constant[variable.name] = len(self.constant_bytes)
                data = variable.initial
                self.constant_bytes += data + b"\0" * (variable.size - len(data))
        for variable in dynamic:
            address = -(-address // max(16, variable.align)) * max(16, variable.align)
        self.shared_static = address
        for variable in dynamic:
            self.shared[variable.name] = address
        self.local_bytes = -(-local // 16) * 16

    # ---- operands

    def constant_row(self, kind: str, key, value) -> int:
        """Index of a constant or special row of a register class."""
        index = self._constant_index.get((kind, key))
        if index is None:
            index = self.counts[kind] + len(self.constants[kind])
            self.constants[kind].append(value)
            self._constant_index[kind, key] = index
        return index

    def source(self, text: str, type_name: str) -> tuple[int, int]:
        """(view, row) of a source operand read as ``type_name``."""
        view = R.VIEW[type_name]
        register = self.statement.register(text)
        if register is not None:
            if register.kind == "r":
                self._reads |= 1 << register.index
            if register.kind != R.VIEW_CLASS[view]:
                raise FormError(f"register {text} used as .{type_name}")
            return view, register.index
        return view, self._constant(text, type_name, view)

    def _constant(self, text, type_name, view) -> int:
        kind = R.VIEW_CLASS[view]
        if text.startswith("%"):
            return self._special(text, kind)
        if text.startswith(("0f", "0F")):
            bits = int(text[2:], 16)
            if view == R.F64:
                value = struct.unpack("<f", struct.pack("<I", bits))[0]
                bits = struct.unpack("<Q", struct.pack("<d", value))[0]
            return self.constant_row(kind, bits, bits)
        if text.startswith(("0d", "0D")):
            bits = int(text[2:], 16)
            if view == R.F32:
                value = struct.unpack("<d", struct.pack("<Q", bits))[0]
                bits = struct.unpack("<I", struct.pack("<f", value))[0]
            return self.constant_row(kind, bits, bits)
        if _INTEGER.match(text):
            value = integer(text)
            if view == R.P:
                return self.constant_row(kind, bool(value), bool(value))
            if view in (R.F32, R.F64):
                code = "f" if view == R.F32 else "d"
                bits = int.from_bytes(struct.pack("<" + code, float(value)), "little")
            else:
                bits = value & ((1 << 8 * R.DTYPE[type_name].itemsize) - 1)
            return self.constant_row(kind, bits, bits)
        if re.match(r"^-?\d+\.\d*(e[+-]?\d+)?$", text):
            code = "f" if view == R.F32 else "d"
            bits = int.from_bytes(struct.pack("<" + code, float(text)), "little")
            return self.constant_row(kind, bits, bits)
        if text == "WARP_SZ":
            return self.constant_row(kind, 32, 32)
        return self.constant_row(kind, self.symbol(text), self.symbol(text))

    def symbol(self, name: str) -> int:
        """The address of a variable or a parameter, in its own state space."""
        if name in self.shared:
            return self.shared[name]
        if name in self.local:
            return self.local[name]
        if name in self.constant:
            return CONSTANT_WINDOW + self.constant[name]
        if name in self.kernel.parameters:
            return PARAMETER_WINDOW + self.kernel.parameters[name][0]
        raise FormError(f"unknown operand {name}")

    def _special(self, text, kind) -> int:
        name = text[1:]
        value = _SPECIAL.get(name)
        if value is None:
            raise FormError(f"unknown special register {text}")
        return self.constant_row(kind, name, value)

    def destination(self, text: str, type_name: str) -> tuple[int, int] | None:
        """(view, row) of a destination; None for the sink ``_``."""
        if text == "_":
            return None
        view = R.VIEW[type_name]
        register = self.statement.register(text)
        if register is None:
            raise FormError(f"{text} is not a register")
        if register.kind == "r":
            self._writes |= 1 << register.index
        if register.kind != R.VIEW_CLASS[view]:
            raise FormError(f"register {text} used as .{type_name}")
        return view, register.index

    def register_row(self, text: str, *, read=False, write=False) -> tuple[int, int]:
        """(unsigned view, row) of a register of any width."""
        register = self.statement.register(text)
        if register is None:
            raise FormError(f"{text} is not a register")
        if register.kind == "r":
            if read:
                self._reads |= 1 << register.index
            if write:
                self._writes |= 1 << register.index
        return {"p": R.P, "h": R.U16, "r": R.U32, "d": R.U64}[register.kind], register.index

    def address(self, text: str):
        """(view, row, offset) of an operand ``[register+offset]`` or ``[symbol+offset]``."""
        match = _ADDRESS.match(text)
        if not match:
            raise FormError(f"cannot read the address {text}")
        base, offset = match[1], integer(match[2]) if match[2] else 0
        register = self.statement.register(base)
        if register is None:
            if _INTEGER.match(base):
                value = integer(base)
            else:
                value = self.symbol(base)
            return R.U64, self.constant_row("d", value, value), offset
        if register.kind == "r":
            self._reads |= 1 << register.index
            return R.U32, register.index, offset
        if register.kind == "d":
            return R.U64, register.index, offset
        raise FormError(f"address in {base}")

    def predicate(self, text: str) -> tuple[bool, tuple[int, int]]:
        """(negated, (view, row)) of a source predicate, ``p`` or ``!p``."""
        return text.startswith("!"), self.source(text.lstrip("!"), "pred")

    def pair(self, text: str) -> list[str]:
        """The destinations of ``d|p``, or the operand itself."""
        return [part.strip() for part in text.split("|")]

    def vector(self, text: str) -> list[str]:
        """The elements of ``{a, b}``, or the operand itself."""
        if text.startswith("{"):
            return [part.strip() for part in text[1:-1].split(",")]
        return [text]

    # ---- statements

    def _compile(self, statement: Statement) -> Operation:
        self.statement = statement
        self._reads = self._writes = 0
        try:
            guard = None
            if statement.guard:
                negated, name = statement.guard
                register = statement.register(name)
                if register is None or register.kind != "p":
                    raise FormError(f"guard {name} is not a predicate")
                guard = (negated, register.index)
            name = statement.parts[0]
            if name == "bra":
                target = statement.target(statement.operands[0])
                return Operation(BRANCH, None, statement, guard, 0, 0, targets=(target,))
            if name in ("ret", "exit"):
                return Operation(RETURN, None, statement, guard, 0, 0)
            if name == "brx":
                labels = self.kernel.branch_tables[statement.operands[1]]
                targets = tuple(statement.target(label) for label in labels)
                index = self.source(statement.operands[0], "u32")
                return Operation(
                    BRANCH_TABLE, index, statement, guard, self._reads, 0, targets=targets
                )
            function = _compiler(statement.parts)(self, statement)
        except FormError as error:
            raise PtxError(f"{statement.where()}: {error}") from None
        except (KeyError, IndexError, ValueError) as error:
            raise PtxError(f"{statement.where()}: unsupported form ({error!r})") from error
        kind = EFFECT if getattr(function, "effect", False) else SIMPLE
        if kind == SIMPLE and guard is not None:
            function = _guarded(function, *guard)
        operation = Operation(kind, function, statement, guard, self._reads, self._writes)
        operation.converge = getattr(function, "converge", False)
        operation.is_wgmma = name == "wgmma"
        return operation

    def _make_runs(self):
        self.runs: list[Run | None] = [None] * (len(self.operations) + 1)
        following = None
        for pc in range(len(self.operations) - 1, -1, -1):
            op = self.operations[pc]
            if op.kind != SIMPLE:
                following = None
                continue
            if following is None or pc + 1 in self.joins:
                following = Run([op.run], pc + 1, op.reads | op.writes, op.writes, pc)
            else:
                following = Run(
                    [op.run, *following.functions],
                    following.next,
                    following.touches | op.reads | op.writes,
                    following.writes | op.writes,
                    pc,
                )
            self.runs[pc] = following
        # Only runs that execution can start at matter; the rest would cost quadratic memory.
        starts = self.joins | {0} | {
            pc + 1 for pc, op in enumerate(self.operations) if op.kind != SIMPLE
        }  # fmt: skip
        for pc in range(len(self.operations)):
            if pc not in starts and self.runs[pc] is not None:
                self.runs[pc] = None


def _guarded(function, negated, row):
    def run(v, m):
        p = v[R.P][row]
        p = ~p if negated else p
        if m is not None:
            p = p & m
        if p.all():
            function(v, None)
        elif p.any():
            function(v, p.copy())

    return run


def _extent(field, axis):
    return lambda block: getattr(block, field)[axis]


_SPECIAL: dict[str, Callable] = {
    "laneid": lambda b: np.arange(b.num_threads) & 31,
    "warpid": lambda b: np.arange(b.num_threads) >> 5,
    "nwarpid": lambda b: (b.num_threads + 31) // 32,
    "lanemask_eq": lambda b: 1 << (np.arange(b.num_threads, dtype=np.uint64) & 31),
    "lanemask_lt": lambda b: (1 << (np.arange(b.num_threads, dtype=np.uint64) & 31)) - 1,
    "lanemask_le": lambda b: (2 << (np.arange(b.num_threads, dtype=np.uint64) & 31)) - 1,
    "lanemask_gt": lambda b: (
        0xFFFFFFFF & ~((2 << (np.arange(b.num_threads, dtype=np.uint64) & 31)) - 1)
    ),
    "lanemask_ge": lambda b: (
        0xFFFFFFFF & ~((1 << (np.arange(b.num_threads, dtype=np.uint64) & 31)) - 1)
    ),
    "smid": lambda b: b.linear_id % b.num_sms,
    "nsmid": lambda b: b.num_sms,
    "clock": lambda b: 0,
    "clock64": lambda b: 0,
    "globaltimer": lambda b: 0,
    "globaltimer_lo": lambda b: 0,
    "is_explicit_cluster": lambda b: b.cluster_size > 1,
    "cluster_ctarank": lambda b: b.cluster_rank,
    "cluster_nctarank": lambda b: b.cluster_size,
    "dynamic_smem_size": lambda b: b.dynamic_shared,
    "total_smem_size": lambda b: b.dynamic_shared,
}
for _axis, _letter in enumerate("xyz"):
    _SPECIAL["tid." + _letter] = lambda b, a=_axis: b.thread_index(a)
    _SPECIAL["ntid." + _letter] = _extent("block_dim", _axis)
    _SPECIAL["ctaid." + _letter] = _extent("block_index", _axis)
    _SPECIAL["nctaid." + _letter] = _extent("grid_dim", _axis)
    _SPECIAL["cluster_ctaid." + _letter] = _extent("cluster_index", _axis)
    _SPECIAL["cluster_nctaid." + _letter] = _extent("cluster_dim", _axis)
    _SPECIAL["clusterid." + _letter] = _extent("cluster_id", _axis)
    _SPECIAL["nclusterid." + _letter] = _extent("num_clusters", _axis)
