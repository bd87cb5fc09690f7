"""Operations on single numbers: choices, loads and stores without a branch, bits of floats, tanh.

Each imports the compiler when it is called: what a kernel will do with scores is found out without.
"""

import math
from typing import Any


def select(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where ``condition`` holds, without a branch."""
    from cutlass._mlir.dialects import arith

    return type(yes)(arith.select(condition.ir_value(), yes.ir_value(), no.ir_value()))


def bits_of(value: Any) -> Any:
    """The bits of a Float32 as an Int32."""
    from cutlass import Int32
    from cutlass._mlir.dialects import llvm

    return Int32(llvm.bitcast(Int32.mlir_type, value.ir_value()))


def float_of(bits: Any) -> Any:
    """The Float32 of an Int32's bits."""
    from cutlass import Float32
    from cutlass._mlir.dialects import llvm

    return Float32(llvm.bitcast(Float32.mlir_type, bits.ir_value()))


def tanh(x: Any) -> Any:
    """To float32's precision, from one exponential and one reciprocal."""
    import cutlass.cute as cute
    from cutlass import Float32

    # Around 0 the difference cancels; its series is short there.
    large = Float32(1.0) - Float32(2.0) * cute.arch.rcp_approx(
        Float32(1.0) + cute.math.exp2(x * (2 * math.log2(math.e)), fastmath=True)
    )
    xx = x * x
    small = x * (Float32(1.0) + xx * (xx * (2 / 15 - 17 / 315 * xx) - 1 / 3))
    return select(cute.math.absf(x) < Float32(0.14), small, large)


def store_float_if(pointer: Any, value: Any, where: Any) -> None:
    """Stores a Float32 to global memory where a condition holds, without a branch."""
    from cutlass import cute

    cute.arch.inline_ptx(
        "st.global.f32 [{$r0}], {$r1};",
        read_only_args=[pointer.toint(), value],
        predicate=where,
    )


def load_words_if(pointer: Any, size: int, where: Any) -> list[Any]:
    """1, 2, 4, 8 or 16 aligned bytes of global memory as Uint32s, where a condition holds, else 0.

    Without a branch, and of memory that the kernel does not write: the load may move.
    """
    from cutlass import Uint32
    from cutlass._mlir import ir
    from cutlass._mlir.dialects import llvm

    words = range(max(1, size // 4))
    kind = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    registers = ", ".join(f"${i}" for i in words)
    target = registers if len(words) == 1 else f"{{{registers}}}"
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in words)
    types = [Uint32.mlir_type for _ in words]
    found = llvm.inline_asm(
        types[0] if len(words) == 1 else llvm.StructType.get_literal(types),
        [pointer.toint().ir_value(), where.ir_value()],
        f"{zeros} @${len(words) + 1} ld.global.{kind} {target}, [${len(words)}];",
        ",".join(["=r" for _ in words] + ["l", "b"]),
        has_side_effects=False,
    )
    if len(words) == 1:
        return [Uint32(found)]
    return [
        Uint32(llvm.extractvalue(types[0], found, ir.DenseI64ArrayAttr.get([i]))) for i in words
    ]
