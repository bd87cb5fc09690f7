"""Control flow, special registers, waiting blocks, and how the simulator reports what went wrong.

Sections by their number in PTX ISA 9.0: 9.3 guards; 9.7.12 control flow; 10 special registers.
"""

import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.ptx import PtxError
from tests.simulator.snippets import LANES, execute, findings, per_thread

# ---- control flow


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


def test_indirect_branches():
    """brx.idx: the target is chosen by an index into a list of labels."""
    got = per_thread(
        """
      rem.u32 %r1, %tid, 3;
      brx.idx %r1, targets;
    targets: .branchtargets zero, one, two;
    zero:
      mov.u32 %r0, 10;
      bra join;
    one:
      mov.u32 %r0, 11;
      bra join;
    two:
      mov.u32 %r0, 12;
    join:
    """,
        threads=64,
    )
    np.testing.assert_array_equal(got, 10 + np.arange(64) % 3)


def test_guards():
    got = per_thread("""
      mov.u32 %r0, 1;
      setp.lt.u32 %p1, %tid, 10;
      @%p1 add.u32 %r0, %r0, 100;
      @!%p1 add.u32 %r0, %r0, 200;
    """)
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 10, 101, 201))


def test_threads_that_return_early():
    got = execute("""
      mul.wide.u32 %rd1, %tid, 4;
      add.s64 %rd1, %rd1, %a0;
      and.b32 %r1, %tid, 1;
      setp.eq.u32 %p1, %r1, 0;
      @%p1 ret;
      activemask.b32 %r2;
      st.global.b32 [%rd1], %r2;
    """, np.zeros(32, np.uint32))[0]  # fmt: skip
    np.testing.assert_array_equal(got, np.where(np.arange(32) % 2, 0xAAAAAAAA, 0))


def test_special_registers():
    got = per_thread(
        """
      mov.u32 %r1, %laneid;
      mov.u32 %r2, %warpid;
      mov.u32 %r3, %ntid.x;
      mad.lo.u32 %r0, %r2, 1000, %r1;
      mad.lo.u32 %r0, %r3, 10000, %r0;
    """,
        threads=64,
    )
    n = np.arange(64)
    np.testing.assert_array_equal(got, 640000 + n // 32 * 1000 + n % 32)


# ---- reports


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


STEP = """
  and.b32 %r5, %r3, 4095;
  setp.eq.u32 %p4, %r5, 0;
  @%p4 bar.sync 1, 32;
"""
COMPUTES = """
  mov.u32 %r1, %ctaid.x;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra compute;
again:
  ld.acquire.gpu.global.b32 %r2, [%a0];
  setp.ne.u32 %p2, %r2, 7;
  @%p2 bra again;
  bra done;
compute:
  mov.u32 %r3, 0;
loop:
  {step}
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p3, %r3, {count};
  @%p3 bra loop;
  mov.u32 %r4, 7;
  st.release.gpu.global.b32 [%a0], %r4;
done:
"""


@pytest.mark.parametrize(("count", "step"), [(50_000, ""), (120_000, STEP)], ids=["alone", "warps"])
def test_a_block_that_computes_for_long_is_no_deadlock(count, step):
    """Neither where it does nothing else, nor where its warps wait for each other now and then."""
    (got,) = execute(COMPUTES.format(count=count, step=step), np.zeros(1, np.uint32), grid=2)
    assert got[0] == 7


def test_blocks_that_wait_for_nothing_are_a_deadlock():
    memory = np.array([7, 0, 0, 0, 0], np.uint32)
    assert findings(TICKET.format(sign="s32", step="1"), memory, grid=2) == ["deadlock"]
