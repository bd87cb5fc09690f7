"""Which implementation serves a call, with a kernel stood in for by one that leaves a mark."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import dispatch, explain, flash_attention, reference, xla
from tests.cases import Case

CASE = Case(seqlen_q=20, seqlen_k=24, causal=True)
# Stands out in lowered text, and in values.
FORWARD_MARK, BACKWARD_MARK = 1234.5, 6789.5


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Stand-in kernels; a test puts reasons against them into the lists."""
    reasons = {"fwd": [], "bwd": []}

    def kernel_forward(spec, operands):
        residuals = reference.attention(spec, operands)
        return jax.tree.map(lambda x: x + FORWARD_MARK, residuals)

    def kernel_backward(spec, operands, residuals, dout, dlse):
        gradients = xla.backward(spec, operands, residuals, dout, dlse)
        return jax.tree.map(lambda x: x + BACKWARD_MARK, gradients)

    monkeypatch.setattr(dispatch, "_kernel_forward", kernel_forward)
    monkeypatch.setattr(dispatch, "_kernel_backward", kernel_backward)
    monkeypatch.setattr(
        dispatch,
        "reasons_against_kernel",
        lambda spec, operands, direction: reasons[direction],
    )
    # No trace of a real kernel's call may serve these tests, nor one of a stand-in any other.
    for function in (dispatch.forward, dispatch.backward):
        function.clear_cache()
    yield reasons
    for function in (dispatch.forward, dispatch.backward):
        function.clear_cache()


def loss(implementation, query, key, value):
    out = flash_attention(query, key, value, is_causal=True, implementation=implementation)
    return jnp.sum(jnp.sin(out))


def marks(platform: str, implementation: str | None) -> tuple[bool, bool]:
    """Whether a gradient lowered for a platform holds the forward and the backward kernel."""
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss, implementation)))
    lowered = gradient.trace(*CASE.arrays().values()).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    return "1.234500e+03" in text, "6.789500e+03" in text


@pytest.mark.usefixtures("reasons")
def test_the_platform_lowered_for_decides() -> None:
    assert marks("cuda", None) == (True, True)
    assert marks("cpu", None) == (False, False)
    assert marks("tpu", None) == (False, False)
    assert marks("cuda", "xla") == (False, False)
    assert marks("cuda", "reference") == (False, False)
    assert marks("cuda", "cute") == (True, True)
    assert marks("cpu", "cute") == (True, True)


def test_backward_falls_back_on_its_own(reasons) -> None:
    reasons["bwd"].append("no backward")
    assert marks("cuda", None) == (True, False)


def test_forward_falls_back_on_its_own(reasons) -> None:
    reasons["fwd"].append("no forward")
    assert marks("cuda", None) == (False, True)


def test_the_xla_backward_takes_a_kernel_s_residuals(reasons) -> None:
    """Exact gradients from whatever computed out and LSE."""
    reasons["bwd"].append("no backward")
    arrays = tuple(CASE.arrays().values())
    query, key, value = arrays
    operands = dispatch.Operands(query=query, key=key, value=value)
    spec = dispatch.AttentionSpec(scale=0.25, is_causal=True)
    residuals = reference.attention(spec, operands)
    dout = jnp.ones_like(residuals.out)
    dlse = jnp.zeros_like(residuals.lse)
    gradients = dispatch.backward(spec, None, operands, residuals, dout, dlse)
    expected = jax.grad(
        lambda *qkv: jnp.sum(
            flash_attention(*qkv, scale=0.25, is_causal=True, implementation="reference")
        ),
        argnums=(0, 1, 2),
    )(*arrays)
    for name, want in zip(("query", "key", "value"), expected, strict=True):
        np.testing.assert_allclose(getattr(gradients, name), want, atol=1e-5)


def test_cute_is_refused_with_every_reason(reasons) -> None:
    arrays = tuple(CASE.arrays().values())
    reasons["fwd"] += ["first reason", "second reason"]
    with pytest.raises(NotImplementedError, match=r"forward pass[\s\S]*first[\s\S]*second reason"):
        loss("cute", *arrays)
    with pytest.raises(NotImplementedError, match="forward pass"):
        jax.jit(functools.partial(loss, "cute"))(*arrays)


def test_cute_without_a_backward_serves_inference_and_refuses_a_gradient(reasons) -> None:
    arrays = tuple(CASE.arrays().values())
    reasons["bwd"].append("no backward yet")
    out = flash_attention(*arrays, implementation="cute")
    expected = flash_attention(*arrays, implementation="reference")
    np.testing.assert_allclose(out - FORWARD_MARK, expected, atol=1e-3)
    with pytest.raises(NotImplementedError, match=r"backward pass[\s\S]*no backward yet"):
        jax.grad(functools.partial(loss, "cute"))(*arrays)


def test_the_kernel_is_folded_by_vmap_too(monkeypatch: pytest.MonkeyPatch, reasons) -> None:
    shapes = []
    stand_in = dispatch._kernel_forward

    def record(spec, operands):
        shapes.append(operands.query.shape)
        return stand_in(spec, operands)

    monkeypatch.setattr(dispatch, "_kernel_forward", record)
    query, key, value = CASE.arrays().values()
    jax.vmap(lambda q: flash_attention(q, key, value, implementation="cute"))(
        jnp.stack([query] * 3)
    )
    assert shapes[-1] == (3 * CASE.batch, *query.shape[1:])


def test_explain(reasons) -> None:
    arrays = tuple(CASE.arrays().values())
    told = explain(*arrays, is_causal=True)
    assert (told.forward, told.backward, told.elsewhere) == ("cute", "cute", "xla")
    reasons["bwd"] += ["one reason", "another reason"]
    told = explain(*arrays, is_causal=True)
    assert (told.forward, told.backward) == ("cute", "xla")
    assert told.backward_reasons == ("one reason", "another reason")
    text = str(told)
    assert "forward on CUDA: cute" in text
    assert "backward on CUDA: xla" in text
    assert "one reason" in text
    assert "another reason" in text
    told = explain(*arrays, implementation="cute")
    assert (told.forward, told.backward, told.elsewhere) == ("cute", "refused", "refused")
    told = explain(*arrays, implementation="reference")
    assert (told.forward, told.backward, told.elsewhere) == ("reference",) * 3


def test_explain_computes_nothing_and_takes_shapes() -> None:
    """Of arrays far too large for any machine; by the real registry."""
    query = jax.ShapeDtypeStruct((2**20, 2**20, 64, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2**20,), jnp.int32)
    told = explain(query, query, query, key_value_seq_lengths=lengths, q_offset=5)
    assert told.elsewhere == "xla"
    with pytest.raises(ValueError, match="value must have"):
        explain(query, query, jax.ShapeDtypeStruct((1, 2, 3, 4), jnp.bfloat16))
