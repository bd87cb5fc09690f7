"""Draw the loss curves of several training runs into one picture.

python examples/plot_losses.py demo_output/cute/log.json demo_output/reference/log.json --out a.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_losses(logs: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of the training loss of each log against the tokens seen."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for log in logs:
        bits = np.asarray(log["bits_per_byte"])
        tokens = (1 + np.arange(len(bits))) * log["tokens_per_step"]
        label = f"{log['implementation']}, {log['tokens_per_second']:,.0f} tokens/s"
        (line,) = axes.plot(tokens, bits, alpha=0.25, linewidth=0.8)
        window = max(1, len(bits) // 40)
        smooth = np.convolve(bits, np.ones(window) / window, mode="valid")
        axes.plot(tokens[window - 1 :], smooth, color=line.get_color(), label=label)
        axes.plot(tokens[-1], log["held_out_bits_per_byte"], "o", color=line.get_color())
    bigram = logs[0]["bigram_bits_per_byte"]
    axes.axhline(bigram, color="gray", linestyle="--", linewidth=1, label="bigram, held-out text")
    axes.set(xlabel="tokens", ylabel="bits per byte", ylim=(0, None))
    axes.set_title(f"Training loss (dot: held-out text), {logs[0]['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", type=Path, help="log.json files of train_byte_lm.py")
    parser.add_argument("--out", type=Path, default=Path("losses.png"))
    args = parser.parse_args()
    plot_losses([json.loads(path.read_text()) for path in args.logs], args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
