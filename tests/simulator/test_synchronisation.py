"""Barriers, mbarriers, shuffles, copies and matrix instructions, and what the simulator reports.

Each heading names the section, by its number in PTX ISA 9.0.
"""

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.ptx import PtxError
from tests.simulator.snippets import execute

LANES = np.arange(32)


def findings(body, *arrays, **how):
    """The kinds of finding that a program raises."""
    with pytest.raises(SimulationError) as raised:
        execute(body, *arrays, **how)
    return [f.kind for f in raised.value.findings]


def per_thread(body, *, threads=32, **how):
    """Run ``body``, which leaves a word in %r0, and return it for every thread."""
    body += """
      mul.wide.u32 %rd60, %tid, 4;
      add.s64 %rd60, %rd60, %a0;
      st.global.b32 [%rd60], %r0;
    """
    return execute(body, np.zeros(threads, np.uint32), threads=threads, **how)[0]


# ---- 9.7.9 shfl.sync; 9.7.13 vote.sync, redux.sync, elect.sync


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    [
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
        ("down", 5, 31, np.where(LANES + 5 <= 31, LANES + 5, LANES)),
        ("bfly", 4, 31, LANES ^ 4),
        ("idx", 7, 31, np.full(32, 7)),
        # Segments of 8: the mask 0x18 in bits 8-12, clamp within the segment.
        ("bfly", 4, 0x1807, LANES ^ 4),
        ("down", 5, 0x1807, np.where(LANES % 8 + 5 <= 7, LANES + 5, LANES)),
        ("idx", 3, 0x1807, LANES // 8 * 8 + 3),
    ],
)
def test_shuffle(mode, amount, clamp, source):
    got = per_thread(f"""
      add.u32 %r1, %tid, 100;
      shfl.sync.{mode}.b32 %r0|%p1, %r1, {amount}, {clamp}, -1;
    """)
    np.testing.assert_array_equal(got, source + 100)


def test_shuffle_tells_whether_the_source_was_in_range():
    got = per_thread("""
      shfl.sync.up.b32 %r1|%p1, %tid, 4, 0, -1;
      selp.b32 %r0, 1, 0, %p1;
    """)
    np.testing.assert_array_equal(got, LANES >= 4)


def test_votes_and_reductions():
    assert (
        per_thread("""
      setp.lt.u32 %p1, %tid, 5;
      vote.sync.ballot.b32 %r0, %p1, -1;
    """)
        == 31
    ).all()
    assert (per_thread("redux.sync.add.u32 %r0, %tid, -1;") == 496).all()
    assert (per_thread("redux.sync.max.s32 %r0, %tid, -1;") == 31).all()
    assert (
        per_thread("""
      setp.lt.u32 %p1, %tid, 5;
      vote.sync.any.pred %p2, %p1, -1;
      vote.sync.all.pred %p3, %p1, -1;
      selp.b32 %r1, 2, 0, %p2;
      selp.b32 %r2, 1, 0, %p3;
      or.b32 %r0, %r1, %r2;
    """)
        == 2
    ).all()


def test_elect_chooses_one_thread_always_the_same():
    """elect.sync: "the election is deterministic for a membermask"."""
    body = """
      elect.sync %r1|%p1, -1;
      elect.sync %r2|%p2, -1;
      selp.b32 %r0, 1, 0, %p1;
      @%p2 add.u32 %r0, %r0, 2;
    """
    for seed in range(5):
        got = per_thread(body, warps="seeded", seed=seed)
        assert sorted(got)[-1] == 3
        assert got.sum() == 3


def test_divergent_threads_meet_again():
    got = per_thread("""
      and.b32 %r1, %tid, 1;
      setp.eq.u32 %p1, %r1, 0;
      @%p1 bra even;
      mov.u32 %r2, 10;
      bra join;
    even:
      mov.u32 %r2, 20;
    join:
      shfl.sync.bfly.b32 %r0, %r2, 1, 31, -1;
    """)
    np.testing.assert_array_equal(got, np.where(LANES % 2 == 0, 10, 20))


