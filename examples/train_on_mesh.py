"""Train the byte-level decoder with data, tensor and context parallelism at once, and time it.

    python examples/train_on_mesh.py --meshes 1x1x1,2x1x1,1x2x1,1x1x2     # data x model x context

One program for every mesh: windows are spread over "data", their positions over "context" in
zig-zag order, heads and hidden features over "model".  The parameters say where they lie and XLA
does the rest, but for attention: `flash_attention` follows batch and heads by itself, and
`context_parallel_attention` takes over where a sequence lies on several devices.  Every mesh starts
from the same parameters and sees the same bytes, so that losses agree within rounding.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from byte_decoder import SIZES, ByteDecoder, ModelConfig
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_byte_lm import cut, read_standard_library

from jax_flashcute import (
    context_parallel_attention,
    flash_attention,
    permute_sequence,
    permuted_positions,
)

AXES = ("data", "model", "context")
SPLIT_OUTPUTS, SPLIT_INPUTS = ("query", "key", "value", "gate", "up"), ("out", "down")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--meshes", default="1x1x1", help="data x model x context, in turn")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, help="other than the size has")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=256, help="bytes a window")
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--context-parallel", choices=["ring", "all_gather"], default="ring")
    parser.add_argument("--implementation", choices=["cute", "xla"], help="default: what serves")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    return parser.parse_args()


def partition_of(path: tuple) -> P:
    """How a parameter is spread: projections by their features, so by heads; the rest is whole."""
    if len(path) < 2 or path[-1] != "kernel":
        return P()
    if path[-2] in SPLIT_OUTPUTS:
        return P(None, "model")
    return P("model", None) if path[-2] in SPLIT_INPUTS else P()


def spread(model: ByteDecoder, mesh: Mesh) -> None:
    """Put every parameter where it belongs."""
    state = nnx.state(model, nnx.Param)
    placed = [
        (path, x.replace(jax.device_put(x[...], NamedSharding(mesh, partition_of(path)))))
        for path, x in nnx.to_flat_state(state)
    ]
    nnx.update(model, nnx.from_flat_state(placed))


def make_loss(mesh: Mesh, context_parallel: str, implementation: str | None, length: int):
    """Mean nats of a byte, of inputs and targets (B, T) in the mesh's order of the sequence."""
    devices = mesh.shape["context"]
    positions = jnp.asarray(permuted_positions(length, devices) if devices > 1 else range(length))

    def attend(layer, query, key, value):
        if devices == 1:
            return flash_attention(query, key, value, is_causal=True, implementation=implementation)
        return context_parallel_attention(
            query,
            key,
            value,
            mesh=mesh,
            axis_name="context",
            batch_axes="data",
            head_axes="model",
            context_parallel=context_parallel,
            is_causal=True,
            implementation=implementation,
        )

    def loss(model, inputs, targets):
        logits = model(inputs, positions, attend)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    return loss


@functools.partial(nnx.jit, static_argnames="loss", donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, inputs, targets, loss) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss)(model, inputs, targets)
    optimizer.update(model, gradients)
    return value


def train(config: ModelConfig, shape: tuple[int, ...], text: np.ndarray, args) -> dict[str, Any]:
    """Losses in bits a byte and tokens a second on one mesh."""
    count = math.prod(shape)
    mesh = jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:count])
    model = ByteDecoder(config, jnp.dtype(args.dtype), rngs=nnx.Rngs(0))
    spread(model, mesh)
    optimizer = nnx.Optimizer(model, optax.adamw(args.learning_rate), wrt=nnx.Param)
    loss = make_loss(mesh, args.context_parallel, args.implementation, args.seq_len)
    places = NamedSharding(mesh, P("data", "context"))
    order = np.random.default_rng(0)

    def batch() -> list[jax.Array]:
        starts = order.integers(0, len(text) - args.seq_len - 1, args.batch)
        windows = cut(text, starts, args.seq_len + 1).astype(np.int32)
        both = [windows[:, :-1], windows[:, 1:]]
        if mesh.shape["context"] > 1:
            both = [permute_sequence(x, mesh.shape["context"]) for x in both]
        return [jax.device_put(x, places) for x in both]

    # Calls are asynchronous: the clock stands still for compiling and for the first two steps.
    losses, start = [], time.perf_counter()
    for step in range(args.steps):
        losses.append(train_step(model, optimizer, *batch(), loss))
        if step == min(2, args.steps - 1):
            losses[-1].block_until_ready()
            compiled = time.perf_counter()
    losses[-1].block_until_ready()
    timed = max(args.steps - 3, 0)
    seconds = time.perf_counter() - compiled
    return {
        "mesh": dict(zip(AXES, shape, strict=True)),
        "devices": count,
        "device": jax.devices()[0].device_kind,
        "model": dataclasses.asdict(config),
        "dtype": args.dtype,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "context_parallel": args.context_parallel if mesh.shape["context"] > 1 else None,
        "steps_timed": timed,
        "tokens_per_second": timed * args.batch * args.seq_len / seconds,
        "compile_seconds": compiled - start,
        "bits_per_byte": [float(x) / math.log(2) for x in losses],
    }


def main() -> int:
    args = parse_arguments()
    if args.steps < 4:
        sys.exit(f"--steps must be at least 4, of which three are not timed; got {args.steps}")
    config = SIZES[args.size]
    if args.layers:
        config = dataclasses.replace(config, layers=args.layers)
    text, _ = read_standard_library()
    results = []
    for name in args.meshes.split(","):
        shape = tuple(int(n) for n in name.split("x"))
        if len(shape) != len(AXES):
            sys.exit(f"a mesh is {' x '.join(AXES)}, as 1x2x1; got {name}")
        if math.prod(shape) > len(jax.devices()):
            print(f"left out: {name}; there are {len(jax.devices())} devices", file=sys.stderr)
            continue
        found = train(config, shape, text, args)
        results.append(found)
        print(
            f"{name}: {found['tokens_per_second']:,.0f} tokens a second, loss "
            f"{found['bits_per_byte'][0]:.4f} -> {found['bits_per_byte'][-1]:.4f} bits a byte, "
            f"{found['compile_seconds']:.1f} s until the third step",
            flush=True,
        )
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"rows": results}, indent=1) + "\n")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
