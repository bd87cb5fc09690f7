"""The same object and inputs on a GPU and in the simulator, for the Hopper forward on 30 shapes.

Runs where there is a GPU of compute capability 9.0 and a C compiler.  Rows without a visible key,
and what lies beyond a length, must agree bit for bit; the rest to a unit in the last place of the
16-bit output, since the tensor cores add in another order.  ``-s`` prints the agreement.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.ffi.runtime import CALL_TARGET, register_call_target
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.simulator import agreement, agreement_table, simulate
from tests.simulator.test_forward_features import CASES, SLOW_CASES, compiled, sized

pytestmark = pytest.mark.gpu

SIMULATED = json.loads(agreement_table.RECORDS[0].read_text())["calls"]
LENGTHS = {
    f"128_{t}_{s}": sized(128, seqlen_q=t, seqlen_k=s, kv_heads=2, causal=causal)
    for t, s, causal in (
        (1, 1, False), (64, 64, True), (65, 127, False), (127, 129, True), (128, 128, False),
        (128, 256, False), (129, 400, True), (300, 200, True), (384, 384, True), (513, 130, False),
        (2, 700, False), (640, 640, True), (200, 63, False),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def num_sms() -> int:
    device = jax.local_devices(backend="cuda")[0]
    if str(device.compute_capability) != "9.0":
        pytest.skip(f"compute capability {device.compute_capability}")
    return device.core_count


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of 16-bit floats, in representable numbers."""

    def ordered(x):
        bits = x.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -32768 - bits, bits)

    return np.abs(ordered(a) - ordered(b))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=n) for n, c in (CASES | SLOW_CASES | LENGTHS).items()]
)
def test_forward(case: Case, num_sms: int):
    arrays = case.arrays(jnp.bfloat16, poison=True)
    operands = Operands(**arrays)
    spec = AttentionSpec(case.head_dim**-0.5, case.causal, case.window)
    key = registry.kernel_key(spec, operands, "fwd", "sm_90a", num_sms)
    kernel = compiled(key)
    inputs = [operands.query, operands.key, operands.value]
    inputs += [arrays[n] for n in OPTIONAL_OPERANDS if n in arrays]
    rows = (case.batch, case.seqlen_q, case.q_heads)
    outputs = [((*rows, case.head_dim_v), np.dtype(ml_dtypes.bfloat16)), (rows, np.dtype("f4"))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    register_call_target()
    call = jax.ffi.ffi_call(CALL_TARGET, [jax.ShapeDtypeStruct(*o) for o in outputs])
    on_gpu = jax.jit(lambda *x: call(*x, module=kernel.object, key=kernel.digest))(*inputs)
    out, lse = (np.asarray(x) for x in on_gpu[:2])
    simulated, simulated_lse, *_ = simulate(
        kernel, *(np.asarray(x) for x in inputs), outputs=outputs, num_sms=num_sms
    )
    distance = ulps(out, simulated)
    print(
        f"{(distance == 0).mean():.4%} of the output equal, at most {distance.max()} units apart; "
        f"log-sum-exp at most {np.nanmax(np.abs(lse - simulated_lse), initial=0):.1e} apart"
    )
    empty = np.isneginf(lse)
    np.testing.assert_array_equal(empty, np.isneginf(simulated_lse))
    np.testing.assert_array_equal(out[empty].view(np.uint16), simulated[empty].view(np.uint16))
    np.testing.assert_allclose(simulated_lse, lse, atol=2e-5, rtol=1e-6)
    np.testing.assert_allclose(
        simulated.astype(np.float32), out.astype(np.float32), atol=2e-3, rtol=2**-7
    )


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.usefixtures("num_sms")
def test_hopper_agrees_with_what_is_simulated_for_blackwell(name: str):
    found = agreement.record(name, "sm_90a", gpu=True)
    for result, entry in found["results"].items():
        there = SIMULATED[name]["results"][result]
        samples = (agreement_table.decoded(x["samples"]) for x in (entry, there))
        apart = agreement_table.error(*samples)
        assert apart < (1e-5 if result == "LSE" else 1e-2), (result, apart)
