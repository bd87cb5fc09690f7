"""PyTorch's FlexAttention, compiled; a causal call skips blocks through its block mask."""

from benchmarks import functions
from benchmarks.cases import BUILDING, SPARSE_TILE, Case, Pass
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
    visible = _visible(case)
    library = _OnGPU()
    score_mod = functions.score_mod(case.name, case.seqlen_k, case.q_heads, library)
    build = torch.compile(create_block_mask, dynamic=False)

    def make_mask():
        return build(visible, None, None, case.seqlen_q, case.seqlen_k, device="cuda")

    if case.name == BUILDING:
        if pass_ == "bwd":
            raise NotImplementedError("lists have no backward pass")
        return Step(make_mask, lambda _: torch.cuda.synchronize(), case.dtype)
    made = None
    if case.kept is not None:
        made = _full_tiles(case)
    elif visible is not None and case.documents is None:
        made = create_block_mask(visible, None, None, case.seqlen_q, case.seqlen_k, device="cuda")

    def attention(query, key, value):
        # Documents are new in every step, so the building of their mask belongs to it.
        block_mask = make_mask() if case.documents is not None else made
        out = compiled(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            score_mod=score_mod,
            block_mask=block_mask,
            enable_gqa=case.q_heads != case.kv_heads,
        )
        return out.transpose(1, 2)

    return torch_step(attention, case, pass_, takes_all=True)


class _OnGPU:
    """Arrays and functions that ``benchmarks.functions`` asks of a library, as PyTorch has them."""

    def asarray(self, array):
        import torch

        return torch.from_numpy(array).cuda()

    def clip(self, x, low, high):
        return x.clamp(low, high)


def _visible(case: Case):
    """The case's mask as a function of positions; None where all is visible."""
    import torch

    if case.has_function:
        return functions.mask_mod(case.name, case.seqlen_k, _OnGPU())
    if case.documents is None:
        return (lambda b, h, q_idx, kv_idx: q_idx >= kv_idx) if case.causal else None
    lengths = torch.tensor(case.documents, device="cuda")
    ids = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)
    return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])


def _full_tiles(case: Case):
    """The case's lists, of tiles that need no mask."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    lists = case.tile_lists()
    tiles = case.seqlen_k // SPARSE_TILE
    rows = [[*row, *(n for n in range(tiles) if n not in row)] for row in lists]
    counts = torch.tensor([[list(map(len, lists))]], dtype=torch.int32, device="cuda")
    indices = torch.tensor([[rows]], dtype=torch.int32, device="cuda")
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=SPARSE_TILE
    )
