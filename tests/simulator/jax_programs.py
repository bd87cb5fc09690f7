"""JAX programs on the CPU whose kernels are simulated: public calls whole, with their gradients."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

from jax_flashcute import plan
from jax_flashcute.ffi import call, fixed_point
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.elements import summed_arrays
from jax_flashcute.kernels.launchers import has_fixed_sums
from tests.simulator.compiled import kernel_of
from tests.simulator.simulation import simulate

_one_at_a_time = threading.Lock()


class Simulated:
    """Stands in for the primitive of a kernel: runs it in simulation where its results are used."""

    def __init__(self, bind, how: dict):
        self.bind = functools.partial(bind, how)


@contextlib.contextmanager
def simulated_kernels(arch: str = "sm_90a", num_sms: int = 3, **how) -> Iterator[None]:
    """``implementation="cute"`` runs kernels in simulation; ``how``: arguments of ``simulate``."""
    binds = {"_forward_p": of_forward, "_backward_p": of_backward, "_nsa_p": of_nsa}
    stand_ins = {name: Simulated(bind, how) for name, bind in binds.items()}
    jax.clear_caches()
    try:
        with (
            mock.patch.dict("os.environ", {plan.ARCH_VARIABLE: f"{arch}:{num_sms}"}),
            mock.patch.dict(vars(call), stand_ins),
        ):
            yield
    finally:
        jax.clear_caches()  # no other test may meet what was traced here


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
    inputs += call.sum_exponents(key, spec, operands, saved, dout, dlse)
    sums = [
        jax.ShapeDtypeStruct(x.shape, np.dtype(np.float32))
        for group in summed_arrays(spec, operands)
        for x in group
    ]
    functions = key.elements if has_fixed_sums(key) else None
    raw = sums if functions is None else fixed_point.raw(functions, sums)
    results = [(x.shape, x.dtype) for x in (*main, *raw)]
    found = run(how, key, inputs, results, registry.scratch_shapes(key, operands))
    if functions is not None:
        found[3:] = fixed_point.as_floats(functions, inputs[-1], found[3:])
    return found


def of_nsa(how: dict, *arrays, key, shapes):
    return run(how, plan.make_nsa_plan(key), arrays, shapes)
