"""What a kernel is compiled for, and the compile key of a call."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jax_flashcute import plan
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.key import Direction
from jax_flashcute.plan import ARCH_VARIABLE, DEFAULT_NUM_SMS, Target
from jax_flashcute.spec import AttentionSpec, Operands

QUERY = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
OPERANDS = Operands(query=QUERY, key=QUERY, value=QUERY)
SPEC = AttentionSpec(0.125)


@pytest.fixture(autouse=True)
def no_architecture_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ARCH_VARIABLE, raising=False)


def with_device(monkeypatch: pytest.MonkeyPatch, **attributes) -> None:
    """A CUDA device with these attributes, and only where CUDA is asked for."""

    def local_devices(backend=None):
        assert backend == "cuda"
        return [SimpleNamespace(**attributes)]

    monkeypatch.setattr(jax, "local_devices", local_devices)


def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def local_devices(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", local_devices)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        *(("9.0", "sm_90a"), ("10.0", "sm_100a"), ("10.3", "sm_103a"), ("12.0", "sm_120a")),
        ("8.0", "sm_80"),
    ],
)
def test_the_target_is_the_device(monkeypatch: pytest.MonkeyPatch, capability, arch) -> None:
    with_device(monkeypatch, compute_capability=capability, core_count=114)
    assert plan.target() == Target(arch, 114)


def test_a_device_that_does_not_tell_its_multiprocessors(monkeypatch) -> None:
    with_device(monkeypatch, compute_capability="9.0")
    assert plan.target() == Target("sm_90a", DEFAULT_NUM_SMS)


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    without_device(monkeypatch)
    assert plan.target() is None
    assert plan.reasons_against(SPEC, OPERANDS, "fwd") == []
    with pytest.raises(NotImplementedError, match=f"set {ARCH_VARIABLE} to .* sm_90a"):
        plan.make_plan(SPEC, OPERANDS)


def test_a_named_architecture_needs_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    without_device(monkeypatch)
    monkeypatch.setenv(ARCH_VARIABLE, "sm_90a")
    assert plan.target() == Target("sm_90a", DEFAULT_NUM_SMS)
    monkeypatch.setenv(ARCH_VARIABLE, "")
    assert plan.target() is None


def test_a_named_architecture_goes_before_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with_device(monkeypatch, compute_capability="8.0", core_count=108)
    monkeypatch.setenv(ARCH_VARIABLE, "sm_90a")
    assert plan.target() == Target("sm_90a", DEFAULT_NUM_SMS)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_plan_is_the_registry_s_key(monkeypatch, direction: Direction) -> None:
    with_device(monkeypatch, compute_capability="9.0", core_count=114)
    key = plan.make_plan(SPEC, OPERANDS, direction)
    assert key == registry.kernel_key(SPEC, OPERANDS, direction, "sm_90a", 114)


def test_an_architecture_without_kernels_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_device(monkeypatch, compute_capability="8.0", core_count=108)
    (reason,) = plan.reasons_against(SPEC, OPERANDS, "fwd")
    assert reason.endswith("not for sm_80")
    with pytest.raises(NotImplementedError, match="not for sm_80"):
        plan.make_plan(SPEC, OPERANDS)


def test_a_plan_is_refused_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARCH_VARIABLE, "sm_80")
    odd = jax.ShapeDtypeStruct((2, 300, 4, 20), jnp.float32)
    with pytest.raises(NotImplementedError) as caught:
        plan.make_plan(SPEC, Operands(query=odd, key=odd, value=odd))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for word, line in zip(
        ("sm_80", "float32", "head_dim", "value head_dim"), lines[1:], strict=True
    ):
        assert line.startswith("  - ")
        assert word in line
