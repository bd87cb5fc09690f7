"""Operations that masks and scores are made of, as kernels compute them, against JAX and numpy.

One kernel evaluates all functions of a list, at random numbers and at those where one may go wrong.
"""

import math
from collections.abc import Callable

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_flashcute import masks
from jax_flashcute.ffi.compile import ArrayType
from jax_flashcute.kernels.common.numbers import bits_of
from jax_flashcute.kernels.elements import INDICES
from jax_flashcute.kernels.lowering.derivative import Derivative, derivative
from jax_flashcute.kernels.lowering.inlining import flat_program
from jax_flashcute.kernels.lowering.program import ElementProgram
from jax_flashcute.kernels.lowering.values import arrays_as_views, numbered_view
from tests.simulator import simulate
from tests.simulator.compiled import compile_to_simulate

ARGUMENTS = ("x", "y", "i", "j")
SHAPES = [jax.ShapeDtypeStruct((), d) for d in (*[jnp.float32] * 2, *[jnp.int32] * 2)]
COUNT = 1024
THREADS = 128


class Functions:
    """Of two floats and two integers: each result, in 32 bits, of ``COUNT`` of these."""

    def __init__(self, programs: list[ElementProgram]):
        self.programs = programs

    @cute.jit
    def __call__(self, stream: cuda.CUstream, mF: cute.Tensor, mI: cute.Tensor, mOut: cute.Tensor):
        self.kernel(mF, mI, mOut).launch(
            grid=[COUNT // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mF: cute.Tensor, mI: cute.Tensor, mOut: cute.Tensor):
        at = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        numbers = (mF[0, at], mF[1, at], mI[0, at], mI[1, at])
        given = dict(zip(ARGUMENTS, numbers, strict=True))
        for n, program in enumerate(self.programs):
            found = program.value(program.given(program.start([]), **given))
            if cutlass.const_expr(isinstance(found, cutlass.Float32)):
                mOut[n, at] = bits_of(found)
            else:
                mOut[n, at] = cutlass.Int32(found)


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Two rows of floats and two of integers: random ones of all sizes, and the ends of ranges."""
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((2, COUNT)) * 10.0 ** rng.integers(-6, 4, (2, COUNT))
    floats[:, ::2] = rng.uniform(-1.2, 1.2, (2, COUNT // 2))
    tiny, most = 2.0**-149, float(np.finfo(np.float32).max)
    ends = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, math.inf, -math.inf, math.nan, tiny, -tiny]
    ends += [2.0**-126, most, -most, 1e-3, 88.0, 89.5, -89.5, 1e10, math.pi / 2, 1 + 2.0**-23]
    pairs = np.array(np.meshgrid(ends, ends)).reshape(2, -1)
    floats[:, : pairs.shape[1]] = pairs
    integers = rng.integers(-(2**31), 2**31, (2, COUNT)) >> rng.integers(0, 31, (2, COUNT))
    edges = np.array([0, 1, -1, 2, 127, 128, -128, 255, 256, 32767, -32768, 2**31 - 1, -(2**31)])
    integers[:, : len(edges) ** 2] = np.array(np.meshgrid(edges, edges)).reshape(2, -1)
    return floats.astype(np.float32), integers.astype(np.int32)


# ---- functions ---------------------------------------------------------------------------------

MATH = {
    "sinh": np.sinh, "cosh": np.cosh, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "cbrt": np.cbrt, "erfc": np.vectorize(math.erfc), "erf": np.vectorize(math.erf),
    "sin": np.sin, "cos": np.cos, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "log": np.log, "log1p": np.log1p, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip
"""What a function of ``jax.lax`` is in float64."""
HALVES = {
    f"{name} {dtype}": (name, dtype)
    for name in ("sinh", "atan", "acosh", "cbrt", "erfc")
    for dtype in ("bfloat16", "float16")
}


def rounded(name: str, dtype: str) -> Callable:
    return lambda x, y, i, j: getattr(lax, name)(x.astype(dtype)).astype(jnp.float32)


def pieces(x, y, i, j):
    return jnp.piecewise(x, [x < -1, (x < 1) & (i > j)], [lambda x: x + y, jnp.negative, 3.0])


def chosen(x, y, i, j):
    def of_two(x):
        return lax.cond(x < y, lambda: x - y, lambda: jnp.abs(x))

    return lax.switch(i % 5 - 1, [of_two, lambda x: x * 2, lambda x: jnp.where(j > 0, x, y)], x)


def of_which(x, y, i, j):
    """No branch may make NaN of what another one computes."""
    return lax.switch(i % 3, [jnp.log, jnp.square, lambda x: x * y], jnp.abs(x))


def selected(x, y, i, j):
    return jnp.select([i > j, x > y, jnp.isnan(x)], [x, y, 1.0], -x)


def of_floats(function: Callable) -> Callable:
    return lambda x, y, i, j: function(jnp.stack([x, y, jnp.float32(0.25)]))


def of_integers(function: Callable, dtype: str = "int32") -> Callable:
    return lambda x, y, i, j: function(jnp.stack([i, j, jnp.int32(7), j - 1]).astype(dtype))


def of_booleans(function: Callable) -> Callable:
    return lambda x, y, i, j: function(jnp.stack([i > j, x > y, i > 5]))


def of_parts(x, y, i, j):
    """Its derivative is split, padded and turned round."""
    return jnp.sum(jnp.roll(jnp.stack([x, y, 2 * x]), 1)[::-1][:2] * jnp.stack([y, 4.0]))


def at_a_place(x, y, i, j):
    """Its derivative is put at a place that is known late, and within bounds."""
    return lax.dynamic_slice(jnp.stack([x, y, 2 * x, y]), [i], [2])[0] * y


def of_rows(x, y, i, j):
    return lax.cumsum(jnp.stack([jnp.stack([i, j]), jnp.stack([j, i])], axis=1), axis=1)[1, 1]


def of_slices(x, y, i, j):
    """Rows of a matrix, of which some are beyond it, and a product with one."""
    matrix = jnp.arange(12, dtype=jnp.int32).reshape(4, 3) * i
    rows = matrix.at[jnp.stack([j % 7, i % 3])].get(mode="fill", fill_value=-1)
    columns = jnp.take(matrix, jnp.stack([i % 3, j % 5]), axis=1, mode="clip")
    return jnp.sum(rows @ jnp.stack([i, j, 1])) + (rows @ columns[:3])[1, 0]


EXACT = {
    **{
        f"{function.__name__} {dtype}": lambda x, y, i, j, f=function, d=dtype: f(i.astype(d))
        for function in (lax.population_count, lax.clz)
        for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32")
    },
    **{f.__name__: f for f in (pieces, chosen, selected, of_rows, of_slices)},
    "derivative": lambda *given: jax.grad(of_which)(*given),
    "argmax": of_floats(jnp.argmax),
    "argmin": of_floats(jnp.argmin),
    "argmax of integers": of_integers(lambda v: lax.argmax(v, 0, jnp.int8), "uint16"),
    "argmin of booleans": of_booleans(jnp.argmin),
    "max of booleans": of_booleans(jnp.max),
    "min of booleans": of_booleans(jnp.min),
    "cumsum": of_integers(lambda v: jnp.cumsum(v)[2]),
    "cumsum backwards": of_integers(lambda v: lax.cumsum(v, reverse=True)[1], "int16"),
    "cumprod": of_integers(lambda v: jnp.cumprod(v)[2]),
    "cummax": of_integers(lambda v: lax.cummax(v)[2], "int8"),
    "cummin": of_floats(lambda v: lax.cummin(v)[1]),
    **{f.__name__: lambda *given, f=f: jax.grad(f)(*given) for f in (of_parts, at_a_place)},
    "prod": of_integers(jnp.prod, "int16"),
    "transpose": lambda x, y, i, j: jnp.stack([jnp.stack([i, j])] * 2).T[1, 0],
    "bits of a float": lambda x, y, i, j: lax.bitcast_convert_type(x, jnp.uint32),
    "bits of an integer": lambda x, y, i, j: lax.bitcast_convert_type(
        lax.bitcast_convert_type(i, jnp.uint32), jnp.float32
    ),
    "unstack": of_floats(lambda v: jnp.unstack(v)[1]),
}
"""As JAX has them, bit for bit."""

FUNCTIONS = {
    **{name: lambda x, y, i, j, name=name: getattr(lax, name)(x) for name in MATH},
    "atan2": lambda x, y, i, j: lax.atan2(x, y),
    **{name: rounded(*of) for name, of in HALVES.items()},
    **EXACT,
}


# ---- tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow)])
def test_functions(arch: str) -> None:
    results = simulated(arch)
    (x, y), _ = numbers()
    for name, function in MATH.items():
        check_close(name, results[name], function, x)
    check_close("atan2", results["atan2"], np.arctan2, x, y)
    for name, (function, dtype) in HALVES.items():
        with np.errstate(over="ignore"):
            given = x.astype(jnp.dtype(dtype))
        check_close(name, results[name], MATH[function], given, limit=1)
    # XLA's code for a CPU takes subnormal numbers as 0.
    alike = ~(is_subnormal(x) | is_subnormal(y))
    for name, want in by_jax().items():
        both = [np.where(is_subnormal(r), 0, r) for r in (results[name], np.asarray(want))]
        np.testing.assert_array_equal(*(r[alike] for r in both), err_msg=name)


def simulated(arch: str) -> dict[str, np.ndarray]:
    """Each function's results as a kernel has them."""
    traced = {name: jax.make_jaxpr(function)(*SHAPES) for name, function in FUNCTIONS.items()}
    programs = [ElementProgram(flat_program(closed.jaxpr, ARGUMENTS)) for closed in traced.values()]
    assert not any(program.unsupported() for program in programs)
    arrays = [ArrayType(d, (1, 1)) for d in (cutlass.Float32, cutlass.Int32, cutlass.Int32)]
    text = f"functions of {COUNT} numbers: {list(map(str, traced.values()))}"
    kernel = compile_to_simulate(lambda: Functions(programs), arrays, arch, text)
    (found,) = simulate(kernel, *numbers(), outputs=[((len(FUNCTIONS), COUNT), np.int32)])
    return {
        name: row.view(np.float32) if program.result_dtypes[0] == "float32" else row
        for name, program, row in zip(FUNCTIONS, programs, found, strict=True)
    }


def by_jax() -> dict[str, jax.Array]:
    def of_all(*given):
        results = {name: function(*given) for name, function in EXACT.items()}
        return {n: x if x.dtype == jnp.float32 else x.astype(jnp.int32) for n, x in results.items()}

    floats, integers = numbers()
    return jax.jit(jax.vmap(of_all))(*floats, *integers)


def is_subnormal(x: np.ndarray) -> np.ndarray:
    return (np.abs(x) < 2.0**-126) & (x != 0) & (x.dtype == np.float32)


def check_close(name: str, got, function: Callable, *given: np.ndarray, limit: float = 4) -> None:
    """Within so many units in the last place, and infinite, not a number or negative where it is.

    The error of smaller numbers is one of the least normal number's.
    """
    info = jnp.finfo(given[0].dtype)
    with np.errstate(all="ignore"):
        exact = function(*(x.astype(np.float64) for x in given))
        want = exact.astype(info.dtype).astype(np.float32)
        held = got.astype(info.dtype).astype(np.float32)
    np.testing.assert_array_equal(got, held, err_msg=name)
    infinite = np.isinf(want), np.isinf(got)
    np.testing.assert_array_equal(*infinite, err_msg=name)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
    there = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[there]), np.signbit(want[there]), err_msg=name)
    inside = np.isfinite(want)
    size = np.maximum(np.abs(want[inside], dtype=np.float64), float(info.smallest_normal))
    unit = 2.0 ** np.floor(np.log2(size)) * float(info.eps)
    assert (np.abs(got[inside] - exact[inside]) / unit).max() < limit, name


