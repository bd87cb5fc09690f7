"""What a tile of the main loop takes of a Blackwell multiprocessor, counted in the machine code.

    python -m benchmarks.sass_model --flash-attention PATH --out docs/blackwell.md

compiles the head_dim 128 kernels for sm_100a, ours and FlashAttention-4's (``PATH`` holds its
``flash_attn`` package; it needs torch and quack-kernels beside it), finds the loop of each role in
the SASS and writes a table.  No GPU is needed, and none is measured: this is a model.
"""

import argparse
import dataclasses
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from jax_flashcute.ffi.resources import find_tools

ARCH = "sm_100a"
HEAD_DIM = 128
WIDE = 256
"""The head_dim at which the backward has a kernel for each gradient."""
TILE = 128
SMEM_BYTES_A_CYCLE = 128
TENSOR_MACS_A_CYCLE = 4096
CYCLES = ("products", "special functions", "FMA", "ALU", "issue", "shared memory")
"""The counts that are cycles, of which the largest bounds a kernel."""
LANES = {"sfu": 4, "fma": 32, "alu": 16}
"""Of each unit of one of a multiprocessor's four parts; 32 lanes are an instruction."""
FMA = ("FFMA", "FADD", "FMUL", "IMAD", "FFMA2", "FADD2", "FMUL2")
ALU = (
    *("FMNMX", "FMNMX3", "FSEL", "SEL", "LOP3", "SHF", "LEA", "IADD3", "VIADD", "ISETP", "FSETP"),
    *("F2FP", "PRMT", "R2P", "VIMNMX", "VIADDMNMX", "PLOP3", "IADD", "IABS", "FSET"),
)
PREAMBLE = """\
# A model of the Blackwell kernels

Written by `python -m benchmarks.sass_model`. **No Blackwell GPU has run these kernels**: nothing
here is measured. What stands in the table is counted in the machine code (SASS) of the main loops
at head_dim 128 in bfloat16, ours and FlashAttention-4's from its public source, compiled by the
same compiler: cycles of a multiprocessor for the tiles a block has in flight, two of 128 x 128
scores forward and one backward.

- Products: 4,096 multiply-adds a cycle; of a pair of blocks (2-CTA) each does its half.
- Special functions: 4 lanes in each of the four parts of a multiprocessor; FMA 32 (a packed
  instruction is two); ALU 16 (comparisons, selections, shifts, conversions to 16 bits). Issue: one
  instruction a cycle in each part, here the part that has the product warp beside its share of the
  others. The rates of the FMA and ALU pipes are those of Hopper, taken to hold.
- Loops of masked tiles, and rescaling of O, which is mostly skipped, are left out.
- Shared memory: operands of products, tiles that arrive, STS, dQ's bulk reductions, at 128 bytes a
  cycle; an LDS is one cycle, for these loops load one number for all lanes or one each. In the
  backward dS is counted by its size: written once, and the half that a pair exchanges by a copy
  (FlashAttention-4) read and written once more, not where it is stored to the other block directly
  (ours). dQ of a pair is 16 products of 64 rows a block; else a loop within the loop is counted
  once. Tensor memory: loads and stores of threads, and the operand A that lies there, in KiB.
- Spills: loads and stores of local memory in the loop of exponentials.

The largest of the cycles bounds the kernel, as far as such a count can tell.

"""
PASSES = """
Ours at head_dim 256, backward, for 128 x 128 scores, where dV, dK and dQ have a kernel each
([kernels.md](kernels.md)). FlashAttention-4 has two there, of pairs of blocks, with seven products
in place of our eight; they are not counted here.

"""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of SASS: ``opcode`` with its modifiers, ``target`` of a branch or None."""

    address: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is compared: ``passes`` is fwd or bwd; ``pair``: products of two blocks."""

    name: str
    implementation: str
    passes: str
    pair: bool
    compile: Callable[[Path], bytes]


def kernels_of(cubin: bytes) -> list[list[Instruction]]:
    """Those of each kernel that has tensor core products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(find_tools() / "cuobjdump"), "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [part for part in sass.split("Function : ")[1:] if "UTCHMMA" in part]
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    return [
        [Instruction(int(a, 16), o, x) for a, o, x in re.findall(pattern, kernel)]
        for kernel in kernels
    ]


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Bodies of loops, innermost first; not the waits that are tried again, behind the code."""
    end = max(i.address for i in code if i.name == "EXIT")
    spans = [
        (i.target, i.address)
        for i in code
        if i.target is not None and i.target <= i.address < end and i.address - i.target > 160
    ]
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        yield [i for i in code if first <= i.address <= last]


