"""tcgen05: PTX ISA 9.0, 9.7.16 "TensorCore 5th Generation Family Instructions"."""

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.operands import core_matrices
from tests.simulator.snippets import execute

BF16 = ml_dtypes.bfloat16
ROWS, COLUMNS = 128, 32
# Instruction descriptor: float32 accumulator, bfloat16 operands, N >> 3 and M >> 4.
FORM = 1 << 4 | 1 << 7 | 1 << 10 | COLUMNS // 8 << 17 | ROWS // 16 << 24
# Matrix descriptor without swizzle: core matrices 128 bytes apart along K, 256 along M; version 1.
HIGH = (128 >> 4) << 16 | (256 >> 4) << 32 | 1 << 46

PRODUCT = """
  mov.u32 %r1, smem;
  setp.eq.u32 %p7, %tid, 0;
  setp.lt.u32 %p6, %tid, 32;
  @%p7 mbarrier.init.shared.b64 [%r1], 1;
  @%p7 fence.mbarrier_init.release.cluster;
  @%p6 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+8], 64;
  @%p6 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
  mov.u32 %r2, %tid;
copy:
  shl.b32 %r3, %r2, 2;
  cvt.u64.u32 %rd1, %r3;
  add.s64 %rd1, %rd1, %a1;
  ld.global.b32 %r4, [%rd1];
  add.u32 %r5, %r1, %r3;
  st.shared.b32 [%r5+1024], %r4;
  add.u32 %r2, %r2, 128;
  setp.lt.u32 %p1, %r2, 1280;
  @%p1 bra copy;
  {proxy_fence}
  bar.sync 0;
  ld.shared.b32 %r10, [%r1+8];
  @!%p7 bra wait;
  add.u32 %r6, %r1, 1024;
  shr.u32 %r6, %r6, 4;
  cvt.u64.u32 %rd2, %r6;
  or.b64 %rd3, %rd2, {high};
  add.u64 %rd4, %rd3, 256;
  setp.ne.b32 %p2, 0, 0;
  setp.eq.b32 %p3, 0, 0;
  mov.u32 %r11, {form};
  tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd3, %rd4, %r11, %p2;
  tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd3, %rd4, %r11, %p3;
  {commit}
wait:
  {wait}
  {fence}
  shl.b32 %r12, %tid, 16;
  and.b32 %r12, %r12, 0x600000;
  add.u32 %r12, %r12, %r10;
  tcgen05.ld.sync.aligned.32x32b.x32.b32 {{{registers}}}, [%r12];
  tcgen05.wait::ld.sync.aligned;
  shl.b32 %r13, %tid, 7;
  cvt.u64.u32 %rd5, %r13;
  add.s64 %rd5, %rd5, %a0;
{stores}
  bar.sync 0;
  {dealloc}
"""
STEPS = {
    "proxy_fence": "fence.proxy.async.shared::cta;",
    "commit": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1];",
    "wait": "mbarrier.try_wait.parity.shared.b64 %p4, [%r1], 0;\n  @!%p4 bra wait;",
    "fence": "tcgen05.fence::after_thread_sync;",
    "dealloc": "@%p6 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 64;",
}


def product(timing="late", **changes):
    random = np.random.default_rng(5)
    a = random.integers(-4, 5, (ROWS, 16)).astype(BF16)
    b = random.integers(-4, 5, (COLUMNS, 16)).astype(BF16)
    shared = np.concatenate([core_matrices(a), core_matrices(b)])
    registers = [f"%r{100 + i}" for i in range(COLUMNS)]
    body = PRODUCT.format(
        high=HIGH, form=FORM, registers=", ".join(registers),
        stores="\n".join(
            f"  st.global.v4.b32 [%rd5+{4 * i}], {{{', '.join(registers[i : i + 4])}}};"
            for i in range(0, COLUMNS, 4)
        ),
        **{**STEPS, **changes},
    )  # fmt: skip
    got = execute(
        body, np.zeros((ROWS, COLUMNS), np.float32), shared, threads=128, shared=8192,
        arch="sm_100a", timing=timing,
    )[0]  # fmt: skip
    return got, 2 * a.astype(np.float32) @ b.astype(np.float32).T


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_product(timing):
    """The second product adds to the first; the accumulator's row is its lane."""
    got, expected = product(timing)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"proxy_fence": ""}, "missing proxy fence"),
        ({"commit": ""}, "deadlock"),
        ({"wait": ""}, "shared-memory race"),
        ({"fence": ""}, "missing tcgen05.fence"),
        ({"dealloc": ""}, "tensor memory not deallocated"),
    ],
)
def test_every_step_matters(changes, kind):
    with pytest.raises(SimulationError) as raised:
        product(**changes)
    assert kind in [f.kind for f in raised.value.findings]


