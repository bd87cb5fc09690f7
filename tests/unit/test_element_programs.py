"""Element programs before they are lowered: limits of integers, columns by base and step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_flashcute import masks, scores
from jax_flashcute.kernels import elements
from jax_flashcute.kernels.elements import INDICES, ElementArray, ElementFunctions
from jax_flashcute.kernels.lowering.affine import AFFINE_RULES, Affine
from jax_flashcute.kernels.lowering.inlining import flat_program
from jax_flashcute.kernels.lowering.limits import limits_of
from jax_flashcute.kernels.lowering.program import ElementProgram
from tests.unit.test_analysis import GRID, INDEX, random_mask, random_number

PROGRAMS = 400
INDEX_ARRAYS = [x.astype(np.int32) for x in GRID]


def program_of(function) -> tuple[ElementProgram, str]:
    closed = jax.make_jaxpr(lambda *i: jnp.asarray(function(jnp, *i)))(*[INDEX] * 4)
    return ElementProgram(flat_program(closed.jaxpr, INDICES)), str(closed)


def limits_of_result(program: ElementProgram):
    return limits_of(program.result(0), program._limits)


def test_limits_hold_for_random_programs() -> None:
    rng = np.random.default_rng(7)
    known = 0
    for i in range(PROGRAMS):
        make = random_mask if i % 2 else random_number
        function = make(rng, int(rng.integers(0, 4)))
        program, text = program_of(function)
        limits = limits_of_result(program)
        if limits is None:
            continue
        with np.errstate(over="ignore"):
            values = np.asarray(function(np, *INDEX_ARRAYS)).astype(np.int64)
        found = int(values.min()), int(values.max())
        assert limits == (min(limits[0], found[0]), max(limits[1], found[1])), text
        known += limits not in ((0, 1), (-(2**31), 2**31 - 1))
    assert known > PROGRAMS // 20


def test_a_choice_that_is_decided_is_made() -> None:
    array = jnp.arange(10, dtype=jnp.float32)
    program, _ = program_of(lambda m, b, h, q, kv: array[kv])
    names = [e.primitive for e in program._equations]
    # JAX adds the length to a negative index; a key is never one.
    assert not {"select_n", "lt"} & set(names)


def test_an_index_below_the_length_needs_no_bounds() -> None:
    array = jnp.zeros(10)
    closed = jax.make_jaxpr(lambda b, h, q, kv: array[kv] + array[q])(*[INDEX] * 4)
    for keys, inside in ((10, 1), (11, 0)):
        program = ElementProgram(flat_program(closed.jaxpr, INDICES), keys)
        found = [e.params["inside"] for e in program._equations if e.primitive == "dynamic_slice"]
        assert sorted(found) == [False, bool(inside)]


UFUNCS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}
INTEGERS = st.integers(-1000, 1000)
EXPRESSIONS = st.recursive(
    st.one_of(INTEGERS, st.tuples(INTEGERS, INTEGERS)),
    lambda inner: st.one_of(
        st.tuples(st.just("neg"), inner),
        st.tuples(st.sampled_from(["add", "sub", "mul"]), inner, inner),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS, st.integers(0, 255))
def test_affine_arithmetic(expression, column: int) -> None:
    """Base and step in 32 bits, against the same arithmetic at the column."""

    def evaluate(node):
        """(by base and step, at the column)"""
        if isinstance(node, int):
            return np.int32(node), np.int32(node)
        if not isinstance(node[0], str):
            base, step = map(np.int32, node)
            return Affine(base, step), base + step * np.int32(column)
        name, *operands = node
        parts, numbers = zip(*map(evaluate, operands), strict=True)
        direct = getattr(
            np, {"neg": "negative", "sub": "subtract", "mul": "multiply"}.get(name, name)
        )
        whole = direct(*numbers)
        if None in parts:
            return None, whole
        if any(isinstance(x, Affine) for x in parts):
            return AFFINE_RULES[name](*parts), whole
        return direct(*parts), whole

    with np.errstate(over="ignore"):
        found, expected = evaluate(expression)
        if isinstance(found, Affine):
            found = found.at(column)
    assert found is None or found == expected


TABLE, OTHER, SLOPES = jnp.ones((4, 65)), jnp.zeros((4, 65)), jnp.ones(4)
ADDED = {
    "alibi": (lambda s, b, h, q, kv: s - SLOPES[h] * (q - kv), {"affine"}),
    "in_order": (
        lambda s, b, h, q, kv: 1.0 + (SLOPES[h] * kv + (s - SLOPES[h])),
        {"row", "affine"},
    ),
    "keys": (scores.key_bias(jnp.ones((4, 300))), {"key"}),
    "queries": (scores.query_bias(jnp.ones((4, 300))), {"row"}),
    "clipped": (lambda s, b, h, q, kv: s + TABLE[h, jnp.clip(q - kv, -32, 32) + 32], {"tile"}),
    "t5": (scores.relative_bias(TABLE), {"tile"}),
    "t5_one_sided": (scores.relative_bias(TABLE, bidirectional=False), {"tile"}),
    "either": (
        lambda s, b, h, q, kv: (
            s + TABLE[h, jax.lax.cond(kv > 2 * q, lambda: 9, lambda: jnp.clip(q - kv, 0, 5))]
        ),
        {"tile"},
    ),
    "of_several": (
        lambda s, b, h, q, kv: (
            s + TABLE[h, jax.lax.select_n(jnp.clip(kv - 2 * q, 0, 2), 3, 1, jnp.minimum(kv, 9))]
        ),
        None,
    ),
    "known": (
        lambda s, b, h, q, kv: s + jax.lax.cond(True, lambda: SLOPES[h] * kv, lambda: SLOPES[h]),
        {"affine"},
    ),
    "distances": (lambda s, b, h, q, kv: s + TABLE[h, q - kv], {"distance"}),
    "not_alone": (lambda s, b, h, q, kv: s + jnp.sin(kv - q + kv), None),
    "pairs": (lambda s, b, h, q, kv: s + TABLE[q, kv], None),
    "absolute": (scores.alibi(SLOPES), {"bent"}),
    "of_the_score": (lambda s, b, h, q, kv: s + jnp.sin(s), None),
    "subtracted": (lambda s, b, h, q, kv: kv * SLOPES[h] - s, None),
    "scaled": (lambda s, b, h, q, kv: 2 * s + SLOPES[h], None),
    "rounded": (lambda s, b, h, q, kv: s.astype(jnp.bfloat16) + SLOPES[h], None),
}


@pytest.mark.parametrize("name", ADDED)
def test_how_what_is_added_varies(name: str) -> None:
    score_mod, kinds = ADDED[name]
    functions = ElementFunctions(score_mod=masks.trace_score(score_mod, jnp.float32)[0])
    assert functions.added_kinds(False) == kinds
    # Rows of several heads have no key bias of a head in common, and distances of fewer tokens.
    of_heads = None if kinds in ({"key"}, {"distance"}, {"bent"}) else kinds
    assert functions.added_kinds(True) == of_heads


@pytest.mark.parametrize(
    ("full", "kinds", "of_heads"),
    [
        ("", {"row"}, {"row"}),
        ("nt", {"row"}, {"row"}),
        ("bs", {"key"}, {"key"}),
        ("ns", {"key"}, None),
        ("ts", None, None),
    ],
)
def test_how_a_bias_varies(full: str, kinds, of_heads) -> None:
    functions = ElementFunctions(bias=ElementArray("float32", full))
    assert functions.added_kinds(False) == kinds
    assert functions.added_kinds(True) == of_heads
    capped = ElementFunctions(bias=functions.bias, soft_cap=2.0)
    assert capped.added_kinds(False) is None


def test_what_is_refused_in_words() -> None:
    """Branches that do more than to compute, or choose an array as a whole, and bits of halves."""

    def traced(choose):
        return masks.trace_score(lambda s, b, h, q, kv: s * choose(q, kv), jnp.float32)[0]

    def printing(q, kv):
        return jax.lax.cond(q < kv, lambda: (jax.debug.print("far"), 2.0)[1], lambda: 1.0)

    def of_arrays(q, kv):
        return jax.lax.cond(q < kv, lambda: TABLE, lambda: OTHER)[0, q]

    (reason,) = elements.program_of(traced(printing)).unsupported()
    assert reason.startswith("debug_print has side effects, at ")
    halves = traced(lambda q, kv: jax.lax.bitcast_convert_type(q.astype(jnp.int16), jnp.float16))
    (reason,) = elements.program_of(halves).unsupported()
    assert reason.startswith("bitcast_convert_type of int16 to float16, at ")
    function = traced(of_arrays)
    assert "select_n on more than 16 elements" in elements.program_of(function).unsupported()[-1]
    with pytest.raises(NotImplementedError, match="cond of an array of floats as a whole, at "):
        elements.derivative_of(function)
