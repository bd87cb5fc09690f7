"""Programs exported for CUDA on a machine without a GPU, and lowered at many shapes."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention, plan
from jax_flashcute.export import EXPORT_CHECKS
from jax_flashcute.ffi import store
from jax_flashcute.ffi.runtime import CALL_TARGET
from tests.user_functions import without_rule

N, K, H = 4, 2, 64


@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for the tests of this module."""
    store.forget()
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def hopper(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")
    monkeypatch.setenv(store.CACHE_VARIABLE, str(kernels))
    monkeypatch.delenv(store.COMPILE_VARIABLE, raising=False)


def attend(query, key, value, lengths=None, *, implementation=None, **options):
    return flash_attention(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        implementation=implementation,
        return_residual=True,
        **options,
    )


def shapes(B, T, S, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((B, T, N, H), dtype),
        jax.ShapeDtypeStruct((B, S, K, H), dtype),
        jax.ShapeDtypeStruct((B, S, K, H), dtype),
    ]


def export(arguments, **options) -> jax.export.Exported:
    """The program, after it was written and read back."""
    function = jax.jit(functools.partial(attend, **options))
    exported = jax.export.export(function, platforms=["cuda"], disabled_checks=EXPORT_CHECKS)(
        *arguments
    )
    return jax.export.deserialize(exported.serialize())


def calls(program: jax.export.Exported) -> list[str]:
    """Targets of the program's custom calls that are not JAX's own checks of shapes."""
    targets = re.findall(r"custom_call @(\w+)", program.mlir_module())
    return [target for target in targets if target != "shape_assertion"]


@pytest.mark.parametrize("implementation", [None, "cute"])
def test_fixed_dimensions(implementation: str | None) -> None:
    program = export(shapes(2, 300, 500), is_causal=True, implementation=implementation)
    assert calls(program) == [CALL_TARGET]
    assert program.platforms == ("cuda",)
    out, lse = program.out_avals
    assert (out.shape, out.dtype) == ((2, 300, N, H), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 300, N), jnp.float32)


@pytest.mark.parametrize("implementation", [None, "cute"])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_symbolic_batch_and_lengths(implementation: str | None, with_lengths: bool) -> None:
    B, T, S = jax.export.symbolic_shape("b, t, s")
    arguments = shapes(B, T, S)
    if with_lengths:
        arguments.append(jax.ShapeDtypeStruct((B,), jnp.int32))
    program = export(arguments, is_causal=True, implementation=implementation)
    assert calls(program) == [CALL_TARGET]
    out, lse = program.out_avals
    assert str(out.shape) == f"(b, t, {N}, {H})"
    assert str(lse.shape) == f"(b, t, {N})"


@pytest.mark.parametrize("dimensions", ["2, 300, 500", "b, t, s"])
def test_gradients(dimensions: str) -> None:
    """One call forward and one backward; the backward's scratch follows the lengths too."""

    def loss(query, key, value):
        out, lse = attend(query, key, value, is_causal=True)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    given = shapes(*jax.export.symbolic_shape(dimensions))
    exported = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
        platforms=["cuda"],
        disabled_checks=EXPORT_CHECKS,
    )(*given)
    program = jax.export.deserialize(exported.serialize())
    assert calls(program) == [CALL_TARGET] * 2
    assert [str(x.shape) for x in program.out_avals] == [str(x.shape) for x in given]


def test_gradients_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kernels; where the backward's refuses, the forward kernel and then the XLA path."""
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_100a")
    bias = jax.ShapeDtypeStruct((1, 1, 1, 500), jnp.float32)

    def gradients(head_dim, of, implementation=None, *, has_rule=True, deterministic=False):
        how = {"implementation": implementation, "deterministic": deterministic}

        def loss(query, key, value, bias):
            given = {"bias": bias}
            if not has_rule:
                given = {"score_mod": lambda score, b, h, q, kv: without_rule(score)}
            out, _ = attend(query, key, value, **given, **how)
            return jnp.sum(out)

        given = [x.update(shape=(*x.shape[:3], head_dim)) for x in shapes(2, 300, 500)]
        return jax.export.export(
            jax.jit(jax.grad(loss, of)), platforms=["cuda"], disabled_checks=EXPORT_CHECKS
        )(*given, bias)

    for head_dim, deterministic in ((64, False), (256, True)):
        program = gradients(head_dim, (0, 3), "cute", deterministic=deterministic)
        assert calls(program) == [CALL_TARGET] * 2
    assert calls(gradients(64, 0, has_rule=False)) == [CALL_TARGET]
    with pytest.raises(NotImplementedError, match="the primitive lgamma has no rule"):
        gradients(64, 0, "cute", has_rule=False)


