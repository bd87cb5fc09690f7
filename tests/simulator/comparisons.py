"""Comparisons and selections: PTX ISA, "Comparison and Selection Instructions"."""

import numpy as np

from . import registers as R
from .elementwise import elementwise
from .number_types import FLOATS, elements, is_float, to_single
from .program import FormError, instruction, put
from .rounding import flush

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_UNORDERED = {"equ": np.equal, "neu": np.not_equal, "ltu": np.less, "leu": np.less_equal,
              "gtu": np.greater, "geu": np.greater_equal}  # fmt: skip


def _comparison(name: str, *, floating: bool):
    """The function of a comparison; unordered ones are true when an operand is NaN."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED:
        ufunc = _UNORDERED[name]
        return lambda a, b: ufunc(a, b) | np.isnan(a) | np.isnan(b)
    ufunc = _COMPARE[name]
    if name == "ne" and floating:  # ordered: false on NaN, unlike numpy's
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return ufunc


def _test(st):
    """The function of a comparison's operands, and how many comparisons that is."""
    element, count = elements(st.parts[-1])
    test = _comparison(st.parts[1], floating=is_float(element))
    if element in ("f16", "bf16"):
        dtype = FLOATS[element]
        return lambda a, b: test(to_single(a, dtype), to_single(b, dtype)), count
    if "ftz" in st.parts:
        return lambda a, b: test(flush(a), flush(b)), count
    return test, count


@instruction("setp")
def _setp(asm, st):
    kind = st.parts[-1]
    test, count = _test(st)
    logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(st.parts[2])
    names = asm.pair(st.operands[0])
    if count == 2 and len(names) != 2:
        raise FormError("packed comparison without two predicates")
    if len(names) == 1 and logic is None:
        return elementwise(asm, st, test, "pred", [kind] * 2)
    (va, a), (vb, b) = (asm.source(x, kind) for x in st.operands[1:3])
    outs = [asm.destination(x, "pred") for x in names]
    if logic is not None:
        negated, (_, third) = asm.predicate(st.operands[3])

    def run(v, m):
        result = test(v[va][a], v[vb][b])
        results = result.reshape(-1, 2).T if count == 2 else (result, ~result)
        if logic is not None:
            c = ~v[R.P][third] if negated else v[R.P][third]
            results = [logic(x, c) for x in results]
        for out, value in zip(outs, results, strict=False):
            if out:
                put(v[R.P][out[1]], value, m)

    return run


@instruction("set")
def _set(asm, st):
    kind, out = st.parts[-1], st.parts[-2]
    test, count = _test(st)
    if count == 2:
        raise FormError("set of pairs")
    if out in ("u32", "s32"):
        return elementwise(
            asm, st, lambda a, b: np.where(test(a, b), np.uint32(0xFFFFFFFF), np.uint32(0)),
            "u32", [kind] * 2,
        )  # fmt: skip
    if out == "f32":
        return elementwise(asm, st, lambda a, b: test(a, b).astype(np.float32), out, [kind] * 2)
    raise FormError("set of this type")


@instruction("selp")
def _selp(asm, st):
    kind = st.parts[-1]
    return elementwise(asm, st, lambda a, b, p: np.where(p, a, b), kind, [kind, kind, "pred"])


@instruction("slct")
def _slct(asm, st):
    kind, test = st.parts[-2], st.parts[-1]
    return elementwise(asm, st, lambda a, b, c: np.where(c >= 0, a, b), kind, [kind, kind, test])
