"""cuDNN's attention through PyTorch's scaled_dot_product_attention."""

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import


def available() -> str | None:
    if reason := cannot_import("torch"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from benchmarks.peers.torch_step import torch_step

    def attention(query, key, value):
        # It takes (batch, heads, length, head_dim): views, no copy.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=case.causal,
                enable_gqa=case.q_heads != case.kv_heads,
            )
        return out.transpose(1, 2)

    return torch_step(attention, case, pass_)