def test_loops_of_different_lengths():
    got = per_thread(
        """
      mov.u32 %r0, 0;
      mov.u32 %r1, 0;
    again:
      add.u32 %r0, %r0, %r1;
      add.u32 %r1, %r1, 1;
      setp.le.u32 %p1, %r1, %tid;
      @%p1 bra again;
    """,
        threads=160,
    )
    n = np.arange(160)
    np.testing.assert_array_equal(got, n * (n + 1) // 2)


# ---- 9.7.13 bar, barrier

EXCHANGE = """
  mov.u32 %r1, smem;
  shl.b32 %r2, %tid, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.b32 [%r3], %tid;
  {barrier}
  xor.b32 %r4, %r2, 128;
  add.u32 %r4, %r1, %r4;
  ld.shared.b32 %r0, [%r4];
"""


def test_barrier_orders_shared_memory():
    got = per_thread(EXCHANGE.format(barrier="bar.sync 0;"), threads=64)
    np.testing.assert_array_equal(got, np.arange(64) ^ 32)


def test_without_a_barrier_there_is_a_race():
    body = EXCHANGE.format(barrier="") + "st.global.b32 [%a0], %r0;"
    for how in ({}, {"warps": "adversarial", "seed": 1}, {"warps": "seeded", "seed": 1}):
        kinds = findings(body, np.zeros(1, np.uint32), threads=64, **how)
        assert {"shared-memory race", "uninitialised shared memory"} & set(kinds)


def test_arrive_and_sync_pair_up():
    """bar.arrive does not wait; bar.sync on the same barrier waits for both counts."""
    got = per_thread("""
      mov.u32 %r1, smem;
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      st.shared.b32 [%r1], 42;
      bar.arrive 3, 64;
      mov.u32 %r0, 1;
      bra done;
    consumer:
      bar.sync 3, 64;
      ld.shared.b32 %r0, [%r1];
    done:
    """.replace("st.shared.b32 [%r1], 42;", "mov.u32 %r5, 42;\n @!%p1 st.shared.b32 [%r1], %r5;"),
        threads=64)  # fmt: skip
    np.testing.assert_array_equal(got, [1] * 32 + [42] * 32)


def test_barrier_reduction():
    got = per_thread(
        """
      setp.lt.u32 %p1, %tid, 10;
      bar.red.popc.u32 %r0, 0, %p1;
    """,
        threads=64,
    )
    assert (got == 10).all()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("bar.sync 1, 64;", "deadlock"),
        ("bar.arrive 1, 64;", "unbalanced barrier at exit"),
        ("bar.sync 1, 40;", "bad barrier count"),
        ("bar.sync 16, 32;", "bad barrier index"),
        ("bar.arrive 1, 64; bar.sync 1, 96;", "barrier count mismatch"),
        ("mov.u32 %r1, smem; mbarrier.arrive.shared.b64 %rd1, [%r1];", "uninitialised mbarrier"),
        ("mov.u32 %r1, smem; add.u32 %r1, %r1, 4096; st.shared.b32 [%r1], %tid;",
         "out-of-bounds access"),
        ("mov.u32 %r1, smem; st.shared.b32 [%r1+2], %tid;", "misaligned access"),
        ("mov.u32 %r1, smem; ld.shared.b32 %r2, [%r1];", "uninitialised shared memory"),
        ("add.s64 %rd1, %a0, 4; ld.global.b32 %r1, [%rd1];", "out-of-bounds access"),
        ("add.s64 %rd1, %a0, 2; ld.global.b32 %r1, [%rd1];", "out-of-bounds access"),
        ("trap;", "trap"),
    ],
)  # fmt: skip
def test_faults_are_named(body, kind):
    assert kind in findings(body, np.zeros(1, np.uint32))


def test_unknown_opcodes_name_their_line():
    with pytest.raises(PtxError, match=r"PTX line \d+.*frobnicate"):
        execute("frobnicate.b32 %r1, %r2;")


def test_deadlock_names_every_warp_and_what_it_waits_for():
    body = """
      mov.u32 %r1, smem;
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra second;
      bar.sync 1, 96;
      ret;
    second:
      bar.sync 2, 96;
    """
    with pytest.raises(SimulationError) as raised:
        execute(body, threads=64)
    text = str(raised.value)
    assert "warp 0" in text
    assert "barrier 1 (32 of 96 threads arrived)" in text
    assert "warp 1" in text
    assert "barrier 2 (32 of 96 threads arrived)" in text


# ---- 9.7.13 mbarrier

