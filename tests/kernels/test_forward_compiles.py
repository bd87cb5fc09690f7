"""Every forward configuration, cross-compiled for sm_90a: what ptxas made of it.

No GPU is needed.  The launch is the launcher's own, recorded on the CPU.
"""

import dataclasses
import functools
import importlib.util
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_flashcute import masks
from jax_flashcute.ffi.compile import ArrayType, CompiledKernel, compile_kernel
from jax_flashcute.ffi.resources import ResourceReport, find_tools, report
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.memory import SMEM_BYTES
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.kernels.sm90.fragments import ROWS_PER_THREAD
from jax_flashcute.spec import AttentionSpec, Operands
from tests.simulator.simulation import record_launches

ARCH = "sm_90a"
BATCH, LENGTH, KV_HEADS, NUM_SMS = 2, 3000, 2, 132


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the kernel, by what its plan depends on."""

    head_dim: int
    head_dim_v: int
    mask: str
    group: int = 1
    q_length: int = LENGTH
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        packed = "" if self.q_length == LENGTH else "-packed"
        return f"{self.head_dim}-{self.head_dim_v}-{self.mask}-{self.group}{packed}-{self.dtype}"


SPECS = {
    "full": AttentionSpec(0.125),
    "causal": AttentionSpec(0.125, is_causal=True),
    "window": AttentionSpec(0.125, local_window_size=(300, 20)),
}
HEAD_DIMS = [
    *((8, 8), (64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (192, 192)),
    *((256, 256), (64, 256), (256, 128)),
]
# Every pair of head_dims with a causal mask, lengths and offset; the rest where it differs most.
ALWAYS = [
    *(Call(h, hv, "causal") for h, hv in HEAD_DIMS),
    Call(64, 64, "full"),
    Call(128, 128, "full"),
    Call(128, 128, "window"),
    Call(128, 128, "causal", group=8, q_length=1, dtype="float16"),
    Call(256, 256, "causal", group=7, q_length=1),
    Call(256, 256, "window"),
    Call(256, 256, "full"),
]
ALL = [
    *(Call(h, hv, mask) for h, hv in HEAD_DIMS for mask in SPECS),
    *(Call(h, hv, "causal", 7, length) for h, hv in HEAD_DIMS for length in (1, LENGTH)),
    *(Call(h, hv, mask, dtype="float16") for h, hv in HEAD_DIMS for mask in ("full", "window")),
]
CALLS = [
    *(pytest.param(call, id=str(call)) for call in ALWAYS),
    *(
        pytest.param(call, id=str(call), marks=pytest.mark.slow)
        for call in dict.fromkeys(ALL)
        if call not in ALWAYS
    ),
]


def shapes(call: Call) -> Operands:
    dtype = jnp.dtype(call.dtype)
    kv = (BATCH, LENGTH, KV_HEADS)
    query = (BATCH, call.q_length, KV_HEADS * call.group, call.head_dim)
    integers = None if call.mask == "full" else jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return Operands(
        query=jax.ShapeDtypeStruct(query, dtype),
        key=jax.ShapeDtypeStruct((*kv, call.head_dim), dtype),
        value=jax.ShapeDtypeStruct((*kv, call.head_dim_v), dtype),
        q_offset=integers,
        query_seq_lengths=integers,
        key_value_seq_lengths=integers,
    )


@functools.cache
def compiled(call: Call) -> tuple[KernelKey, CompiledKernel]:
    key = registry.kernel_key(SPECS[call.mask], shapes(call), "fwd", ARCH, NUM_SMS)
    return key, compile_key(key)


def compile_key(key: KernelKey) -> CompiledKernel:
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    return compile_kernel(registry.builder(key), arrays, key.arch, keep_intermediates=True)


def main_report(kernel: CompiledKernel) -> ResourceReport:
    """Of the kernel that does the products."""
    assert kernel.cubin is not None
    products = ("HGMMA", "UTCHMMA")
    (found,) = (r for r in report(kernel.cubin) if any(map(r.count, products)))
    return found


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("call", CALLS)
def test_code(call: Call) -> None:
    key, kernel = compiled(call)
    assert key.pack_gqa == (call.q_length == 1 and call.group > 1)
    found = main_report(kernel)
    config = key.config
    reallocated = (config.producer_registers, config.consumer_registers)
    assert found.reallocated_registers == (reallocated if config.reallocates_registers else ())
    assert found.highest_register < config.consumer_registers
    # At launch every warpgroup has the same number.
    assert 128 * (config.warpgroups + 1) * found.registers <= 65536
    assert kernel.cubin is not None
    for each in report(kernel.cubin):
        assert (each.spill_loads, each.spill_stores) == (0, 0)
        assert (each.stack_bytes, each.local_bytes) == (0, 0)
    # One instruction for each product that was written and one wait for each wait: where ptxas
    # cannot follow the accumulators, it serialises products by waiting for each.
    assert kernel.ptx is not None
    assert found.count("HGMMA") == kernel.ptx.count("wgmma.mma_async")
    assert found.count("WARPGROUP.DEPBAR") == kernel.ptx.count("wgmma.wait_group")
    assert found.count(f"HGMMA.64x{config.tile_n}x16") > 0
    # Q, K and V come by TMA.
    assert found.count("UTMALDG") >= 3
    # Eight bits of a mask word become predicates at once; without bounds that differ between the
    # lanes of a warp, ptxas may have uniform predicates instead.
    if call.mask != "full":
        assert found.count("R2P") >= ROWS_PER_THREAD * (config.tile_n // 4 // 8)
    # Rows of O leave by TMA where there are two query tiles as wide, else 16 bytes at a time.
    by_tma = config.q_stages > 1 and call.head_dim == call.head_dim_v
    assert found.count("UTMASTG" if by_tma else "STG.E.128") > 0


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (128, "float32"), (128, "bfloat16"), (256, "float32"), (256, "float16")],
)
def test_a_bias_over_queries_and_keys_comes_by_tma(head_dim: int, dtype: str) -> None:
    """Nothing is spilled, and no thread reads global memory."""
    operands = shapes(Call(head_dim, head_dim, "full", group=2))
    bias = jax.ShapeDtypeStruct((1, 1, LENGTH, LENGTH), jnp.dtype(dtype))
    operands = dataclasses.replace(operands, bias=bias)
    key = registry.kernel_key(SPECS["full"], operands, "fwd", ARCH, NUM_SMS)
    assert (key.config.bias_itemsize, key.config.cluster) == (jnp.dtype(dtype).itemsize, 2)
    kernel = compile_key(key)
    found = main_report(kernel)
    assert (found.spill_loads, found.spill_stores, found.stack_bytes) == (0, 0, 0)
    assert found.count("LDG") == 0
    assert found.count("UTMALDG") >= 4
    assert kernel.ptx is not None
    assert found.count("WARPGROUP.DEPBAR") == kernel.ptx.count("wgmma.wait_group")


@pytest.mark.parametrize("page_size", [None, 1, 2, 8])
@pytest.mark.parametrize(("q_length", "group"), [(1, 4), (1, 1), (64, 4), (300, 1)])
def test_l2_gives_up_first_what_one_block_reads(
    page_size: int | None, q_length: int, group: int
) -> None:
    """Of 64 queries the heads of a group share no tile, and of 300 several tiles read each key."""
    operands = shapes(Call(128, 128, "causal", group, q_length))
    if page_size is not None:
        page = (BATCH * LENGTH, page_size, KV_HEADS, 128)
        operands = dataclasses.replace(
            operands,
            key=jax.ShapeDtypeStruct(page, jnp.bfloat16),
            value=jax.ShapeDtypeStruct(page, jnp.bfloat16),
            page_table=jax.ShapeDtypeStruct((BATCH, LENGTH // page_size), jnp.int32),
        )
    key = registry.kernel_key(SPECS["causal"], operands, "fwd", ARCH, NUM_SMS)
    ptx = compile_key(key).ptx
    assert ptx is not None
    by_threads = re.findall(r"cp\.async\.cg\.shared\.global(\S*)", ptx)
    assert bool(by_threads) == (page_size == 1)
    assert key.config.reads_keys_once == (q_length == 1)
    assert ("createpolicy.fractional.L2::evict_first" in ptx) == (q_length == 1)
    assert set(by_threads) <= {".L2::cache_hint" if q_length == 1 else ""}


@pytest.mark.skipif(shutil.which("cc") is None, reason="recording a launch needs a C compiler")
@pytest.mark.parametrize("call", CALLS)
def test_launch(call: Call) -> None:
    key, kernel = compiled(call)
    config = key.config
    T, N = call.q_length, KV_HEADS * call.group
    kv = (BATCH, LENGTH, KV_HEADS)
    dims = [(BATCH, T, N, call.head_dim), (*kv, call.head_dim), (*kv, call.head_dim_v)]
    dims += [(BATCH,)] * len(key.optional)
    dims += [(BATCH, T, N, call.head_dim_v), (BATCH, T, N)]
    dims += [shape for shape, _ in registry.scratch_shapes(key, shapes(call))]
    buffers = [(256 * (i + 1) << 32, dim) for i, dim in enumerate(dims)]
    launches = iter(record_launches(kernel, buffers, num_sms=NUM_SMS))
    heads = call.group if key.pack_gqa else 1
    m_blocks = -(-T // (64 // heads * config.warpgroups))
    splits = registry.num_splits(key.arch, key.interval, shapes(call), NUM_SMS)
    tiles = m_blocks * BATCH * N // heads * splits
    if tiles > NUM_SMS or config.joins_parts:
        assert next(launches).grid == (1, 1, 1)
    main, *combine = launches
    has_combine = key.split_kv and not config.joins_parts
    assert [c.grid for c in combine] == ([(-(-BATCH * T * N // 4), 1, 1)] if has_combine else [])
    smem = config.smem_bytes(call.head_dim, call.head_dim_v)
    # Barriers and alignment come on top.
    assert smem < main.shared_bytes <= smem + 1024
    assert main.shared_bytes <= SMEM_BYTES
    assert main.block == (128 * (config.warpgroups + 1), 1, 1)
    assert (splits > 1) == key.split_kv
    spreads = (splits > 1 or config.reads_keys_once) and 2 * tiles > NUM_SMS
    assert main.grid == (NUM_SMS if spreads else min(tiles, NUM_SMS), 1, 1)


def test_what_is_no_cubin() -> None:
    with pytest.raises(ValueError, match="cubin: "):
        report(b"not a cubin")


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    find_tools.cache_clear()
    try:
        with pytest.raises(ImportError, match="nvidia-cuda-cuobjdump"):
            report(b"")
    finally:
        find_tools.cache_clear()


def test_an_opcode_is_counted_with_its_modifiers() -> None:
    opcodes = {"STG.E": 2, "STG.E.128": 3, "STGX": 5}
    found = ResourceReport("kernel", 0, 0, 0, 0, 0, 0, 0, (), opcodes)
    counts = [found.count(opcode) for opcode in ("STG", "STG.E", "STG.E.128", "ST", "LDG")]
    assert counts == [5, 5, 3, 0, 0]


def test_a_configuration_that_spills_is_seen() -> None:
    """More registers for accumulators than a thread has: refused, and rightly."""
    key, _ = compiled(Call(64, 64, "full"))
    config = FwdConfig(3, 176, 1, consumer_registers=160, producer_registers=32)
    assert any("accumulators alone" in r for r in config.reasons_invalid(64, 128))
    key = dataclasses.replace(key, head_dim_v=128, config=config)
    found = main_report(compile_key(key))
    assert found.spill_stores > 0
    assert found.spill_loads > 0
    assert found.stack_bytes + found.local_bytes > 0


@pytest.mark.parametrize(
    ("arch", "keys", "dtype", "opcode", "bytes_a_load"),
    [
        ("sm_90a", LENGTH, "float32", "LDG.E.64", 8),
        ("sm_90a", LENGTH, "bfloat16", "LDG.E", 4),
        ("sm_90a", LENGTH + 1, "bfloat16", "LDG.E.U16", 2),
        ("sm_100a", LENGTH, "bfloat16", "LDG.E.128", 16),
    ],
)
def test_what_lies_along_keys_is_read_at_once(
    arch: str, keys: int, dtype: str, opcode: str, bytes_a_load: int
) -> None:
    """A table by query and key, in a kernel that reads nothing else from threads."""
    table = jnp.zeros((LENGTH, keys), dtype)

    def score_mod(score, b, h, q, kv):
        return score - table[q, kv].astype(jnp.float32)

    traced, arrays = masks.trace_score(score_mod, jnp.float32)
    kv = jax.ShapeDtypeStruct((BATCH, keys, KV_HEADS, 128), jnp.bfloat16)
    operands = Operands(
        query=jax.ShapeDtypeStruct((BATCH, LENGTH, KV_HEADS, 128), jnp.bfloat16),
        key=kv,
        value=kv,
        batch_index=jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        score_mod_arrays=arrays,
    )
    spec = AttentionSpec(0.125, score_mod=traced)
    kernel = compile_key(registry.kernel_key(spec, operands, "fwd", arch, NUM_SMS))
    found = main_report(kernel)
    assert (found.spill_loads, found.spill_stores) == (0, 0)
    loads = {name: n for name, n in found.opcodes.items() if name.startswith("LDG")}
    assert max(loads, key=loads.__getitem__) == opcode, loads
    # Blackwell's threads have a row of 32 columns at once; Hopper's two rows of 32.
    columns = 64 if arch == "sm_90a" else 32
    per_tile = columns * table.dtype.itemsize // bytes_a_load
    assert loads[opcode] % per_tile == 0
