"""vmap in every position, against a loop; the mapped axis becomes part of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention
from tests.cases import Case, differentiable
from tests.compare import assert_close

CASE = Case(
    batch=2,
    seqlen_q=20,
    seqlen_k=24,
    group=2,
    head_dim=8,
    head_dim_v=4,
    causal=True,
    offset=True,
    lengths=True,
    bias="nts",
    mask="bs",
    sinks=True,
)
SIZE = 3
ALL = tuple(CASE.arrays())


def attend(implementation, arrays):
    return flash_attention(
        **arrays, **CASE.static, implementation=implementation, return_residual=True
    )


def stacked(mapped: tuple[str, ...], size: int = SIZE) -> dict:
    """Arrays of the case, those in ``mapped`` with a leading axis of different values."""
    several = [CASE.arrays(seed=seed, poison=False) for seed in range(size)]
    return {
        name: jnp.stack([arrays[name] for arrays in several]) if name in mapped else array
        for name, array in several[0].items()
    }


def element(arrays: dict, mapped: tuple[str, ...], index: int) -> dict:
    return {name: array[index] if name in mapped else array for name, array in arrays.items()}


def in_axes(mapped: tuple[str, ...]) -> dict:
    return {name: 0 if name in mapped else None for name in ALL}


def loss(implementation, floating, others):
    out, lse = attend(implementation, floating | others)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, jnp.cos(lse)))


def split(arrays: dict) -> tuple[dict, dict]:
    floating = differentiable(arrays)
    return floating, {name: a for name, a in arrays.items() if name not in floating}


MAPPED = [
    ALL,
    ("query",),
    ("key", "value"),
    ("q_offset",),
    ("key_value_seq_lengths", "query_seq_lengths"),
    ("bias",),
    ("mask", "sinks"),
    tuple(name for name in ALL if name not in ("bias", "sinks")),
]


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_is_a_loop(mapped: tuple[str, ...]) -> None:
    arrays = stacked(mapped)
    mapped_attend = jax.vmap(functools.partial(attend, "xla"), in_axes=(in_axes(mapped),))
    out, lse = jax.jit(mapped_attend)(arrays)
    attend_one = jax.jit(functools.partial(attend, "reference"))
    for index in range(SIZE):
        expected = attend_one(element(arrays, mapped, index))
        assert_close(
            {"out": out[index], "lse": lse[index]},
            dict(zip(("out", "lse"), expected, strict=True)),
            1e-5,
        )


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap_of_grad(mapped: tuple[str, ...]) -> None:
    """Each element has gradients of its own, of operands that all elements share too."""
    arrays = stacked(mapped)
    floating, others = split(arrays)
    axes = in_axes(mapped)
    gradient = jax.vmap(
        jax.grad(functools.partial(loss, "xla")),
        in_axes=({n: axes[n] for n in floating}, {n: axes[n] for n in others}),
    )
    actual = jax.jit(gradient)(floating, others)
    expected_gradient = jax.jit(jax.grad(functools.partial(loss, "reference")))
    for index in range(SIZE):
        expected = expected_gradient(*split(element(arrays, mapped, index)))
        assert_close({name: array[index] for name, array in actual.items()}, expected, 2e-5)


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_grad_of_vmap(mapped: tuple[str, ...]) -> None:
    """The gradient of what all elements share is the sum over them."""
    arrays = stacked(mapped)
    axes = in_axes(mapped)

    def total(implementation, floating, others):
        mapped_loss = jax.vmap(
            functools.partial(loss, implementation),
            in_axes=({n: axes[n] for n in floating}, {n: axes[n] for n in others}),
        )
        return jnp.sum(mapped_loss(floating, others))

    actual = jax.jit(jax.grad(functools.partial(total, "xla")))(*split(arrays))
    expected = jax.jit(jax.grad(functools.partial(total, "reference")))(*split(arrays))
    assert_close(actual, expected, 2e-5)


def test_nested_and_along_any_axis() -> None:
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, 20, 3, 4, 8)), jnp.float32)
    key = jnp.asarray(rng.standard_normal((24, 2, 8, 3)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((2, 4, 20, 24)), jnp.float32)

    def on_one(implementation, query, key, bias):
        return flash_attention(query, key, key, bias=bias, implementation=implementation)

    def twice(implementation):
        inner = jax.vmap(functools.partial(on_one, implementation), in_axes=(1, 3, None))
        return jax.vmap(inner, in_axes=(0, None, 0), out_axes=1)

    def total(implementation, *arguments):
        return jnp.sum(jnp.sin(twice(implementation)(*arguments)))

    actual, expected = (jax.jit(twice(name))(query, key, bias) for name in ("xla", "reference"))
    assert actual.shape == (3, 2, 20, 4, 8)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3)), static_argnums=0)
    actual, expected = (gradient(name, query, key, bias) for name in ("xla", "reference"))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def query_shapes(function, *arguments) -> list[tuple[int, ...]]:
    """Shapes of the first array of every attention call in a function."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    shapes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "custom_vmap_call":
                shapes.append(next(v.aval.shape for v in equation.invars if v.aval.ndim == 4))
            for parameter in equation.params.values():
                if equation.primitive.name != "custom_vmap_call" and hasattr(parameter, "eqns"):
                    visit(parameter)
                elif equation.primitive.name != "custom_vmap_call" and hasattr(parameter, "jaxpr"):
                    visit(parameter.jaxpr)

    visit(jaxpr)
    return shapes


@pytest.mark.parametrize("differentiate", [False, True])
def test_the_mapped_axis_becomes_batch(differentiate: bool) -> None:
    """One call (two with a gradient) of SIZE times the batch, and no loop around it."""
    mapped = ("query", "q_offset")
    arrays = stacked(mapped)
    axes = in_axes(mapped)
    floating, others = split(arrays)
    function = functools.partial(loss, "xla")
    function = jax.grad(function) if differentiate else function
    function = jax.vmap(
        function, in_axes=({n: axes[n] for n in floating}, {n: axes[n] for n in others})
    )
    folded = (SIZE * CASE.batch, CASE.seqlen_q, CASE.q_heads, CASE.head_dim)
    assert query_shapes(function, floating, others) == [folded] * (2 if differentiate else 1)
