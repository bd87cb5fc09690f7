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

    if case.page_size is not None:
        return torch_step(_paged(case), case, pass_, takes_pages=True, aligns_ends=True)
    return torch_step(
        lambda q, k, v: flash_attn_func(q, k, v, causal=case.causal)[0],
        case,
        pass_,
        aligns_ends=True,
    )


def _paged(case: Case):
    import torch
    from flash_attn.cute.interface import flash_attn_varlen_func

    table = torch.from_numpy(case.page_table()).cuda()
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device="cuda")
    return lambda q, k, v: flash_attn_varlen_func(
        q, k, v, seqused_k=lengths, page_table=table, causal=case.causal
    )[0]