def count(body: list[Instruction], *names: str) -> int:
    return sum(i.name in names for i in body)


def loop_of(
    code: list[Instruction], what: str, is_it: Callable[[list[Instruction]], bool]
) -> list[Instruction]:
    """The smallest loop that ``is_it``.

    Raises:
      ValueError: there is none.
    """
    for body in loops(code):
        if is_it(body):
            return body
    raise ValueError(f"code must have a loop of {what}; found none")


def loops_over_tiles(code: list[Instruction]) -> list[list[Instruction]]:
    """Of a forward kernel: those of the softmax, each for some kind of tiles, and the correction's.

    Raises:
      ValueError: the correction has none.
    """
    of_softmax = [b for b in loops(code) if 64 <= count(b, "MUFU") <= 130]
    return [*of_softmax, rescaling(code)]


def rescaling(code: list[Instruction]) -> list[Instruction]:
    """The correction's loop over key tiles."""
    return loop_of(code, "rescaling", lambda b: bool(count(b, "STTM")) and not count(b, "MUFU"))


def without_branches(body: list[Instruction], name: str) -> list[Instruction]:
    """A loop that skips what a branch may skip, where that has such instructions.

    Of the correction, STTM: no row's maximum has grown.  Of a mask, R2P: the tile hides nothing.
    """
    kept, resume = [], 0
    for instruction in body:
        if instruction.address < resume:
            continue
        kept.append(instruction)
        target = instruction.target
        if target is not None and instruction.address < target <= body[-1].address:
            skipped = [i for i in body if instruction.address < i.address < target]
            if count(skipped, name):
                resume = target
    return kept


def accesses(body: list[Instruction], name: str) -> int:
    """Bytes of a warp's loads or stores."""
    total = 0
    for instruction in body:
        if instruction.name == name:
            width = re.search(r"\.(64|128|x\d+)", instruction.opcode)
            words = 1 if not width else {"64": 2, "128": 4}.get(width[1]) or int(width[1][1:])
            total += 128 * words
    return total


def product_bytes(body: list[Instruction], kernel: Kernel) -> tuple[int, int]:
    """Bytes that products read of shared memory and, for A, of tensor memory.

    K = 16: an operand of 128 x 16 is 4 KiB.  Of a pair, each block holds half of B; of its dQ,
    which is over the keys of both, half of A as well.
    """
    operand = TILE * 16 * 2
    held = operand // 2 if kernel.pair else operand
    products = [i.operands.strip() for i in body if i.name == "UTCHMMA"]
    from_shared = sum(x.startswith("gdesc") for x in products)
    from_tensor = len(products) - from_shared
    of_dq = 0
    if kernel.pair and kernel.passes == "bwd":
        # All others of A in shared memory are S and dP.
        from_shared, of_dq = 2 * HEAD_DIM // 16, 2 * TILE // 16
    shared = from_shared * (operand + held) + from_tensor * held + of_dq * 2 * held
    return shared, from_tensor * operand


def score_gradient_bytes(body: list[Instruction]) -> int:
    """Bytes that dS takes of a block's shared memory, besides the products that read it."""
    written = TILE * TILE * 2
    # Half, from a place of its own to the other block of a pair.
    return written + (written if count(body, "UBLKCP") else 0)


def row(kernel: Kernel, code: list[Instruction]) -> dict[str, float]:
    """The counts of one kernel by resource."""
    forward = kernel.passes == "fwd"
    products = loop_of(code, "products", lambda b: count(b, "UTCHMMA") >= (32 if forward else 40))
    exponentials = min(
        (b for b in loops(code) if 64 <= count(b, "MUFU") <= 130), key=len, default=[]
    )
    if not exponentials:
        raise ValueError("code must have a loop of exponentials; found none")
    if forward:
        others = without_branches(rescaling(code), "STTM")
    else:
        others = loop_of(code, "reductions", lambda b: bool(count(b, "UBLKRED")))
    # Eight warps of exponentials and four others, so two and one in each part.
    warps = ((exponentials, 2), (others, 1))
    names = sum((Counter(i.name for i in body * n) for body, n in warps), Counter())
    shared, tensor = product_bytes(products, kernel)
    # Of K and V, or of Q and dO; a pair shares the first.
    shared += 2 * TILE * HEAD_DIM * 2 // (2 if kernel.pair and forward else 1)
    for body, n in warps:
        shared += 4 * n * 128 * count(body, "LDS")
        if forward:
            shared += 4 * n * accesses(body, "STS")
        tensor += 4 * n * (accesses(body, "LDTM") + accesses(body, "STTM"))
    if not forward:
        # dQ, read again by the reductions.
        shared += score_gradient_bytes(exponentials) + 2 * 4 * accesses(others, "STS")
    tiles = 4 if forward else 5
    return {
        "products": tiles * TILE * TILE * HEAD_DIM / TENSOR_MACS_A_CYCLE,
        **unit_cycles(names),
        "issue": sum(names.values()) + len(products),
        "shared memory": shared / SMEM_BYTES_A_CYCLE,
        "tensor memory, KiB": tensor / 1024,
        "spills": count(exponentials, "LDL", "STL"),
    }


