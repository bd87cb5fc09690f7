"""What the analysis says of masks, against evaluating them at every element.

``JAX_FLASHCUTE_FUZZ=20000 pytest tests/unit/test_analysis.py`` runs the full count of programs.
"""

import collections
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import analysis
from jax_flashcute.analysis import POSITION_LIMIT, Guard, Linear
from jax_flashcute.kernels.lowering.columns import aligned_widths
from jax_flashcute.kernels.lowering.inlining import flat_program

PROGRAMS = int(os.environ.get("JAX_FLASHCUTE_FUZZ", "800"))
CHUNK = 400
INDEX = jax.ShapeDtypeStruct((), jnp.int32)
B, H = 2, 3
QUERIES = np.array([-POSITION_LIMIT, -130, -9, *range(-3, 18), 31, 64, 65, POSITION_LIMIT - 1])
KEYS = np.array([*range(40), 63, 64, 65, 127, 128, 1000, POSITION_LIMIT - 1])
GRID = np.meshgrid(np.arange(B), np.arange(H), QUERIES, KEYS, indexing="ij")
ROWS = np.meshgrid(np.arange(B), np.arange(H), QUERIES, indexing="ij")
TABLES = [
    np.array([3, 17, -5], np.int32),
    np.array([[0, 4, 9, 20, 1000], [7, -(2**31), 2**31 - 1, 2, 30]], np.int32),
    np.array([True, False, True]),
]


def analysed(function) -> analysis.Program:
    return analysis.analyse(jax.make_jaxpr(function)(*[INDEX] * 4).jaxpr)


# ---- random programs -------------------------------------------------------------------------


def clamped_read(np_like, table, *index):
    """Indexing as JAX does it where the index is out of bounds."""
    if np_like is jnp:
        return jnp.asarray(table)[index]
    wrapped = [np.where(i < 0, i + n, i) for i, n in zip(index, table.shape, strict=True)]
    clipped = [np.clip(i, 0, n - 1) for i, n in zip(wrapped, table.shape, strict=True)]
    return table[tuple(clipped)]


def random_number(rng, depth: int):
    """A function ``(np or jnp, b, h, q, kv) -> int32`` and whether it mentions kv."""
    if depth == 0 or rng.random() < 0.2:
        match rng.integers(0, 8):
            case 0 | 1 | 2:
                return lambda m, b, h, q, kv: kv
            case 3 | 4:
                return lambda m, b, h, q, kv: q
            case 5:
                n = np.int32(rng.integers(-20, 70))
                return lambda m, b, h, q, kv: n
            case 6:
                return lambda m, b, h, q, kv: clamped_read(m, TABLES[0], h)
            case _:
                return lambda m, b, h, q, kv: clamped_read(m, TABLES[1], b, q)
    x, y = random_number(rng, depth - 1), random_number(rng, depth - 1)
    n = int(rng.integers(1, 9)) if rng.random() < 0.8 else int(rng.integers(9, 2000))
    signed = n if rng.random() < 0.6 else -n
    operation = rng.choice(
        [
            *("add", "sub", "neg", "times", "floordiv", "mod", "div", "rem", "min", "max"),
            *("abs", "clip", "where", "product", "shift", "add", "sub", "select"),
        ]
    )
    predicate = random_mask(rng, depth - 1) if operation in ("where", "select") else None

    def number(m, *i):
        a = x(m, *i)
        match operation:
            case "add":
                return a + y(m, *i)
            case "sub":
                return a - y(m, *i)
            case "neg":
                return -a
            case "times":
                return a * np.int32(signed)
            case "floordiv":
                return a // np.int32(signed)
            case "mod":
                return a % np.int32(signed)
            case "div" | "rem":
                return truncating(m, operation, a, signed)
            case "min":
                return m.minimum(a, y(m, *i))
            case "max":
                return m.maximum(a, y(m, *i))
            case "abs":
                return m.abs(a)
            case "clip":
                return m.clip(a, np.int32(-5), np.int32(n))
            case "where":
                assert predicate is not None
                return m.where(predicate(m, *i), a, y(m, *i))
            case "select":
                assert predicate is not None
                return m.select([predicate(m, *i), a > n], [a, y(m, *i)], -a)
            case "product":
                return a * y(m, *i)
            case _:
                return a >> np.int32(n % 5)

    return number


