"""Instructions that apply one function to each thread's registers."""

import numpy as np

from .program import put


def elementwise(asm, statement, function, out_type, source_types, *, ufunc=False):
    """``destination = function(*sources)``; with ``ufunc`` the function writes in place."""
    sources = [
        asm.source(text, kind)
        for text, kind in zip(statement.operands[1:], source_types, strict=True)
    ]
    out = asm.destination(statement.operands[0], out_type)
    if out is None:
        return lambda v, m: None
    vd, d = out
    if ufunc and len(sources) == 2:
        (va, a), (vb, b) = sources

        def run(v, m):
            if m is None:
                function(v[va][a], v[vb][b], out=v[vd][d])
            else:
                np.copyto(v[vd][d], function(v[va][a], v[vb][b]), where=m, casting="unsafe")
    elif len(sources) == 1:
        ((va, a),) = sources

        def run(v, m):
            if m is None:
                v[vd][d][...] = function(v[va][a])
            else:
                np.copyto(v[vd][d], function(v[va][a]), where=m, casting="unsafe")
    elif len(sources) == 2:
        (va, a), (vb, b) = sources

        def run(v, m):
            if m is None:
                v[vd][d][...] = function(v[va][a], v[vb][b])
            else:
                np.copyto(v[vd][d], function(v[va][a], v[vb][b]), where=m, casting="unsafe")
    else:

        def run(v, m):
            put(v[vd][d], function(*[v[view][row] for view, row in sources]), m)

    return run