def test_a_symbolic_offset() -> None:
    """The last query row stands at the last key: the offset is known when the program runs."""
    B, T, S = jax.export.symbolic_shape("b, t, s", constraints=["s >= t"])

    def decode(query, key, value):
        offset = jnp.asarray(key.shape[1] - query.shape[1], jnp.int32)
        return flash_attention(query, key, value, is_causal=True, q_offset=offset)

    exported = jax.export.export(
        jax.jit(decode), platforms=["cuda"], disabled_checks=EXPORT_CHECKS
    )(*shapes(B, T, S))
    assert calls(jax.export.deserialize(exported.serialize())) == [CALL_TARGET]


def test_symbolic_and_fixed_dimensions_share_a_kernel() -> None:
    B, T, S = jax.export.symbolic_shape("b, t, s")
    export(shapes(2, 300, 500))
    before = store.compiles()
    export(shapes(B, T, S))
    assert store.compiles() == before


def export_for_both(implementation: str | None) -> jax.export.Exported:
    function = jax.jit(functools.partial(attend, is_causal=True, implementation=implementation))
    exported = jax.export.export(
        function, platforms=["cpu", "cuda"], disabled_checks=EXPORT_CHECKS
    )(*shapes(2, 30, 50))
    assert CALL_TARGET in exported.mlir_module()
    return jax.export.deserialize(exported.serialize())


def arrays(B, T, S) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s.shape), s.dtype) for s in shapes(B, T, S)]


def test_a_program_for_both_takes_the_xla_path_on_a_cpu() -> None:
    given = arrays(2, 30, 50)
    out, lse = export_for_both(None).call(*given)
    expected = attend(*given, is_causal=True, implementation="xla")
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_a_kernel_asked_for_by_name_does_not_run_on_a_cpu() -> None:
    given = arrays(2, 30, 50)
    with pytest.raises(NotImplementedError, match=r"on CUDA only; .* lowered for cpu"):
        jax.jit(functools.partial(attend, implementation="cute"))(*given)
    with pytest.raises(RuntimeError, match=CALL_TARGET):
        jax.block_until_ready(export_for_both("cute").call(*given))


def test_an_unexportable_call_target_is_named() -> None:
    """Without ``EXPORT_CHECKS``, JAX refuses and says which target it does not know."""
    with pytest.raises(ValueError, match=CALL_TARGET):
        jax.export.export(jax.jit(attend), platforms=["cuda"])(*shapes(2, 300, 500))


def test_without_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "target", lambda: None)
    for implementation in (None, "cute"):
        with pytest.raises(NotImplementedError, match=f"set {plan.ARCH_VARIABLE} to .* sm_90a"):
            export(shapes(2, 300, 500), implementation=implementation)


def test_an_architecture_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_80")
    assert calls(export(shapes(2, 300, 500))) == []
    with pytest.raises(NotImplementedError, match=r"kernels exist for sm_90a.*, not for sm_80"):
        export(shapes(2, 300, 500), implementation="cute")


@pytest.mark.parametrize("group", [1, 2])
def test_new_shapes_compile_nothing(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over batch, lengths and the number of heads; each is lowered, as by ``jax.jit`` on a GPU.

    After the first; where heads may share tiles, after one call that does and one that does not.
    """
    rng = np.random.default_rng(0)
    seen = [(2, 40, 200, 2), (2, 1920, 200, 2)][-group:]
    while len(seen) < group + 50:
        seen.append(tuple(int(x) for x in rng.integers(1, (9, 5000, 5000, 9))))
    assert len(set(seen)) == len(seen)
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path))
    store.forget()
    before, counts, objects = store.compiles(), [], set()
    for B, T, S, k in seen:
        query = jax.ShapeDtypeStruct((B, T, group * k, H), jnp.bfloat16)
        key = jax.ShapeDtypeStruct((B, S, k, H), jnp.bfloat16)
        lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
        call = jax.jit(functools.partial(attend, is_causal=True))
        lowered = call.trace(query, key, key, lengths).lower(lowering_platforms=("cuda",))
        objects.update(re.findall(r'key = "([^"]+)"', lowered.as_text()))
        counts.append(store.compiles() - before)
    assert counts == [*range(1, group + 1), *[group] * 50]
    assert len(objects) == group


def test_what_makes_another_kernel() -> None:
    """Each of these is another object, and calling them again is not."""
    variants = [{}, {"is_causal": True}, {"scale": 0.1}, {"local_window_size": (5, 0)}]

    def objects() -> list[str]:
        found = []
        for options in variants:
            text = export(shapes(2, 300, 500), **options).mlir_module()
            found += re.findall(r'key = "([^"]+)"', text)
        return found

    first = objects()
    before = store.compiles()
    assert objects() == first
    assert store.compiles() == before
    assert len(set(first)) == len(variants)
