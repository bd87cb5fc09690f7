"""Train one model with dense and with native sparse attention on the same text; plot both losses.

    python examples/train_nsa.py                                      # CPU: short windows
    python examples/train_nsa.py --size base --seq-len 16384 --batch 1 --steps 1000 \\
        --block 64 --num-selected 16 --window 512 --query-tile 256    # a GPU

The model, the text and the training loop are those of `train_byte_lm.py`; only the attention
differs.  Compressed blocks are seen once they are complete, so that no mean holds later bytes; the
choice of blocks is shared by the rows of a query tile and made from all of their queries.  It
leaves `losses.png` and the logs of both runs in the output folder.
"""

import argparse
import json
import sys
from pathlib import Path

import jax.numpy as jnp
from byte_decoder import SIZES, ByteDecoder, ModelConfig, rotate
from flax import nnx
from plot_losses import plot_losses
from train_byte_lm import (
    bigram_bits_per_byte,
    bits_per_byte,
    default_dtype,
    default_learning_rate,
    fit,
    held_out_windows_of,
    log_of,
    number_of_parameters,
    read_standard_library,
)

from jax_flashcute.nn import NativeSparseAttention
from jax_flashcute.nsa import NSAConfig

WORSE_BY = 1.1  # held-out bits per byte of the sparse model over the dense one's that fail


class SparseAttention(NativeSparseAttention):
    """In the place of `byte_decoder.Attention`, for whole sequences."""

    def __call__(self, x, positions, attend):
        del positions, attend
        return super().__call__(x)


class SparseByteDecoder(ByteDecoder):
    """The decoder with native sparse attention in every layer."""

    def __init__(
        self, config: ModelConfig, sizes: NSAConfig, dtype, implementation, *, rngs: nnx.Rngs
    ):
        super().__init__(config, dtype, implementation, rngs=rngs)
        for block in self.blocks:
            block.attention = SparseAttention(
                config.width,
                config.q_heads,
                num_kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                config=sizes,
                positional=lambda x: rotate(x, jnp.arange(x.shape[1])),
                dtype=dtype,
                implementation=implementation,
                rngs=rngs,
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="model size")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq-len", type=int, default=512, help="bytes a window")
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--learning-rate", type=float, help="peak; default by size")
    parser.add_argument("--implementation", choices=["cute", "xla", "reference"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("block", 16), ("num-selected", 4), ("window", 64), ("query-tile", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of NSAConfig")
    parser.add_argument("--out", type=Path, default=Path("demo_output/nsa"))
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    config, dtype = SIZES[args.size], args.dtype or default_dtype()
    sizes = NSAConfig(
        args.block, args.num_selected, args.window, args.query_tile, complete_only=True
    )
    train, held_out = read_standard_library()
    windows = held_out_windows_of(held_out, args.seq_len)
    bigram = bigram_bits_per_byte(train, windows)
    args.out.mkdir(parents=True, exist_ok=True)
    logs = []
    common = jnp.dtype(dtype), args.implementation
    models = {
        "dense": ByteDecoder(config, *common, rngs=nnx.Rngs(args.seed)),
        "sparse": SparseByteDecoder(config, sizes, *common, rngs=nnx.Rngs(args.seed)),
    }
    for name, model in models.items():
        print(f"{name} attention: {number_of_parameters(model) / 1e6:.2f} M parameters in {dtype}")
        fitted = fit(model, train, args.learning_rate or default_learning_rate(config), args)
        bits = bits_per_byte(model, windows, args.batch)
        logs.append(log_of(name, model, dtype, fitted, bits, bigram, args))
        (args.out / f"{name}.json").write_text(json.dumps(logs[-1]) + "\n")
        print(f"  held-out text: {bits:.3f} bits per byte; a bigram model: {bigram:.3f}")
    plot_losses(logs, args.out / "losses.png")
    print(f"Wrote {args.out / 'losses.png'}")
    dense, sparse = (log["held_out_bits_per_byte"] for log in logs)
    if not sparse <= WORSE_BY * dense:
        print("Sparse attention is clearly worse than dense.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
