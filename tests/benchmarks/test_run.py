"""The harness end to end on a CPU, and the cases' arithmetic."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import functions, nsa, peers, report, run, tables
from benchmarks.cases import DECODE, DENSE, NSA_STAGES, SUITES, Case
from benchmarks.peers import flashinfer

FIELDS = {
    "run", "commit", "date", "gpu", "clock", "command", "case", "pass", "implementation", "batch",
    "seqlen_q", "seqlen_k", "q_heads", "kv_heads", "head_dim", "head_dim_v", "causal", "dtype",
    "ms", "ms_spread", "calls", "tflops",
}  # fmt: skip


def test_flops_follow_the_convention() -> None:
    case = Case("dense", 2, 1024, 1024, 16, 4, 128, 128)
    assert case.flops("fwd") == 4 * 2 * 16 * 1024**2 * 128
    assert case.flops("bwd") == 2.5 * case.flops("fwd")
    causal = Case("dense", 2, 1024, 1024, 16, 4, 128, 128, causal=True)
    assert causal.flops("fwd") == case.flops("fwd") / 2
    prefill = Case("paged8", 4, 2048, 8192, 32, 8, 128, 128, causal=True, page_size=8)
    assert prefill.flops("fwd") == 4 * 4 * 32 * 2048 * (8192 - 1024) * 128
    assert sorted(prefill.page_table().ravel()) == list(range(4 * 1024))
    assert list(replace(prefill, in_order=True).page_table().ravel()) == list(range(4 * 1024))


def test_decode_counts_bytes() -> None:
    case = DECODE[0]
    read = 2 * 32 * 8192 * 8 * 128 * 2
    assert case.bytes("bfloat16") == pytest.approx(read, rel=0.01)
    assert case.rate("fwd", "bfloat16", 1.0) == {"gbs": case.bytes("bfloat16") / 1e6}


def test_labels_tell_the_cases_of_a_suite_apart() -> None:
    for suite in SUITES.values():
        assert len({case.label for case in suite}) == len(suite)
    assert len(DENSE) == 15


def test_every_peer_says_whether_it_can_run() -> None:
    for name in peers.NAMES:
        reason = peers.load(name).available()
        assert reason is None or isinstance(reason, str)


@pytest.mark.slow
def test_native_sparse_attention_by_stages(tmp_path: Path, capsys) -> None:
    out = tmp_path / "nsa.json"
    arguments = ["--cases", "tiny_nsa", "--allow-cpu", "--rounds", "1", "--clock", "host"]
    assert run.main([*arguments, "--peers", "jax_flashcute,jax_nn_xla", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["case"], row["implementation"]) for row in rows] == [
        *((name, "jax_flashcute") for name in NSA_STAGES),
        ("dense_causal", "jax_flashcute"),
        ("dense_causal", "jax_nn_xla"),
    ]
    assert ["gbs" in row for row in rows] == [False, True, False, True, False, False]
    lines = nsa.shares(rows, "fwd").splitlines()
    ms = {row["case"]: row["ms"] for row in rows if row["implementation"] == "jax_flashcute"}
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[0] == "300"
    assert float(cells[3]) == pytest.approx(ms["dense_causal"] / ms["nsa"], abs=0.01)
    assert cells[4] == f"{ms['nsa_compress'] / ms['nsa']:.0%}"


def test_bytes_of_the_stages() -> None:
    """Gates read query and three branches and write one; backward they read dO and write four."""
    gates = Case("nsa_gate", 1, 4096, 4096, 32, 8, 128, 64, causal=True)
    rows = 4096 * 32 * 2
    assert gates.bytes("bfloat16") == rows * (128 + 4 * 64)
    assert gates.bytes("bfloat16", "bwd") == rows * (2 * 128 + 7 * 64)
    compress = Case("nsa_compress", 1, 4096, 4096, 32, 8, 128, 64, causal=True)
    assert compress.bytes("bfloat16", "bwd") == (4096 + 64) * 8 * (128 + 64) * 2


def test_run_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "cpu" / "tiny.json"
    arguments = ["--cases", "tiny", "--filter", "hd32", "--passes", "fwd,bwd", "--allow-cpu"]
    arguments += ["--peers", "jax_flashcute,jax_nn_xla,flash_attention_3_jax", "--rounds", "2"]
    assert run.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["pass"], row["implementation"]) for row in rows] == [
        ("fwd", "jax_flashcute"),
        ("fwd", "jax_nn_xla"),
        ("bwd", "jax_flashcute"),
        ("bwd", "jax_nn_xla"),
    ]
    for row in rows:
        assert set(row) == FIELDS
        assert row["ms"] > 0
        assert row["head_dim"] == 32
    assert len({row["run"] for row in rows}) == 1
    assert str(tmp_path) not in rows[0]["command"]
    assert rows[0]["command"].endswith("--rounds 2 --out tiny.json")
    assert "flash_attention_3_jax" in capsys.readouterr().err

    arguments = ["--cases", "tiny", "--filter", "hd32", "--allow-cpu", "--peers", "jax_nn_xla"]
    assert run.main([*arguments, "--rounds", "1", "--append", "--out", str(out)]) == 0
    assert len(json.loads(out.read_text())) == 5

    (out.parent / "gpu_tests.json").write_text('{"counts": {}}')
    page, *pictures = report.report(out.parent, tmp_path / "docs")
    text = page.read_text()
    assert "## tiny, forward" in text
    assert "| hd32 1x64 4/2 causal |" in text
    # The second run had other implementations, so it stands apart.
    names = ["cpu_tiny_fwd.png", "cpu_tiny_bwd.png"]
    assert [picture.name for picture in pictures] == names
    assert "## tiny, forward: jax_nn_xla" in text
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_failing_peer_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = peers.load("jax_flashcute")

    def build(case, pass_):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(broken, "build", build)
    out = tmp_path / "tiny.json"
    arguments = ["--cases", "tiny", "--filter", "hd32", "--allow-cpu", "--rounds", "1"]
    arguments += ["--peers", "jax_flashcute,jax_nn_xla", "--out", str(out)]
    assert run.main(arguments) == 0
    assert [row["implementation"] for row in json.loads(out.read_text())] == ["jax_nn_xla"]
    assert "jax_flashcute: NotImplementedError: no kernel for this" in capsys.readouterr().err


def test_no_gpu_needs_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = type("Device", (), {"platform": "cpu", "device_kind": "cpu"})()
    monkeypatch.setattr(run.jax, "devices", lambda: [device])
    assert run.main(["--cases", "tiny"]) == 2


def row(implementation: str, run: str, ms: float, case: Case = DENSE[0]) -> tables.Row:
    return {
        "run": run, "commit": "c", "date": run, "gpu": "NVIDIA H200", "clock": "device",
        "command": "python", "case": "dense", "pass": "fwd", "implementation": implementation,
        "batch": case.batch, "seqlen_q": case.seqlen_q, "seqlen_k": case.seqlen_k,
        "q_heads": case.q_heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v, "causal": case.causal, "dtype": "bfloat16", "ms": ms,
        "ms_spread": 0.0, "tflops": case.flops("fwd") / ms / 1e9,
    }  # fmt: skip


def test_a_table_shows_the_latest_run_of_the_same_implementations() -> None:
    rows = [
        row("jax_flashcute", "2026-01-01", 4.0),
        row("other", "2026-01-01", 1.0),
        row("jax_flashcute", "2026-01-01", 1.0, DENSE[1]),
        row("jax_nn_cudnn", "2026-01-01", 4.0, DENSE[1]),
        row("jax_flashcute", "2026-02-01", 1.0),
        row("jax_nn_cudnn", "2026-02-01", 2.0),
    ]
    groups = tables.latest_runs(rows)
    ours = "jax_flashcute"
    assert list(groups) == [
        ("dense", "fwd", (ours, "jax_nn_cudnn"), "tflops"),
        ("dense", "fwd", (ours, "other"), "tflops"),
    ]
    assert groups["dense", "fwd", (ours, "other"), "tflops"] == rows[:2]
    latest = groups["dense", "fwd", (ours, "jax_nn_cudnn"), "tflops"]
    assert latest == rows[2:4] + rows[4:]
    newer = [row("jax_flashcute", "2026-03-01", 0.5), row("jax_nn_cudnn", "2026-03-01", 2.0)]
    assert (
        tables.latest_runs(rows + newer)["dense", "fwd", (ours, "jax_nn_cudnn"), "tflops"]
        == rows[2:4] + newer
    )
    text = tables.table(latest)
    assert "other |" not in text.replace("best other |", "")
    assert text.count("\n| hd64 4x4096") == 2
    assert "| 2.00 |" in text
    assert "2.828 of jax_nn_cudnn (2 cells)" in text
    runs = [line for line in report.footnotes(latest) if line.startswith("Run")]
    assert len(runs) == 2


def test_flops_of_masks_count_what_they_show() -> None:
    """A window of 3 over 8 positions shows 1 + 2 + 6 * 3 pairs; compressed keys, by blocks."""
    assert functions.visible_pairs("causal_lambda", 8, 8) == 36
    assert functions.visible_pairs("compress4", 8, 2) == 4 * 1 + 4 * 2
    assert functions.visible_pairs("prefix512", 600, 600) == 512 * 600 + 88 * 89 // 2
    documents = functions.visible_pairs("documents", 4000, 4000)
    lengths = np.bincount(np.unique(functions.first_positions(4000), return_inverse=True)[1])
    assert len(lengths) == 16
    assert documents == sum(n * (n + 1) // 2 for n in lengths)
    case = Case("window256", 1, 8192, 8192, 32, 8, 128, 128)
    assert case.flops("fwd") == 4 * 32 * 128 * (256 * 257 // 2 + (8192 - 256) * 256)


@pytest.mark.parametrize("name", [*functions.MASKS, *functions.SCORES])
def test_functions_are_those_of_the_library_and_of_numpy(name: str) -> None:
    """What one definition gives in two libraries."""
    q, kv = np.arange(300, dtype=np.int32)[:, None], np.arange(300, dtype=np.int32)
    score = np.ones((300, 300), np.float32)
    for make, given in (
        (functools.partial(functions.mask_mod, name, 300), ()),
        (functools.partial(functions.score_mod, name, 300, 4), (score,)),
    ):
        plain, traced = make(np), make(jnp)
        assert (plain is None) == (traced is None)
        if plain is not None and traced is not None:
            np.testing.assert_allclose(traced(*given, 0, 1, q, kv), plain(*given, 0, 1, q, kv))


def test_pages_in_use() -> None:
    """Lists of a skewed case without pages, and of one whose pages are in random order."""
    case = Case("decode_skewed", 3, 1, 64, 4, 2, 8, 8, kv_lengths=(16, 1, 33))
    starts, pages, last = flashinfer.pages_in_use(case, 16)
    assert starts.tolist() == [0, 1, 2, 5]
    assert pages.tolist() == [0, 4, 8, 9, 10]
    assert last.tolist() == [16, 1, 1]
    case = Case("paged8", 2, 1, 64, 4, 2, 8, 8, page_size=8)
    starts, pages, last = flashinfer.pages_in_use(case, 8)
    assert starts.tolist() == [0, 8, 16]
    assert pages.tolist() == case.page_table().ravel().tolist()
    assert last.tolist() == [8, 8]
