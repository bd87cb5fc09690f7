"""Native sparse attention whole: a JAX program on the CPU whose kernels are simulated."""

import functools
import threading

import jax
import numpy as np
import pytest

from jax_flashcute import plan
from jax_flashcute.ffi import call
from jax_flashcute.kernels import registry
from jax_flashcute.nsa import NSAConfig
from tests.nsa_cases import Case, check
from tests.simulator import simulate
from tests.simulator.compiled import kernel_of

_one_at_a_time = threading.Lock()


class Simulated:
    """Stands in for the primitive of a kernel: runs it in simulation where its results are used."""

    def __init__(self, bind, how: dict):
        self.bind = functools.partial(bind, how)


def run(how: dict, key, inputs, results, scratch=()) -> list[jax.Array]:
    """The results of a kernel's simulation, in a program on the CPU."""
    outputs = [(tuple(shape), np.dtype(dtype)) for shape, dtype in (*results, *scratch)]

    kernel = kernel_of(key)  # while the program is traced: the compiler is for one thread

    def on_host(*arrays):
        with _one_at_a_time:
            found = simulate(kernel, *map(np.asarray, arrays), outputs=outputs, **how)
        return tuple(found[: len(results)])

    shapes = tuple(jax.ShapeDtypeStruct(*output) for output in outputs[: len(results)])
    return list(jax.pure_callback(on_host, shapes, *inputs))


def of_forward(how: dict, *leaves, spec, tree):
    operands = jax.tree.unflatten(tree, leaves)
    key = plan.make_plan(spec, operands)
    query, key_, value = operands.query, operands.key, operands.value
    rows = query.shape[:3]
    results = [((*rows, value.shape[3]), query.dtype), (rows, "float32")]
    inputs = [query, key_, value, *call.other_inputs(key, spec, operands)]
    return run(how, key, inputs, results, registry.scratch_shapes(key, operands))


def of_backward(how: dict, *leaves, spec, tree):
    operands, saved, dout, dlse = jax.tree.unflatten(tree, leaves)
    key = plan.make_plan(spec, operands, "bwd")
    main = [operands.query, operands.key, operands.value]
    inputs = [*main, saved.out, saved.lse, dout, dlse, *call.other_inputs(key, spec, operands)]
    results = [(x.shape, x.dtype) for x in main]
    return run(how, key, inputs, results, registry.scratch_shapes(key, operands))


def of_nsa(how: dict, *arrays, key, shapes):
    return run(how, plan.make_nsa_plan(key), arrays, shapes)


def check_simulated(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    *,
    arch: str = "sm_90a",
    backward: bool = True,
    **how,
) -> None:
    """Against float64, every kernel simulated, few multiprocessors."""
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", f"{arch}:3")
    for name, bind in (
        ("_forward_p", of_forward),
        ("_backward_p", of_backward),
        ("_nsa_p", of_nsa),
    ):
        monkeypatch.setattr(call, name, Simulated(bind, how))
    jax.clear_caches()
    try:
        check(case, "bfloat16", "cute", monkeypatch, backward=backward)
    finally:
        jax.clear_caches()  # no other test may meet what was traced here


# Groups, head_dims, lengths below a tile and below a block, more blocks selected than there are.
CASES = {
    "64_group_3": Case(200, 1, 3, 64, NSAConfig(64, 2, 70, 128)),
    "96_group_5": Case(300, 1, 5, 96, NSAConfig(64, 3, 100, 128, complete_only=True)),
    "128_group_4": Case(333, 2, 4, 128, NSAConfig(64, 99, 40, 256), batch=2),
    "128_group_1_below_a_tile": Case(100, 2, 1, 128, NSAConfig(64, 2, 30, 128)),
    "64_group_4_below_a_block": Case(40, 1, 4, 64, NSAConfig(64, 2, 30, 128)),
}


def test_forward_under_adversarial_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"timing": "shuffled", "warps": "adversarial", "seed": 3}
    check_simulated(CASES["64_group_3"], monkeypatch, backward=False, **how)


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), [("early", "adversarial"), ("shuffled", "seeded")])
@pytest.mark.parametrize("name", CASES)
def test_all_gradients_under_any_timing(
    name: str, timing: str, warps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_simulated(CASES[name], monkeypatch, timing=timing, warps=warps, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_gradients_on_blackwell(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lists have tiles of 128 keys, and so have blocks that its kernels take."""
    case = Case(300, 1, 3, head_dim, NSAConfig(128, 2, 70, 128))
    check_simulated(case, monkeypatch, arch="sm_100a", timing="shuffled", warps="seeded", seed=3)
