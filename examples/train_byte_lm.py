"""Train a byte-level language model on the source text of Python's standard library.

    python examples/train_byte_lm.py                      # two CPU cores, under three minutes
    python examples/train_byte_lm.py --size base --seq-len 2048 --batch 16 --steps 2000    # a GPU
    python examples/train_byte_lm.py --implementation reference --out demo_output/reference

The model is `byte_decoder.py`, whose attention is `jax_flashcute.flash_attention`.  The text is
what the running Python has on disk; every twentieth file is held out.  At the end the model's bits
per byte on held-out text stand beside those of a bigram model counted on the same training text;
the program fails where the loss did not fall or the model is not clearly better.  It leaves
`loss.png` and `log.json` in the output folder; `examples/plot_losses.py` draws several logs into
one picture.  With `--save` it leaves the model as well, for `examples/serve.py`.
"""

import argparse
import dataclasses
import json
import math
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from byte_decoder import SIZES, VOCABULARY, ByteDecoder, save_model
from flax import nnx
from plot_losses import plot_losses
from tqdm import tqdm

HOLD_OUT_EVERY = 20  # one file in twenty
HELD_OUT_WINDOWS = 96
CLEARLY_BETTER = 0.9  # of the bigram model's bits per byte


def cross_entropy(model: ByteDecoder, windows: jax.Array) -> jax.Array:
    """Mean nats per byte of (B, T + 1) windows, each byte predicted from those before it."""
    windows = windows.astype(jnp.int32)
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@nnx.jit
def train_step(model: ByteDecoder, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(cross_entropy)(model, windows)
    optimizer.update(model, gradients)
    return loss


evaluate = nnx.jit(cross_entropy)


@nnx.jit
def write(model: ByteDecoder, text: jax.Array, start: int, temperature: float, key: jax.Array):
    """Fill (T,) `text` from position `start` on with bytes drawn from the model."""

    def next_byte(position, text):
        logits = model(text[None])[0, position - 1]
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return text.at[position].set(drawn)

    return jax.lax.fori_loop(start, text.shape[0], next_byte, text)


def read_standard_library() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out bytes: the running Python's own modules, without their tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    if len(files) < HOLD_OUT_EVERY:
        sys.exit(f"{root} holds {len(files)} Python files: too few to train on.")
    held_out = files[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]
    train = [path for path in files if path not in set(held_out)]

    def join(paths):
        return np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)

    return join(train), join(held_out)


def cut(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows of `length` bytes: (len(starts), length)."""
    return text[starts[:, None] + np.arange(length)]


def bigram_bits_per_byte(train: np.ndarray, windows: np.ndarray) -> float:
    """Bits per byte of each window's bytes given the one before, from counts with one added."""
    counts = np.ones((VOCABULARY, VOCABULARY))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return float(bits[windows[:, :-1], windows[:, 1:]].mean())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="model size")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seq-len", type=int, default=256, help="bytes a window")
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--learning-rate", type=float, help="peak; default by size")
    parser.add_argument(
        "--implementation",
        choices=["cute", "xla", "reference", "jax_nn_cudnn"],
        help="of flash_attention, or jax.nn's with cuDNN beside it; default: what the device has",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the model: .safetensors")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    config = SIZES[args.size]
    device = jax.devices()[0]
    dtype = args.dtype or ("bfloat16" if device.platform == "gpu" else "float32")
    learning_rate = args.learning_rate or 3e-3 * math.sqrt(128 / config.width)

    train, held_out = read_standard_library()
    starts = np.linspace(0, len(held_out) - args.seq_len - 1, HELD_OUT_WINDOWS).astype(np.int64)
    held_out_windows = cut(held_out, starts, args.seq_len + 1)
    bigram = bigram_bits_per_byte(train, held_out_windows)

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, args.steps // 20), args.steps, learning_rate / 20
    )
    model = ByteDecoder(config, jnp.dtype(dtype), args.implementation, rngs=nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98)),
        wrt=nnx.Param,
    )
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{device.device_kind} · {parameters / 1e6:.2f} M parameters in {dtype} · "
        f"{len(train) / 1e6:.1f} MB of training text, {len(held_out) / 1e6:.1f} MB held out"
    )

    order = np.random.default_rng(args.seed)
    losses: list[jax.Array] = []
    start = time.perf_counter()
    interval = 0.1 if sys.stderr.isatty() else 5.0  # seconds; a log file wants fewer lines
    with tqdm(total=args.steps, unit="step", desc="training", mininterval=interval) as bar:
        for step in range(args.steps):
            positions = order.integers(0, len(train) - args.seq_len - 1, args.batch)
            losses.append(train_step(model, optimizer, cut(train, positions, args.seq_len + 1)))
            if step == 0:
                losses[0].block_until_ready()
                compiled = time.perf_counter()
            elif step % 5 == 0 or step == args.steps - 1:
                # Reading a loss waits for the device: only now and then, so that it stays busy.
                recent = np.mean([float(x) for x in losses[-5:]])
                bar.set_postfix(loss=f"{recent / math.log(2):.3f} bits/byte", refresh=False)
            bar.update()
    seconds = time.perf_counter() - compiled
    tokens_per_second = (args.steps - 1) * args.batch * args.seq_len / seconds if seconds else 0.0
    bits = [float(loss) / math.log(2) for loss in losses]

    batches = np.array_split(held_out_windows, math.ceil(HELD_OUT_WINDOWS / args.batch))
    total = sum(float(evaluate(model, batch)) * len(batch) for batch in batches)
    held_out_bits = total / HELD_OUT_WINDOWS / math.log(2)

    prompt = np.frombuffer(b"def ", np.uint8)
    text = np.zeros(min(args.seq_len, 256), np.int32)
    text[: len(prompt)] = prompt
    sample = write(model, jnp.asarray(text), len(prompt), 0.7, jax.random.key(args.seed))
    print("\nWhat it writes after 'def ':\n")
    print(
        "    "
        + bytes(np.asarray(sample, np.uint8)).decode(errors="replace").replace("\n", "\n    ")
    )

    args.out.mkdir(parents=True, exist_ok=True)
    log = {
        "implementation": args.implementation or "default",
        "device": device.device_kind,
        "jax": jax.__version__,
        "model": dataclasses.asdict(config),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "dtype": dtype,
        "parameters": parameters,
        "tokens_per_step": args.batch * args.seq_len,
        "tokens_per_second": round(tokens_per_second, 1),
        "compile_seconds": round(compiled - start, 2),
        "bits_per_byte": [round(x, 5) for x in bits],
        "held_out_bits_per_byte": round(held_out_bits, 5),
        "bigram_bits_per_byte": round(bigram, 5),
    }
    if args.save:
        save_model(args.save, model)
        print(f"\nWrote {args.save}")
    (args.out / "log.json").write_text(json.dumps(log) + "\n")
    plot_losses([log], args.out / "loss.png")

    window = max(1, min(20, args.steps // 4))
    first, last = np.mean(bits[:window]), np.mean(bits[-window:])
    print(f"\nTraining loss: {first:.3f} -> {last:.3f} bits per byte")
    print(f"Held-out text: {held_out_bits:.3f} bits per byte; a bigram model: {bigram:.3f}")
    print(
        f"Speed: {tokens_per_second:,.0f} tokens per second, "
        f"after {compiled - start:.1f} s of compiling"
    )
    print(f"Wrote {args.out / 'loss.png'} and {args.out / 'log.json'}")
    if not last < first:
        print("The loss did not fall.", file=sys.stderr)
        return 1
    if not held_out_bits < CLEARLY_BETTER * bigram:
        print("The model is not clearly better than the bigram model.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
