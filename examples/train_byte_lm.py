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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from byte_decoder import SIZES, VOCABULARY, ByteDecoder, ModelConfig, save_model
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


@dataclasses.dataclass(frozen=True)
class Fit:
    """A training run: bits per byte of each step, and how long it took."""

    bits: list[float]
    tokens_per_second: float
    compile_seconds: float


def fit(model: ByteDecoder, text: np.ndarray, learning_rate: float, args) -> Fit:
    """Train on windows of `text` drawn in an order that the seed alone decides."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, args.steps // 20), args.steps, learning_rate / 20
    )
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98)),
        wrt=nnx.Param,
    )
    order = np.random.default_rng(args.seed)
    losses: list[jax.Array] = []
    start = time.perf_counter()
    interval = 0.1 if sys.stderr.isatty() else 5.0  # seconds; a log file wants fewer lines
    with tqdm(total=args.steps, unit="step", desc="training", mininterval=interval) as bar:
        for step in range(args.steps):
            positions = order.integers(0, len(text) - args.seq_len - 1, args.batch)
            losses.append(train_step(model, optimizer, cut(text, positions, args.seq_len + 1)))
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
    return Fit(bits, tokens_per_second, compiled - start)


def bits_per_byte(model: ByteDecoder, windows: np.ndarray, batch: int) -> float:
    """The model's loss on windows of held-out text."""
    batches = np.array_split(windows, math.ceil(len(windows) / batch))
    total = sum(float(evaluate(model, each)) * len(each) for each in batches)
    return total / len(windows) / math.log(2)


def number_of_parameters(model: ByteDecoder) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def held_out_windows_of(text: np.ndarray, seq_len: int) -> np.ndarray:
    starts = np.linspace(0, len(text) - seq_len - 1, HELD_OUT_WINDOWS).astype(np.int64)
    return cut(text, starts, seq_len + 1)


def default_dtype() -> str:
    return "bfloat16" if jax.devices()[0].platform == "gpu" else "float32"


def default_learning_rate(config: ModelConfig) -> float:
    return 3e-3 * math.sqrt(128 / config.width)


def log_of(
    name: str, model: ByteDecoder, dtype: str, fitted: Fit, held_out: float, bigram: float, args
) -> dict[str, Any]:
    """What is kept of a run, and drawn by `plot_losses`."""
    return {
        "implementation": name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": dataclasses.asdict(model.config),
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "dtype": dtype,
        "parameters": number_of_parameters(model),
        "tokens_per_step": args.batch * args.seq_len,
        "tokens_per_second": round(fitted.tokens_per_second, 1),
        "compile_seconds": round(fitted.compile_seconds, 2),
        "bits_per_byte": [round(x, 5) for x in fitted.bits],
        "held_out_bits_per_byte": round(held_out, 5),
        "bigram_bits_per_byte": round(bigram, 5),
    }


def main() -> int:
    args = parse_arguments()
    config = SIZES[args.size]
    device = jax.devices()[0]
    dtype = args.dtype or default_dtype()
    train, held_out = read_standard_library()
    held_out_windows = held_out_windows_of(held_out, args.seq_len)
    bigram = bigram_bits_per_byte(train, held_out_windows)

    model = ByteDecoder(config, jnp.dtype(dtype), args.implementation, rngs=nnx.Rngs(args.seed))
    print(
        f"{device.device_kind} · {number_of_parameters(model) / 1e6:.2f} M parameters in {dtype} · "
        f"{len(train) / 1e6:.1f} MB of training text, {len(held_out) / 1e6:.1f} MB held out"
    )
    fitted = fit(model, train, args.learning_rate or default_learning_rate(config), args)
    held_out_bits = bits_per_byte(model, held_out_windows, args.batch)

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
    name = args.implementation or "default"
    log = log_of(name, model, dtype, fitted, held_out_bits, bigram, args)
    (args.out / "log.json").write_text(json.dumps(log) + "\n")
    plot_losses([log], args.out / "loss.png")

    if args.save:
        save_model(args.save, model)
        print(f"\nWrote {args.save}")

    bits = fitted.bits
    window = max(1, min(20, args.steps // 4))
    first, last = np.mean(bits[:window]), np.mean(bits[-window:])
    print(f"\nTraining loss: {first:.3f} -> {last:.3f} bits per byte")
    print(f"Held-out text: {held_out_bits:.3f} bits per byte; a bigram model: {bigram:.3f}")
    print(
        f"Speed: {fitted.tokens_per_second:,.0f} tokens per second, "
        f"after {fitted.compile_seconds:.1f} s of compiling"
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
