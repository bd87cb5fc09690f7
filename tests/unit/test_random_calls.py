"""Calls drawn at random on the XLA path; and that what compares them notices what is wrong."""

import jax
import pytest

from tests import random_calls
from tests.random_calls import SMALL, RandomCall, check, numbers, random_call


@pytest.mark.parametrize("number", numbers(20))
def test_random_calls(number: int) -> None:
    call = random_call(number, SMALL)
    print(call)
    check(call, "xla")


def call_with_gradients() -> RandomCall:
    calls = (random_call(number, SMALL) for number in range(100))
    return next(c for c in calls if c.has_gradients and c.sizes.scores > 10_000)


@pytest.mark.parametrize("wrong", ["query", "gradient of out", "gradient of lse"])
def test_what_is_wrong_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = random_calls.flash_attention

    def wrong_attention(query, **given):
        if given["implementation"] == "reference":
            return attention(query=query, **given)
        out, lse = attention(query=query * 1.04 if wrong == "query" else query, **given)
        constant_out, constant_lse = jax.lax.stop_gradient((out, lse))
        if wrong == "gradient of out":
            return out * 0.95 + constant_out * 0.05, lse
        return out, constant_lse if wrong == "gradient of lse" else lse

    monkeypatch.setattr(random_calls, "flash_attention", wrong_attention)
    with pytest.raises(AssertionError, match="out" if wrong == "query" else "gradient of"):
        check(call_with_gradients(), "xla")
