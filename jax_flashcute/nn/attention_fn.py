"""``attention_fn`` for the ``MultiHeadAttention`` of Flax NNX and Linen."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from jax_flashcute.api import flash_attention

_BY_ROW = ("is_causal", "local_window_size", "mask_mod", "score_mod", "compress_factor")
"""Options whose meaning depends on a row's position."""


def make_attention_fn(**options: Any) -> Callable[..., jax.Array]:
    """An ``attention_fn`` that calls ``flash_attention``, for NNX and Linen alike.

    Args:
      options: keyword arguments of ``flash_attention`` for every call: ``is_causal``,
        ``local_window_size``, ``mask_mod``, ``implementation`` and so on.  ``bias`` and ``mask``
        are the module's.

    Returns:
      A function with the arguments that Flax's modules give theirs: query (batch..., T, N, H),
      key and value (batch..., S, K, H).  Masks may have any dtype, as those of
      ``flax.linen.make_causal_mask`` do, and broadcast to (batch..., N, T, S); anything but 0 is
      visible.  The softmax is in float32.  A row that sees no key gives 0, where Flax's own
      functions give the mean of the values.

      It raises NotImplementedError for what no kernel does, with every reason: dropout of
      attention weights (``dropout_rate`` without ``deterministic``), ``sow_weights``, a
      ``precision``, einsums of one's own, positions of the inputs (``input_positions``), and, where
      queries and keys differ in number as in decoding, options that depend on a row's position
      without ``q_offset``.

    Raises:
      ValueError: ``flash_attention`` has no such option, or it is the module's to give.
    """
    check_options(options, "bias", "mask")

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        promote_dtype: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng, force_fp32_for_softmax
        reasons = []
        if dropout_rate > 0 and not deterministic:
            reasons.append(f"dropout of attention weights, dropout_rate={dropout_rate}")
        if module is not None:
            reasons.append("sow_weights: the weights are never in memory")
        if precision not in (None, "default", lax.Precision.DEFAULT):
            reasons.append(f"precision={precision}: products are those of the operands' dtype")
        own = {
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
            "input_positions": input_positions,
        }
        reasons += [f"{name}: not supported" for name, x in own.items() if x is not None]
        # A window of 0 is one.
        by_row = [n for n in _BY_ROW if options.get(n) is not None and options[n] is not False]
        if by_row and "q_offset" not in options and query.shape[-3] != key.shape[-3]:
            reasons.append(
                f"{', '.join(by_row)} with {query.shape[-3]} queries and {key.shape[-3]} keys: the "
                "module does not say at which position its queries stand; give it a mask, or "
                "q_offset among the options (0 in cross-attention)"
            )
        if reasons:
            raise NotImplementedError(
                "flash attention cannot do this:\n" + "\n".join(f"  - {r}" for r in reasons)
            )
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        else:
            common = jnp.result_type(query, key, value) if dtype is None else dtype
            query, key, value = (jnp.asarray(x, common) for x in (query, key, value))
        causal = is_causal or options.get("is_causal", False)
        return _of_batches(query, key, value, bias, mask, {**options, "is_causal": causal})

    return attention_fn


def check_options(options: Iterable[str], *owned: str) -> None:
    """Raise ValueError for what ``flash_attention`` does not take, or its caller gives itself."""
    owned = ("query", "key", "value", "return_residual", *owned)
    known = inspect.signature(flash_attention).parameters.keys() - set(owned)
    wrong = sorted(set(options) - known)
    if wrong:
        raise ValueError(
            f"options: expected arguments of flash_attention other than {', '.join(owned)}; "
            f"got {', '.join(wrong)}"
        )


def check_input(x: jax.Array, features: int) -> None:
    """Raise ValueError unless x, a module's input, is (B, T, features)."""
    if x.ndim != 3 or x.shape[2] != features:
        raise ValueError(f"x must be (batch, length, {features}); got shape {x.shape}")


def _of_batches(query, key, value, bias, mask, options: dict[str, Any]) -> jax.Array:
    """``flash_attention`` for any number of batch dimensions."""
    batch, rows = query.shape[:-3], query.shape[-3:]
    one_batch = [x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)]

    def elementwise(x):
        if x is None:
            return None
        x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
        if len(batch) != 1 and any(length != 1 for length in x.shape[:-3]):
            x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    bias, mask = elementwise(bias), elementwise(mask)
    if mask is not None:
        mask = mask.astype(jnp.bool_)
    out = cast(jax.Array, flash_attention(*one_batch, bias=bias, mask=mask, **options))
    return out.reshape(*batch, *rows[:-1], value.shape[-1])
