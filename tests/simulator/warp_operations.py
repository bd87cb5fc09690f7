"""Shuffles, votes, elections and reductions within a warp; PTX ISA, "Parallel Synchronization"."""

import numpy as np

from .program import FormError, effect, instruction, put


def _warps(values, g):
    return np.broadcast_to(values, (g.n,)).reshape(-1, 32)


def _member_mask(asm, text):
    return asm.source(text, "b32")


@instruction("shfl")
def _shfl(asm, st):
    """shfl.sync: PTX ISA "shfl.sync"; c packs a clamp value and a segment mask."""
    mode = st.parts[2]
    names = asm.pair(st.operands[0])
    out = asm.destination(names[0], "b32")
    valid = asm.destination(names[1], "pred") if len(names) > 1 else None
    value, lane_operand, packed = (asm.source(x, "b32") for x in st.operands[1:4])
    lane = np.arange(32)[None]

    def run(block, g, m):
        a = _warps(g.v[value[0]][value[1]], g)
        b = _warps(g.v[lane_operand[0]][lane_operand[1]], g).astype(np.int64) & 31
        c = _warps(g.v[packed[0]][packed[1]], g).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        if mode == "up":
            source = lane - b
            ok = source >= highest
        elif mode == "down":
            source = lane + b
            ok = source <= highest
        elif mode == "bfly":
            source = lane ^ b
            ok = source <= highest
        else:
            source = lowest | (b & ~segment)
            ok = source <= highest
        source = np.where(ok, source, lane)
        result = np.take_along_axis(a, source, 1).reshape(-1)
        if m is not None:
            # A value read from a thread that does not take part is undefined.
            inside = np.take_along_axis(_warps(m, g), source, 1).reshape(-1)
            if not inside[m].all():
                block.machine.log.add(
                    "shuffle from an inactive thread", st, "reads a thread that does not take part"
                )
        if out:
            put(g.v[out[0]][out[1]], result, m)
        if valid:
            put(g.v[valid[0]][valid[1]], np.broadcast_to(ok, a.shape).reshape(-1), m)

    return effect(run, converge=True)


@instruction("elect")
def _elect(asm, st):
    names = asm.pair(st.operands[0])
    lane_out = asm.destination(names[0], "b32")
    leader_out = asm.destination(names[1], "pred")

    def run(block, g, m):
        active = _warps(g.active() if m is None else m, g)
        leader = np.zeros_like(active)
        lanes = np.zeros(active.shape, np.uint32)
        for w, row in enumerate(active):
            candidates = np.flatnonzero(row)
            if len(candidates):
                chosen = block.machine.schedule.elect(candidates)
                leader[w, chosen] = True
                lanes[w] = chosen
        put(g.v[leader_out[0]][leader_out[1]], leader.reshape(-1), m)
        if lane_out:
            put(g.v[lane_out[0]][lane_out[1]], lanes.reshape(-1), m)

    return effect(run, converge=True)


@instruction("vote")
def _vote(asm, st):
    mode = next(p for p in st.parts if p in ("all", "any", "uni", "ballot"))
    out = asm.destination(st.operands[0], "b32" if mode == "ballot" else "pred")
    negate, source = asm.predicate(st.operands[1])

    def run(block, g, m):
        active = _warps(g.active() if m is None else m, g)
        p = _warps(g.v[source[0]][source[1]], g)
        p = (~p if negate else p) & active
        if mode == "ballot":
            bits = (p.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
            result = np.repeat(bits, 32)
        else:
            every, some = (p == active).all(1), p.any(1)
            chosen = {"all": every, "any": some, "uni": every | ~some}[mode]
            result = np.repeat(chosen, 32)
        put(g.v[out[0]][out[1]], result, m)

    return effect(run, converge=True)


@instruction("match")
def _match(asm, st):
    mode, kind = st.parts[1], st.parts[-1]
    names = asm.pair(st.operands[0])
    out = asm.destination(names[0], "b32")
    every = asm.destination(names[1], "pred") if len(names) > 1 else None
    source = asm.source(st.operands[1], kind)

    def run(block, g, m):
        active = _warps(g.active() if m is None else m, g)
        x = _warps(g.v[source[0]][source[1]], g)
        same = (x[:, :, None] == x[:, None, :]) & active[:, None, :]
        weights = np.uint64(1) << np.arange(32, dtype=np.uint64)
        bits = (same * weights).sum(2).astype(np.uint32)
        if mode == "all":
            full = (active * weights).sum(1).astype(np.uint32)[:, None]
            ok = np.broadcast_to((bits == full) | ~active, bits.shape).all(1)
            bits = np.where(ok[:, None], full, np.uint32(0))
            if every:
                put(g.v[every[0]][every[1]], np.repeat(ok, 32), m)
        if out:
            put(g.v[out[0]][out[1]], bits.reshape(-1), m)

    return effect(run, converge=True)


@instruction("redux")
def _redux(asm, st):
    operation, kind = st.parts[2], st.parts[-1]
    if kind not in ("u32", "s32", "b32"):
        raise FormError("redux of this type")
    out = asm.destination(st.operands[0], kind)
    source = asm.source(st.operands[1], kind)
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[operation]  # fmt: skip

    def run(block, g, m):
        active = _warps(g.active() if m is None else m, g)
        x = _warps(g.v[source[0]][source[1]], g)
        result = np.zeros(len(x), x.dtype)
        for w in range(len(x)):
            chosen = x[w][active[w]]
            if len(chosen):
                result[w] = ufunc.reduce(chosen, dtype=x.dtype)
        put(g.v[out[0]][out[1]], np.repeat(result, 32), m)

    return effect(run, converge=True)


@instruction("activemask")
def _activemask(asm, st):
    out = asm.destination(st.operands[0], "b32")

    def run(block, g, m):
        active = _warps(g.active(), g)
        bits = (active.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
        put(g.v[out[0]][out[1]], np.repeat(bits.astype(np.uint32), 32), m)

    return effect(run)
