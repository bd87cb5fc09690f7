"""FlashAttention-4, CuTe DSL kernels called from PyTorch (`flash_attn.cute`)."""

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import


def available() -> str | None:
    if reason := cannot_import("torch") or cannot_import("flash_attn.cute.interface"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    from flash_attn.cute.interface import flash_attn_func

    from benchmarks.peers.torch_step import torch_step

    return torch_step(lambda q, k, v: flash_attn_func(q, k, v, causal=case.causal)[0], case, pass_)
