"""Sums in fixed point in global memory, which do not depend on the order of what is added.

Blocks add to a sum in the order in which they come.  Sums of integers are the same in any order: a
float32 becomes a 64-bit integer in units of 2**-shift, so small that rounding to one is less than
what a float32 rounds the sum to, and so large that nothing overflows.  How large a sum may be is
known before the kernel as an ``exponent``: it is below 2**exponent.  Where nothing bounds what is
added, a first run of the kernel finds the largest of that, and the exponent is that of their
number.  A not-a-number among what is added is the largest of all.
"""

from copy import copy as copied

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32

from jax_flashcute.kernels.common.numbers import bits_of, float_of, select
from jax_flashcute.kernels.elements import (
    SHIFTS,
    SUM_BITS,
    ElementFunctions,
    in_fixed_point,
)


class FixedPointSums:
    """An array of such sums, as ``gradient_sums.FloatSums``.

    Python that makes straight-line code.
    """

    def __init__(
        self,
        words: cute.Tensor,
        exponent: Int32,
        largest: cute.Pointer | None,
        is_measuring: bool,
    ):
        """
        Args:
          words: (..., 2) uint32, the low and the high word of each sum.
          exponent: of a sum, or, with ``largest``, of how many addends it has.
          largest: the bits of the largest addend's magnitude, uint32 in global memory.
          is_measuring: the kernel is run to find that, and adds nothing to any sum.
        """
        self.shape = words.shape[:-1]
        self.address = words.iterator.toint()
        self.largest = largest
        self.most = None
        if is_measuring:
            self.most = cute.make_rmem_tensor(1, Int32)
            self.most.fill(0)
        if largest is not None:
            bits = Int32(cute.make_tensor(largest, cute.make_layout(1))[0])
            exponent = exponent + exponent_of(bits)
        shift = cutlass.min(SUM_BITS - exponent, Int32(SHIFTS[1]))
        self.units = float_of((cutlass.max(shift, Int32(SHIFTS[0])) + 127) << 23)

    def moved(self, elements: Int64) -> "FixedPointSums":
        """The sums from one on."""
        made = copied(self)
        made.address = self.address + 8 * elements
        return made

    def add(self, place: Int32 | Int64, value: Float32, where: Boolean | None = None) -> None:
        """Adds to a sum."""
        where = Boolean(True) if where is None else where
        if self.most is not None:
            bits = bits_of(value) & Int32(0x7FFFFFFF)
            self.most[0] = cutlass.max(self.most[0], select(where, bits, Int32(0)))
            return
        _add(self.address + 8 * Int64(place), value * self.units, where)

    add_if = add

    def finish(self, lane: Int32) -> None:
        """After all that a warp has added."""
        if self.most is not None and self.largest is not None:
            most = cute.arch.warp_redux_sync(self.most[0], kind="max")
            _raise(self.largest, Uint32(most), lane == 0)


def sums_in_memory(
    functions: ElementFunctions,
    deterministic: bool,
    gradients: tuple,
    exponents: tuple,
    *,
    is_measuring: bool = False,
) -> list[cute.Tensor | FixedPointSums]:
    """The gradients that are summed, those in fixed point with their units.

    Args:
      gradients: as ``launchers`` has them.
      exponents: that of ``ffi.fixed_point.exponents``, where any is in fixed point.
      is_measuring: of ``FixedPointSums``.
    """
    found = list(gradients[: len(functions.summed)])
    fixed = in_fixed_point(functions, deterministic)
    for i, addends in enumerate(functions.summed):
        if fixed[i]:
            largest = gradients[-1].iterator + i if addends.factor is None else None
            found[i] = FixedPointSums(found[i], exponents[0][i], largest, is_measuring)
    return found


def exponent_of(bits: Int32) -> Int32:
    """Of a float32 not below 0, by its bits: it is below 2 to its power."""
    return (bits >> 23) - 126


@cute.jit
def _add(address: Int64, value: Float32, where: Boolean):
    if where:
        fixed = cute.arch.inline_ptx(
            "cvt.rni.s64.f32 {$w0}, {$r0};", write_only_types=[Int64], read_only_args=[value]
        )
        cute.arch.inline_ptx(
            "red.relaxed.gpu.global.add.u64 [{$r0}], {$r1};", read_only_args=[address, fixed]
        )


@cute.jit
def _raise(pointer: cute.Pointer, value: Uint32, where: Boolean):
    if where:
        cute.arch.red(pointer, value, op="max", dtype="u32", sem="relaxed", scope="gpu")