SETUP = """
  mov.u32 %r1, smem;
  setp.eq.u32 %p7, %tid, 0;
  @%p7 mbarrier.init.shared.b64 [%r1], {count};
  @%p7 fence.mbarrier_init.release.cluster;
  bar.sync 0;
"""


def test_mbarrier_phases():
    """test_wait.parity: true for the phase before the current one, false for the current."""
    got = per_thread(
        SETUP.format(count=32)
        + """
      mbarrier.test_wait.parity.shared.b64 %p1, [%r1], 0;
      mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 1;
      bar.sync 0;
      mbarrier.arrive.shared.b64 %rd1, [%r1];
      bar.sync 0;
      mbarrier.test_wait.parity.shared.b64 %p3, [%r1], 0;
      mbarrier.test_wait.parity.shared.b64 %p4, [%r1], 1;
      selp.b32 %r0, 1, 0, %p1;
      @%p2 or.b32 %r0, %r0, 2;
      @%p3 or.b32 %r0, %r0, 4;
      @%p4 or.b32 %r0, %r0, 8;
    """
    )
    assert (got == 2 + 4).all()


def test_mbarrier_orders_memory_between_warps():
    body = (
        SETUP.format(count=32)
        + """
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      st.shared.b32 [%r2+1024], %tid;
      {arrive}
      bra done;
    consumer:
      mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
      @!%p2 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      ld.shared.b32 %r0, [%r2+896];
    done:
    """
    )
    got = per_thread(
        body.replace("{arrive}", "mbarrier.arrive.shared.b64 %rd1, [%r1];"), threads=64
    )
    np.testing.assert_array_equal(got[32:], np.arange(32))
    with pytest.raises(SimulationError) as raised:
        per_thread(body.replace("{arrive}", ""), threads=64)
    assert raised.value.findings[0].kind == "deadlock"
    assert "32 of 32 arrivals" in str(raised.value)


def test_too_many_arrivals():
    body = (
        SETUP.format(count=16)
        + """
      setp.lt.u32 %p1, %tid, 16;
      mov.u32 %r2, 2;
      @%p1 mbarrier.arrive.shared.b64 %rd1, [%r1], 5;
    """
    )
    assert findings(body) == ["mbarrier overrun"]


def test_initialisation_must_be_ordered_before_use():
    body = (
        SETUP.replace("bar.sync 0;", "").format(count=64)
        + """
      mbarrier.arrive.shared.b64 %rd1, [%r1];
    """
    )
    assert findings(body, threads=64)[0] in (
        "mbarrier used before its initialisation", "uninitialised mbarrier"
    )  # fmt: skip


# ---- 9.7.9 asynchronous copies

BULK_LOAD = (
    SETUP.format(count=1)
    + """
  @!%p7 bra wait;
  mbarrier.arrive.expect_tx.shared.b64 %rd1, [%r1], {expected};
  cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+128], [%a1], 128, [%r1];
wait:
  {wait}
  shl.b32 %r2, %tid, 2;
  add.u32 %r2, %r2, %r1;
  ld.shared.b32 %r0, [%r2+128];
"""
)
WAIT = "mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;\n  @!%p2 bra wait;"


def bulk_load(expected=128, wait=WAIT, **how):
    body = BULK_LOAD.replace("{expected}", str(expected)).replace("{wait}", wait)
    body += """
      mul.wide.u32 %rd60, %tid, 4;
      add.s64 %rd60, %rd60, %a0;
      st.global.b32 [%rd60], %r0;
    """
    source = np.arange(32, dtype=np.uint32) * 3
    return execute(body, np.zeros(32, np.uint32), source, **how)[0]


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_bulk_load_completes_its_mbarrier(timing):
    np.testing.assert_array_equal(bulk_load(timing=timing), np.arange(32) * 3)


def test_a_wrong_transaction_count_never_completes():
    with pytest.raises(SimulationError, match="deadlock") as raised:
        bulk_load(expected=144)
    assert "0 of 1 arrivals and 16 bytes outstanding" in str(raised.value)


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_reading_a_bulk_load_without_waiting_is_a_race(timing):
    with pytest.raises(SimulationError) as raised:
        bulk_load(wait="", timing=timing)
    assert "shared-memory race" in [f.kind for f in raised.value.findings]


