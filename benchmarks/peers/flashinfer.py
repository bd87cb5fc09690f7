"""FlashInfer's batched decode over paged keys and values, called from PyTorch.

Keys and values of a case without pages are taken as pages of 16 in order.
"""

import numpy as np

from benchmarks.cases import Case, Pass
from benchmarks.measure import Step, fastest
from benchmarks.peers import cannot_import

PAGE_SIZE = 16
WORKSPACE_BYTES = 512 * 2**20


def available() -> str | None:
    if reason := cannot_import("torch") or cannot_import("flashinfer"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    if case.seqlen_q != 1 or pass_ == "bwd":
        raise NotImplementedError("its decode serves one query a sequence")
    return fastest(
        (f"use_tensor_cores={use}", lambda use=use: _step(case, use)) for use in (False, True)
    )


def _step(case: Case, use_tensor_cores: bool) -> Step:
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    from benchmarks.peers.torch_step import torch_step

    page_size = case.page_size or PAGE_SIZE
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=use_tensor_cores
    )
    dtype = getattr(torch, case.dtype)
    # The plan reads lengths on the host and is not timed.
    wrapper.plan(
        *(torch.from_numpy(array).cuda() for array in pages_in_use(case, page_size)),
        num_qo_heads=case.q_heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        page_size=page_size,
        q_data_type=dtype,
        kv_data_type=dtype,
    )

    def attention(query, key, value):
        pages = tuple(x.view(-1, page_size, *x.shape[2:]) for x in (key, value))
        return wrapper.run(query[:, 0], pages)[:, None]

    return torch_step(attention, case, "fwd", takes_pages=True, takes_lengths=True)


def pages_in_use(case: Case, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Int32 arrays: where each sequence's pages start in a list, the list, keys of last pages."""
    if case.page_size is not None:
        table = case.page_table()
    else:
        pages = case.seqlen_k // page_size
        table = np.arange(case.batch * pages, dtype=np.int32).reshape(case.batch, pages)
    lengths = np.array(case.kv_lengths or [case.seqlen_k] * case.batch, np.int32)
    counts = -(-lengths // page_size)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    used = [row[:count] for row, count in zip(table, counts, strict=True)]
    return starts, np.concatenate(used), (lengths - (counts - 1) * page_size).astype(np.int32)
