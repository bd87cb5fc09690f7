"""Python objects that hold traced values and may be used inside traced loops and branches."""

import copy

import cutlass
from cutlass._mlir import ir


class Traced:
    """Base of small objects with traced attributes: numbers, pointers, tensors, other ``Traced``.

    The compiler takes an object apart into its values where control flow begins, and puts it
    together again from the values inside.  Attributes that hold no traced value stay as they are
    and are shared by all copies.
    """

    def _traced_attributes(self) -> list[tuple[str, list[ir.Value]]]:
        found = []
        for name, value in vars(self).items():
            if hasattr(value, "__extract_mlir_values__"):
                found.append((name, cutlass.extract_mlir_values(value)))
        return found

    def __extract_mlir_values__(self) -> list[ir.Value]:
        return [v for _, values in self._traced_attributes() for v in values]

    def __new_from_mlir_values__(self, values: list[ir.Value]) -> "Traced":
        made = copy.copy(self)
        given = list(values)
        for name, old in self._traced_attributes():
            new, given = given[: len(old)], given[len(old) :]
            setattr(made, name, cutlass.new_from_mlir_values(getattr(self, name), new))
        return made
