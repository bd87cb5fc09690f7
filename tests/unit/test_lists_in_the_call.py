"""Lists of tiles made from a mask inside a call: where, how often, and what is in them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import BlockMask, api, explain
from jax_flashcute.block_mask import packed
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm90 import backward_config, forward_config
from jax_flashcute.kernels.config.sm100 import backward_config_sm100, forward_config_sm100
from tests.unit.test_block_mask import MASKS, B, N, dense, inputs, kinds_of

LARGE = {"query": (2, 8192, 16, 64), "key": (2, 8192, 4, 64), "value": (2, 8192, 4, 64)}


def large(**shapes) -> dict[str, jax.ShapeDtypeStruct]:
    return {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in (LARGE | shapes).items()}


def every_third(b, h, q, kv):
    return (q + kv) % 3 == 0


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_where_lists_are_made_in_the_call(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_FLASHCUTE_ARCH", arch)
    ids = jnp.zeros((2, 8192), jnp.int32)

    def said(arrays=None, mask_mod=every_third, **call) -> str:
        return explain(**(arrays or large()), mask_mod=mask_mod, **call).lists

    made = "made from mask_mod in the call"
    assert said() == made
    assert said(mask_mod=lambda b, h, q, kv: ids[b, q] == ids[b, kv]) == made
    assert said(is_causal=True, q_offset=5, deterministic=True) == made
    assert said(block_mask=None) == "none"
    assert "67,108,864 scores are fewer" in said(local_window_size=(255, 0))
    assert said(mask_mod=MASKS["causal"]) == "none"
    assert "segments have no lists" in said(segment_ids=ids)
    assert "fewer than 4 heads" in said(mask_mod=lambda b, h, q, kv: (q + b) % 3 != (kv + h) % 2)
    few = large(query=(2, 9, 16, 64), key=(2, 2**20, 4, 64), value=(2, 2**20, 4, 64))
    assert "heads share a tile" in said(few)
    assert said(large(**{n: (*LARGE[n][:3], 256) for n in LARGE})) == made
    short = large(query=(2, 900, 16, 64), key=(2, 900, 4, 64), value=(2, 900, 4, 64))
    assert "25,920,000 scores are fewer than 134,217,728" in said(short)


ABSENT = dict.fromkeys(
    (
        *("bias", "mask", "scale", "query_seq_lengths", "key_value_seq_lengths", "sinks"),
        *("local_window_size", "logits_soft_cap", "score_mod", "segment_ids"),
        *("cu_seqlens_q", "cu_seqlens_k", "positions"),
    )
) | {"is_causal": False, "q_offset": 0, "deterministic": False, "block_mask": "auto"}


def lists_for_kernels(
    layers: int, mask_mod, arch: str = "sm_90a", **call
) -> Callable[[dict], list]:
    """The lists that each layer's kernels take, forward and backward."""

    def run(arrays: dict):
        found = []
        for _ in range(layers):
            spec, operands = api.checked_call(**ABSENT | arrays | call, mask_mod=mask_mod)
            for direction in ("fwd", "bwd"):
                key = registry.kernel_key(spec, operands, direction, arch, 132)
                assert key.has_lists
                found.append(other_inputs(key, spec, operands)[-4:])
        return found

    return run


def test_layers_make_their_lists_once_forward_and_backward(monkeypatch) -> None:
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_LISTS", 1)
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs(700, 900).items()}

    def classifications(layers: int) -> int:
        text = jax.jit(lists_for_kernels(layers, every_third)).lower(arrays).compile().as_text()
        return sum(" reduce(" in x and "classify" in x for x in text.splitlines())

    assert classifications(3) == classifications(1) == 1


CONFIGS = {
    "sm_90a": (forward_config, backward_config),
    "sm_100a": (forward_config_sm100, backward_config_sm100),
}


@pytest.mark.parametrize("arch", CONFIGS)
def test_lists_made_in_the_call_are_those_of_the_mask(arch: str, monkeypatch) -> None:
    monkeypatch.setattr(registry, "LEAST_SCORES_FOR_LISTS", 1)
    monkeypatch.setattr(registry, "LEAST_HEADS_FOR_A_LIST", 1)
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs(700, 900).items()}
    H = arrays["query"].shape[-1]
    mask, lengths = MASKS["head_limits"], jnp.asarray([300, 900])
    call = {"is_causal": True, "key_value_seq_lengths": lengths, "q_offset": jnp.asarray([7, 0])}
    found = jax.jit(lists_for_kernels(1, mask, arch, **call))(arrays)
    seen = dense(mask, 700, 900, call["q_offset"])
    q, kv = np.arange(700)[:, None], np.arange(900)
    seen = seen & (kv <= q + np.asarray(call["q_offset"])[:, None, None, None])
    for lists, is_forward in zip(found, (True, False), strict=True):
        config = CONFIGS[arch][0 if is_forward else 1](H, H)
        tile_m, tile_n = config.tile_m, config.tile_n
        kinds = kinds_of(np.broadcast_to(seen, (B, N, 700, 900)), tile_m, tile_n)
        first = np.arange(kinds.shape[3]) * tile_n
        kinds = np.where(first < np.asarray(lengths)[:, None, None, None], kinds, 0)
        sizes = {"q_length": 700, "kv_length": 900, "tile_m": tile_m, "tile_n": tile_n}
        expected = BlockMask.from_kinds(jnp.asarray(kinds), **sizes)
        if is_forward:
            wanted = expected.kernel_lists()
        else:
            wanted = packed(expected.transpose().kernel_lists())
        for one, other in zip(lists, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
