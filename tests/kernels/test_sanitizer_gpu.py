"""compute-sanitizer over small calls and their gradients, on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).resolve().parents[2]

EVERY_LANE_ARRIVES = """
import contextlib
# racecheck does not follow a barrier through to another lane's arrival.
from cutlass import cute
from jax_flashcute.kernels.common.pipeline import TmaPipeline
init, release = TmaPipeline.init, TmaPipeline.release

def init_for_lanes(self):
    self.consumer_warps *= 32
    init(self)
    self.consumer_warps //= 32

def release_by_lanes(self, stage, *args, **kwargs):
    elect, cute.arch.elect_one = cute.arch.elect_one, contextlib.nullcontext
    release(self, stage, *args, **kwargs)
    cute.arch.elect_one = elect

TmaPipeline.init, TmaPipeline.release = init_for_lanes, release_by_lanes
"""

SMALL_CALLS = """
import jax, jax.numpy as jnp, numpy as np
from jax_flashcute import flash_attention
rng = np.random.default_rng(0)
bf16 = jnp.bfloat16
for T, S, N, K, H, Hv, lengths, deterministic in (
    (65, 129, 2, 1, 64, 64, None, False),
    (1, 200, 8, 1, 128, 128, None, True),
    (130, 67, 3, 1, 72, 40, [31], False),
    (70, 130, 1, 1, 256, 256, [100], False),
):
    q, k, v, dout = (
        rng.standard_normal(s).astype(bf16)
        for s in ((1, T, N, H), (1, S, K, H), (1, S, K, Hv), (1, T, N, Hv))
    )
    n = None if lengths is None else np.array(lengths, np.int32)

    @jax.jit
    def call(q, k, v, dout):
        out, vjp = jax.vjp(lambda *main: flash_attention(
            *main, is_causal=True, q_offset=S - T, key_value_seq_lengths=n,
            deterministic=deterministic, implementation="cute"), q, k, v)
        return out, vjp(dout)

    jax.tree.map(np.asarray, call(q, k, v, dout))
print("calls done")
"""

PAGED_CALLS = """
from jax_flashcute import paged_attention
for page_size, T, H in ((1, 1, 64), (4, 70, 72), (16, 1, 128), (512, 5, 64)):
    most = 1100 // page_size + 2
    pages = [rng.standard_normal((most, page_size, 2, H)).astype(bf16) for _ in range(2)]
    q = rng.standard_normal((2, T, 6, H)).astype(bf16)
    lengths = np.array([1000, 3], np.int32)
    table = np.full((2, most), -1, np.int32)
    for row, length in zip(table, lengths):
        used = -(-length // page_size)
        row[:used] = most - 1 - np.arange(used)
    np.asarray(paged_attention(q, *pages, table, lengths, implementation="cute"))
print("paged calls done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    """No access outside the buffers, each an allocation of its own; no race in shared memory."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{toolkit}/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in the CUDA toolkit")
    program = {
        "memcheck": SMALL_CALLS + PAGED_CALLS,
        "racecheck": EVERY_LANE_ARRIVES + SMALL_CALLS,
    }[tool]
    result = subprocess.run(
        [
            sanitizer,
            *("--tool", tool, "--error-exitcode", "9"),
            # The CuTe compiler asks the driver for a device before there is a context.
            *(("--report-api-errors", "no") if tool == "memcheck" else ()),
            # XLA's own kernels are not in question.
            *(("--kernel-name", "kns=flashcute") if tool == "racecheck" else ()),
            *(sys.executable, "-c", program),
        ],
        cwd=REPOSITORY,
        env=os.environ
        | {
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
            "JAX_FLASHCUTE_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-5000:]
    assert "calls done" in result.stdout
    assert tool == "racecheck" or "paged calls done" in result.stdout
    expected = {
        "memcheck": "ERROR SUMMARY: 0 errors",
        "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
    }[tool]
    assert expected in report, report[-5000:]
