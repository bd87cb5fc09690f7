"""The example models, tiny, on a CPU: exact with and without a cache, and they learn."""

import dataclasses
import functools

import gemma2
import gpt_oss
import jax
import jax.numpy as jnp
import llama
import numpy as np
import packed_fine_tune
import pytest
import vision_transformer
from flax import nnx

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

DECODERS = {
    "llama": (llama.Llama, llama.TINY),
    "gemma2": (gemma2.Gemma2, gemma2.TINY),
    "gpt_oss": (gpt_oss.GptOss, gpt_oss.TINY),
}
MODULES = (llama, gemma2, gpt_oss, vision_transformer, packed_fine_tune)

forward = nnx.jit(lambda model, *arguments: model(*arguments))


def make(name: str, **changes) -> nnx.Module:
    """A decoder; one that has sinks gets some that matter."""
    model, config = DECODERS[name]
    made = model(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))
    for block in made.blocks:
        if block.attention.sinks is not None:
            block.attention.sinks[...] = jnp.linspace(-1, 2, config.heads)
    return made


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_changes_nothing(name: str) -> None:
    """Nor does the implementation."""
    model = make(name)
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 32)
    whole = forward(model, tokens)
    close(whole, forward(make(name, implementation="reference"), tokens))
    caches = model.init_caches(2, 13, jnp.float32)
    logits, caches = forward(model, tokens[:, :10], caches)
    outs = [logits]
    for i in range(10, 13):
        logits, caches = forward(model, tokens[:, i : i + 1], caches)
        outs.append(logits)
    close(jnp.concatenate(outs, axis=1), whole)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_windows(name: str) -> None:
    """Token 0 reaches rows 0 to 4 of the first layer, and all of the second."""
    tokens = jnp.arange(13)[None]
    for layers, last in ((1, 4), (2, 12)):
        model = make(name, layers=layers)
        difference = forward(model, tokens) - forward(model, tokens.at[0, 0].set(31))
        changed = np.flatnonzero(np.abs(difference[0]).max(-1) > 1e-6)
        assert changed.max() == last


def test_sinks_learn() -> None:
    gradients = nnx.grad(llama.next_token_loss)(make("gpt_oss"), jnp.arange(12)[None])
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients))
    sinks = [x for path, x in leaves if "sinks" in jax.tree_util.keystr(path)]
    assert [x.shape for x in sinks] == [(6,), (6,)]
    assert all(np.abs(x).min() > 0 for x in sinks)


def test_the_vision_transformer_is_flaxs() -> None:
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 1))
    ours, own = (
        vision_transformer.VisionTransformer(vision_transformer.TINY, fn, rngs=nnx.Rngs(0))
        for fn in (None, nnx.dot_product_attention)
    )
    close(forward(ours, images), forward(own, images))


def test_packing_loses_nothing() -> None:
    """The loss of packed conversations is that of each in a row of its own."""
    examples = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [10, 11, 12]), ([5, 6], [4, 3])]
    model = make("llama")
    packed, left = packed_fine_tune.pack(examples, rows=2, length=9)
    assert left == []
    assert (packed["segments"] >= 0).sum() == 16
    alone, _ = packed_fine_tune.pack(examples, rows=4, length=5)
    assert (alone["segments"].max(1) == np.arange(4)).all()
    loss = nnx.jit(nnx.value_and_grad(packed_fine_tune.loss_of))
    (packed_loss, packed_gradients), (alone_loss, alone_gradients) = (
        loss(model, batch) for batch in (packed, alone)
    )
    close(packed_loss, alone_loss)
    jax.tree.map(close, packed_gradients, alone_gradients)


def test_what_does_not_fit_is_packed_later() -> None:
    examples = [([1], [2]), ([3], [4]), ([5, 6], [7])]
    batch, left = packed_fine_tune.pack(examples, rows=1, length=4)
    assert left == examples[2:]
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4]])
    np.testing.assert_array_equal(batch["weights"], [[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="example 0 has 5 tokens, a row 4"):
        packed_fine_tune.pack([([1, 2, 3], [4, 5])], rows=1, length=4)


@pytest.mark.parametrize(
    "module",
    [pytest.param(m, marks=pytest.mark.slow if m is not packed_fine_tune else ()) for m in MODULES],
    ids=lambda module: module.__name__,
)
def test_it_learns(module, capsys: pytest.CaptureFixture) -> None:
    losses = module.main(steps=25)
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert "after 25 steps" in capsys.readouterr().out