BULK_STORE = """
  mov.u32 %r1, smem;
  shl.b32 %r2, %tid, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.b32 [%r3], %tid;
  {fence}
  {barrier}
  setp.eq.u32 %p1, %tid, 0;
  @%p1 cp.{copy} [%a0], [%r1], 256;
  @%p1 cp.async.bulk.commit_group;
  {wait}
"""
STORE = {
    "fence": "fence.proxy.async.shared::cta;", "barrier": "bar.sync 0;",
    "copy": "async.bulk.global.shared::cta.bulk_group", "wait": "cp.async.bulk.wait_group 0;",
}  # fmt: skip


def bulk_store(**changes):
    how = {k: changes.pop(k) for k in ("timing", "seed", "warps") if k in changes}
    array = np.full(64, 5, np.float32 if "add" in changes.get("copy", "") else np.uint32)
    if array.dtype == np.float32:
        store = "st.shared.b32 [%r3], %tid;"
        assert store in BULK_STORE
        body = BULK_STORE.replace(store, "cvt.rn.f32.u32 %r5, %tid;\n st.shared.b32 [%r3], %r5;")
    else:
        body = BULK_STORE
    for name, text in {**STORE, **changes}.items():
        body = body.replace("{" + name + "}", text)
    return execute(body, array, threads=64, **how)[0]


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_bulk_store(timing):
    np.testing.assert_array_equal(bulk_store(timing=timing), np.arange(64))


def test_bulk_reduction():
    got = bulk_store(copy="reduce.async.bulk.global.shared::cta.bulk_group.add.f32")
    np.testing.assert_array_equal(got, np.arange(64) + 5)


@pytest.mark.parametrize(
    ("missing", "kind"),
    [
        ("fence", "missing proxy fence"),
        ("barrier", "shared-memory race"),
        ("wait", "shared memory released in use"),
    ],
)
def test_bulk_store_needs_every_step(missing, kind):
    with pytest.raises(SimulationError) as raised:
        bulk_store(**{missing: ""})
    assert kind in [f.kind for f in raised.value.findings] or (
        missing == "barrier" and raised.value.findings[0].kind == "uninitialised shared memory"
    )


def test_overwriting_what_a_bulk_store_still_reads():
    again = "cp.async.bulk.wait_group 0;\n bar.sync 0;\n st.shared.b32 [%r3], %tid;"
    bulk_store(wait=again)
    for broken in (again.replace("bar.sync 0;", ""), again.split("\n", 1)[1]):
        with pytest.raises(SimulationError) as raised:
            bulk_store(wait=broken + "\n cp.async.bulk.wait_group 0;")
        assert "shared-memory race" in [f.kind for f in raised.value.findings]


def test_cp_async_zero_fills():
    """cp.async: "the remaining bytes are filled with zeros" when src-size is smaller."""
    body = """
      mov.u32 %r1, smem;
      shl.b32 %r2, %tid, 4;
      add.u32 %r3, %r1, %r2;
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a1;
      cp.async.cg.shared.global [%r3], [%rd1], 16, 8;
      cp.async.commit_group;
      cp.async.wait_group 0;
      bar.warp.sync -1;
      ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];
      add.u32 %r14, %r10, %r11;
      add.u32 %r15, %r12, %r13;
      shl.b32 %r15, %r15, 16;
      or.b32 %r0, %r14, %r15;
      mul.wide.u32 %rd60, %tid, 4;
      add.s64 %rd60, %rd60, %a0;
      st.global.b32 [%rd60], %r0;
    """
    source = np.arange(128, dtype=np.uint32)
    got = execute(body, np.zeros(32, np.uint32), source)[0]
    np.testing.assert_array_equal(got, 8 * np.arange(32) + 1)


# ---- 9.7.14 ldmatrix, stmatrix


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_fragments(transposed):
    """ldmatrix: thread i holds row i / 4, elements 2 (i % 4) and the next, of each matrix."""
    trans = ".trans" if transposed else ""
    body = f"""
      mov.u32 %r1, smem;
      shl.b32 %r2, %tid, 4;
      add.u32 %r3, %r1, %r2;
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a1;
      ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd1];
      st.shared.v4.b32 [%r3], {{%r10, %r11, %r12, %r13}};
      bar.warp.sync -1;
      ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a0;
      st.global.v4.b32 [%rd1], {{%r20, %r21, %r22, %r23}};
      stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r20, %r21, %r22, %r23}};
      bar.warp.sync -1;
      ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3+512];
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a2;
      st.global.v4.b32 [%rd1], {{%r10, %r11, %r12, %r13}};
    """
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    fragment = np.zeros((32, 4), np.uint32)
    got, _, back = execute(body, fragment, matrices, np.zeros_like(matrices))
    expected = matrices.swapaxes(1, 2) if transposed else matrices
    pairs = np.ascontiguousarray(expected).view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(got, pairs)
    np.testing.assert_array_equal(back, matrices)


