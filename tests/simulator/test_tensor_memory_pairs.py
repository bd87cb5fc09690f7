"""tcgen05 on pairs of blocks, and copies from shared memory: PTX ISA 9.0, 9.7.16.

``tcgen05.mma`` and ``tcgen05.cp`` of ``cta_group::2``, ``tcgen05.commit`` with multicast, and every
shape of ``tcgen05.cp``.
"""

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.operands import core_matrices
from tests.simulator.ptx import PtxError
from tests.simulator.snippets import execute
from tests.simulator.test_tensor_memory import HIGH

BF16 = ml_dtypes.bfloat16
ROWS = 128

# Each block copies its part of array 1 (WORDS words) to shared memory at 1024, one thread of the
# first block issues `work`, all wait for its commit, and array 0 receives COLUMNS columns.
PROGRAM = """
  mov.u32 %r1, smem;
  mov.u32 %r20, %cluster_ctarank;
  setp.eq.u32 %p7, %tid, 0;
  setp.lt.u32 %p6, %tid, 32;
  setp.eq.and.u32 %p8, %r20, 0, %p7;
  @%p7 mbarrier.init.shared.b64 [%r1], 1;
  @%p7 fence.mbarrier_init.release.cluster;
  @%p6 tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r1+8], 128;
  mul.lo.u32 %r21, %r20, {part};
  cvt.u64.u32 %rd6, %r21;
  add.s64 %rd6, %rd6, %a1;
  mul.lo.u32 %r21, %r20, {result};
  cvt.u64.u32 %rd7, %r21;
  add.s64 %rd7, %rd7, %a0;
  mov.u32 %r2, %tid;
fill:
  shl.b32 %r3, %r2, 2;
  cvt.u64.u32 %rd1, %r3;
  add.s64 %rd1, %rd1, %rd6;
  ld.global.b32 %r4, [%rd1];
  add.u32 %r5, %r1, %r3;
  st.shared.b32 [%r5+1024], %r4;
  add.u32 %r2, %r2, 128;
  setp.lt.u32 %p1, %r2, {words};
  @%p1 bra fill;
  {proxy_fence}
  bar.sync 0;
  {cluster}
  ld.shared.b32 %r10, [%r1+8];
  @!%p8 bra wait;
  add.u32 %r6, %r1, 1024;
  shr.u32 %r6, %r6, 4;
  cvt.u64.u32 %rd2, %r6;
  {work}
  {commit}
wait:
  {wait}
  {fence}
  shl.b32 %r12, %tid, 16;
  and.b32 %r12, %r12, 0x600000;
  add.u32 %r12, %r12, %r10;
  tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {{{registers}}}, [%r12];
  tcgen05.wait::ld.sync.aligned;
  mul.lo.u32 %r13, %tid, {row};
  cvt.u64.u32 %rd5, %r13;
  add.s64 %rd5, %rd5, %rd7;
{stores}
  bar.sync 0;
  @%p6 tcgen05.dealloc.cta_group::{group}.sync.aligned.b32 %r10, 128;
"""
CLUSTER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
WAIT = "mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0;\n  @!%p4 bra wait;"
COMMIT = "tcgen05.commit.cta_group::{}.mbarrier::arrive::one.shared::cluster{}.b64 [%r1]{};"
ONE = COMMIT.format(1, "", "")
BOTH = "mov.u16 %h1, 3; " + COMMIT.format(2, ".multicast::cluster", ", %h1")