def unit_cycles(names: Counter) -> dict[str, float]:
    """Cycles of each unit of a part of a multiprocessor, of its instructions by name."""
    lanes = {unit: 32 / n for unit, n in LANES.items()}
    fma = sum(n * (2 if name.endswith("2") else 1) for name, n in names.items() if name in FMA)
    alu = sum(n for name, n in names.items() if name in ALU)
    return {
        "special functions": names["MUFU"] * lanes["sfu"],
        "FMA": fma * lanes["fma"],
        "ALU": alu * lanes["alu"],
    }


def pass_row(code: list[Instruction]) -> dict[str, float]:
    """``row`` of one of the passes at head_dim 256: 128 x 128 scores, in halves of 64 columns."""
    products = loop_of(code, "products", lambda b: count(b, "UTCHMMA") >= 40)
    exponentials = loop_of(code, "exponentials", lambda b: count(b, "MUFU") == 64)
    step = without_branches(exponentials, "R2P")
    names = Counter(i.name for i in step * 2)
    shared = tensor = 0
    macs = 0
    for instruction in products:
        if instruction.name == "UTCHMMA":
            # S and dP have A, of 128 rows, in shared memory and B of 64; the gradient B of 256.
            of_scores = instruction.operands.strip().startswith("gdesc")
            shared += 2 * 16 * (TILE + TILE // 2 if of_scores else WIDE)
            tensor += 0 if of_scores else 2 * 16 * TILE
            macs += 16 * TILE * (TILE // 2 if of_scores else WIDE)
    shared += 2 * TILE * WIDE * 2 + 8 * 128 * count(step, "LDS")
    tensor += 8 * (accesses(step, "LDTM") + accesses(step, "STTM"))
    return {
        "products": macs / TENSOR_MACS_A_CYCLE,
        **unit_cycles(names),
        "issue": sum(names.values()) + len(products),
        "shared memory": shared / SMEM_BYTES_A_CYCLE,
        "tensor memory, KiB": tensor / 1024,
        "spills": count(exponentials, "LDL", "STL"),
    }


def ours(direction: str, causal: bool, head_dim: int = HEAD_DIM) -> Callable[[Path], bytes]:
    def compile_ours(folder: Path) -> bytes:
        import jax
        import jax.numpy as jnp

        from jax_flashcute.ffi.compile import ArrayType, compile_kernel
        from jax_flashcute.kernels import registry
        from jax_flashcute.spec import AttentionSpec, Operands

        x = jax.ShapeDtypeStruct((2, 4096, 16, head_dim), jnp.bfloat16)
        spec = AttentionSpec(head_dim**-0.5, is_causal=causal)
        key = registry.kernel_key(spec, Operands(x, x, x), direction, ARCH, 148)
        arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
        kernel = compile_kernel(registry.builder(key), arrays, ARCH, keep_intermediates=True)
        assert kernel.cubin is not None
        return kernel.cubin

    return compile_ours


def flash_attention_4(direction: str, causal: bool, pair: bool) -> Callable[[Path], bytes]:
    """With the options that its interface gives such a call; any batch, lengths and heads."""

    def compile_theirs(folder: Path) -> bytes:
        import cutlass
        from cutlass import cute
        from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

        def tensor(dtype, *shape):
            order = tuple(range(len(shape)))[::-1]
            return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=16)

        b, t, s, n, rows = (cute.sym_int() for _ in range(5))
        q, k = (tensor(cutlass.BFloat16, b, length, n, HEAD_DIM) for length in (t, s))
        if direction == "fwd":
            from flash_attn.cute.flash_fwd_sm100 import FlashAttentionForwardSm100

            kernel = FlashAttentionForwardSm100(
                HEAD_DIM,
                HEAD_DIM,
                is_causal=causal,
                is_static_persistent=not causal,
                use_2cta_instrs=pair,
            )
            arrays = [q, k, k, q, tensor(cutlass.Float32, b, n, t)]
        else:
            from flash_attn.cute.flash_bwd_sm100 import FlashAttentionBackwardSm100

            kernel = FlashAttentionBackwardSm100(
                HEAD_DIM, HEAD_DIM, is_causal=causal, cluster_size=2, use_2cta_instrs=pair
            )
            statistics = tensor(cutlass.Float32, b, n, rows)
            sums = tensor(cutlass.Float32, b, n, cute.sym_int())
            arrays = [q, k, k, q, statistics, statistics, sums, k, k]
        cute.compile(
            kernel,
            *arrays,
            cutlass.Float32(HEAD_DIM**-0.5),
            stream=make_fake_stream(),
            options=f"--gpu-arch {ARCH} --dump-dir={folder} --keep-cubin",
        )
        (cubin,) = folder.glob("*.cubin")
        return cubin.read_bytes()

    return compile_theirs


class B200:
    """What a kernel asks of a device that is not here."""

    def __init__(self, *_args, **_kwargs):
        pass

    def get_device_multiprocessor_count(self) -> int:
        return 148

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return self.get_device_multiprocessor_count() // cluster_size


KERNELS = [
    Kernel("forward, full", "jax_flashcute", "fwd", False, ours("fwd", False)),
    Kernel("forward, full", "FlashAttention-4", "fwd", True, flash_attention_4("fwd", False, True)),
    Kernel("forward, causal", "jax_flashcute", "fwd", False, ours("fwd", True)),
    Kernel(
        "forward, causal", "FlashAttention-4", "fwd", False, flash_attention_4("fwd", True, False)
    ),
    Kernel("backward, full", "jax_flashcute", "bwd", True, ours("bwd", False)),
    Kernel(
        "backward, full", "FlashAttention-4", "bwd", True, flash_attention_4("bwd", False, True)
    ),
]


def page(with_peer: bool) -> str:
    """The documentation's page: what is counted, and the table."""
    import cutlass.utils
    import cutlass.utils.hardware_info

    cutlass.utils.HardwareInfo = cutlass.utils.hardware_info.HardwareInfo = B200
    lines: list[str] = []
    bounds: dict[str, list[float]] = {}
    for kernel in KERNELS:
        if kernel.implementation != "jax_flashcute" and not with_peer:
            continue
        with tempfile.TemporaryDirectory() as folder:
            (code,) = kernels_of(kernel.compile(Path(folder)))
        found = row(kernel, code)
        name = kernel.implementation + (", 2-CTA" if kernel.pair else "")
        bound = add_line(lines, f"{kernel.name} | {name}", found)
        bounds.setdefault(kernel.name, []).append(found[bound])
    ratios = [
        f"{name} {cycles[0] / cycles[1]:.3f}" for name, cycles in bounds.items() if len(cycles) > 1
    ]
    text = PREAMBLE + "\n".join(lines) + "\n"
    if ratios:
        text += f"\nOurs of FlashAttention-4 by the largest of each: {', '.join(ratios)}.\n"
    wide: list[str] = []
    codes = sorted(kernels_of(ours("bwd", False, WIDE)(Path())), key=pass_of)
    for gradient, code in zip(("dV", "dK", "dQ"), codes, strict=True):
        add_line(wide, f"head_dim {WIDE} | {gradient}", pass_row(code))
    return f"{text}{PASSES}{chr(10).join(wide)}\n"


def pass_of(code: list[Instruction]) -> tuple[int, int]:
    """Sorts the passes: dV has the fewest products, and dQ no statistics in shared memory."""
    return count(code, "UTCHMMA"), -count(code, "LDS")


def add_line(lines: list[str], names: str, found: dict[str, float]) -> str:
    """Adds a kernel's counts to a table; returns what bounds it."""
    if not lines:
        lines.append(f"| | | {' | '.join(found)} | bound by |")
        lines.append("|---|---|" + "---:|" * len(found) + "---|")
    bound = max(CYCLES, key=lambda name: found[name])
    figures = " | ".join(f"{math.ceil(x):,}" for x in found.values())
    lines.append(f"| {names} | {figures} | {bound} |")
    print(lines[-1], flush=True)
    return bound


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flash-attention", type=Path, help="folder with the package flash_attn")
    parser.add_argument("--out", type=Path, help="file to write the page to")
    arguments = parser.parse_args()
    if arguments.flash_attention is not None:
        sys.path.insert(0, str(arguments.flash_attention))
    text = page(arguments.flash_attention is not None)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
