"""A measured step from any PyTorch attention function of (query, key, value)."""

from collections.abc import Callable

import torch

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step


def no_gpu() -> str | None:
    """Why PyTorch cannot use a GPU, or None."""
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def torch_step(
    attention: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    case: Case,
    pass_: Pass,
    *,
    takes_all: bool = False,
    takes_pages: bool = False,
    takes_lengths: bool = False,
    aligns_ends: bool = False,
) -> Step:
    """One pass of an attention function on (batch, length, heads, head_dim) tensors.

    ``takes_all``: the function observes lists, documents and functions; others refuse.
    ``takes_pages``: the function observes ``case.page_size``, and is given (num_pages, page_size,
    heads, head_dim); others refuse such a case.  ``takes_lengths``: likewise ``case.kv_lengths``.
    ``aligns_ends``: its causal mask does.
    """
    has_lengths = case.kv_lengths is not None
    if not (takes_lengths if has_lengths else case.is_plain or takes_all):
        raise NotImplementedError("this peer is not given lengths, lists, documents or functions")
    if case.page_size is not None and not takes_pages:
        raise NotImplementedError("this peer is not given a page table")
    if case.causal and case.seqlen_q != case.seqlen_k and not aligns_ends:
        raise NotImplementedError("this peer's causal mask aligns queries and keys at the start")
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)

    query = normal(case.batch, case.seqlen_q, case.q_heads, case.head_dim)
    rows = (case.batch, case.seqlen_k)
    if case.page_size is not None:
        rows = (case.batch * case.seqlen_k // case.page_size, case.page_size)
    key = normal(*rows, case.kv_heads, case.head_dim)
    value = normal(*rows, case.kv_heads, case.head_dim_v)

    def wait(_result: object) -> None:
        torch.cuda.synchronize()

    if pass_ == "fwd":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attention(query, key, value)

        return Step(forward, wait, case.dtype)

    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = attention(*inputs)
    out_gradient = normal(*out.shape)

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, inputs, out_gradient, retain_graph=True)

    return Step(backward, wait, case.dtype)