def test_columns_must_be_allocated():
    with pytest.raises(SimulationError) as raised:
        execute("mov.u32 %r1, 0; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r2}, [%r1];")
    assert raised.value.findings[0].kind == "out-of-bounds access"


@pytest.mark.parametrize("shape", ["32x32b.x4", "16x256b.x1", "16x128b.x2"])
def test_store_then_load(shape):
    """What a warp stores it loads again; without wait::st nothing is promised."""
    body = f"""
      mov.u32 %r1, smem;
      tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
      bar.warp.sync -1;
      ld.shared.b32 %r10, [%r1];
      mul.lo.u32 %r2, %tid, 10;
      add.u32 %r3, %r2, 1;
      add.u32 %r4, %r2, 2;
      add.u32 %r5, %r2, 3;
      tcgen05.st.sync.aligned.{shape}.b32 [%r10], {{%r2, %r3, %r4, %r5}};
      tcgen05.wait::st.sync.aligned;
      tcgen05.ld.sync.aligned.{shape}.b32 {{%r6, %r7, %r8, %r9}}, [%r10];
      tcgen05.wait::ld.sync.aligned;
      mul.wide.u32 %rd1, %tid, 16;
      add.s64 %rd1, %rd1, %a0;
      st.global.v4.b32 [%rd1], {{%r6, %r7, %r8, %r9}};
      tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;
    """
    (got,) = execute(body, np.zeros((32, 4), np.uint32), arch="sm_100a")
    np.testing.assert_array_equal(got, 10 * np.arange(32)[:, None] + np.arange(4))


# Warps 0 and 4 reach the same lanes.
TURNS = """
  mov.u32 %r1, smem;
  setp.lt.u32 %p6, %tid, 32;
  setp.ge.u32 %p7, %tid, 128;
  @%p6 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
  bar.sync 0;
  ld.shared.b32 %r10, [%r1];
  @!%p6 bra stored;
  add.u32 %r2, %tid, 7;
  tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {{%r2}};
  tcgen05.wait::st.sync.aligned;
  {written}
stored:
  bar.sync 0;
  @!%p7 bra loaded;
  {may_read}
  tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r3}}, [%r10];
  tcgen05.wait::ld.sync.aligned;
  mul.wide.u32 %rd1, %tid, 4;
  add.s64 %rd1, %rd1, %a0;
  st.global.b32 [%rd1+-512], %r3;
  {read}
loaded:
  bar.sync 0;
  @!%p6 bra overwritten;
  {may_write}
  tcgen05.st.sync.aligned.32x32b.x1.b32 [%r10], {{%r2}};
  tcgen05.wait::st.sync.aligned;
overwritten:
  bar.sync 0;
  @%p6 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 32;
"""
BEFORE, AFTER = "tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync"
FENCES = {"written": BEFORE, "may_read": AFTER, "read": BEFORE, "may_write": AFTER}


def take_turns(**changes):
    fences = {name: f"{text};" if text else "" for name, text in {**FENCES, **changes}.items()}
    body = TURNS.format(**fences)
    return execute(body, np.zeros(32, np.uint32), threads=160, arch="sm_100a")[0]


def test_fences_order_warps_across_a_barrier():
    """A store, another warp's load, the first warp's next store."""
    np.testing.assert_array_equal(take_turns(), np.arange(32) + 7)


@pytest.mark.parametrize("missing", FENCES)
def test_a_barrier_alone_does_not_order_tensor_memory(missing):
    with pytest.raises(SimulationError) as raised:
        take_turns(**{missing: ""})
    assert [f.kind for f in raised.value.findings] == ["missing tcgen05.fence"]
    assert FENCES[missing] in str(raised.value)
