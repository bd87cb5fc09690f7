"""Moves between registers, and generic addresses: PTX ISA, "Data Movement and Conversion"."""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import UNSIGNED, joined, split, width_of
from .program import (
    CONSTANT_WINDOW,
    LOCAL_WINDOW,
    PARAMETER_WINDOW,
    SHARED_WINDOW,
    FormError,
    instruction,
    put,
)


@instruction("mov")
def _mov(asm, st):
    kind = st.parts[-1]
    into, value = st.operands
    if kind == "b128":
        raise FormError("128-bit moves")
    if into.startswith("{"):
        return _unpack(asm, asm.vector(into), value, kind)
    if value.startswith("{"):
        return _pack(asm, into, asm.vector(value), kind)
    return elementwise(asm, st, lambda x: x, kind, [kind])


def _unpack(asm, names, text, kind):
    view, row = asm.source(text, kind)
    width = width_of(kind) // len(names)
    outs = [asm.destination(name, f"b{width}") for name in names]

    def unpack(v, m):
        pieces = split(v[view][row], UNSIGNED[width])
        for i, out in enumerate(outs):
            if out:
                put(v[out[0]][out[1]], pieces[:, i], m)

    return unpack


def _pack(asm, text, names, kind):
    width = width_of(kind) // len(names)
    sources = [asm.source(name, f"b{width}") for name in names]
    vd, d = asm.destination(text, kind)

    def pack(v, m):
        pieces = [v[view][row] for view, row in sources]
        put(v[vd][d], joined(pieces, UNSIGNED[width], R.DTYPE[kind]), m)

    return pack


@instruction("cvta")
def _cvta(asm, st):
    """cvta.space generic, address; cvta.to.space address, generic."""
    kind = st.parts[-1]
    space = st.parts[2] if st.parts[1] == "to" else st.parts[1]
    window = {
        "global": 0, "const": 0, "param": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW,
    }[space.split("::")[0]]  # fmt: skip
    if kind == "u32":
        window = 0
    if st.parts[1] == "to":
        return elementwise(asm, st, lambda x: x - x.dtype.type(window), kind, [kind])
    return elementwise(asm, st, lambda x: x + x.dtype.type(window), kind, [kind])


@instruction("isspacep")
def _isspacep(asm, st):
    space = st.parts[1].split("::")[0]
    low, high = {
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, PARAMETER_WINDOW),
        "global": (0, CONSTANT_WINDOW),
        "const": (CONSTANT_WINDOW, SHARED_WINDOW),
    }[space]
    return elementwise(
        asm, st, lambda x: (x >= np.uint64(low)) & (x < np.uint64(high)), "pred", ["u64"]
    )
