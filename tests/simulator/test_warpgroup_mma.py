"""wgmma: PTX ISA 9.0, 9.7.15 "Asynchronous Warpgroup Level Matrix Instructions"."""

import ml_dtypes
import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.operands import core_matrices
from tests.simulator.snippets import execute

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
