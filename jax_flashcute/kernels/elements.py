"""What a call does to single scores, as a part of a kernel's key: no compiler is needed here."""

import dataclasses
import functools
from collections.abc import Sequence

from jax_flashcute.analysis import POSITION_LIMIT
from jax_flashcute.kernels.lowering.derivative import Derivative, derivative
from jax_flashcute.kernels.lowering.equations import FlatProgram
from jax_flashcute.kernels.lowering.inlining import flat_program
from jax_flashcute.kernels.lowering.program import ElementProgram
from jax_flashcute.kernels.lowering.values import FLOATS, SCALAR_DTYPES
from jax_flashcute.masks import TracedFunction
from jax_flashcute.spec import AttentionSpec, Operands

INDICES = ("b", "h", "q_idx", "kv_idx")

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number in an array, by dtype."""

SUM_BITS = 61
"""Sums in fixed point are below 2 to its power."""
SHIFTS = (-126, 126)
"""Their units are 2**-shift, of shifts in between."""


@dataclasses.dataclass(frozen=True)
class ElementArray:
    """A bias or a mask.

    Attributes:
      dtype: its dtype's name.
      full: which of batch, heads, rows and keys it varies along, of "bnts".
      in_pairs: it varies along rows and keys, and keys are even in number: pairs of them are
        aligned.
    """

    dtype: str
    full: str
    in_pairs: bool = False

    @property
    def has_all_axes(self) -> bool:
        """Whether each score has an element of its own."""
        return set(self.full) == set("bnts")


@dataclasses.dataclass(frozen=True)
class Addends:
    """What scores add to the gradient of an array.

    Attributes:
      axes: of a bias those that it has, of "bnts"; None of an array that a score reads.
      is_single: to each element one score, and nothing else, adds.
      reads: how often a score reads the array.
      factor: what a read adds is at most so many times the gradient of the changed score, and sums
        over a row's scores follow from norms; None where that is not known beforehand.
    """

    axes: str | None
    is_single: bool
    reads: int
    factor: float | None


@dataclasses.dataclass(frozen=True)
class ElementFunctions:
    """Everything that changes or hides single scores; the attributes are those of a call.

    The scaled score goes through ``score_mod``, the soft cap and the bias, in this order.

    ``keys``: there are at most so many, which saves looking up arrays of that length with care.
    ``constants``: of ``"bias"`` and ``"score_mod_arrays"`` those that have no gradients.
    ``positions``: the functions read positions from arrays, not from the numbers of rows and keys.
    ``table``: the bias is this one of the score's arrays, and there is no score.
    """

    score_mod: TracedFunction | None = None
    mask_mod: TracedFunction | None = None
    soft_cap: float | None = None
    bias: ElementArray | None = None
    mask: ElementArray | None = None
    sinks: bool = False
    keys: int = POSITION_LIMIT
    positions: bool = False
    constants: tuple[str, ...] = ()
    table: int | None = None

    @property
    def changes_scores(self) -> bool:
        return not (self.score_mod is None and self.soft_cap is None and self.bias is None)

    @property
    def hides(self) -> bool:
        return not (self.mask_mod is None and self.mask is None)

    @property
    def by_element(self) -> bool:
        """Whether anything is done to each score, beyond the normaliser."""
        return self.changes_scores or self.hides

    def array_types(self) -> list[tuple[str, int]]:
        """Dtype and rank of each array that a kernel takes for these, in its order."""
        types = []
        functions = (self.mask_mod, self.score_mod)
        if any(f is not None for f in functions):
            types.append(("int32", 1))
        types += [("int32", 2)] * (2 * self.positions)
        for function in functions:
            if function is not None:
                types += [(d, len(shape) + 1) for d, shape in program_of(function).array_types]
        types += [(array.dtype, 4) for array in (self.bias, self.mask) if array is not None]
        return types + ([("float32", 2)] if self.sinks else [])

    def added_kinds(self, heads_share_rows: bool) -> frozenset[str] | None:
        """How what is added to scores varies, where nothing else is done to them; else None.

        "row": not with the key; "affine": as ``Affine``; "key": with the key, and not the row;
        "tile": with both, but many a tile has one for all of its keys; "distance": with their
        difference; "bent": likewise, and as ``Affine`` in tiles where no sign changes.

        Args:
          heads_share_rows: rows of one product are of different heads.
        """
        if self.soft_cap is not None or self.positions or not self.changes_scores:
            return None
        kinds: list[str | None] = []
        of_rows = {"q_idx", "h"} if heads_share_rows else {"q_idx"}
        if self.score_mod is not None:
            program = program_of(self.score_mod, self.keys)
            addends = program.addends()
            if addends is None:
                return None
            for value, _ in addends:
                kind = program.kind_of(value)
                is_shared = kind != "key" or not program.arguments_of(value) & of_rows
                is_shared &= kind not in ("distance", "bent") or not heads_share_rows
                kinds.append(kind if is_shared else None)
        if self.bias is not None:
            of_rows = {"t", "n"} if heads_share_rows else {"t"}
            if "s" not in self.bias.full:
                kinds.append("row")
            else:
                kinds.append("key" if not of_rows & set(self.bias.full) else None)
        known = frozenset(kind for kind in kinds if kind is not None)
        return None if None in kinds else known

    def only_adds(self, heads_share_rows: bool) -> bool:
        """Whether all that is done to scores is to add what ``added_kinds`` knows."""
        return not self.hides and self.added_kinds(heads_share_rows) is not None

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradient of the changed score is that of the scaled one."""
        identity = self.score_mod is None or derivative_of(self.score_mod).program.is_identity
        return identity and self.soft_cap is None

    @property
    def derivatives_read_score(self) -> bool:
        """Whether derivatives of the changed score, by anything, are functions of the score."""
        if self.soft_cap is not None or self.score_mod is None:
            return self.soft_cap is not None
        program = derivative_of(self.score_mod, self.keys).program
        results = range(len(program.result_dtypes))
        return any("score" in program.depends_on(result) for result in results)

    @property
    def may_be_infinite(self) -> bool:
        """Whether finite products may become infinite scores that are not hidden."""
        return self.changes_scores and self.score_mod is not None and not self.keeps_gradients

    @property
    def summed_ranks(self) -> list[int]:
        """Ranks of the arrays that have gradients: the bias, and those of floats of the score."""
        ranks = [4] * (self.bias is not None and "bias" not in self.constants)
        if self.score_mod is not None and "score_mod_arrays" not in self.constants:
            derivative = derivative_of(self.score_mod)
            types = derivative.program.array_types
            ranks += [len(types[i][1]) + 1 for i in derivative.numbered]
        return ranks

    @property
    def summed(self) -> list[Addends]:
        """What is added to the arrays of ``summed_ranks``."""
        found = []
        if self.bias is not None and "bias" not in self.constants:
            factor = 1.0 if self.scores_follow_products else None
            found.append(Addends(self.bias.full, self.bias.has_all_axes, 1, factor))
        if self.score_mod is None or "score_mod_arrays" in self.constants:
            return found
        derivative = derivative_of(self.score_mod, self.keys)
        for array in derivative.numbered:
            places = [at for of_array, at in derivative.cotangents() if of_array == array]
            factors = [derivative.program.largest_factor(x + 1, "cotangent") for x in places]
            is_known = self.scores_follow_products and None not in factors
            factor = max((x for x in factors if x is not None), default=0.0)
            found.append(Addends(None, False, len(places), factor if is_known else None))
        return found

    @property
    def scores_follow_products(self) -> bool:
        """Whether rounding errors of products are not larger in the scores."""
        return self.score_mod is None or program_of(self.score_mod, self.keys).addends() is not None