# ---- 9.7.15 wgmma

WGMMA = """
  mov.u32 %r1, smem;
  mov.u32 %r2, %tid;
copy:
  shl.b32 %r3, %r2, 2;
  cvt.u64.u32 %rd1, %r3;
  add.s64 %rd1, %rd1, %a1;
  ld.global.b32 %r4, [%rd1];
  add.u32 %r5, %r1, %r3;
  st.shared.b32 [%r5], %r4;
  add.u32 %r2, %r2, 128;
  setp.lt.u32 %p1, %r2, 1536;
  @%p1 bra copy;
  {async_fence}
  bar.sync 0;
  shr.u32 %r6, %r1, 4;
  cvt.u64.u32 %rd2, %r6;
  or.b64 %rd3, %rd2, {high};
  add.u64 %rd4, %rd3, 256;
  mov.b32 %r20, 0f3F800000;
  mov.b32 %r21, %r20;
  mov.b32 %r22, %r20;
  mov.b32 %r23, %r20;
  {fence}
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r20, %r21, %r22, %r23}}, %rd3, %rd4, 1, 1, 1, 0, 0;
  {commit}
  {wait}
  shl.b32 %r7, %tid, 4;
  cvt.u64.u32 %rd1, %r7;
  add.s64 %rd1, %rd1, %a0;
  st.global.v4.b32 [%rd1], {{%r20, %r21, %r22, %r23}};
  {after}
"""  # noqa: E501
COMPLETE = {
    "async_fence": "fence.proxy.async.shared::cta;", "fence": "wgmma.fence.sync.aligned;",
    "commit": "wgmma.commit_group.sync.aligned;", "wait": "wgmma.wait_group.sync.aligned 0;",
    "after": "",
}  # fmt: skip
# No swizzle: core matrices of 8 rows x 16 bytes; 128 bytes along K (leading), 256 along M (stride).
HIGH = (128 >> 4) << 16 | (256 >> 4) << 32


def core_matrices(x):
    """Rows x 16 of bf16 as 8x8 core matrices, the two along K next to each other."""
    rows = x.shape[0]
    return np.ascontiguousarray(x.reshape(rows // 8, 8, 2, 8).swapaxes(1, 2)).reshape(-1)


def wgmma(**changes):
    random = np.random.default_rng(5)
    a = random.integers(-4, 5, (64, 16)).astype(ml_dtypes.bfloat16)
    b = random.integers(-4, 5, (8, 16)).astype(ml_dtypes.bfloat16)
    # A takes 2048 bytes; B starts 4096 bytes in (256 in units of 16).
    shared = np.zeros(3072, ml_dtypes.bfloat16)
    shared[:1024] = core_matrices(a)
    shared[2048:2176] = core_matrices(b)
    body = WGMMA.format(high=HIGH, **{**COMPLETE, **changes})
    got = execute(body, np.zeros((128, 4), np.float32), shared, threads=128, shared=8192)[0]
    return got, 1 + a.astype(np.float32) @ b.astype(np.float32).T


def test_wgmma_product_and_fragment():
    """wgmma D fragment: thread i holds rows i / 4 and + 8 of its warp's 16, columns 2 (i % 4)."""
    got, expected = wgmma()
    for thread in range(128):
        row, column = 16 * (thread // 32) + thread % 32 // 4, 2 * (thread % 4)
        want = [*expected[row, column : column + 2], *expected[row + 8, column : column + 2]]
        np.testing.assert_array_equal(got[thread], want)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"wait": ""}, "register of a wgmma in flight"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "register of a wgmma in flight"),
        ({"commit": ""}, "register of a wgmma in flight"),
        ({"fence": ""}, "missing wgmma.fence"),
        ({"async_fence": ""}, "missing proxy fence"),
    ],
)
def test_wgmma_needs_every_step(changes, kind):
    with pytest.raises(SimulationError) as raised:
        wgmma(**changes)
    assert kind in [f.kind for f in raised.value.findings]


