"""Parse PTX text, as NVVM writes it, into kernels of flat statement lists."""

import bisect
import re
from dataclasses import dataclass, field

_TYPE_BITS = re.compile(r"[bfsu](\d+)$")


class PtxError(Exception):
    """PTX that the simulator cannot parse or does not know; names the line."""


@dataclass
class Statement:
    """One instruction.

    Attributes:
      line: its line in the PTX text, from 1.
      text: as written, without the guard and the semicolon.
      opcode: such as ``add.f32``; parts: the opcode split at dots.
      operands: top-level operands, as written.
      guard: ``(negated, predicate name)`` or None.
      scopes: register name -> declaration, innermost last.
      labels: the label scopes that a branch target is looked up in, innermost last.
      source: ``(file, line)`` of the Python source, or None.
    """

    line: int
    text: str
    opcode: str
    parts: list[str]
    operands: list[str]
    guard: tuple[bool, str] | None
    scopes: list[dict]
    label_scopes: list[dict]
    source: tuple[str, int] | None

    def register(self, name: str) -> "Register | None":
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def target(self, label: str) -> int:
        for scope in reversed(self.label_scopes):
            if label in scope:
                return scope[label]
        raise PtxError(f"PTX line {self.line}: no label {label}")

    def where(self) -> str:
        python = f" ({self.source[0]}:{self.source[1]})" if self.source else ""
        return f"PTX line {self.line}{python}: {self.text[:90]}"


@dataclass(frozen=True)
class Register:
    """A declared register: its class (``p``, ``h``, ``r``, ``d``, ``q``) and index in it."""

    kind: str
    index: int


@dataclass
class Variable:
    """A shared, local, global or constant variable."""

    name: str
    space: str
    align: int
    size: int
    initial: bytes = b""


@dataclass
class Kernel:
    """One ``.entry``.

    Attributes:
      parameters: name -> (offset, size) in the parameter space.
      num_threads: product of ``.reqntid``, or None.
      register_counts: registers of each class.
      variables: shared and local variables declared in or outside the body.
      branch_tables: label of a ``.branchtargets`` list -> its labels.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    num_threads: int | None
    max_registers: int | None
    statements: list[Statement] = field(default_factory=list)
    register_counts: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)

    @property
    def parameter_sizes(self) -> list[int]:
        return [size for _, size in self.parameters.values()]


_KINDS = {"pred": "p", "8": "h", "16": "h", "32": "r", "64": "d", "128": "q"}


def register_kind(type_name: str) -> str:
    """The register class of a type such as ``f32`` or ``pred``."""
    if type_name == "pred":
        return "p"
    bits = _TYPE_BITS.search(type_name)
    if not bits:
        if type_name.endswith("x2"):  # f16x2, bf16x2
            return "r"
        raise PtxError(f"no register class for .{type_name}")
    return _KINDS[bits[1]]


def split_operands(text: str) -> list[str]:
    """Split at commas outside of braces, brackets and parentheses."""
    if "{" not in text and "[" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    out, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    out.append(text[start:].strip())
    return out


def _blank_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)


_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.([bfsu]\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.S,
)
_MODULE_VARIABLE = re.compile(
    r"^\s*((?:\.(?:extern|visible|weak)\s+)*\.(?:shared|global|const)\s[^;]*);", re.M
)
_TOKEN = re.compile(r"\s*(?:\.loc\s+([^\n]*)|([{}])|([$\w]+)\s*:(?!:)|([^;{}\s][^;]*);)", re.S)
_GUARD = re.compile(r"@(!?)(%?[$\w]+)\s+(.*)", re.S)
_INSTRUCTION = re.compile(r"([\w.:]+)\s*(.*)", re.S)


def _variable(text: str) -> Variable | None:
    match = _VARIABLE.match(text)
    if not match:
        return None
    space, align, kind, name, count, initial = match.groups()
    width = int(kind[1:]) // 8
    data = b""
    if initial:
        values = [int(v, 0) for v in re.findall(r"-?(?:0x)?[0-9a-fA-F]+", initial)]
        data = b"".join((v % (1 << 8 * width)).to_bytes(width, "little") for v in values)
    size = width * int(count) if count else (0 if count == "" else width)
    return Variable(name, space, int(align or width), max(size, len(data)), data)


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a PTX module by name."""
    text = _blank_comments(text.replace("\0", ""))
    newlines = [i for i, char in enumerate(text) if char == "\n"]
    files = {int(n): name for n, name in re.findall(r"\.file\s+(\d+)\s+\"([^\"]*)\"", text)}
    module_variables = {}
    for match in _MODULE_VARIABLE.finditer(text):
        variable = _variable(match[1].strip())
        if variable:
            module_variables[variable.name] = variable
    kernels = {}
    entry = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.S)
    for match in entry.finditer(text):
        kernel = Kernel(match[1], _parameters(match[2]), *_limits(match[3]))
        kernel.variables.update(module_variables)
        _parse_body(kernel, text, match.end(), newlines, files)
        kernels[kernel.name] = kernel
    if not kernels:
        raise PtxError("the PTX has no .entry")
    return kernels


