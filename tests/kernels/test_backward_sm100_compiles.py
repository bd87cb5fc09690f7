"""Every Blackwell backward configuration, cross-compiled: what ptxas made of it.

No GPU is needed, and none has run these kernels.
"""

import shutil

import pytest

from jax_flashcute.ffi.resources import find_tools, report
from jax_flashcute.kernels.config.memory import SMEM_BYTES
from jax_flashcute.kernels.config.sm100 import backward_config_sm100
from jax_flashcute.kernels.config.workspace import workspace_shapes
from tests.cases import Case
from tests.kernels.backward_launchers import launcher
from tests.simulator.simulation import record_launches

BATCH, LENGTH, KV_HEADS = 2, 3000, 2
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "everything": {"causal": True, "offset": True, "lengths": True, "group": 7},
    "window": {"window": (300, 20), "offset": True, "lengths": True},
}
HEAD_DIMS = [(8, 8), (64, 64), (72, 40), (96, 96), (64, 128), (128, 128)]
HEAD_DIMS += [(192, 128), (160, 160), (64, 256)]


def call(head_dim: int, head_dim_v: int, features: str) -> Case:
    shape = {"group": 1} | FEATURES[features]
    return Case(BATCH, LENGTH, LENGTH, KV_HEADS, head_dim=head_dim, head_dim_v=head_dim_v, **shape)


ALWAYS = [(128, 128, "everything", "sm_103a", False), (64, 64, "window", "sm_100a", True)]
ALL = [
    (h, hv, features, arch, deterministic)
    for h, hv in HEAD_DIMS
    for features in FEATURES
    for arch in ("sm_100a", "sm_103a")
    for deterministic in (False, True)
    if (h, hv, features, arch, deterministic) not in ALWAYS
]


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))
    if shutil.which("cc") is None:
        pytest.skip("recording a launch needs a C compiler")


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "features", "arch", "deterministic"),
    [*ALWAYS, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL)],
)
def test_code(head_dim: int, head_dim_v: int, features: str, arch: str, deterministic: bool):
    case = call(head_dim, head_dim_v, features)
    config = backward_config_sm100(head_dim, head_dim_v, deterministic)
    kernel = launcher(case, "bfloat16", config=config, arch=arch)
    compiled = kernel.compiled()
    assert compiled.cubin is not None
    assert compiled.ptx is not None
    reports = report(compiled.cubin)
    (found,) = (r for r in reports if r.count("UTCHMMA"))
    registers = {config.gradient_registers, config.reduce_registers, config.other_registers}
    assert set(found.reallocated_registers) == registers
    assert found.highest_register < max(registers)
    assert config.threads * found.registers <= 65536
    for each in reports:
        assert (each.spill_loads, each.spill_stores) == (0, 0), each.kernel
        assert (each.stack_bytes, each.local_bytes) == (0, 0), each.kernel
    # A product in the code for each that was written; tensor memory read and written; Q, dO, K and
    # V by TMA, dK and dV too; mask bits eight at once; arithmetic in pairs; dQ by bulk reductions,
    # and nothing added element by element.
    assert found.count("UTCHMMA") == compiled.ptx.count("tcgen05.mma.")
    assert found.count("LDTM") >= 6
    assert found.count("STTM") >= 3
    assert found.count("UTMALDG") >= 4
    assert found.count("UTMASTG") >= 2
    assert found.count("UBLKRED") >= 1
    assert found.count("R2P") >= 8
    assert found.count("FFMA2") >= 32
    turns = 1 if deterministic else 0
    assert found.count("RED") + found.count("REDG") + found.count("ATOMG") == turns
    check_launches(kernel, case)