def in_fixed_point(functions: ElementFunctions, deterministic: bool) -> list[bool]:
    """Which of the arrays of ``summed_ranks`` a kernel sums in fixed point."""
    return [deterministic and not addends.is_single for addends in functions.summed]


def measures(functions: ElementFunctions | None, deterministic: bool) -> bool:
    """Whether a first run of the kernel finds how large addends of such sums are."""
    if functions is None:
        return False
    fixed = zip(functions.summed, in_fixed_point(functions, deterministic), strict=True)
    return any(is_fixed and addends.factor is None for addends, is_fixed in fixed)


@functools.cache
def derivative_of(function: TracedFunction, keys: int = POSITION_LIMIT) -> Derivative:
    """The transposed derivative of a score, of ``("cotangent", "score", *INDICES)``."""
    return derivative(function.jaxpr, ("score", *INDICES), keys)


@functools.cache
def program_of(function: TracedFunction, keys: int = POSITION_LIMIT) -> ElementProgram:
    """The program of a mask or of a score, for so many keys at most."""
    return ElementProgram(_flat(function), keys)


def _flat(function: TracedFunction) -> FlatProgram:
    inputs = len(function.jaxpr.invars)
    return flat_program(function.jaxpr, ("score", *INDICES)[-inputs:])


@functools.cache
def _added_element(function: TracedFunction, sizes: tuple[int, int, int]):
    """``ElementProgram.added_element`` of a score for so many heads, queries and keys."""
    heads, queries, keys = sizes
    counts = {"h": heads, "q_idx": queries}
    return ElementProgram(_flat(function), keys, counts=counts).added_element()


