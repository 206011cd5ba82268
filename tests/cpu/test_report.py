"""The report: figures from results files, misses named, documents kept fresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import decode as runner
from benchmarks import report, targets

ROOT = Path(__file__).parents[2]


def row(name: str, own: float, floor: float | None = None, kv_bytes: int = 10**9, **others: float) -> dict[str, Any]:
    results = {"flashtile": {"gpu_us": own}} | {peer: {"gpu_us": us} for peer, us in others.items()}
    plan = {"block_m": 16, "swapped": False, "block_n": 64, "num_warps": 4, "num_stages": 3, "num_splits": 8}
    return {"name": name, "kv_bytes": kv_bytes, "page_size": 0, "floor_us": floor, "plan": plan, "results": results}


def data(*entries: dict[str, Any]) -> dict[str, Any]:
    head = {"commit": "abc", "date": "2026-01-01", "device": "a GPU", "driver": "1", "versions": {"torch": "2"}, "protocol": "medians"}
    return {**head, "entries": list(entries)}


def test_the_best_peer_is_the_fastest_and_the_mean_is_geometric() -> None:
    rows = [row("a", 10.0, fa2=40.0, fa3=20.0), row("b", 10.0, cudnn=5.0)]
    verdict = targets.verdict("seqlen1", rows)
    assert verdict is not None
    assert verdict.figure.startswith("1.000x the best peer (geometric mean of 2 problems); lowest 0.50x at b")
    assert verdict.misses == ("geometric mean 1.000x, target 1.10x", "b: 0.50x")


@pytest.mark.parametrize(
    ("own", "fa3", "fa2", "misses"),
    [(10.0, 10.6, 10.1, 0), (10.0, 10.4, 10.1, 1), (10.0, 10.6, 9.9, 1), (10.0, 9.0, 9.0, 2)],
)
def test_speculative_decoding_is_held_to_fa3_and_to_the_best_peer(own: float, fa3: float, fa2: float, misses: int) -> None:
    verdict = targets.verdict("speculative", [row("q4", own, fa3=fa3, fa2=fa2)])
    assert verdict is not None
    assert len(verdict.misses) == misses


def test_a_ragged_batch_is_compared_by_bytes_a_second() -> None:
    ragged = row("ragged", 11.0, kv_bytes=100, beside=20.0) | {"beside": {"name": "even", "kv_bytes": 200}}
    assert targets.beside_ratio(ragged) == pytest.approx(10 / 11)
    verdict = targets.verdict("ragged", [ragged])
    assert verdict is not None
    assert not verdict.misses
    slower = ragged | {"results": ragged["results"] | {"flashtile": {"gpu_us": 12.0}}}
    verdict = targets.verdict("ragged", [slower])
    assert verdict is not None
    assert verdict.misses == ("ragged: 0.83, target 0.90",)


def test_the_read_floor_counts_from_half_a_gigabyte() -> None:
    verdict = targets.verdict("floor", [row("big", 100.0, 96.0), row("slow", 100.0, 90.0), row("small", 100.0, 10.0, kv_bytes=10**6)])
    assert verdict is not None
    assert verdict.figure.startswith("90.0% to 96.0%")
    assert verdict.misses == ("slow: 90.0%",)


def test_regret_has_two_bars() -> None:
    rows = [{"name": str(i), "regret": 0.01} for i in range(9)] + [{"name": "bad", "regret": 0.2}]
    verdict = targets.verdict("search", rows)
    assert verdict is not None
    assert verdict.misses == ("bad: 20.0% behind",)
    verdict = targets.verdict("search", [*rows, {"name": "middling", "regret": 0.05}])
    assert verdict is not None
    assert verdict.misses[0].startswith("within 3% on 82% of problems")


def test_wrong_and_failed_problems_are_listed_and_never_averaged() -> None:
    wrong = {"name": "w", "results": {"flashtile": {"wrong": "WrongResult: off"}, "fa3": {"gpu_us": 1.0}}}
    failed = {"name": "f", "failed": "OutOfMemoryError: no"}
    table = report.tables({"seqlen1": data(row("a", 10.0, fa3=20.0), wrong, failed, {"name": "s", "skipped": "no time left"})})["seqlen1"]
    assert "2.000x the best peer (geometric mean of 1 problems)" in table
    assert "- w: wrong, WrongResult: off" in table
    assert "- f: failed, OutOfMemoryError: no" in table
    assert "Not reached in the time given: 1 problems." in table
    assert "commit abc" in table


def test_every_grid_has_a_table_without_results() -> None:
    made = report.tables({})
    assert set(made) == set(report.GRIDS)
    assert set(made.values()) == {"Not measured yet.\n"}


def test_a_stale_document_fails_the_check_and_is_rewritten(tmp_path: Path) -> None:
    docs, results = tmp_path / "performance.md", tmp_path / "results"
    results.mkdir()
    docs.write_text("before\n<!-- table: host -->\nold\n<!-- end -->\nafter\n")
    (results / "decode_host.json").write_text(json.dumps(data(row("1x512 32/8", 5.0))))
    with pytest.raises(typer.Exit):
        report.main(results, docs, check=True)
    report.main(results, docs, check=False)
    report.main(results, docs, check=True)
    text = docs.read_text()
    assert "old" not in text
    assert "1x512 32/8: GPU 5.00 us" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_marker_that_names_no_table_is_an_error() -> None:
    with pytest.raises(report.StaleReport, match="no table called speed"):
        report.rendered("<!-- table: speed -->\n<!-- end -->", report.tables({}))


def test_the_document_shows_the_results_in_the_tree() -> None:
    docs = ROOT / "docs" / "performance.md"
    text = docs.read_text()
    for grid in report.GRIDS:
        assert f"<!-- table: {grid} -->" in text
    assert report.rendered(text, report.tables(report.load(ROOT / "benchmarks" / "results"))) == text, "run python -m benchmarks.report"


def test_a_dry_run_measures_reports_and_resumes(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(runner.main)
    flags = ["--grid", "paged", "--device", "cpu", "--dry-run", "--rounds", "1", "--only", "32x4096 32/8 page 16", "--out", str(tmp_path), "--no-peers"]
    outcome = CliRunner().invoke(app, flags)
    assert outcome.exit_code == 0, outcome.output
    path = tmp_path / "decode_paged.json"
    written = json.loads(path.read_text())
    (entry,) = written["entries"]
    assert entry["results"]["flashtile"]["gpu_us"] > 0
    assert entry["results"]["beside"]["error"] < 5e-3
    assert written["protocol"].startswith("DRY RUN")
    assert "of the contiguous cache's speed" in report.tables({"paged": written})["paged"]
    # a process that died leaves the entry that ran; a resumed one records it and measures the rest
    path.write_text(json.dumps(written | {"entries": [], "running": entry["name"]}))
    outcome = CliRunner().invoke(app, [*flags, "--resume"])
    assert outcome.exit_code == 0, outcome.output
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["failed"] == "the process died or was stopped here"
