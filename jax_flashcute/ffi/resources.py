"""What a compiled kernel takes of the GPU and which instructions it is made of.

Reads cubins with NVIDIA's ``cuobjdump``, which needs ``nvdisasm`` beside it: the distributions
``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm``, or a CUDA toolkit.  No GPU is needed.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_TOOLS = ("cuobjdump", "nvdisasm")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"Function : (\S+)")
# An address, a predicate perhaps, an opcode, operands.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class ResourceReport:
    """One kernel of a cubin.

    Attributes:
      kernel: its symbol.
      registers: registers a thread at launch, before any reallocation among warpgroups.
      highest_register: the highest register that an instruction names, ranges not followed.
      stack_bytes, local_bytes: memory a thread for its stack, and other local memory.
      shared_bytes: static shared memory a block, with what the system takes; what a launch adds is
        not in a cubin.
      spill_loads, spill_stores: instructions that read and write local memory.
      reallocated_registers: registers a thread that warpgroups give up to or claim, in the order
        of the code.
      opcodes: how often each instruction stands in the code, with its modifiers: ``STG.E.128``.
    """

    kernel: str
    registers: int
    highest_register: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    spill_loads: int
    spill_stores: int
    reallocated_registers: tuple[int, ...]
    opcodes: Mapping[str, int] = field(repr=False)

    def count(self, opcode: str) -> int:
        """Instructions with this opcode, such as ``HGMMA``, and any modifiers after it."""
        return sum(n for name, n in self.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


@functools.cache
def find_tools() -> Path:
    """The directory that holds ``cuobjdump`` and ``nvdisasm``.

    Raises:
      ImportError: they are not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = (
        [Path(f) / "cu13" / "bin" for f in (spec.submodule_search_locations or [])] if spec else []
    )
    on_path = shutil.which(_TOOLS[0])
    if on_path:
        folders.append(Path(on_path).parent)
    for folder in folders:
        if all((folder / tool).exists() for tool in _TOOLS):
            return folder
    raise ImportError(
        f"{' and '.join(_TOOLS)} were found neither in the nvidia packages nor on PATH; install "
        'them with: pip install "nvidia-cuda-cuobjdump>=13" "nvidia-cuda-nvdisasm>=13"'
    )


def report(cubin: bytes) -> list[ResourceReport]:
    """A report on each kernel, in the order of their symbols.

    Args:
      cubin: GPU code, such as ``CompiledKernel.cubin`` of a kernel compiled with
        ``keep_intermediates=True``.

    Raises:
      ImportError: the tools are not installed.
      ValueError: this is no cubin.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(file.name, "--dump-resource-usage")
        sass = _run(file.name, "--dump-sass")
    instructions = _instructions(sass)
    reports = []
    for symbol, registers, stack, shared, local in _USAGE.findall(usage):
        found = instructions[symbol]
        opcodes = Counter(opcode for opcode, _ in found)
        mnemonics = Counter(opcode.split(".")[0] for opcode, _ in found)
        reports.append(
            ResourceReport(
                kernel=symbol,
                registers=int(registers),
                highest_register=max(
                    (int(r) for _, operands in found for r in _REGISTER.findall(operands)),
                    default=0,
                ),
                stack_bytes=int(stack),
                local_bytes=int(local),
                shared_bytes=int(shared),
                spill_loads=mnemonics["LDL"],
                spill_stores=mnemonics["STL"],
                reallocated_registers=tuple(
                    int(operands.split(",")[-1], 0)
                    for opcode, operands in found
                    if opcode.startswith("USETMAXREG")
                ),
                opcodes=dict(opcodes),
            )
        )
    if not reports:
        raise ValueError("cubin: cuobjdump found no kernel in it")
    return sorted(reports, key=lambda r: r.kernel)


def _run(path: str, option: str) -> str:
    command = [str(find_tools() / _TOOLS[0]), option, path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cubin: cuobjdump {option} says: {done.stderr.strip()}")
    return done.stdout


def _instructions(sass: str) -> dict[str, list[tuple[str, str]]]:
    """For each kernel its instructions: opcodes and operands."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if function := _FUNCTION.search(line):
            current = found.setdefault(function[1], [])
        elif instruction := _INSTRUCTION.search(line):
            current.append((instruction[1], instruction[2]))
    return found
