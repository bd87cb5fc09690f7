"""The register file of a thread block and typed views of it.

Each register is a row over the block's threads.  A *frame* is the window of a run of whole warps:
for each type, a list of the rows' views, so that an instruction costs two list look-ups an operand.
Immediates and special registers are rows too.
"""

import numpy as np

# Indices into a frame.
P, U16, S16, F16, U32, S32, F32, U64, S64, F64 = range(10)
_DTYPES = {
    P: np.bool_,
    U16: np.uint16, S16: np.int16, F16: np.float16,
    U32: np.uint32, S32: np.int32, F32: np.float32,
    U64: np.uint64, S64: np.int64, F64: np.float64,
}  # fmt: skip
_CLASS_VIEWS = {"p": (P,), "h": (U16, S16, F16), "r": (U32, S32, F32), "d": (U64, S64, F64)}
VIEW = {
    "pred": P,
    "b16": U16, "u16": U16, "s16": S16, "f16": F16, "bf16": U16,
    "b32": U32, "u32": U32, "s32": S32, "f32": F32, "f16x2": U32, "bf16x2": U32, "u16x2": U32,
    "s16x2": U32, "tf32": U32,
    "b64": U64, "u64": U64, "s64": S64, "f64": F64, "f32x2": U64,
    "b8": U16, "u8": U16, "s8": S16,
}  # fmt: skip
_SIGNED = {U16: S16, U32: S32, U64: S64}
DTYPE = {name: np.dtype(_DTYPES[view]) for name, view in VIEW.items()}
VIEW_CLASS = {view: kind for kind, views in _CLASS_VIEWS.items() for view in views}

Frame = list


def extended(values, view: int, *, signed: bool):
    """Values of a type as narrow as a register or narrower, extended to its unsigned view."""
    raw = _DTYPES[view]
    return values.astype(_DTYPES[_SIGNED[view]]).view(raw) if signed else values.astype(raw)


class RegisterFile:
    """Rows of registers over ``num_threads`` threads; ``constants`` follow the declared ones."""

    def __init__(self, counts: dict[str, int], constants: dict[str, list], num_threads: int):
        self.num_threads = num_threads
        self._declared = dict(counts)
        self._frames: dict[tuple[int, int], Frame] = {}
        self.rows = {}
        for kind in "phrd":
            extra = constants[kind]
            base = np.dtype(_DTYPES[_CLASS_VIEWS[kind][0]])
            rows = np.zeros((counts[kind] + len(extra), num_threads), base)
            for i, value in enumerate(extra):
                if not callable(value):
                    rows[counts[kind] + i] = value
            self.rows[kind] = rows
        self._constants = constants
        self.wide = np.zeros((counts["q"], num_threads, 2), np.uint64)

    def reset(self, poison: int, block) -> None:
        """Fill the declared registers with poison and the special ones with their values."""
        for kind, rows in self.rows.items():
            count = self._declared[kind]
            width = rows.dtype.itemsize
            if kind == "p":
                rows[:count] = poison & 1
            else:
                rows[:count] = poison & ((1 << 8 * width) - 1)
            for i, value in enumerate(self._constants[kind]):
                if callable(value):
                    rows[count + i] = value(block)

    def frame(self, lo: int, hi: int) -> Frame:
        frame = self._frames.get((lo, hi))
        if frame is None:
            frame = [None] * 10
            for kind, rows in self.rows.items():
                for view in _CLASS_VIEWS[kind]:
                    frame[view] = list(rows.view(_DTYPES[view])[:, lo:hi])
            self._frames[lo, hi] = frame
        return frame
