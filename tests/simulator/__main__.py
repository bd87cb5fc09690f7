"""Draw a timeline of the forward kernel: ``python -m tests.simulator --trace picture.png``."""

import argparse

import ml_dtypes
import numpy as np

from jax_flashcute.kernels.config.sm90 import forward_config

from .compiled import forward, forward_barriers
from .simulation import simulate
from .trace import Trace


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", metavar="FILE", required=True, help="picture to write")
    parser.add_argument("--shape", default="1,256,1,512,1,128", help="B,T,N,S,K,H")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--block", type=int, default=0, help="block to draw")
    arguments = parser.parse_args()
    b, t, n, s, heads, h = (int(x) for x in arguments.shape.split(","))
    window = (None, 0) if arguments.causal else (None, None)
    kernel = forward(h, n // heads, window=window)
    random = np.random.default_rng(0)
    shapes = ((b, t, n, h), (b, s, heads, h), (b, s, heads, h))
    inputs = [random.standard_normal(x).astype(ml_dtypes.bfloat16) for x in shapes]
    trace = Trace((arguments.block, 0, 0), barriers=forward_barriers(forward_config(h, h)))
    outputs = [(shapes[0], ml_dtypes.bfloat16), ((b, t, n), np.float32), ((1,), np.int32)]
    simulate(kernel, *inputs, outputs=outputs, trace=trace)
    trace.draw(arguments.trace)
    print(trace.report())


main()