# The kernels that are simulated too.
FEATURES_OF_PASSES = FEATURES | {"threes": FEATURES["everything"] | {"group": 3}}
PASSES = [(256, 256, "threes", "sm_100a")]
PASSES += [
    (h, hv, features, arch)
    for h, hv in [(256, 256), (192, 192), (136, 256), (256, 8)]
    for features in FEATURES
    for arch in ("sm_100a", "sm_103a")
]


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "features", "arch"),
    [PASSES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in PASSES[1:])],
)
def test_code_of_passes(head_dim: int, head_dim_v: int, features: str, arch: str):
    """A kernel for each gradient: nothing is spilled and nothing added up in global memory."""
    shape = {"group": 1} | FEATURES_OF_PASSES[features]
    case = Case(BATCH, LENGTH, LENGTH, KV_HEADS, head_dim=head_dim, head_dim_v=head_dim_v, **shape)
    kernel = launcher(case, "bfloat16", arch=arch)
    compiled = kernel.compiled()
    assert compiled.cubin is not None
    reports = report(compiled.cubin)
    found = [r for r in reports if r.count("UTCHMMA")]
    assert len(found) == 3
    for each in found:
        (config,) = {(p.gradient_registers, p.other_registers) for p in kernel.config.passes}
        assert set(each.reallocated_registers) == set(config)
        assert each.highest_register < max(config)
        assert each.count("UTMALDG") >= 3
        assert each.count("UTMASTG") >= 2
        assert each.count("R2P") >= 8
        assert each.count("FFMA2") >= 32
    for each in reports:
        assert (each.spill_loads, each.spill_stores) == (0, 0), each.kernel
        assert (each.stack_bytes, each.local_bytes) == (0, 0), each.kernel
        assert each.count("UBLKRED") + each.count("RED") + each.count("ATOMG") == 0
    _, *passes = launches_of(kernel, case)
    blocks = -(-LENGTH // 128) * KV_HEADS * BATCH
    for launch, config in zip(passes, kernel.config.passes, strict=True):
        heads = case.group if config.target == "query" else 1
        assert launch.grid == (blocks * heads, 1, 1)
        assert launch.block == (config.threads, 1, 1)
        smem = config.smem_bytes(head_dim, head_dim_v)
        assert smem < launch.shared_bytes <= min(smem + 1024, SMEM_BYTES)


def launches_of(kernel, case: Case) -> list:
    config = kernel.config
    q, o = ((BATCH, LENGTH, case.q_heads, h) for h in (case.head_dim, case.head_dim_v))
    k, v = ((BATCH, LENGTH, KV_HEADS, h) for h in (case.head_dim, case.head_dim_v))
    rows = (BATCH, LENGTH, case.q_heads)
    optional = [rows if name == "dlse" else (BATCH,) for name in kernel.optional]
    scratch = workspace_shapes(
        config, BATCH, LENGTH, LENGTH, case.q_heads, KV_HEADS, case.head_dim, case.head_dim_v
    )
    dims = [q, k, v, o, rows, o, *optional, q, k, v, *(shape for shape, _ in scratch)]
    buffers = [(256 * (i + 1) << 32, dim) for i, dim in enumerate(dims)]
    return list(record_launches(kernel.compiled(), buffers, num_sms=148))


def check_launches(kernel, case: Case) -> None:
    """Grids and blocks, and shared memory within its limit."""
    config = kernel.config
    before, main, after = launches_of(kernel, case)
    blocks = -(-LENGTH // 128)
    assert before.grid == after.grid == (blocks * case.q_heads * BATCH, 1, 1)
    groups = -(-LENGTH // config.tile_n) * KV_HEADS * BATCH
    assert main.grid == (groups * config.cta_group, 1, 1)
    assert main.cluster == (config.cta_group, 1, 1)
    assert main.block == (config.threads, 1, 1)
    # Barriers and alignment come on top.
    smem = config.smem_bytes(case.head_dim, case.head_dim_v)
    assert smem < main.shared_bytes <= smem + 1024
    assert main.shared_bytes <= SMEM_BYTES
    assert config.columns(case.head_dim, case.head_dim_v) <= 512
