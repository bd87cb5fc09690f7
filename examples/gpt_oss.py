"""A decoder as gpt-oss is: attention sinks, every other layer within a window, experts.

    python examples/gpt_oss.py      # trains a tiny one to count

A sink is a learned logit per head that takes part in the softmax and has no value: a head may look
at nothing.  Left out: YaRN, which stretches rotary positions, and 4-bit weights.  Every expert is
computed for every token, which is right and slow.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from llama import counting, generate, next_token_loss, train

from jax_flashcute import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of gpt-oss 20B."""

    vocabulary: int = 201_088
    layers: int = 24
    features: int = 2880
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 64
    window: int = 128
    experts: int = 32
    experts_of_token: int = 4
    hidden: int = 2880
    dtype: Any = jnp.bfloat16
    implementation: str | None = None


TINY = Config(
    vocabulary=32,
    layers=2,
    features=32,
    heads=6,
    kv_heads=2,
    head_dim=8,
    window=5,
    experts=4,
    experts_of_token=2,
    hidden=32,
    dtype=jnp.float32,
)


class Experts(nnx.Module):
    """A mixture of the experts that score best for a token."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        features, hidden, count = config.features, config.hidden, config.experts
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(features, count, rngs=rngs)
        self.gate_and_up = nnx.Param(initial(rngs.params(), (count, features, 2, hidden)))
        self.gate_and_up_bias = nnx.Param(jnp.zeros((count, 2, hidden)))
        self.down = nnx.Param(initial(rngs.params(), (count, hidden, features)))
        self.down_bias = nnx.Param(jnp.zeros((count, features)))
        self.chosen, self.count, self.dtype = config.experts_of_token, count, config.dtype

    def __call__(self, x):
        scores, experts = jax.lax.top_k(self.router(x), self.chosen)
        weights = jax.nn.one_hot(experts, self.count) * jax.nn.softmax(scores)[..., None]
        y = jnp.einsum("btf,efgh->btegh", x, self.gate_and_up[...].astype(self.dtype))
        gate, up = jnp.moveaxis(y + self.gate_and_up_bias[...].astype(self.dtype), -2, 0)
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        y = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
        y = jnp.einsum("bteh,ehf->btef", y, self.down[...].astype(self.dtype))
        y = y + self.down_bias[...].astype(self.dtype)
        return jnp.einsum("btef,bte->btf", y, weights.sum(-2).astype(self.dtype))


class Block(nnx.Module):
    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.attention = nn.FlashAttention(
            config.features,
            config.heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_theta=150_000.0,
            use_bias=True,
            sinks=True,
            is_causal=True,
            # A row sees itself and the window - 1 tokens before it.
            local_window_size=(config.window - 1, 0) if layer % 2 == 0 else None,
            implementation=config.implementation,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.experts_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)

    def __call__(self, x, cache):
        out = self.attention(self.attention_norm(x), cache=cache)
        out, cache = (out, None) if cache is None else out
        x = x + out
        return x + self.experts(self.experts_norm(x)), cache


class GptOss(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            config.vocabulary, config.features, dtype=config.dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.layers)])
        self.norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, config.vocabulary, use_bias=False, rngs=rngs)

    def init_caches(self, batch: int, max_length: int, dtype=jnp.bfloat16) -> list[nn.KVCache]:
        return [block.attention.init_cache(batch, max_length, dtype) for block in self.blocks]

    def __call__(self, tokens: jax.Array, caches: list[nn.KVCache] | None = None):
        """Logits (B, T, vocabulary) in float32 of tokens (B, T), and with caches these too."""
        x, after = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, None if caches is None else caches[i])
            after.append(cache)
        logits = self.head(self.norm(x).astype(jnp.float32))
        return logits if caches is None else (logits, after)


def main(steps: int = 60) -> list[float]:
    model = GptOss(TINY, rngs=nnx.Rngs(0))
    losses = train(model, counting(TINY.vocabulary, steps), next_token_loss)
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps")
    print("5 6 7 8 and on:", *generate(model, jnp.asarray([[5, 6, 7, 8]]), 8, jnp.float32)[0])
    return losses


if __name__ == "__main__":
    main()
