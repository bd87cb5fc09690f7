"""The values of an element program on a device, and how they are indexed.

Scalars are CuTe numbers: Boolean, Int32 (also narrower signed integers), Uint32 (likewise) and
Float32 (also bfloat16 and float16, rounded after each operation, as XLA does).  A few values that
are vectors on the way, as the indices of a gather are, are numpy arrays of such numbers.  Arrays
that the function closes over are views: they are indexed, and only what is indexed is read, always
within bounds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_flashcute.kernels.common.numbers import load_words_if

SCALAR_DTYPES = {
    "bool": "bool",
    "int8": "signed",
    "int16": "signed",
    "int32": "signed",
    "uint8": "unsigned",
    "uint16": "unsigned",
    "uint32": "unsigned",
    "float16": "float",
    "bfloat16": "float",
    "float32": "float",
}
"""The dtypes that can be lowered, and what kind of number each is."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes of arrays that have gradients."""

BITS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16}
"""Of the integers that are held in more than they have."""


@dataclasses.dataclass(frozen=True)
class View:
    """Elements of an array in memory, of which some are read once their indices are known.

    Attributes:
      load: reads the element at an Int32 offset, as a CuTe number.
      offset: of the first element.
      shape, strides: in elements.
      load_aligned: reads so many elements from an Int32 offset that is a multiple of their number,
        a power of two, where a Boolean or None holds; itself None of what is in no memory.
    """

    load: Callable[[Any], Any]
    offset: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    load_aligned: Callable[[Any, int, Any], list] | None = None

    def elements(self) -> Any:
        """All elements, read: a number, or a numpy array of numbers."""
        if self.shape == ():
            return self.load(self.offset)
        found = np.empty(self.shape, object)
        for index in np.ndindex(*self.shape):
            step = sum(i * s for i, s in zip(index, self.strides, strict=True))
            found[index] = self.load(self.offset + step)
        return found


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def number_type(dtype: str):
    """The CuTe type that a scalar of ``dtype`` is held in."""
    import cutlass

    return {
        "bool": cutlass.Boolean,
        "signed": cutlass.Int32,
        "unsigned": cutlass.Uint32,
        "float": cutlass.Float32,
    }[SCALAR_DTYPES[dtype]]


def constant(value: np.ndarray, dtype: str) -> Any:
    """CuTe numbers of ``dtype``: one, or as many as an array has elements."""
    python = {"bool": bool, "float": float}.get(SCALAR_DTYPES[dtype], int)
    make = number_type(dtype)
    if value.shape == ():
        return make(python(value))
    return mapped(lambda x: make(python(x)), value.astype(object))


def exact(value: Any, dtype: str) -> Any:
    """A number that an operation in 32 bits gave, brought to its dtype."""
    import cutlass

    if dtype in BITS:
        shift = 32 - BITS[dtype]
        return (value << shift) >> shift
    if dtype in ("bfloat16", "float16"):
        narrow = cutlass.BFloat16 if dtype == "bfloat16" else cutlass.Float16
        return cutlass.Float32(narrow(value))
    return value


def as_number(source: int | np.ndarray, known: Mapping[int, Any], dtype: str) -> Any:
    """A constant, or a value by its number, as a CuTe number."""
    if isinstance(source, np.ndarray):
        return constant(source, dtype)
    value = known[source]
    return value.elements() if isinstance(value, View) else value


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """``function`` of numbers on numbers and arrays of numbers, which broadcast."""
    if not any(isinstance(x, np.ndarray) for x in values):
        return function(*values)
    arrays = np.broadcast_arrays(*map(array_of, values))
    found = np.empty(arrays[0].shape, object)
    for index in np.ndindex(*found.shape):
        found[index] = function(*(x[index] for x in arrays))
    return found


def array_of(value: Any) -> np.ndarray:
    """An array of numbers; of no dimension where ``value`` is one number."""
    if isinstance(value, np.ndarray):
        return value
    array = np.empty((), object)
    array[()] = value
    return array


def unwrapped(array: np.ndarray) -> Any:
    """The number of an array of no dimension; other arrays as they are."""
    return array[()] if array.shape == () else array


def arrays_as_views(
    array_types: Sequence[tuple[str, tuple[int, ...]]], tensors: Iterable[Any], entry: Any
) -> list[View]:
    """The arrays that a program closes over as a batch entry sees them.

    Args:
      array_types: as a program has them.
      tensors: (1|B, ...) in global memory, row-major; booleans as bytes.
      entry: the number of the batch entry.
    """
    import cutlass

    views = []
    for tensor, (dtype, shape) in zip(tensors, array_types, strict=True):
        batch = cutlass.min(entry, cutlass.Int32(tensor.shape[0]) - cutlass.Int32(1))
        base = tensor.iterator + cutlass.Int64(batch) * math.prod(shape)
        load, aligned = (functools.partial(f, base, dtype) for f in (_load, _load_aligned))
        views.append(View(load, cutlass.Int32(0), shape, row_major(shape), aligned))
    return views


def numbered_view(shape: Sequence[int]) -> View:
    """An int32 array of its elements' numbers, which is in no memory."""
    import cutlass

    return View(lambda offset: offset, cutlass.Int32(0), tuple(shape), row_major(shape))


def _load(base: Any, dtype: str, offset: Any) -> Any:
    import cutlass.cute as cute

    element = cute.make_tensor(base + offset, cute.make_layout(1))[0]
    return _number(element, dtype)


def _load_aligned(base: Any, dtype: str, offset: Any, count: int, where: Any) -> list:
    return [_number(element, dtype) for element in aligned_elements(base + offset, count, where)]


def _number(element: Any, dtype: str) -> Any:
    import cutlass

    if dtype == "bool":
        return element != cutlass.Uint8(0)
    return number_type(dtype)(element)


def aligned_elements(pointer: Any, count: int, where: Any = None) -> list:
    """So many elements of memory, at a multiple of their number, by one load.

    They have 16 bytes at most, to which arrays are aligned.  Zeros, and nothing is read, where
    ``where``, a Boolean or None, is False; it is None but for global memory.
    """
    from cutlass import Uint32, cute

    element = pointer.dtype
    size = count * element.width // 8
    if where is None:
        address, space = pointer.toint(), pointer.memspace
        place = cute.make_ptr(element, address, space, assumed_align=size)
        loaded = cute.make_rmem_tensor(count, element)
        cute.autovec_copy(cute.make_tensor(place, cute.make_layout(count)), loaded)
        return [loaded[i] for i in range(count)]
    # Behind a predicate, not at another address: offsets of columns stay constants.
    loaded = load_words_if(pointer, size, where)
    words = cute.make_rmem_tensor(len(loaded), Uint32)
    for i, word in enumerate(loaded):
        words[i] = word
    elements = cute.recast_ptr(words.iterator, dtype=element)
    loaded = cute.make_tensor(elements, cute.make_layout(count))
    return [loaded[i] for i in range(count)]