# ---- derivatives -------------------------------------------------------------------------------

HEADS, KEYS = 3, 40


class Gradients:
    """The results of a derivative for each score, numbers of elements and floats by their bits."""

    def __init__(self, derivative: Derivative):
        self.program = derivative.program

    @cute.jit
    def __call__(
        self,
        stream: cuda.CUstream,
        mF: cute.Tensor,
        mI: cute.Tensor,
        mTable: cute.Tensor,
        mKeys: cute.Tensor,
        mOut: cute.Tensor,
    ):
        self.kernel(mF, mI, (mTable, mKeys), mOut).launch(
            grid=[COUNT // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mF: cute.Tensor, mI: cute.Tensor, arrays: tuple, mOut: cute.Tensor):
        at = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        program = self.program
        views = arrays_as_views(program.array_types[: len(arrays)], arrays, cutlass.Int32(0))
        views += [numbered_view(shape) for _, shape in program.array_types[len(arrays) :]]
        given = {"score": mF[0, at], "cotangent": mF[1, at]}
        given |= {name: mI[row, at] for row, name in enumerate(INDICES)}
        known = program.given(program.start(views), **given)
        for n, dtype in enumerate(program.result_dtypes):
            value = program.value(known, n)
            if cutlass.const_expr(dtype == "float32"):
                mOut[n, at] = bits_of(value)
            else:
                mOut[n, at] = value


def of_branches(table, keys):
    """Arrays are read in branches, and where one is not taken its derivative may be infinite."""

    def score_mod(score, b, h, q, kv):
        read = [lambda x: x * table[h, kv] + x * keys[kv], lambda x: x + table[h, q]]
        either = lambda x: jax.lax.cond(h > 0, *read, x)  # noqa: E731
        squared = lambda x: x * keys[table[h, kv].astype(jnp.int32) % 8] ** 2  # noqa: E731
        last = lambda x: jnp.log(jnp.abs(x - 0.5)) + keys[0]  # noqa: E731
        return jax.lax.switch(q % 4, [either, squared, last, jnp.tanh], score)

    return score_mod


def of_vectors(table, keys):
    """Rows, columns and stretches of arrays, as elements of vectors and matrices."""

    def score_mod(score, b, h, q, kv):
        column, features = table[:, kv], jnp.cos(keys[:4] * (q - kv))
        stretch = jax.lax.dynamic_slice(keys, (kv % 38,), (3,))
        matrix = jnp.take(table, jnp.stack([q, kv + 20]), axis=1, mode="fill", fill_value=0.5)
        mixed = jnp.stack([score, 2.0]) @ (matrix * stretch[:, None]).T
        either = jax.lax.cond(kv > q, lambda: keys[2:5], lambda: table[:, q])
        return mixed @ jax.nn.softmax(column / 9) + features @ table[h, 3:7] + jnp.sum(either)

    return score_mod


@pytest.mark.parametrize("function", [of_branches, of_vectors])
def test_gradients_of_what_is_read(function) -> None:
    rng = np.random.default_rng(0)
    sizes = (HEADS, KEYS), (KEYS,)
    table, keys = (jnp.asarray(rng.standard_normal(x) * 9, jnp.float32) for x in sizes)
    floats = rng.standard_normal((2, COUNT)).astype(np.float32)
    floats[0, ::2] = 0.5
    indices = rng.integers(0, [[1], [HEADS], [KEYS], [KEYS]], (4, COUNT)).astype(np.int32)
    traced, arrays = masks.trace_score(function(table, keys), jnp.float32)
    assert [x.shape[1:] for x in arrays] == [table.shape, keys.shape]
    of = derivative(traced.jaxpr, ("score", *INDICES))
    types = [(cutlass.Float32, 2), (cutlass.Int32, 2), (cutlass.Float32, 3), (cutlass.Float32, 2)]
    types = [ArrayType(d, (1,) * rank) for d, rank in (*types, (cutlass.Int32, 2))]
    kernel = compile_to_simulate(lambda: Gradients(of), types, "sm_90a", f"of {traced.text}")
    shape = (len(of.program.result_dtypes), COUNT)
    given = floats, indices, *map(np.asarray, arrays)
    (found,) = simulate(kernel, *given, outputs=[(shape, np.int32)])
    sums = [np.zeros((COUNT, x.size), np.float32) for x in arrays]
    for array, place in of.cotangents():
        (there,) = np.nonzero(found[place] >= 0)
        elements, values = found[place, there], found[place + 1, there].view(np.float32)
        np.add.at(sums[array], (there, elements), values)

    def changed(score, table, keys, *indices):
        return function(table, keys)(score, *indices)

    gradient = jax.vmap(jax.grad(changed, (0, 1, 2)), (0, None, None, 0, 0, 0, 0))
    want, *of_arrays = jax.jit(gradient)(floats[0], table, keys, *indices)
    np.testing.assert_allclose(found[0].view(np.float32), want * floats[1], rtol=1e-5, atol=1e-6)
    for total, x in zip(sums, of_arrays, strict=True):
        expected = x.reshape(COUNT, -1) * floats[1][:, None]
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
