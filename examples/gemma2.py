"""A decoder as Gemma 2 is: soft-capped attention, every other layer within a window.

    python examples/gemma2.py       # trains a tiny one to count

Layers 0, 2, 4 ... see the last `window` tokens, the others all; scores are capped, and so are the
logits.  Norms stand before and after both parts of a layer; input and output share an embedding.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from llama import counting, generate, next_token_loss, train

from jax_flashcute import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of Gemma 2 9B."""

    vocabulary: int = 256_000
    layers: int = 42
    features: int = 3584
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 256
    hidden: int = 14_336
    window: int = 4096
    attention_cap: float = 50.0
    logit_cap: float = 30.0
    query_scalar: float = 256.0
    dtype: Any = jnp.bfloat16
    implementation: str | None = None


TINY = Config(
    vocabulary=32,
    layers=2,
    features=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=64,
    window=5,
    query_scalar=16.0,
    dtype=jnp.float32,
)


class Norm(nnx.RMSNorm):
    """RMSNorm whose scale is kept as its distance from 1."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, use_scale=False, rngs=rngs)
        self.offset = nnx.Param(jnp.zeros(features))

    def __call__(self, x):
        return super().__call__(x) * (1 + self.offset[...]).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs):
        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(width_in, width_out, use_bias=False, dtype=config.dtype, rngs=rngs)

        self.norms = nnx.List([Norm(config.features, rngs=rngs) for _ in range(4)])
        self.attention = nn.FlashAttention(
            config.features,
            config.heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_theta=10_000.0,
            is_causal=True,
            # A row sees itself and the window - 1 tokens before it.
            local_window_size=(config.window - 1, 0) if layer % 2 == 0 else None,
            logits_soft_cap=config.attention_cap,
            scale=config.query_scalar**-0.5,
            implementation=config.implementation,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.gate = linear(config.features, config.hidden)
        self.up = linear(config.features, config.hidden)
        self.down = linear(config.hidden, config.features)

    def __call__(self, x, cache):
        out = self.attention(self.norms[0](x), cache=cache)
        out, cache = (out, None) if cache is None else out
        x = x + self.norms[1](out)
        y = self.norms[2](x)
        y = self.down(nnx.gelu(self.gate(y), approximate=True) * self.up(y))
        return x + self.norms[3](y), cache


class Gemma2(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            config.vocabulary, config.features, dtype=config.dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.layers)])
        self.norm = Norm(config.features, rngs=rngs)
        self.logit_cap, self.scale = config.logit_cap, math.sqrt(config.features)

    def init_caches(self, batch: int, max_length: int, dtype=jnp.bfloat16) -> list[nn.KVCache]:
        return [block.attention.init_cache(batch, max_length, dtype) for block in self.blocks]

    def __call__(self, tokens: jax.Array, caches: list[nn.KVCache] | None = None):
        """Logits (B, T, vocabulary) in float32 of tokens (B, T), and with caches these too."""
        x, after = self.embedding(tokens) * self.scale, []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, None if caches is None else caches[i])
            after.append(cache)
        logits = self.embedding.attend(self.norm(x)).astype(jnp.float32)
        logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return logits if caches is None else (logits, after)


def main(steps: int = 60) -> list[float]:
    model = Gemma2(TINY, rngs=nnx.Rngs(0))
    losses = train(model, counting(TINY.vocabulary, steps), next_token_loss)
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps")
    print("5 6 7 8 and on:", *generate(model, jnp.asarray([[5, 6, 7, 8]]), 8, jnp.float32)[0])
    return losses


if __name__ == "__main__":
    main()
