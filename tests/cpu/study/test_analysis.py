"""What follows from a study, on files whose times are known."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from flashtile.planner.device import Device
from flashtile.study import analysis, findings
from flashtile.study.document import Document, Entry, document_of, load
from flashtile.study.points import Point, Task
from flashtile.study.rows import Row
from tests.cpu.study.synthetic import H200, write_study

POINT = Point(1, 4096, 1, 8)


def row(block_m: int, us: float, *, kernel: str = "triton.decode", splits: int = 1, programs: int = 0, spread: float = 0.0) -> Row:
    return Row(kernel, block_m, False, 64, 4, 3, splits, programs, us, spread, 1.1 * us)


def document(*entries: Entry) -> Document:
    from dataclasses import asdict

    return Document({"basis": "measured", "device": "H200", "figures": asdict(H200)}, entries, ())


def entry(*rows: Row, stage: str = "tiles", point: Point = POINT, chosen: int = 0) -> Entry:
    facts = {name: getattr(rows[chosen], name) for name in ("kernel", "block_m", "num_splits")}
    return Entry(stage, point, rows, facts, ())


def test_the_best_tile_and_what_others_lose() -> None:
    (verdict,) = analysis.verdicts(document(entry(row(16, 11.0), row(8, 10.0), row(64, 15.0), row(64, 14.0))))
    assert verdict.best.block_m == 8
    assert verdict.planner_loss == pytest.approx(0.1)
    assert verdict.fixed_loss == pytest.approx(0.4), "the fastest of that query tile counts"
    assert verdict.ties() == [8]


def test_a_batch_of_unlike_lengths_wants_programs_that_share_its_keys() -> None:
    rows = row(8, 10.2, programs=264), row(8, 9.0), row(16, 10.0, programs=64)
    (batch,) = analysis.verdicts(document(entry(*rows, point=Point(8, 4096))))
    assert (batch.planner_loss, batch.unlike_loss) == (pytest.approx(10.2 / 9 - 1), pytest.approx(0.02))
    (lone,) = analysis.verdicts(document(entry(*rows)))
    assert lone.unlike_loss == lone.planner_loss == pytest.approx(10.2 / 9 - 1), "a lone sequence has nothing to balance"
    (grids,) = analysis.verdicts(document(entry(row(8, 9.0), point=Point(8, 4096))))
    assert grids.unlike_loss is None


def test_times_within_the_spread_are_ties() -> None:
    rows = (row(8, 10.0, spread=0.02), row(16, 10.35, spread=0.02), row(64, 10.6, spread=0.02))
    assert analysis.verdicts(document(entry(*rows)))[0].ties() == [8, 16]
    assert analysis.verdicts(document(entry(row(8, 10.0), row(16, 10.09))))[0].ties() == [8, 16], "below one percent nothing is decided"


def test_what_was_not_timed_is_not_judged() -> None:
    found = analysis.verdicts(document(entry(row(8, 10.0)), entry(row(8, 1.0), stage="splits")))
    assert [verdict.fixed_loss for verdict in found] == [None]


def test_the_map_has_a_cell_for_each_problem_of_a_regime() -> None:
    points = [Point(1, 4096, q, g) for q, g in product((1, 4), (1, 8))]
    others = [Point(8, 4096), Point(1, 4096, head_dim=64), Point(1, 4096, dtype_kv="float8_e4m3fn")]
    some = document(*(entry(row(8, 9.0), row(16, 8.0, kernel="gluon.decode_sm90"), point=point) for point in points + others))
    assert {cell: v.best.block_m for cell, v in analysis.best_map(some, 1, 4096).items()} == dict.fromkeys(product((1, 4), (1, 8)), 16)
    assert {v.best.block_m for v in analysis.best_map(some, 1, 4096, kernel="triton.decode").values()} == {8}


def test_wasted_rows_are_counted_over_all_blocks() -> None:
    some = document(entry(row(1, 5.0), row(8, 10.0), row(16, 12.0), row(64, 20.0), point=Point(1, 4096, 3, 8)))
    found = {waste.block_m: waste for waste in analysis.wasted_rows(some)}
    assert sorted(found) == [8, 16, 64]
    assert found[8].wasted == 0.0
    assert found[16].wasted == pytest.approx(8 / 32)
    assert found[64].wasted == pytest.approx(40 / 64)
    assert found[64].slowdown == 2.0


def test_split_curves_are_the_grids_of_a_problem() -> None:
    rows = (row(16, 9.0, splits=1), row(16, 5.0, splits=4), row(16, 6.0, splits=2), row(64, 7.0, splits=2), row(16, 1.0, programs=132))
    curves = analysis.split_curves(document(entry(*rows, stage="splits")), POINT)
    assert curves == {("triton.decode", 16): [(1, 9.0), (2, 6.0), (4, 5.0)], ("triton.decode", 64): [(2, 7.0)]}


def test_bounds_are_the_devices() -> None:
    few, many = Point(64, 8192, 1, 1), Point(64, 8192, 64, 16)
    bounds = {b.point: b for b in analysis.roofline(document(entry(row(8, 300.0), point=few), entry(row(64, 30000.0), point=many)))}
    assert bounds[few].memory_us == pytest.approx(1e6 * few.kv_bytes / H200.bandwidth)
    assert bounds[few].matrix_us == pytest.approx(1e6 * few.problem.flops / H200.matrix_rate)
    assert bounds[few].intensity == pytest.approx(1.0), "one query: a multiplication and an addition for each element of two bytes"
    assert bounds[many].matrix_us > bounds[many].memory_us
    assert analysis.roofline(document(entry(row(8, 900.0), point=Point(1, 512))))[0].bound == "latency"
    assert analysis.roofline(document(entry(row(8, 500.0), point=few)))[0].bound == "memory"


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (100, 10), (1, 1)])
def test_percentiles_are_values_that_occurred(percent: int, value: int) -> None:
    assert analysis.percentile([float(n) for n in range(1, 11)], percent) == value


def test_findings_carry_their_numbers(tmp_path: Path) -> None:
    path = write_study(tmp_path / "study.json", [Task("tiles", POINT), Task("splits", POINT), Task("tiles", Point(8, 8192, 4, 4))])
    some = load(path)
    text = " ".join(findings.in_words(some))
    assert "A fixed block_m of 64 loses" in text
    assert "The cost model is off by" in text
    assert "Of the plans that hold up where a batch's lengths differ, it is within 3% of the best on" in text
    summary = findings.summary(some)
    json.dumps(summary)
    assert [problem["name"] for problem in summary["problems"]] == ["1x4096 q1 g8 d128", "8x8192 q4 g4 d128"]


def test_wrong_results_are_reported(tmp_path: Path) -> None:
    data: dict[str, Any] = json.loads(write_study(tmp_path / "study.json", [Task("tiles", POINT)]).read_text())
    data["entries"][0]["refused"] = [[{"kernel": "triton.decode"}, "WRONG: relative L2 error 1"]]
    assert f"WRONG results were found at {POINT.name}." in findings.in_words(document_of(data))


def test_a_document_knows_its_device(tmp_path: Path) -> None:
    some = load(write_study(tmp_path / "study.json", [Task("tiles", POINT), Task("splits", POINT)]))
    assert some.figures == Device.named("h200")
