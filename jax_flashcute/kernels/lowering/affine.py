"""Numbers that differ from column to column of a tile by a step that all columns share."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_flashcute.kernels.common.numbers import select


@dataclasses.dataclass(frozen=True)
class Affine:
    """``base + step * column``: a number of each column of a tile, of which columns are constants.

    Attributes:
      base, step: CuTe numbers of one type, Int32 or Float32.
      adjacent: of the keys of a tile, how many adjacent columns a thread has from each column on
        that is a multiple of it; ``base`` is one too.
    """

    base: Any
    step: Any
    adjacent: int = 1

    def at(self, column: int) -> Any:
        """The number of a column."""
        return self.base + self.step * type(self.step)(column)

    def converted(self, make: Callable[[Any], Any]) -> "Affine":
        """In another CuTe type."""
        return Affine(make(self.base), make(self.step))

    @staticmethod
    def sum(x: Any, y: Any) -> "Affine":
        (xb, xs), (yb, ys) = map(_base_and_step, (x, y))
        steps = [s for s in (xs, ys) if s is not None]
        return Affine(xb + yb, steps[0] if len(steps) == 1 else steps[0] + steps[1])

    @staticmethod
    def negative(x: "Affine") -> "Affine":
        return Affine(-x.base, -x.step)

    @staticmethod
    def absolute(x: "Affine") -> "Affine":
        """Of one that is above 0 in all columns, or below it in all."""
        is_below = x.base < type(x.base)(0)
        return Affine(select(is_below, -x.base, x.base), select(is_below, -x.step, x.step))

    @staticmethod
    def difference(x: Any, y: Any) -> "Affine":
        (xb, xs), (yb, ys) = map(_base_and_step, (x, y))
        if ys is None:
            return Affine(xb - yb, xs)
        return Affine(xb - yb, -ys if xs is None else xs - ys)

    @staticmethod
    def product(x: Any, y: Any) -> "Affine | None":
        (xb, xs), (yb, ys) = map(_base_and_step, (x, y))
        if xs is not None and ys is not None:
            return None
        return Affine(xb * yb, xs * yb if ys is None else xb * ys)


def _base_and_step(value: Any) -> tuple[Any, Any]:
    return (value.base, value.step) if isinstance(value, Affine) else (value, None)


AFFINE_RULES: dict[str, Callable[..., Affine | None]] = {
    "add": Affine.sum,
    "add_any": Affine.sum,
    "sub": Affine.difference,
    "neg": Affine.negative,
    "mul": Affine.product,
}
"""What sums and products make of ``Affine`` operands; one at least is."""

SIGNED_RULES: dict[str, Callable[..., Affine | None]] = {**AFFINE_RULES, "abs": Affine.absolute}
"""The same where no sign changes along the columns."""
