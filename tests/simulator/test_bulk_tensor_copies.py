"""TMA tensor copies and clusters: PTX ISA 9.0, 9.7.9 "Asynchronous Copy" and 5.5 "Tensors"."""

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.snippets import execute
from tests.simulator.tensor_map import decode, encode

LOAD = """
  mov.u32 %r1, smem;
  setp.eq.u32 %p7, %tid, 0;
  @%p7 mbarrier.init.shared.b64 [%r1], 1;
  @%p7 fence.mbarrier_init.release.cluster;
  bar.sync 0;
  @!%p7 bra wait;
  mbarrier.arrive.expect_tx.shared.b64 %rd1, [%r1], {size};
  mov.u32 %r10, {x};
  mov.u32 %r11, {y};
  cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes
    [%r1+1024], [%t0, {{%r10, %r11}}], [%r1];
wait:
  mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
  @!%p2 bra wait;
"""
DUMP = """
  mov.u32 %r2, %tid;
dump:
  shl.b32 %r3, %r2, 2;
  add.u32 %r4, %r3, %r1;
  ld.shared.b32 %r5, [%r4+1024];
  cvt.u64.u32 %rd2, %r3;
  add.s64 %rd2, %rd2, %a1;
  st.global.b32 [%rd2], %r5;
  add.u32 %r2, %r2, 32;
  setp.lt.u32 %p1, %r2, {words};
  @%p1 bra dump;
"""


