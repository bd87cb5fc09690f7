"""Every backward configuration, cross-compiled for sm_90a: what ptxas made of it.

No GPU is needed.  The launches are the launcher's own, recorded on the CPU.
"""

import shutil

import pytest

from jax_flashcute.ffi.resources import ResourceReport, find_tools, report
from jax_flashcute.kernels.config.memory import SMEM_BYTES
from jax_flashcute.kernels.config.sm90 import backward_config
from jax_flashcute.kernels.config.workspace import workspace_shapes
from tests.cases import Case
from tests.kernels.backward_launchers import Launcher, launcher
from tests.simulator.simulation import record_launches

BATCH, LENGTH, KV_HEADS = 2, 3000, 2


def call(head_dim: int, head_dim_v: int, group: int = 1, **features) -> Case:
    return Case(BATCH, LENGTH, LENGTH, KV_HEADS, group, head_dim, head_dim_v, **features)


HEAD_DIMS = [(8, 8), (64, 64), (72, 40), (96, 96), (64, 128), (128, 128)]
HEAD_DIMS += [(64, 256), (192, 128), (192, 192), (256, 256)]
EVERYTHING = {"causal": True, "offset": True, "lengths": True}
ALWAYS = {
    "64": call(64, 64),
    "72_40_everything": call(72, 40, 7, **EVERYTHING),
    "128_everything": call(128, 128, **EVERYTHING),
    "256_everything": call(256, 256, **EVERYTHING),
    "128_window": call(128, 128, window=(300, 20)),
}
ALL = {
    f"{h}_{hv}_{name}": call(h, hv, group, **features)
    for h, hv in HEAD_DIMS
    for name, group, features in (
        ("full", 1, {}),
        ("causal", 1, {"causal": True}),
        ("everything", 7, EVERYTHING),
        ("window", 1, {"window": (300, 20)}),
    )
}
SUMMED, IN_TURNS, APART = {}, {"deterministic": True}, {"may_part": True}
PARAMETERS = [
    *(pytest.param(case, "bfloat16", SUMMED, id=name) for name, case in ALWAYS.items()),
    pytest.param(ALWAYS["128_everything"], "bfloat16", IN_TURNS, id="128_deterministic"),
    pytest.param(ALWAYS["256_everything"], "bfloat16", APART, id="256_apart"),
    *(
        pytest.param(case, dtype, how, id=f"{name}_{label}", marks=pytest.mark.slow)
        for name, case in ALL.items()
        for dtype, how, label in (
            ("bfloat16", SUMMED, "bfloat16"),
            ("float16", SUMMED, "float16"),
            ("bfloat16", IN_TURNS, "deterministic"),
            ("bfloat16", APART, "apart"),
            ("float16", APART, "apart_float16"),
        )
        if how is not APART or case.head_dim >= 192
    ),
]


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))


def main_reports(kernel: Launcher) -> list[ResourceReport]:
    """Of the kernels that do the products; the one of dK and dV comes last."""
    cubin = kernel.compiled().cubin
    assert cubin is not None
    found = [r for r in report(cubin) if r.count("HGMMA")]
    return sorted(found, key=lambda each: "QueryGradient" not in each.kernel)


@pytest.mark.parametrize(("case", "dtype", "how"), PARAMETERS)
def test_code(case: Case, dtype: str, how: dict) -> None:
    config = backward_config(case.head_dim, case.head_dim_v, **how)
    kernel = launcher(case, dtype, config=config)
    compiled = kernel.compiled()
    *others, found = main_reports(kernel)
    tilings = [config, *([config.dq_pass] if config.dq_pass else [])]
    for each, tiling in zip((found, *others), tilings, strict=True):
        assert each.reallocated_registers == (tiling.producer_registers, tiling.consumer_registers)
        assert each.highest_register < tiling.consumer_registers
        # At launch every warpgroup has the same number.
        assert 128 * (tiling.warpgroups + 1) * each.registers <= 65536
    assert compiled.cubin is not None
    for each in report(compiled.cubin):
        assert (each.spill_loads, each.spill_stores) == (0, 0), each.kernel
        assert (each.stack_bytes, each.local_bytes) == (0, 0), each.kernel
    # One instruction for each product that was written and one wait for each wait: where ptxas
    # cannot follow the accumulators, it serialises products by waiting for each.
    assert compiled.ptx is not None
    for sass, ptx in (("HGMMA", "wgmma.mma_async"), ("WARPGROUP.DEPBAR", "wgmma.wait_group")):
        assert sum(each.count(sass) for each in (found, *others)) == compiled.ptx.count(ptx)
    # Q, dO, K and V come by TMA, dK and dV leave by it; dQ leaves by bulk reductions, or from
    # registers.
    assert all(each.count("UTMALDG") >= 4 for each in (found, *others))
    assert found.count("UTMASTG") >= 2
    assert (found.count("UBLKRED") >= 1) == (config.dq_pass is None)
    # No gradient is added element by element; warps count their turns, and how far heads are.
    turns = config.dq_warps(case.head_dim) if config.deterministic else 0
    counts = found.count("RED") + found.count("REDG") + found.count("ATOMG")
    heads = 0 if config.dq_pass else 1 + config.dq_warps(case.head_dim)
    assert counts == turns + heads


@pytest.mark.skipif(shutil.which("cc") is None, reason="recording a launch needs a C compiler")
@pytest.mark.parametrize(("case", "dtype", "how"), PARAMETERS)
def test_launches(case: Case, dtype: str, how: dict) -> None:
    config = backward_config(case.head_dim, case.head_dim_v, **how)
    kernel = launcher(case, dtype, config=config)
    heads = KV_HEADS * case.group
    q, o = ((BATCH, LENGTH, heads, h) for h in (case.head_dim, case.head_dim_v))
    k, v = ((BATCH, LENGTH, KV_HEADS, h) for h in (case.head_dim, case.head_dim_v))
    rows = (BATCH, LENGTH, heads)
    optional = [rows if name == "dlse" else (BATCH,) for name in kernel.optional]
    scratch = workspace_shapes(
        config, BATCH, LENGTH, LENGTH, heads, KV_HEADS, case.head_dim, case.head_dim_v
    )
    dims = [q, k, v, o, rows, o, *optional, q, k, v, *(shape for shape, _ in scratch)]
    buffers = [(256 * (i + 1) << 32, dim) for i, dim in enumerate(dims)]
    before, main, after = record_launches(kernel.compiled(), buffers, num_sms=132)
    m_blocks, n_blocks = -(-LENGTH // config.tile_m), -(-LENGTH // config.tile_n)
    assert before.grid == (m_blocks * heads * BATCH, 1, 1)
    after_blocks = m_blocks if config.dq_pass is None else -(-LENGTH // config.dq_pass.tile_m)
    assert after.grid == (after_blocks * heads * BATCH, 1, 1)
    assert main.grid == (n_blocks * KV_HEADS * BATCH, 1, 1)
    assert main.block == (128 * (config.warpgroups + 1), 1, 1)
    for launch, tiling in ((main, config), (after, config.dq_pass)):
        if tiling is not None:
            smem = tiling.smem_bytes(case.head_dim, case.head_dim_v)
            # Barriers and alignment come on top.
            assert smem < launch.shared_bytes <= smem + 1024
            assert launch.shared_bytes <= SMEM_BYTES