def _limits(directives: str) -> tuple[int | None, int | None]:
    def numbers(name):
        found = re.search(rf"\.{name}\s+([\d, ]+)", directives)
        return [int(x) for x in found[1].replace(",", " ").split()] if found else None

    threads = numbers("reqntid")
    registers = numbers("maxnreg")
    count = None
    if threads:
        count = 1
        for x in threads:
            count *= x
    return count, registers[0] if registers else None


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    parameters, offset = {}, 0
    for item in filter(None, (p.strip() for p in text.split(","))):
        match = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([bfsu]\d+)\s+(?:\.ptr\S*\s+(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?)?"
            r"([\w$]+)(?:\[(\d+)\])?$",
            item,
        )
        if not match:
            raise PtxError(f"cannot read the parameter {item!r}")
        align, kind, name, count = match.groups()
        width = int(kind[1:]) // 8
        size, align = width * int(count or 1), int(align or width)
        offset = -(-offset // align) * align
        parameters[name] = (offset, size)
        offset += size
    return parameters


def _parse_body(kernel, text, position, newlines, files):
    scopes, label_scopes = [{}], [{}]
    counts = dict.fromkeys("phrdq", 0)
    source, pending_table = None, None

    def declare(body):
        kind_name, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", body, re.S).groups()
        kind = register_kind(kind_name)
        for name in names.split(","):
            name = name.strip()
            numbered = re.match(r"(%?[\w$]+)<(\d+)>$", name)
            every = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]
            for each in every:
                scopes[-1][each] = Register(kind, counts[kind])
                counts[kind] += 1

    while True:
        match = _TOKEN.match(text, position)
        if not match:
            line = bisect.bisect(newlines, position) + 1
            raise PtxError(f"PTX line {line}: cannot read {text[position : position + 60]!r}")
        position = match.end()
        loc, brace, label, body = match.groups()
        if loc is not None:
            fields = loc.split()
            number = int(fields[1])
            if number:
                source = (files.get(int(fields[0]), "?"), number)
        elif brace == "{":
            # Only names declared inside differ: an empty scope costs a dictionary, no copy.
            scopes, label_scopes = [*scopes, {}], [*label_scopes, {}]
        elif brace == "}":
            scopes, label_scopes = scopes[:-1], label_scopes[:-1]
            if not scopes:
                break
        elif label is not None:
            label_scopes[-1][label] = len(kernel.statements)
            pending_table = label
        elif body.startswith(".reg"):
            declare(body)
        elif body.startswith(".branchtargets"):
            kernel.branch_tables[pending_table] = split_operands(body[len(".branchtargets") :])
        elif body.startswith("."):
            variable = _variable(body.strip())
            if variable:
                kernel.variables[variable.name] = variable
            elif not body.startswith(".pragma"):
                line = bisect.bisect(newlines, match.start(4)) + 1
                raise PtxError(f"PTX line {line}: unknown directive {body[:60]}")
        else:
            line = bisect.bisect(newlines, match.start(4)) + 1
            guard, rest = None, body.strip()
            if rest.startswith("@"):
                negated, name, rest = _GUARD.match(rest).groups()
                guard = (negated == "!", name)
            opcode, operands = _INSTRUCTION.match(rest).groups()
            kernel.statements.append(
                Statement(
                    line, rest, opcode, opcode.split("."), split_operands(operands.strip()),
                    guard, scopes, label_scopes, source,
                )
            )  # fmt: skip
    kernel.register_counts = counts
