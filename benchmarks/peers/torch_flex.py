"""PyTorch's FlexAttention, compiled; a causal call skips blocks through its block mask."""

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import


def available() -> str | None:
    if reason := cannot_import("torch") or cannot_import("triton"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from benchmarks.peers.torch_step import torch_step

    # Past a number of shapes the compiler would give up on this function and run it eagerly.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if case.causal:
        block_mask = create_block_mask(
            lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
            B=None,
            H=None,
            Q_LEN=case.seqlen_q,
            KV_LEN=case.seqlen_k,
            device="cuda",
        )

    def attention(query, key, value):
        out = compiled(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=block_mask,
            enable_gqa=case.q_heads != case.kv_heads,
        )
        return out.transpose(1, 2)

    return torch_step(attention, case, pass_)
