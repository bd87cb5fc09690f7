"""The timeline: rows, waits, and a picture."""

import itertools

import ml_dtypes
import numpy as np

from jax_flashcute.kernels.config.sm90 import forward_config
from tests.simulator import simulate
from tests.simulator.compiled import forward, forward_barriers
from tests.simulator.trace import Trace


def test_timeline_of_the_forward(tmp_path):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, n, 1, 128)).astype(ml_dtypes.bfloat16)
               for n in (128, 256, 256))  # fmt: skip
    trace = Trace(barriers=forward_barriers(forward_config(128, 128)))
    outputs = [(q.shape, q.dtype), ((1, 128, 1), np.float32), ((1,), np.int32)]
    simulate(forward(), q, k, v, outputs=outputs, trace=trace)
    kinds = {s.kind for s in trace.segments}
    assert {"run", "wait mbarrier", "wait wgmma", "copy", "wgmma"} <= kinds
    # A warp is in one state at a time.
    for row in {s.row for s in trace.segments if s.row.startswith("warp")}:
        spans = sorted((s.start, s.end) for s in trace.segments if s.row == row)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    # Consumer warps of a warpgroup do the same thing, so they share a row.
    assert any(label.count(",") == 3 for label in trace.roles().values())
    assert "forward.py" in trace.report()
    for stage in ("q[0] full, its consumers waiting", "tile[0] full, its consumers waiting"):
        assert stage in trace.report()
    assert "mbarrier 0x" not in trace.report()
    trace.draw(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