def _most_keys(functions: Sequence[TracedFunction | None], keys: int) -> int:
    """The least length of an array that the functions close over and that all keys fit in."""
    shapes = [shape for f in functions if f is not None for _, shape in program_of(f).array_types]
    lengths = [n for shape in shapes for n in shape if isinstance(n, int)]
    known = isinstance(keys, int)
    return min((n for n in lengths if known and keys <= n), default=POSITION_LIMIT)


def element_functions(spec: AttentionSpec, operands: Operands) -> ElementFunctions | None:
    """What a call does to single scores; None where nothing."""
    score_mod = spec.score_mod
    if score_mod is not None and program_of(score_mod).is_identity:
        score_mod = None
    bias, mask = (
        None if array is None else _element_array(str(array.dtype), array.shape)
        for array in (operands.bias, operands.mask)
    )
    found = ElementFunctions(
        score_mod,
        spec.mask_mod,
        spec.logits_soft_cap,
        bias,
        mask,
        operands.sinks is not None,
        _most_keys((spec.mask_mod, score_mod), operands.kv_length),
        _has_positions(operands) and not (spec.mask_mod is None and score_mod is None),
    )
    return found if found.by_element or found.sinks else None


def names_of(functions: ElementFunctions | None) -> list[str]:
    """The arguments of the call that ask for something to be done to single scores."""
    if functions is None:
        return []
    given = {
        "score_mod": functions.score_mod is not None,
        "mask_mod": functions.mask_mod is not None,
        "logits_soft_cap": functions.soft_cap is not None,
        "bias": functions.bias is not None,
        "mask": functions.mask is not None,
        "sinks": functions.sinks,
    }
    return [name for name, present in given.items() if present]


def without_sinks(
    functions: ElementFunctions | None, constants: tuple[str, ...] = ()
) -> ElementFunctions | None:
    """What the backward kernel does: sinks are in the LSE, and their gradient needs no kernel.

    It reads no pairs of keys.

    ``constants``: of the call.
    """
    if functions is None or not functions.by_element:
        return None
    arrays = {
        name: None if array is None else dataclasses.replace(array, in_pairs=False)
        for name, array in (("bias", functions.bias), ("mask", functions.mask))
    }
    functions = dataclasses.replace(functions, sinks=False, **arrays)
    # Kernels differ by names of what is there alone.
    kept = [] if functions.bias is None else ["bias"]
    if constants and functions.score_mod is not None:
        kept += ["score_mod_arrays"] * bool(derivative_of(functions.score_mod).numbered)
    constants = tuple(name for name in kept if name in constants)
    return dataclasses.replace(functions, constants=constants)


def with_elements_of_scores(functions: ElementFunctions | None, batch) -> ElementFunctions | None:
    """With a bias of one entry, and of all else, as one that varies along the one entry there is.

    ``batch``: how many entries the call has, a number or symbolic.
    """
    if functions is None or functions.bias is None or functions.bias.full != "nts":
        return functions
    if not isinstance(batch, int) or batch != 1:
        return functions
    return dataclasses.replace(functions, bias=dataclasses.replace(functions.bias, full="bnts"))