# ---- 9.7.13 atom, red


def test_atomics():
    old, counter = execute(
        """
      atom.global.add.u32 %r0, [%a1], 2;
      mul.wide.u32 %rd60, %tid, 4;
      add.s64 %rd60, %rd60, %a0;
      st.global.b32 [%rd60], %r0;
    """,
        np.zeros(32, np.uint32),
        np.zeros(1, np.uint32),
    )
    assert sorted(old) == list(range(0, 64, 2))
    assert counter == [64]


def test_float_reductions():
    (total,) = execute(
        """
      cvt.rn.f32.u32 %r1, %tid;
      red.global.add.f32 [%a0], %r1;
    """,
        np.zeros(1, np.float32),
    )
    assert total == [496]


def test_compare_and_swap():
    (cell,) = execute(
        """
      add.u32 %r2, %tid, 1;
      atom.global.cas.b32 %r0, [%a0], %tid, %r2;
    """,
        np.zeros(1, np.uint32),
    )
    assert cell == [32]


# ---- 9.7.13 bar.warp.sync; 8 Memory Consistency Model


def test_threads_of_a_warp_need_a_warp_barrier():
    """bar.warp.sync: "guarantees memory ordering among participating threads"."""
    body = """
      mov.u32 %r1, smem;
      shl.b32 %r2, %tid, 2;
      add.u32 %r3, %r1, %r2;
      st.shared.b32 [%r3], %tid;
      {barrier}
      xor.b32 %r4, %r2, 4;
      add.u32 %r4, %r1, %r4;
      ld.shared.b32 %r0, [%r4];
    """
    got = per_thread(body.format(barrier="bar.warp.sync -1;"))
    np.testing.assert_array_equal(got, LANES ^ 1)
    with pytest.raises(SimulationError) as raised:
        per_thread(body.format(barrier=""))
    assert "no bar.warp.sync between" in str(raised.value)


RELEASE = (
    SETUP.format(count=1)
    + """
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      st.shared.b32 [%r2+1024], %tid;
      {barrier}
      @%p7 mbarrier.arrive.shared.b64 %rd1, [%r1];
      bra done;
    consumer:
      mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
      @!%p2 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      ld.shared.b32 %r0, [%r2+896];
    done:
    """
)


def test_one_thread_releases_for_its_warp_only_after_a_warp_barrier():
    got = per_thread(RELEASE.replace("{barrier}", "bar.warp.sync -1;"), threads=64)
    np.testing.assert_array_equal(got[32:], LANES)
    with pytest.raises(SimulationError) as raised:
        per_thread(RELEASE.replace("{barrier}", ""), threads=64)
    assert "shared-memory race" in [f.kind for f in raised.value.findings]


# ---- between blocks

TICKET = """
  mov.u32 %r1, %ctaid.x;
  setp.ne.u32 %p1, %tid, 0;
  @%p1 bra done;
again:
  ld.acquire.gpu.global.b32 %r2, [%a0];
  setp.ne.u32 %p2, %r2, %r1;
  @%p2 bra again;
  mul.lo.u32 %r3, %r1, %r1;
  mul.wide.u32 %rd1, %r1, 4;
  add.s64 %rd1, %rd1, %a0;
  st.global.b32 [%rd1+4], %r3;
  add.{sign} %r2, %r2, {step};
  st.release.gpu.global.b32 [%a0], %r2;
done:
"""


@pytest.mark.parametrize("first", [0, 3])
def test_blocks_wait_for_each_other(first):
    """In the order of the grid, and against it."""
    step = {0: "1", 3: "-1"}[first]
    memory = np.array([first, 0, 0, 0, 0], np.uint32)
    (got,) = execute(TICKET.format(sign="s32", step=step), memory, grid=4)
    np.testing.assert_array_equal(got[1:], [0, 1, 4, 9])


def test_blocks_that_wait_for_nothing_are_a_deadlock():
    memory = np.array([7, 0, 0, 0, 0], np.uint32)
    assert findings(TICKET.format(sign="s32", step="1"), memory, grid=2) == ["deadlock"]