def swizzled(tile, swizzle):
    """Rows of bytes as they lie in shared memory: 16-byte chunk ^= row within the pattern."""
    flat = tile.reshape(-1)
    out = np.empty_like(flat)
    for chunk in range(len(flat) // 16):
        address = 16 * chunk
        if swizzle:
            # PTX ISA "Swizzling Modes": bits 4-6 are xored with bits 7-9, as many as the mode has.
            address ^= (address >> 7 & (swizzle // 16 - 1)) << 4
        out[address : address + 16] = flat[16 * chunk : 16 * chunk + 16]
    return out


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0), (-8, -3), (56, 30), (200, 0)])
def test_tile_load(swizzle, corner):
    """Elements out of bounds read as zero; the whole box counts as transferred."""
    columns = (swizzle or 64) // 2
    source = np.arange(40 * 72, dtype=np.uint16).reshape(40, 72)
    box = (columns, 16)
    size = 2 * columns * 16
    body = LOAD.format(size=size, x=corner[0], y=corner[1]) + DUMP.format(words=size // 4)
    _, got = execute(
        body, source, np.zeros(size, np.uint8), tensor_maps=[
            {"array": 0, "dtype": np.uint16, "extents": (72, 40), "strides": (144,), "box": box,
             "swizzle": swizzle},
        ],
    )  # fmt: skip
    tile = np.zeros((16, columns), np.uint16)
    for i in range(16):
        for j in range(columns):
            y, x = corner[1] + i, corner[0] + j
            if 0 <= y < 40 and 0 <= x < 72:
                tile[i, j] = source[y, x]
    np.testing.assert_array_equal(got, swizzled(tile.view(np.uint8), swizzle))


STORE = """
  mov.u32 %r1, smem;
  mov.u32 %r2, %tid;
fill:
  shl.b32 %r3, %r2, 2;
  add.u32 %r4, %r3, %r1;
  cvt.rn.f32.u32 %r5, %r2;
  st.shared.b32 [%r4], %r5;
  add.u32 %r2, %r2, 32;
  setp.lt.u32 %p1, %r2, 256;
  @%p1 bra fill;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  setp.eq.u32 %p1, %tid, 0;
  mov.u32 %r10, 8;
  mov.u32 %r11, 4;
  @%p1 cp.{opcode}.bulk_group [%t0, {{%r10, %r11}}], [%r1];
  @%p1 cp.async.bulk.commit_group;
  @%p1 cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize(
    ("opcode", "combine"),
    [
        ("async.bulk.tensor.2d.global.shared::cta.tile", lambda old, new: new),
        ("reduce.async.bulk.tensor.2d.global.shared::cta.add.tile", lambda old, new: old + new),
        ("reduce.async.bulk.tensor.2d.global.shared::cta.max.tile", np.maximum),
    ],
)
def test_tile_store_and_reduction(opcode, combine):
    """Only elements in bounds are written."""
    target = np.full((16, 16), 100, np.float32)
    (got,) = execute(
        STORE.replace("{opcode}", opcode).replace("{{", "{").replace("}}", "}"), target,
        tensor_maps=[{"array": 0, "dtype": np.float32, "extents": (16, 16), "strides": (64,),
                      "box": (16, 16)}],
    )  # fmt: skip
    tile = np.arange(256, dtype=np.float32).reshape(16, 16)
    expected = target.copy()
    expected[4:, 8:] = combine(target[4:, 8:], tile[:12, :8])
    np.testing.assert_array_equal(got, expected)


def test_a_tensor_map_survives_encoding():
    raw = encode(
        0x7F0012345600, ml_dtypes.bfloat16, (64, 1 << 20, 7, 3), (1 << 36, 256, 1 << 20),
        (64, 8, 2, 1), 128,
    )  # fmt: skip
    found = decode(raw)
    assert found.address == 0x7F0012345600
    assert found.extents == (64, 1 << 20, 7, 3)
    assert found.strides == (2, 1 << 36, 256, 1 << 20)
    assert found.box == (64, 8, 2, 1)
    assert found.swizzle == 128
    assert found.dtype == ml_dtypes.bfloat16


# ---- clusters: 9.7.9 mapa, 9.7.13 barrier.cluster and mbarrier

EXCHANGE = """
  mov.u32 %r1, smem;
  mov.u32 %r2, %cluster_ctarank;
  add.u32 %r3, %r2, 1000;
  shl.b32 %r4, %tid, 2;
  add.u32 %r5, %r1, %r4;
  add.u32 %r6, %r3, %tid;
  st.shared.b32 [%r5], %r6;
  {barrier}
  xor.b32 %r7, %r2, 1;
  mapa.shared::cluster.u32 %r8, %r5, %r7;
  ld.shared::cluster.b32 %r9, [%r8];
  shl.b32 %r10, %r2, 7;
  add.u32 %r10, %r10, %r4;
  cvt.u64.u32 %rd1, %r10;
  add.s64 %rd1, %rd1, %a0;
  st.global.b32 [%rd1], %r9;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned;
"""
CLUSTER_BARRIER = "barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;"


def test_distributed_shared_memory():
    (got,) = execute(
        EXCHANGE.format(barrier=CLUSTER_BARRIER), np.zeros((2, 32), np.uint32), cluster=2, grid=2
    )
    np.testing.assert_array_equal(got[0], 1001 + np.arange(32))
    np.testing.assert_array_equal(got[1], 1000 + np.arange(32))


def test_distributed_shared_memory_needs_the_cluster_barrier():
    with pytest.raises(SimulationError) as raised:
        execute(EXCHANGE.format(barrier=""), np.zeros((2, 32), np.uint32), cluster=2, grid=2)
    kinds = {f.kind for f in raised.value.findings}
    assert {"shared-memory race", "uninitialised shared memory"} & kinds


MULTICAST = """
  mov.u32 %r1, smem;
  mov.u32 %r20, %cluster_ctarank;
  setp.eq.u32 %p7, %tid, 0;
  @%p7 mbarrier.init.shared.b64 [%r1], 1;
  @%p7 fence.mbarrier_init.release.cluster;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned;
  @%p7 mbarrier.arrive.expect_tx.shared.b64 %rd1, [%r1], 1024;
  setp.eq.u32 %p6, %r20, 0;
  and.pred %p6, %p6, %p7;
  mov.u32 %r10, 0;
  mov.u16 %h1, 3;
  @%p6 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
    [%r1+1024], [%t0, {%r10, %r10}], [%r1], %h1;
wait:
  mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
  @!%p2 bra wait;
  shl.b32 %r4, %tid, 2;
  add.u32 %r5, %r1, %r4;
  ld.shared.b32 %r9, [%r5+1024];
  shl.b32 %r11, %r20, 7;
  add.u32 %r11, %r11, %r4;
  cvt.u64.u32 %rd1, %r11;
  add.s64 %rd1, %rd1, %a1;
  st.global.b32 [%rd1], %r9;
  barrier.cluster.arrive.aligned;
  barrier.cluster.wait.aligned;
"""  # noqa: E501


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_multicast_load_signals_every_block(timing):
    """.multicast::cluster: the data and the signal go to the same offset in each block."""
    source = np.arange(16 * 16, dtype=np.uint32).reshape(16, 16)
    _, got = execute(
        MULTICAST, source, np.zeros((2, 32), np.uint32), cluster=2, grid=2, timing=timing,
        tensor_maps=[{"array": 0, "dtype": np.uint32, "extents": (16, 16), "strides": (64,),
                      "box": (16, 16)}],
    )  # fmt: skip
    np.testing.assert_array_equal(got, np.tile(np.arange(32), (2, 1)))


def test_arriving_at_another_blocks_mbarrier():
    body = """
      mov.u32 %r1, smem;
      mov.u32 %r20, %cluster_ctarank;
      setp.eq.u32 %p7, %tid, 0;
      @%p7 mbarrier.init.shared.b64 [%r1], 64;
      @%p7 fence.mbarrier_init.release.cluster;
      barrier.cluster.arrive.aligned;
      barrier.cluster.wait.aligned;
      mapa.shared::cluster.u32 %r2, %r1, 0;
      mapa.shared::cluster.u32 %r3, %r1, 1;
      mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
      mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
    wait:
      mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r1], 0;
      @!%p2 bra wait;
      red.global.add.u32 [%a0], 1;
      barrier.cluster.arrive.aligned;
      barrier.cluster.wait.aligned;
    """
    (got,) = execute(body, np.zeros(1, np.uint32), cluster=2, grid=4)
    assert got == [128]


def test_a_block_must_outlive_those_that_read_it():
    """Without the last cluster barrier a block may exit while its neighbour still reads it."""
    body = EXCHANGE.format(barrier=CLUSTER_BARRIER)
    last = "barrier.cluster.arrive.aligned;\n  barrier.cluster.wait.aligned;\n"
    assert body.endswith(last)
    kinds = set()
    for seed in range(1, 20):
        try:
            execute(
                body.removesuffix(last), np.zeros((2, 32), np.uint32), cluster=2, grid=2,
                warps="adversarial", seed=seed,
            )  # fmt: skip
        except SimulationError as error:
            kinds |= {f.kind for f in error.findings}
    assert kinds == {"shared memory of an exited block"}
