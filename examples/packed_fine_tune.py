"""Fine-tuning on packed sequences: conversations of any lengths share a row, and do not see others.

    python examples/packed_fine_tune.py     # a tiny Llama learns sums

`segment_ids` say which tokens belong together; attention and the loss follow them.  The loss is on
the answers alone.  Packing loses nothing: the loss is that of the conversations one by one.
"""

import numpy as np
import optax
from flax import nnx
from llama import TINY, Llama, train

PADDING = 0
CHARACTERS = "\0" + "0123456789+=\n"

Example = tuple[list[int], list[int]]
"""The tokens of a question, and those of its answer."""

Batch = dict[str, np.ndarray]
"""`tokens`, `segments` and `weights`, (rows, length) each; weight 1 for the tokens of answers."""


def pack(examples: list[Example], rows: int, length: int) -> tuple[Batch, list[Example]]:
    """Examples in rows, each in the first that has room, and those for which none has.

    Raises:
      ValueError: an example is longer than a row.
    """
    shape = (rows, length)
    tokens = np.full(shape, PADDING, np.int32)
    segments, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    used, left = [0] * rows, []
    for i, (question, answer) in enumerate(examples):
        size = len(question) + len(answer)
        if size > length:
            raise ValueError(f"example {i} has {size} tokens, a row {length}")
        row = next((r for r in range(rows) if used[r] + size <= length), None)
        if row is None:
            left.append((question, answer))
            continue
        place = slice(used[row], used[row] + size)
        tokens[row, place], segments[row, place] = question + answer, i
        weights[row, used[row] + len(question) : place.stop] = 1
        used[row] = place.stop
    return {"tokens": tokens, "segments": segments, "weights": weights}, left


def loss_of(model, batch):
    """Mean cross-entropy of the answers' tokens, each predicted from its own conversation."""
    segments = batch["segments"]
    logits = model(batch["tokens"][:, :-1], segment_ids=segments[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    weights = batch["weights"][:, 1:] * (segments[:, 1:] == segments[:, :-1])
    return (losses * weights).sum() / weights.sum()


def sums(count: int, seed: int) -> list[Example]:
    """Questions such as `7+8=` and their answers."""
    rng = np.random.default_rng(seed)

    def tokens(text: str) -> list[int]:
        return [CHARACTERS.index(c) for c in text]

    pairs = rng.integers(0, 10, (count, 2))
    return [(tokens(f"{a}+{b}="), tokens(f"{a + b}\n")) for a, b in pairs]


def main(steps: int = 100) -> list[float]:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    batches = (pack(sums(40, seed), rows=4, length=48)[0] for seed in range(steps))
    losses = train(model, batches, loss_of)
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