def run(work, parts, columns, dtype=np.float32, timing="late", **changes):
    """The accumulator's first columns, of every block, after ``work`` on (blocks, words)."""
    blocks = len(parts)
    registers = [f"%r{100 + i}" for i in range(columns)]
    steps = {
        "proxy_fence": "fence.proxy.async.shared::cta;",
        "cluster": CLUSTER if blocks > 1 else "",
        "commit": BOTH if blocks > 1 else ONE,
        "wait": WAIT,
        "fence": "tcgen05.fence::after_thread_sync;",
    }
    body = PROGRAM.format(
        group=blocks, work=work, words=parts.shape[1], part=parts[0].nbytes, columns=columns,
        result=ROWS * columns * 4, row=4 * columns, registers=", ".join(registers),
        stores="\n".join(
            f"  st.global.v4.b32 [%rd5+{4 * i}], {{{', '.join(registers[i : i + 4])}}};"
            for i in range(0, columns, 4)
        ),
        **{**steps, **changes},
    )  # fmt: skip
    return execute(
        body, np.zeros((blocks, ROWS, columns), dtype), parts, threads=128,
        shared=2048 + parts[0].nbytes, grid=blocks, cluster=blocks, arch="sm_100a",
        timing=timing,
    )[0]  # fmt: skip


def kinds(raised):
    return [f.kind for f in raised.value.findings]


# ---- products of a pair

COLUMNS = 64
PAIR_FORM = 1 << 4 | 1 << 7 | 1 << 10 | COLUMNS // 8 << 17 | 2 * ROWS // 16 << 24
PAIR_PRODUCT = f"""
  or.b64 %rd3, %rd2, {HIGH};
  add.u64 %rd4, %rd3, 256;
  mov.u32 %r11, {PAIR_FORM};
  setp.ne.b32 %p2, 0, 0;
  setp.eq.b32 %p3, 0, 0;
  tcgen05.mma.cta_group::2.kind::f16 [%r10], %rd3, %rd4, %r11, %p2;
  tcgen05.mma.cta_group::2.kind::f16 [%r10], %rd3, %rd4, %r11, %p3;
"""


