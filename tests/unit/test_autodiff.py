"""Derivatives: what is saved, what is refused and in which words, what integers get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.sharding import AxisType, PartitionSpec

from jax_flashcute import flash_attention
from tests.cases import Case
from tests.compare import assert_close

SMALL = Case(seqlen_q=20, seqlen_k=24, causal=True, group=2)


def loss(query, key, value, implementation=None, **kwargs):
    out = flash_attention(
        query, key, value, is_causal=True, implementation=implementation, **kwargs
    )
    return jnp.sum(jnp.sin(out))


def inputs():
    return tuple(SMALL.arrays().values())


def equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Every equation of a jaxpr and of those inside it, but for the bodies of attention calls."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        if equation.primitive.name == "custom_vmap_call":
            continue
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(parameter, ClosedJaxpr):
                found += equations(parameter.jaxpr)
            elif isinstance(parameter, Jaxpr):
                found += equations(parameter)
    return found


def attention_calls(function, *arguments) -> int:
    """How many forward and backward passes of attention a function makes."""
    calls = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return sum(equation.primitive.name == "custom_vmap_call" for equation in calls)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (None, 3),
        (jax.checkpoint_policies.nothing_saveable, 3),
        (
            jax.checkpoint_policies.save_only_these_names(
                "flash_attention_out", "flash_attention_lse"
            ),
            2,
        ),
        (jax.checkpoint_policies.save_only_these_names("flash_attention_out"), 3),
        (jax.checkpoint_policies.everything_saveable, 2),
    ],
)
def test_checkpoint_policies_decide_what_runs_again(implementation, policy, calls: int) -> None:
    @functools.partial(jax.checkpoint, policy=policy)
    def block(query, key, value):
        return loss(jnp.sin(query), key, value, implementation)

    assert attention_calls(jax.grad(block), *inputs()) == calls
    expected = jax.grad(lambda q, k, v: loss(jnp.sin(q), k, v, "reference"))(*inputs())
    np.testing.assert_allclose(jax.grad(block)(*inputs()), expected, atol=1e-5)


def test_without_checkpoint_forward_and_backward_run_once() -> None:
    assert attention_calls(loss, *inputs()) == 1
    assert attention_calls(jax.grad(loss), *inputs()) == 2


def test_scan_over_layers() -> None:
    query, key, value = inputs()
    scales = jnp.linspace(0.5, 1.5, 3)

    def stack(scales, implementation):
        @jax.checkpoint
        def layer(x, scale):
            return x + flash_attention(x * scale, key, value, implementation=implementation), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, query, scales)[0]))

    actual = jax.jit(jax.grad(stack), static_argnums=1)(scales, "xla")
    expected = jax.jit(jax.grad(stack), static_argnums=1)(scales, "reference")
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("jit", [False, True])
def test_forward_mode_says_what_to_use_instead(implementation, jit: bool) -> None:
    function = functools.partial(loss, implementation=implementation)
    function = jax.jit(function) if jit else function
    with pytest.raises(NotImplementedError, match=r"forward-mode.*implementation=\"reference\""):
        jax.jvp(function, inputs(), inputs())
    with pytest.raises(NotImplementedError, match=r"forward-mode.*implementation=\"reference\""):
        jax.jit(lambda: jax.jvp(function, inputs(), inputs()))()


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("jit", [False, True])
def test_second_derivatives_say_what_to_use_instead(implementation, jit: bool) -> None:
    function = functools.partial(loss, implementation=implementation)
    gradient = jax.grad(jax.jit(function) if jit else function)
    with pytest.raises(NotImplementedError, match=r"second.*implementation=\"reference\""):
        jax.grad(lambda q: jnp.sum(gradient(q, *inputs()[1:]) ** 2))(inputs()[0])
    with pytest.raises(NotImplementedError, match=r"implementation=\"reference\""):
        jax.jvp(gradient, inputs(), inputs())


def test_the_reference_has_both() -> None:
    function = functools.partial(loss, implementation="reference")
    jax.jvp(function, inputs(), inputs())
    jax.jvp(jax.grad(function), inputs(), inputs())


def test_integer_and_boolean_operands_have_no_gradient() -> None:
    case = Case(seqlen_q=20, seqlen_k=24, offset=True, lengths=True, mask="bs", causal=True)
    arrays = case.arrays()

    def total(arrays):
        return jnp.sum(flash_attention(**arrays, is_causal=True, implementation="xla"))

    gradients = jax.grad(total, allow_int=True)(arrays)
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            assert gradients[name].dtype == array.dtype
        else:
            assert gradients[name].dtype == jax.dtypes.float0
        assert gradients[name].shape == array.shape


def test_gradients_keep_the_dtype_of_their_operand() -> None:
    arrays = Case(seqlen_q=20, seqlen_k=24, bias="t", sinks=True).arrays(jnp.bfloat16)
    arrays["bias"] = arrays["bias"].astype(jnp.float16)
    arrays["sinks"] = arrays["sinks"].astype(jnp.bfloat16)
    gradients = jax.grad(
        lambda arrays: jnp.sum(flash_attention(**arrays, implementation="xla").astype(jnp.float32))
    )(arrays)
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, arrays)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_gradient_of_the_lse_alone(implementation: str) -> None:
    """Against the closed form: d lse / d key = scale * weights^T query."""
    query, key, value = (array[:1, :, :1] for array in inputs())

    def total(query, key, value):
        _, lse = flash_attention(
            query, key, value, implementation=implementation, return_residual=True
        )
        return jnp.sum(lse)

    scale = query.shape[-1] ** -0.5
    weights = jax.nn.softmax(scale * query[0, :, 0] @ key[0, :, 0].T)
    dquery, dkey, dvalue = jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    np.testing.assert_allclose(dquery[0, :, 0], scale * weights @ key[0, :, 0], atol=1e-5)
    np.testing.assert_allclose(dkey[0, :, 0], scale * weights.T @ query[0, :, 0], atol=1e-5)
    np.testing.assert_array_equal(dvalue, 0)


def test_a_traced_scale_has_a_gradient() -> None:
    query, key, value = inputs()

    def total(scale, implementation):
        return loss(query, key, value, implementation, scale=scale)

    actual = jax.grad(total)(0.3, "xla")
    step = 1e-3
    expected = (total(0.3 + step, "reference") - total(0.3 - step, "reference")) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_replicated_operands_in_a_shard_map(check_vma: bool) -> None:
    """Their gradient is summed over the mesh; one device is enough to check the types."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec(None, "x"), PartitionSpec()

    def total(query, key, value, implementation):
        def on_device(query, key, value):
            out = flash_attention(query, key, value, implementation=implementation)
            return jax.lax.psum(jnp.sum(jnp.sin(out)), "x")

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(rows, whole, whole),
            out_specs=whole,
            check_vma=check_vma,
        )(query, key, value)

    gradient = jax.grad(total, argnums=(0, 1, 2))
    actual, expected = (gradient(*inputs(), name) for name in ("xla", "reference"))
    names = ("query", "key", "value")
    assert_close(
        dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)), 1e-5
    )
