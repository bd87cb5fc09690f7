"""fla-org's native sparse attention (Triton): blocks chosen for each row, not for a tile of rows.

Its window branch is a call of the package flash-attn; where that is absent it is left out, which
``setting`` says: it then does less than the others.
"""

from benchmarks.cases import NSA_BLOCK, NSA_SELECTED, NSA_WINDOW, Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import

SMALLEST_GROUP = 16


def available() -> str | None:
    if reason := cannot_import("torch") or cannot_import("fla.ops.nsa"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    group = case.q_heads // case.kv_heads
    if case.name != "nsa" or group < SMALLEST_GROUP or group & (group - 1):
        raise NotImplementedError(
            f"its heads of a group are a dimension of Triton's products: a power of 2, at least "
            f"{SMALLEST_GROUP}; this is {case.name} with groups of {group}"
        )
    import dataclasses

    import torch
    from fla.ops.nsa import parallel_nsa

    from benchmarks.peers.torch_step import torch_step

    generator = torch.Generator("cuda").manual_seed(1)
    shape = (case.q_heads, 3, case.head_dim)
    dtype = getattr(torch, case.dtype)
    weights = torch.randn(shape, device="cuda", dtype=dtype, generator=generator)
    has_window = cannot_import("flash_attn.flash_attn_interface") is None

    def attention(query, key, value):
        gates = torch.sigmoid(torch.einsum("btnh,nch->btnc", query, weights))
        return parallel_nsa(
            *(query, key, value),
            *gates.unbind(-1),
            block_counts=NSA_SELECTED,
            block_size=NSA_BLOCK,
            window_size=NSA_WINDOW if has_window else 0,
        )

    dense = dataclasses.replace(case, name="dense_causal")
    step = torch_step(attention, dense, pass_)
    setting = "" if has_window else "without the window branch, which needs flash-attn"
    return dataclasses.replace(step, setting=setting)