def truncating(m, operation: str, a, divisor: int):
    if m is jnp:
        function = jax.lax.div if operation == "div" else jax.lax.rem
        return function(jnp.asarray(a), jnp.int32(divisor))
    # In 64 bits, because -2^31 has no magnitude in 32.
    wide = np.asarray(a, np.int64)
    whole = np.sign(wide) * np.sign(divisor) * (np.abs(wide) // abs(divisor))
    return (whole if operation == "div" else wide - whole * divisor).astype(np.int32)


def random_mask(rng, depth: int):
    """A function ``(np or jnp, b, h, q, kv) -> bool``."""
    if depth == 0 or rng.random() < 0.35:
        if rng.random() < 0.1:
            return lambda m, b, h, q, kv: clamped_read(m, TABLES[2], h)
        x, y = random_number(rng, 2), random_number(rng, int(rng.integers(0, 3)))
        name = str(rng.choice(["less", "less_equal", "greater", "greater_equal", "equal"]))
        return lambda m, *i: getattr(m, name)(x(m, *i), y(m, *i))
    if rng.random() < 0.1:
        return random_choice(rng, depth)
    x, y, z = (random_mask(rng, depth - 1) for _ in range(3))
    match rng.integers(0, 6):
        case 0 | 1:
            return lambda m, *i: m.logical_and(x(m, *i), y(m, *i))
        case 2:
            return lambda m, *i: m.logical_or(x(m, *i), y(m, *i))
        case 3:
            return lambda m, *i: m.logical_not(x(m, *i))
        case 4:
            return lambda m, *i: m.logical_xor(x(m, *i), y(m, *i))
        case _:
            return lambda m, *i: m.where(x(m, *i), y(m, *i), z(m, *i))


def random_choice(rng, depth: int):
    """A function ``(np or jnp, b, h, q, kv) -> bool`` that says which of some others it is."""
    x, y, z = (random_mask(rng, depth - 1) for _ in range(3))
    number = random_number(rng, depth - 1)
    match rng.integers(0, 3):
        case 0:
            return lambda m, *i: m.select([x(m, *i), y(m, *i)], [z(m, *i), x(m, *i)], y(m, *i))
        case 1:
            return lambda m, *i: one_of(m, x(m, *i), [y(m, *i), z(m, *i)])
        case _:
            return lambda m, *i: one_of(m, number(m, *i), [x(m, *i), y(m, *i), z(m, *i)])


def one_of(m, which, cases):
    """One of several values as a ``cond`` has it, by a boolean or by a number."""
    if m is not jnp:
        return np.choose(np.clip(which, 0, len(cases) - 1), np.broadcast_arrays(*cases))
    branches = [lambda case=case: jnp.asarray(case) for case in cases]
    if jnp.asarray(which).dtype == bool:
        return jax.lax.cond(which, *branches[::-1])
    return jax.lax.switch(which, branches)


# ---- what the analysis says, evaluated -------------------------------------------------------


def opaque_values(program: analysis.Program, arrays, keys) -> dict:
    """The program's own values that the bounds and guards of ``keys`` refer to."""
    wanted = set()

    def visit(value):
        match value:
            case analysis.Opaque():
                wanted.add(value.value)
            case analysis.Quotient():
                visit(value.dividend)
            case analysis.Extreme():
                for x in value.operands:
                    visit(x)
            case Linear():
                for atom, _ in value.terms:
                    visit(atom)
            case Guard(value=int(number)):
                wanted.add(number)
            case Guard(value=inner):
                visit(inner)

    for x in keys:
        for part in (x.low, x.high, *x.guards):
            visit(part)
    if not wanted:
        return {}
    numbers = sorted(wanted)

    def at(b, h, q):
        zero = jnp.int32(0)
        return [jnp.asarray(v) for v in program.evaluate(numbers, arrays, [b, h, q, zero])]

    with jax.numpy_dtype_promotion("standard"):
        rows = [jnp.asarray(x.ravel(), jnp.int32) for x in ROWS]
        values = jax.vmap(at)(*rows)
    return {n: np.asarray(v).reshape(ROWS[0].shape) for n, v in zip(numbers, values, strict=True)}


def evaluated(program: analysis.Program, arrays, keys, dtype) -> np.ndarray:
    """The set of keys at every element of the grid, computed in ``dtype``."""
    opaque = opaque_values(program, arrays, keys)
    opaque = {n: v if v.dtype == bool else v.astype(dtype) for n, v in opaque.items()}
    indices = dict(zip("bhq", (x.astype(dtype) for x in ROWS), strict=True))
    number = functools.partial(
        analysis.evaluate,
        indices=indices,
        opaque=opaque,
        minimum=np.minimum,
        maximum=np.maximum,
    )
    kv = KEYS.astype(dtype)
    shown = np.zeros(GRID[0].shape, bool)
    with np.errstate(over="ignore"):
        for x in keys:
            piece = np.ones(GRID[0].shape, bool)
            if x.low is not None:
                piece &= kv >= np.asarray(number(x.low))[..., None]
            if x.high is not None:
                piece &= kv < np.asarray(number(x.high))[..., None]
            for guard in x.guards:
                if isinstance(guard.value, Linear):
                    holds = np.asarray(number(guard.value)) >= 0
                else:
                    holds = opaque[guard.value] == guard.holds
                piece &= holds[..., None]
            shown |= piece
    return shown


def check_trends(keys) -> None:
    """Bounds that are said to rise with q do, where they are numbers of q alone."""
    for x in keys:
        for bound in (x.low, x.high):
            claim = None if bound is None else analysis.trend(bound)
            if claim is None or any(analysis.depends_on(bound, name) for name in "bh"):
                continue
            values = analysis.evaluate(bound, {"q": QUERIES}, {}, np.minimum, np.maximum)
            steps = np.diff(np.broadcast_to(values, QUERIES.shape))
            assert np.all({"rising": steps >= 0, "falling": steps <= 0}.get(claim, steps == 0))


@pytest.mark.parametrize("chunk", range(-(-PROGRAMS // CHUNK)))
def test_random_masks_against_every_element(chunk: int) -> None:
    rng = np.random.default_rng(1000 + chunk)
    reduced = 0
    for i in range(min(CHUNK, PROGRAMS - chunk * CHUNK)):
        mask = random_mask(rng, int(rng.integers(0, 4)))
        closed = jax.make_jaxpr(lambda *i, mask=mask: jnp.asarray(mask(jnp, *i)))(*[INDEX] * 4)
        program = analysis.analyse(closed.jaxpr)
        keys = program.intervals()
        if keys is None:
            continue
        reduced += 1
        with np.errstate(over="ignore"):
            expected = mask(np, *[x.astype(np.int32) for x in GRID])
        expected = np.broadcast_to(expected, GRID[0].shape)
        for dtype in (np.int64, np.int32):
            actual = evaluated(program, closed.consts, keys, dtype)
            message = f"program {i} of chunk {chunk}:\n{closed}\n{[str(x) for x in keys]}"
            np.testing.assert_array_equal(actual, expected, err_msg=message)
        check_trends(keys)
    assert reduced > 0.25 * min(CHUNK, PROGRAMS - chunk * CHUNK)


# ---- masks by name ---------------------------------------------------------------------------

STARTS = np.array([0, 5, 11, 40], np.int32)
IDS = np.arange(60, dtype=np.int32).reshape(2, 30) // 7
WINDOWS = {
    "causal": (lambda b, h, q, kv: kv <= q, (None, 0)),
    "causal_turned": (lambda b, h, q, kv: q - kv >= 0, (None, 0)),
    "strictly_causal": (lambda b, h, q, kv: kv < q, (None, -1)),
    "window": (lambda b, h, q, kv: (kv >= q - 5) & (kv <= q + 2), (5, 2)),
    "symmetric": (lambda b, h, q, kv: jnp.abs(q - kv) <= 9, (9, 9)),
    "selected": (
        lambda b, h, q, kv: jnp.select([kv > q, q - kv <= 31, h < 0], [False, True, True], False),
        (31, 0),
    ),
    "branches": (
        lambda b, h, q, kv: jax.lax.cond(kv > q, lambda: False, lambda: q - kv <= 31),
        (31, 0),
    ),
    "de_morgan": (lambda b, h, q, kv: ~((kv > q) | (q - kv > 31)), (31, 0)),
    "nested": (lambda b, h, q, kv: jax.jit(lambda x, y: (x <= y) & (x + 3 > y))(kv, q), (2, 0)),
    "where": (lambda b, h, q, kv: jnp.where(kv > q, False, kv >= q - 8), (8, 0)),
    "everything": (lambda b, h, q, kv: kv >= 0, (None, None)),
    "wide": (lambda b, h, q, kv: kv <= q + 2**26, (None, None)),
}
INTERVALS = {
    "chunked": (
        lambda b, h, q, kv: q // 128 == kv // 128,
        ["128 * (q // 128) <= kv < 128 * (q // 128) + 128"],
    ),
    "prefix": (lambda b, h, q, kv: (kv < 512) | (kv <= q), ["kv < max(q + 1, 512)"]),
    "compressed": (lambda b, h, q, kv: kv <= q // 4, ["kv < q // 4 + 1"]),
    "compressed_product": (lambda b, h, q, kv: kv * 4 <= q, ["kv < q // 4 + 1"]),
    "complete_only": (lambda b, h, q, kv: kv < (q + 1) // 4, ["kv < (q + 1) // 4"]),
    "sink_tokens": (
        lambda b, h, q, kv: (kv <= q) & ((kv < 4) | (kv > q - 9)),
        ["kv < min(q + 1, 4)", "q - 8 <= kv < q + 1"],
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str) -> None:
    function, expected = WINDOWS[name]
    assert analysis.window(analysed(function).intervals()) == expected


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals(name: str) -> None:
    function, expected = INTERVALS[name]
    keys = analysed(function).intervals()
    assert keys is not None
    assert [str(x) for x in keys] == expected
    assert analysis.window(keys) is None
    for bound in [b for x in keys for b in (x.low, x.high) if b is not None]:
        assert analysis.trend(bound) == "rising"


NOT_INTERVALS = {
    "dilated": lambda b, h, q, kv: kv % 2 == 0,
    "documents": lambda b, h, q, kv: jnp.asarray(IDS)[b, q] == jnp.asarray(IDS)[b, kv],
    "products": lambda b, h, q, kv: kv * kv <= q,
    "may_overflow": lambda b, h, q, kv: kv * 2**20 <= q,
    "floating_point": lambda b, h, q, kv: kv.astype(jnp.float32) <= q,
    "user_named": lambda b, h, q, kv: jax.jit(floor_divide)(kv, 3) == 0,
}


def floor_divide(a, b):
    """Not what its name says, which is what a nested program is called by."""
    return a % b + a


@pytest.mark.parametrize("name", NOT_INTERVALS)
def test_what_is_not_known_to_be_intervals(name: str) -> None:
    assert analysed(NOT_INTERVALS[name]).intervals() is None


def test_bounds_from_arrays() -> None:
    """Documents by offsets, the offset itself read at a document number read at a position."""
    starts, ids = jnp.asarray(STARTS), jnp.asarray(IDS)

    def mask(b, h, q, kv):
        return (kv >= starts[ids[b, q]]) & (kv < starts[ids[b, q] + 1]) & (kv <= q)

    program = analysed(mask)
    keys = program.intervals()
    assert keys is not None
    assert len(keys) == 1
    assert not analysis.depends_on(keys[0].high, "kv")
    assert analysis.trend(keys[0].high) is None
    assert {load.kind for load in analysis.loads(program)} == {"uniform"}


def test_loads() -> None:
    table, row = jnp.zeros((3, 50)), jnp.zeros(50)

    def score(s, b, h, q, kv):
        return s + row[q] + table[h, kv] + row[kv * 2] + row[kv + q] + table[kv % 3, kv]

    program = analysis.analyse(
        jax.make_jaxpr(score)(jax.ShapeDtypeStruct((), jnp.float32), *[INDEX] * 4).jaxpr
    )
    kinds = [load.kind for load in analysis.loads(program)]
    assert kinds == ["uniform", "contiguous", "gather", "gather", "gather"]


def test_positions_of_negative_numbers_are_not_contiguous() -> None:
    """``row[kv - 3]`` wraps around at the first keys."""
    row = jnp.zeros(50)
    program = analysed(lambda b, h, q, kv: row[kv - 3] > 0)
    assert [load.kind for load in analysis.loads(program)] == ["gather"]


@pytest.mark.parametrize(
    ("dtype", "shape", "index", "width"),
    [
        ("float32", (3, 48), lambda h, q, kv: (h, kv), 4),
        ("bfloat16", (3, 48), lambda h, q, kv: (h, kv), 8),
        ("bool", (3, 48), lambda h, q, kv: (h, kv), 16),
        ("float32", (3, 50), lambda h, q, kv: (h, kv), 2),
        ("float32", (3, 49), lambda h, q, kv: (h, kv), 1),
        ("float32", (49,), lambda h, q, kv: (kv,), 1),
        ("float32", (48,), lambda h, q, kv: (kv + 1,), 1),
        ("float32", (48,), lambda h, q, kv: (kv + 2,), 2),
        ("float32", (48,), lambda h, q, kv: (jnp.clip(q, 0, 5) * 6 + kv,), 2),
        ("float32", (48,), lambda h, q, kv: (jnp.clip(q, 0, 5) * 8 + kv,), 4),
        ("float32", (48,), lambda h, q, kv: (h + kv,), 1),
        ("float32", (48,), lambda h, q, kv: (2 * kv,), 1),
        ("float32", (48,), lambda h, q, kv: (h,), 1),
    ],
)
def test_how_many_elements_are_aligned(dtype: str, shape, index, width: int) -> None:
    table = jnp.zeros(shape, dtype)
    program = analysed(lambda b, h, q, kv: table[index(h, q, kv)] > 0)
    assert [load.width for load in analysis.loads(program)] == [width]


@pytest.mark.parametrize("first", range(0, PROGRAMS, CHUNK))
def test_random_loads(first: int) -> None:
    """Kinds and widths of loads, as the analysis has them and as a kernel does."""
    found = collections.Counter()
    for seed in range(first, min(first + CHUNK, PROGRAMS)):
        rng = np.random.default_rng((5, seed))
        length = int(rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 20, 48, 50, 64]))
        dtype = str(rng.choice(["bool", "int8", "bfloat16", "float32"]))
        other, depth = random_number(rng, int(rng.integers(0, 3))), int(rng.integers(0, 3))
        factor, added = (int(rng.choice(x)) for x in ((0, 1, 2, 3, 4, 8, 16), (0, 1, 2, 4, 6, 8)))
        scaled = random_number(rng, depth) if depth == 2 else other

        def index(m, b, h, q, kv, parts=(other, scaled, factor, added, depth)):
            other, scaled, factor, added, depth = parts
            near = m.clip(scaled(m, b, h, q, kv), np.int32(-9), np.int32(300))
            return (other(m, b, h, q, kv) if depth == 1 else kv) + near * factor + np.int32(added)

        table = jnp.zeros((2, length), dtype)

        def read(b, h, q, kv, table=table, index=index):
            start = jnp.int32(0), jnp.asarray(index(jnp, b, h, q, kv), jnp.int32)
            sliced = jax.lax.dynamic_slice(table, start, (1, 1), allow_negative_indices=False)
            return sliced[0, 0] > 0

        jaxpr = jax.make_jaxpr(read)(*[INDEX] * 4).jaxpr
        load = analysis.loads(analysis.analyse(jaxpr))[-1]
        places = np.broadcast_to(index(np, *(x.astype(np.int32) for x in GRID)), GRID[0].shape)
        keys = np.broadcast_to(GRID[3], places.shape)
        if load.kind == "uniform":
            assert (places == places[..., :1]).all(), seed
        if load.kind == "contiguous":
            wide = places.astype(np.int64)
            assert (np.diff(wide) == np.diff(keys)).all(), seed
            assert not (wide[keys % load.width == 0] % load.width).any(), seed
            assert length % load.width == 0
            assert load.width * table.dtype.itemsize <= 16
        flat = flat_program(jaxpr, ("b", "h", "q_idx", "kv_idx"))
        widths = aligned_widths(flat, flat.equations)
        # Without what analysis knows of jnp's functions, a kernel may prove less.
        assert all(load.width % width == 0 for width in widths.values()), seed
        found[load.kind, load.width, *widths.values()] += 1
    assert sum(n for (kind, width, *_), n in found.items() if width > 1) > CHUNK // 20
    assert sum(n for (kind, width, *of), n in found.items() if of == [width] != [1]) > CHUNK // 20
