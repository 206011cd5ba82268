"""The ledger of docs/tiles.md: figures from the results, verdicts that they carry, the document and its figures fresh."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claim_facts as facts
from benchmarks import claim_study, claims
from benchmarks.report import StaleReport, rendered
from flashtile.planner.catalog import TRITON
from flashtile.study.document import KIND
from flashtile.study.rows import COLUMNS
from flashtile.testing.record import SCHEMA

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "tiles.md"


@pytest.fixture(scope="module")
def results() -> facts.Results:
    return facts.load(RESULTS)


def test_the_document_shows_the_results_in_the_tree() -> None:
    text, tables = DOCUMENT.read_text(), claims.tables(RESULTS)
    assert rendered(text, tables) == text, "run python -m benchmarks.claims"
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == tables.keys()


def test_every_claim_has_a_verdict_of_three_and_a_section() -> None:
    assert len(claims.CLAIMS) == 10
    assert all(claim.verdict in ("true", "false") or claim.verdict.startswith("true when ") for claim in claims.CLAIMS)
    sections = re.findall(r"^## Claim (\d+)$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert sections == [str(number) for number in range(1, 11)]


def sweep(*timed: list[float], seqlen_q: int = 1) -> dict[str, Any]:
    """A problem of the sweep: 32 / 8 heads, 134 MB of keys and values."""
    shape = {"batch": 8, "keys": 4096, "num_heads_q": 32, "num_heads_kv": 8, "seqlen_q": seqlen_q}
    return {"decode_sweep": {"entries": [{"name": "one", **shape, "timed": list(timed)}]}}


def test_a_tile_counts_by_its_best_plan() -> None:
    (problem,) = facts.swept(
        sweep([16, 0, 64, 4, 3, 1, 12.0], [16, 0, 64, 2, 3, 1, 10.0], [16, 1, 64, 4, 3, 1, 11.0], [64, 0, 64, 4, 3, 1, 15.0])
    )
    assert problem.best == {"16": 10.0, "16s": 11.0, "64": 15.0}
    assert (problem.rows, problem.kv_bytes) == (4, 134_217_728)
    assert problem.slower("64") == 1.5
    assert problem.slower("128") is None
    assert facts.swept(sweep([16, 0, 64, 4, 3, 1, 12.0])) == [], "one tile alone is no comparison"


def test_a_measured_study_has_tables_and_a_predicted_one_none(tmp_path: Path) -> None:
    row = {"kernel": TRITON, "swapped": False, "block_n": 64, "num_warps": 4, "num_stages": 3, "num_splits": 16, "num_programs": 0}
    times = ((16, 10.0), (32, 10.02), (64, 12.0))
    plans = [row | {"block_m": block_m, "us": us, "spread": 0.0, "predicted_us": us} for block_m, us in times]
    timed = [[plan[name] for name in COLUMNS] for plan in plans]
    point = {"batch": 1, "keys": 4096, "seqlen_q": 2, "group": 8, "head_dim": 128, "dtype_kv": "bfloat16"}
    entry = {"stage": "tiles", **point, "timed": timed, "choice": {}, "refused": []}
    head = {"schema": SCHEMA, "what": KIND, "columns": COLUMNS, "device": "a GPU", "date": "today", "commit": "abc", "entries": [entry]}
    for basis, shown in (("measured", True), ("predicted", False)):
        (tmp_path / "study.json").write_text(json.dumps(head | {"basis": basis}))
        made = claim_study.tables(tmp_path)
        assert (
            "| portable: 2 queries, 16 rows | 1 | - | - | - | 1.00 (1.00) | - | 1.00 (1.00) | 1.20 (1.20) | - |" in made["study-times"]
        ) is shown
        assert ("| 2 | - | - | 16 (32) | - |" in made["study-map"]) is shown


def test_times_by_warps_are_over_the_tiles_own_best() -> None:
    found = sweep([16, 0, 64, 4, 3, 1, 12.0], [16, 0, 64, 2, 3, 1, 10.0], [16, 0, 64, 2, 3, 8, 9.0], [64, 0, 64, 4, 3, 1, 1.0])
    assert facts.by_warps(found, 16) == {2: [1.0], 4: [pytest.approx(12 / 9)]}
    assert facts.by_warps(found, 64) == {4: [1.0]}


@pytest.mark.parametrize(
    ("tile", "warps", "mma", "arch", "rows"),
    [
        ((64, False), [4, 2], "wgmma m64n64k16", "sm_90", 16),
        ((16, False), [1, 4], "mma.sync m16n8k16", "sm_80", 16),
        ((32, False), [1, 4], "mma.sync m16n8k16", "sm_80", 32),
        ((8, True), [8, 1], "mma.sync m16n8k16", "sm_80", 8),
        ((8, False), [4, 1, 1], "mma.sync m16n8k16", "sm_90", 16),
        ((1, False), [], "", "sm_80", None),
        ((8, True), [2, 2], "v_mfma_f32_4x4x1_16b_f32", "gfx942", None),
    ],
)
def test_rows_a_warp(tile: tuple[int, bool], warps: list[int], mma: str, arch: str, rows: int | None) -> None:
    assert facts.rows_a_warp({"tile": tile, "warps_per_cta": warps, "mma": mma, "arch": arch}) == rows


def test_a_verdict_that_the_results_no_longer_carry_makes_no_ledger(results: facts.Results) -> None:
    spoilt = json.loads(json.dumps(results["decode_sweep"]))
    for entry in spoilt["entries"]:
        for plan in entry["timed"]:
            plan[-1] *= 0.5 if plan[0] == 64 else 1.0
    with pytest.raises(StaleReport, match="claim 4 is called 'false', and the results say"):
        claims.ledger({**results, "decode_sweep": spoilt})


def test_the_figures_are_those_of_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import claim_figures

    for out in ("first", "second"):
        claim_figures.main(RESULTS, tmp_path / out)
    for name in claim_figures.FIGURES:
        assert (ROOT / "docs" / "figures" / f"{name}.svg").exists()
        assert (tmp_path / "first" / f"{name}.svg").read_bytes() == (tmp_path / "second" / f"{name}.svg").read_bytes()


@pytest.mark.parametrize(
    ("ptx", "kind", "width"),
    [
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r57;", "copies", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r57;", "copies", 4),
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "loads", 16),
        ("ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "loads", 4),
        ("ld.global.b16 { %r1 }, [ %rd1 + 0 ];", "loads", 2),
    ],
)
def test_widths_of_reads(ptx: str, kind: str, width: int) -> None:
    pytest.importorskip("triton")
    from benchmarks.access_width import widths

    assert widths(ptx)[kind] == {width: 1}
