"""FlashAttention-4 with a mask by element alone: it visits every tile and knows none as full."""

from benchmarks import functions
from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import flash_attention_4

available = flash_attention_4.available


def build(case: Case, pass_: Pass) -> Step:
    if case.name not in functions.MASKS:
        raise NotImplementedError("runs cases that are a mask")
    return flash_attention_4.masked_step(case, pass_, with_lists=False)