def pair_product(timing="late", **changes):
    random = np.random.default_rng(6)
    a = random.integers(-4, 5, (2, ROWS, 16)).astype(BF16)
    b = random.integers(-4, 5, (2, COLUMNS // 2, 16)).astype(BF16)
    parts = [
        np.concatenate([core_matrices(x), core_matrices(y)]) for x, y in zip(a, b, strict=True)
    ]
    got = run(PAIR_PRODUCT, np.stack(parts).view(np.uint32), COLUMNS, timing=timing, **changes)
    return got, 2 * a.astype(np.float32) @ b.astype(np.float32).reshape(COLUMNS, 16).T


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_product_of_a_pair(timing):
    """Each block holds its rows of A and of the result, and half of B's; both learn of the end."""
    got, expected = pair_product(timing)
    np.testing.assert_array_equal(got, expected)


def test_product_of_a_pair_with_half_the_rows():
    """M = 128: 64 rows a block, the second half of the columns in lanes 64 to 127."""
    random = np.random.default_rng(7)
    a = random.integers(-4, 5, (2, ROWS, 16)).astype(BF16)
    b = random.integers(-4, 5, (2, COLUMNS // 2, 16)).astype(BF16)
    parts = [
        np.concatenate([core_matrices(x), core_matrices(y)]) for x, y in zip(a, b, strict=True)
    ]
    form = PAIR_FORM - (ROWS // 16 << 24)
    work = PAIR_PRODUCT.replace(str(PAIR_FORM), str(form))
    got = run(work, np.stack(parts).view(np.uint32), COLUMNS // 2)
    expected = 2 * a[:, :64].astype(np.float32) @ b.astype(np.float32).reshape(COLUMNS, 16).T
    np.testing.assert_array_equal(got, np.concatenate(np.split(expected, 2, axis=2), axis=1))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"proxy_fence": ""}, "missing proxy fence"),
        ({"cluster": ""}, "shared-memory race"),
        ({"commit": COMMIT.format(2, "", "")}, "deadlock"),
        ({"commit": BOTH.replace("3", "2")}, "deadlock"),
        ({"wait": ""}, "shared-memory race"),
        ({"fence": ""}, "missing tcgen05.fence"),
    ],
)
def test_every_step_of_a_pair_matters(changes, kind):
    """Among them a commit that reaches only the issuing block, or only its peer."""
    with pytest.raises(SimulationError) as raised:
        pair_product(**changes)
    assert kind in kinds(raised)


# ---- copies

LANE = np.arange(128)
# The row of the source that each lane receives.
COPIES = {
    "128x256b": (128, 8, LANE),
    "128x128b": (128, 4, LANE),
    "4x256b": (4, 8, np.where(LANE % 32 == 0, LANE // 32, -1)),
    "64x128b.warpx2::02_13": (64, 4, LANE % 64),
    "64x128b.warpx2::01_23": (64, 4, LANE // 64 * 32 + LANE % 32),
    "32x128b.warpx4": (32, 4, LANE % 32),
}
FULL = "128x256b"


def copy_work(shape, group, descriptor=HIGH):
    return f"""
  or.b64 %rd3, %rd2, {descriptor};
  tcgen05.cp.cta_group::{group}.{shape} [%r10], %rd3;
"""


def source(group, rows, columns, swizzle):
    """Random (group, rows, columns) words, and as they lie in shared memory."""
    words = np.random.default_rng(7).integers(0, 1 << 32, (group, rows, columns), np.uint32)
    held = max(16, rows)
    padded = np.zeros((group, held, columns), np.uint32)
    padded[:, :rows] = words
    if not swizzle:
        # Core matrices of 8 rows of 16 bytes: 128 bytes apart along a row, 256 along rows.
        parts = np.zeros((group, held // 8, 2, 8, 4), np.uint32)
        cores = padded.reshape(group, held // 8, 8, columns // 4, 4).swapaxes(2, 3)
        parts[:, :, : columns // 4] = cores
        return words, parts.reshape(group, -1)
    # Rows of 128 bytes: the 16-byte unit's index is exclusive-ored with the row's, modulo eight.
    parts = np.zeros((group, held, 8, 4), np.uint32)
    for r in range(held):
        for unit in range(columns // 4):
            parts[:, r, unit ^ r % 8] = padded[:, r, 4 * unit : 4 * unit + 4]
    return words, parts.reshape(group, -1)


SWIZZLED = (1024 >> 4) << 32 | 1 << 46 | 2 << 61


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("shape", COPIES)
def test_copy(shape, group):
    """Rows, consecutive columns, and the warps that a multicast reaches; both blocks of a pair."""
    rows, columns, lanes = COPIES[shape]
    swizzle = group == 1
    words, parts = source(group, rows, columns, swizzle)
    work = copy_work(shape, group, SWIZZLED if swizzle else HIGH)
    timing = "shuffled" if group == 1 else "late"
    got = run(work, parts, columns, np.uint32, timing)
    np.testing.assert_array_equal(got[:, lanes >= 0], words[:, lanes[lanes >= 0]])
    assert not np.isin(got[:, lanes < 0], words).any()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"proxy_fence": ""}, "missing proxy fence"),
        ({"commit": ""}, "deadlock"),
        ({"wait": ""}, "shared-memory race"),
        ({"fence": ""}, "missing tcgen05.fence"),
    ],
)
def test_every_step_of_a_copy_matters(changes, kind):
    _, parts = source(1, 128, 8, False)
    with pytest.raises(SimulationError) as raised:
        run(copy_work(FULL, 1), parts, 8, np.uint32, **changes)
    assert kind in kinds(raised)


def test_a_copy_is_not_finished_for_its_own_warp():
    """Only one warp, which loads what its own thread copies: it too must wait for the commit."""
    _, parts = source(1, 32, 4, False)
    body = """
      mov.u32 %r1, smem;
      setp.eq.u32 %p7, %tid, 0;
      tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
      mul.wide.u32 %rd1, %tid, 16;
      add.s64 %rd1, %rd1, %a0;
      ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];
      shl.b32 %r6, %tid, 4;
      add.u32 %r6, %r6, %r1;
      st.shared.v4.b32 [%r6+1024], {%r2, %r3, %r4, %r5};
      fence.proxy.async.shared::cta;
      bar.warp.sync -1;
      ld.shared.b32 %r10, [%r1];
      add.u32 %r6, %r1, 1024;
      shr.u32 %r6, %r6, 4;
      cvt.u64.u32 %rd2, %r6;
      or.b64 %rd2, %rd2, DESCRIPTOR;
      @%p7 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r10], %rd2;
      tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r7}, [%r10];
      tcgen05.wait::ld.sync.aligned;
      tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;
    """
    body = body.replace("DESCRIPTOR", str((128 >> 4) << 16 | (128 >> 4) << 32 | 1 << 46))
    with pytest.raises(SimulationError) as raised:
        execute(body, parts[0, :128], shared=4096, arch="sm_100a")
    assert kinds(raised) == ["shared-memory race"]


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_a_product_follows_its_threads_copies(timing):
    """A copied to tensor memory, multiplied, overwritten by another copy, multiplied again."""
    random = np.random.default_rng(8)
    a = random.integers(-4, 5, (2, ROWS, 16)).astype(BF16)
    b = random.integers(-4, 5, (32, 16)).astype(BF16)
    parts = np.concatenate([core_matrices(x) for x in (*a, b)]).view(np.uint32)[None]
    form = 1 << 4 | 1 << 7 | 1 << 10 | 32 // 8 << 17 | ROWS // 16 << 24
    work = f"""
  or.b64 %rd3, %rd2, {HIGH};
  add.u64 %rd4, %rd3, 256;
  add.u64 %rd8, %rd3, 512;
  mov.u32 %r11, {form};
  add.u32 %r14, %r10, 64;
  setp.ne.b32 %p2, 0, 0;
  setp.eq.b32 %p3, 0, 0;
  tcgen05.cp.cta_group::1.128x256b [%r14], %rd3;
  tcgen05.mma.cta_group::1.kind::f16 [%r10], [%r14], %rd8, %r11, %p2;
  tcgen05.cp.cta_group::1.128x256b [%r14], %rd4;
  tcgen05.mma.cta_group::1.kind::f16 [%r10], [%r14], %rd8, %r11, %p3;
"""
    got = run(work, parts, 32, timing=timing)
    expected = a.astype(np.float32).sum(0) @ b.astype(np.float32).T
    np.testing.assert_array_equal(got[0], expected)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("128x256b.b8x16.b6x16_p32", "decompresses: b8x16.b6x16_p32"),
        ("128x128b.b8x16.b4x16_p64", "decompresses: b8x16.b4x16_p64"),
        ("64x128b", "shape 64x128b, multicast None"),
        ("32x128b.warpx2::02_13", "shape 32x128b, multicast warpx2::02_13"),
    ],
)
def test_unknown_copies_are_errors(form, reason):
    """Formats that decompress, and shapes without the multicast that they must have."""
    with pytest.raises(PtxError, match=reason):
        execute(f"tcgen05.cp.cta_group::1.{form} [%r1], %rd1;", arch="sm_100a")


def test_a_pair_needs_a_peer():
    _, parts = source(1, 128, 8, False)
    with pytest.raises(SimulationError) as raised:
        run(copy_work(FULL, 2), parts, 8, np.uint32)
    assert kinds(raised) == ["tcgen05 of a pair"]


@pytest.mark.parametrize("offset", [124, 1 << 16])
def test_a_copy_stays_inside(offset):
    """The columns that are allocated, and the 128 lanes."""
    _, parts = source(1, 128, 8, False)
    work = f"add.u32 %r10, %r10, {offset};" + copy_work(FULL, 1)
    with pytest.raises(SimulationError) as raised:
        run(work, parts, 8, np.uint32)
    assert kinds(raised) == ["out-of-bounds access"]