def with_table_as_bias(functions: ElementFunctions, operands: Operands) -> ElementFunctions:
    """A score that only adds elements of an array of queries and keys, as that bias.

    The array is (T, S) or (N, T, S), in its own order, of a floating dtype.  Where a score does
    anything else, or queries have positions that are not their numbers, the same functions.
    """
    if functions.score_mod is None or functions.soft_cap is not None or functions.bias is not None:
        return functions
    (_, T, N, _), S = operands.query.shape, operands.kv_length
    has_numbers = operands.q_offset is None and not functions.positions
    if not has_numbers or not all(isinstance(size, int) for size in (T, N, S)):
        return functions
    found = _added_element(functions.score_mod, (N, T, S))
    if found is None:
        return functions
    number, indices = found
    table, axes = operands.score_mod_arrays[number], {"h": N, "q_idx": T, "kv_idx": S}
    is_whole = table.shape[1:] == tuple(axes.get(name) for name in indices)
    if not is_whole or indices not in (["q_idx", "kv_idx"], ["h", "q_idx", "kv_idx"]):
        return functions
    bias = _element_array(str(table.dtype), _four_axes(table.shape))
    return dataclasses.replace(functions, score_mod=None, bias=bias, table=number)


def _four_axes(shape: tuple) -> tuple:
    """That of a (1|B, T, S) or (1|B, N, T, S) array as (1|B, 1|N, T, S)."""
    return (*shape[:-2], *(1,) * (4 - len(shape)), *shape[-2:])


def element_operands(functions: ElementFunctions, operands: Operands) -> list:
    """The arrays of ``ElementFunctions.array_types``."""
    arrays = []
    if functions.mask_mod is not None or functions.score_mod is not None:
        arrays.append(operands.batch_index)
    if functions.positions:
        arrays += [operands.segment_ids.q_positions, operands.segment_ids.kv_positions]
    if functions.mask_mod is not None:
        arrays += operands.mask_mod_arrays
    if functions.score_mod is not None:
        arrays += operands.score_mod_arrays
    if functions.table is not None:
        table = operands.score_mod_arrays[functions.table]
        arrays.append(table.reshape(_four_axes(table.shape)))
    elif functions.bias is not None:
        arrays.append(operands.bias)
    if functions.mask is not None:
        arrays.append(operands.mask)
    return arrays + ([operands.sinks] if functions.sinks else [])


def summed_arrays(spec: AttentionSpec, operands: Operands) -> tuple[list, list]:
    """The operands of ``ElementFunctions.summed_ranks``: the bias, and arrays of the score."""
    arrays = operands.score_mod_arrays
    is_constant = "score_mod_arrays" in spec.constants
    if is_constant or spec.score_mod is None or program_of(spec.score_mod).is_identity:
        arrays = ()
    biases = [] if operands.bias is None or "bias" in spec.constants else [operands.bias]
    return biases, [a for a in arrays if str(a.dtype) in FLOATS]


def reasons_against_gradients(spec: AttentionSpec) -> list[str]:
    """Every reason why no backward kernel can differentiate what a call does to scores."""
    if spec.score_mod is None:
        return []
    try:
        unsupported = derivative_of(spec.score_mod).program.unsupported()
    except NotImplementedError as error:
        unsupported = [str(error)]
    return [f"the derivative of score_mod: {why}" for why in unsupported]


def reasons_against_elements(spec: AttentionSpec, operands: Operands) -> list[str]:
    """Every reason why a kernel cannot do what a call does to single scores."""
    reasons = []
    for name, function in (("mask_mod", spec.mask_mod), ("score_mod", spec.score_mod)):
        if function is not None:
            reasons += [f"{name}: {why}" for why in program_of(function).unsupported()]
    for name in ("bias", "sinks"):
        array = getattr(operands, name)
        if array is not None and str(array.dtype) not in SCALAR_DTYPES:
            reasons.append(f"{name} must have a dtype of 32 bits or less, got {array.dtype}")
    return reasons


def _has_positions(operands: Operands) -> bool:
    return operands.segment_ids is not None and operands.segment_ids.q_positions is not None


def _element_array(dtype: str, shape: Sequence) -> ElementArray:
    full, keys = full_axes("bnts", shape), shape[-1]
    is_even = isinstance(keys, int) and keys % 2 == 0
    # By keys alone there is less to load, and lengths that grow should compile one kernel.
    found = ElementArray(dtype, full)
    return dataclasses.replace(found, in_pairs=is_over_pairs(found) and is_even)


def is_over_pairs(array: ElementArray | None) -> bool:
    """Whether there is an array, and it varies along queries and keys."""
    return array is not None and {"t", "s"} <= set(array.full)


def full_axes(letters: str, shape: Sequence) -> str:
    """Those of a shape's axes, by letter, that are not of length 1."""
    return "".join(
        letter
        for letter, length in zip(letters, shape, strict=False)
        if not (isinstance(length, int) and length == 1)
    )
