"""The report: figures from results files, misses named, documents kept fresh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import decode as runner
from benchmarks import grids, kvcache_targets, report, targets
from benchmarks.measure import other_kernels
from flashtile.planner.device import Device
from tests.cpu.dry_runs import dry_run

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
    assert verdict.misses == ("geometric mean 1.000x, target 1.20x", "b: 0.50x")


@pytest.mark.parametrize(
    ("name", "seqlen_q", "fa3", "misses"),
    [("1x4096 32/8 q4", 4, 14.1, 0), ("1x4096 32/8 q4", 4, 13.9, 1), ("16x4096 32/8 q2", 2, 10.3, 0), ("16x4096 32/8 q8", 8, 10.3, 1)],
)
def test_speculative_decoding_is_held_to_fa3_by_queries_and_shape(name: str, seqlen_q: int, fa3: float, misses: int) -> None:
    verdict = targets.verdict("speculative", [row(name, 10.0, fa3=fa3, fa2=5.0) | {"seqlen_q": seqlen_q}])
    assert verdict is not None
    assert len(verdict.misses) == misses


def test_a_ragged_batch_is_compared_by_bytes_a_second() -> None:
    ragged = row("ragged", 10.5, kv_bytes=100, beside=20.0) | {"beside": {"name": "even", "kv_bytes": 200}}
    assert targets.beside_ratio(ragged) == pytest.approx(10 / 10.5)
    verdict = targets.verdict("ragged", [ragged])
    assert verdict is not None
    assert not verdict.misses
    slower = ragged | {"results": ragged["results"] | {"flashtile": {"gpu_us": 12.0}}}
    verdict = targets.verdict("ragged", [slower])
    assert verdict is not None
    assert verdict.misses == ("ragged: 0.83, target 0.93",)


def test_the_read_floor_has_a_bar_for_each_size() -> None:
    rows = [row("big", 100.0, 98.0), row("slow", 100.0, 90.0), row("67 MB", 100.0, 89.0, kv_bytes=67_108_864)]
    between = row("between", 100.0, 10.0, kv_bytes=10**8)
    verdict = targets.verdict("floor", [*rows, between])
    assert verdict is not None
    assert verdict.figure.startswith("89.0% to 98.0%")
    assert verdict.misses == ("slow: 90.0%, target 97%",)


def test_host_time_is_judged_by_the_kernels_that_a_plan_launches() -> None:
    def host(name: str, us: float, splits: int, programs: int = 0) -> dict[str, Any]:
        entry = row(name, 5.0)
        entry["results"]["flashtile"]["host_us"] = us
        entry["plan"] |= {"num_splits": splits, "num_programs": programs}
        return entry

    rows = [host("two", 11.0, 8), host("one", 9.0, 1), host("shared", 13.0, 1, 64)]
    verdict = targets.verdict("host", rows)
    assert verdict is not None
    assert verdict.misses == ("one: 9.0 us for one kernel, target 8", "shared: 13.0 us for two kernels, target 12")
    two, one = targets.goals({"host": rows})[-2:]
    assert (two.reached, two.met) == ("11.0 to 13.0 us", False)
    assert (one.reached, one.met) == ("9.0 to 9.0 us", False)


def test_every_target_says_what_was_reached_and_from_which_commit() -> None:
    seqlen1 = data(row("1x512 32/8", 5.0, cudnn=10.0, fa3=9.5), row("1x4096 32/8", 10.0, cudnn=13.0))
    floor = data(row("8x2048 32/8", 19.0, 17.0, kv_bytes=67_108_864)) | {"commit": "def"}
    table = report.tables({"seqlen1": seqlen1, "floor": floor})["targets"]
    assert "| 1x512 32/8, cuDNN | >= 1.80x | 2.00x | yes | abc |" in table
    assert "| 1x4096 32/8, cuDNN | >= 1.38x | 1.30x | **no** | abc |" in table
    assert "| 67 MB of keys and values, the read floor | >= 88% | 89.5% | yes | def |" in table
    assert "| pages of 16, the contiguous cache | >= 0.95x | not measured | - | - |" in table
    assert "1.572x over 2, lowest 1.30x" in table


def test_a_plan_names_its_kernel_and_how_keys_are_shared() -> None:
    entry = row("8x2048 32/8", 10.0)
    entry["plan"] |= {"kernel": "gluon.decode_sm90", "block_m": 8, "num_programs": 64}
    assert "| gluon 8 x 64, 4, 3, p64 |" in report.tables({"seqlen1": data(entry)})["seqlen1"]


def quantised(name: str, own: float, sixteen_bits: float) -> dict[str, Any]:
    return row(name, own, beside=sixteen_bits) | {"dtype_kv": "float8_e4m3fn"}


def test_float8_is_held_to_the_time_in_16_bits_on_two_problems() -> None:
    rows = [
        quantised("32x4096 32/8 e4m3", 10.0, 18.0),
        quantised("1x131072 32/8 e4m3", 10.0, 17.4),
        quantised("1x512 32/8 e4m3", 10.0, 10.0),
    ]
    (goal,) = [goal for goal in targets.goals({"fp8": rows}) if goal.grid == "fp8"]
    assert (goal.bar, goal.reached, goal.met) == (">= 1.75x", "1.74x to 1.80x", False)
    verdict = targets.verdict("fp8", rows)
    assert verdict is not None
    assert verdict.misses == ("1x131072 32/8 e4m3: 1.74x, target 1.75x",)
    (goal,) = [goal for goal in targets.goals({"fp8": rows[:1]}) if goal.grid == "fp8"]
    assert (goal.reached, goal.met) == ("1.80x", True)


def test_another_kernels_time_is_shown_beside_ours() -> None:
    plain, several = quantised("32x4096 32/8 e4m3", 10.0, 18.0), quantised("16x4096 32/8 q8 e4m3", 50.0, 60.0)
    assert "portable" not in report.tables({"fp8": data(plain)})["fp8"]
    several["results"]["portable"] = {"gpu_us": 102.8}
    table = report.tables({"fp8": data(plain, several)})["fp8"]
    assert "| times as fast | by the portable kernel |" in table
    assert "| 1.20x | 102.8 |" in table
    assert "| 1.80x | - |" in table


def test_other_kernels_are_timed_where_a_rule_decides_between_them() -> None:
    h200 = Device.named("H200")

    def others(name: str, device: Device) -> dict[str, tuple[str, str]]:
        (entry,) = grids.named(name)
        return {label: (plan.kernel, plan.source) for label, plan in other_kernels(entry.problem(), device).items()}

    assert others("16x4096 32/8 q8 e4m3", h200) == {"portable": ("triton.decode", "rule")}
    assert others("16x4096 32/8 q32 int8", h200) == {"hopper": ("gluon.decode_sm90", "rule")}
    for name, device in (("16x4096 32/8 e4m3", h200), ("16x4096 32/8 q8", h200), ("16x4096 32/8 q8 e4m3", Device.named("A100"))):
        assert others(name, device) == {}
    assert others("16x4096 32/8 q8 e4m3", Device.named("cpu")) == {}


def appended(name: str, alone: float, whole: float, host: float) -> dict[str, Any]:
    entry = row(name, alone)
    del entry["plan"], entry["floor_us"]
    entry["results"][kvcache_targets.ROTARY] = {"gpu_us": whole, "host_us": host}
    return entry


def test_an_append_is_held_to_the_time_of_decode_alone() -> None:
    rows = [appended("1x4096 32/8", 8.0, 10.4, 29.0), appended("1x512 32/8", 4.0, 8.0, 40.0)]
    table = report.tables({"kvcache": data(*rows)})
    assert "| 1x4096 32/8 after append and rotary, decode alone | <= 1.25x the time | 1.30x the time | **no** | abc |" in table["targets"]
    assert "| host time of flash_attn_with_kvcache with both, 1x4096 32/8 | <= 30 us | 29.0 us | yes | abc |" in table["targets"]
    assert "**append and rotary: 1.30x to 2.00x the time of decode alone, most at 1x512 32/8.**" in table["kvcache"]
    assert "| 1x512 32/8 | 1000 | 4.00 / - | - / - | 8.00 / 40.00 | - / - | 2.00x |" in table["kvcache"]
    assert "- 1x4096 32/8 after append and rotary, decode alone: 1.30x the time, target <= 1.25x the time" in table["kvcache"]


def test_what_was_wrong_beside_decode_alone_is_listed() -> None:
    entry = appended("1x4096 32/8", 8.0, 9.0, 29.0)
    entry["results"][kvcache_targets.APPEND] = {"wrong": "WrongResult: off"}
    table = report.tables({"kvcache": data(entry)})["kvcache"]
    assert "- 1x4096 32/8, append: wrong: WrongResult: off" in table


def test_generation_is_told_in_milliseconds_and_failures_are_listed() -> None:
    ours, theirs = {"prefill_ms": 10.0, "token_ms": 2.5, "same_tokens": 65}, {"prefill_ms": 12.0, "token_ms": 3.25, "same_tokens": 65}
    rows = [{"name": "dynamic cache, 1 x 4096", "results": {"flashtile": ours, "sdpa": theirs}}, {"name": "b", "failed": "out of memory"}]
    table = report.tables({"transformers": data(*rows)})["transformers"]
    assert "| dynamic cache, 1 x 4096 | 10.00 | 12.00 | 2.50 | 3.25 | 65 |" in table
    assert "Failures:\n\n- b: out of memory" in table


@pytest.mark.parametrize(("num_ranks", "speedup"), [(2, "**1.70x**"), (4, "1.70x")])
def test_several_gpus_are_held_to_what_is_asked_of_two(num_ranks: int, speedup: str) -> None:
    entry = {"name": "decode", "alone_us": 170.0, "together_us": 100.0, "speedup": 1.7, "target": 1.85, "paper_speedup": 1.9}
    table = report.tables({"distributed": data(entry) | {"num_ranks": num_ranks, "backend": "nccl"}})["distributed"]
    assert f"| decode | 170.0 | 100.0 | {speedup} | 1.85x | 1.90x |" in table
    assert f"on {num_ranks} x a GPU, nccl, driver 1" in table


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
    assert set(made) == set(report.TABLES)
    assert set(made.values()) == {"Not measured yet.\n"}


def test_a_stale_document_fails_the_check_and_is_rewritten(tmp_path: Path) -> None:
    docs, results = tmp_path / "performance.md", tmp_path / "results"
    results.mkdir()
    docs.write_text("before\n<!-- table: host -->\nold\n<!-- end -->\nafter\n")
    entry = row("1x512 32/8", 5.0)
    entry["results"]["flashtile"]["host_us"] = 9.0
    (results / "decode_host.json").write_text(json.dumps(data(entry)))
    with pytest.raises(typer.Exit):
        report.main(results, docs, check=True)
    report.main(results, docs, check=False)
    report.main(results, docs, check=True)
    text = docs.read_text()
    assert "old" not in text
    assert "| 1x512 32/8 | 2 | 5.00 / 9.00 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_a_marker_that_names_no_table_is_an_error() -> None:
    with pytest.raises(report.StaleReport, match="no table called speed"):
        report.rendered("<!-- table: speed -->\n<!-- end -->", report.tables({}))


def test_the_document_shows_the_results_in_the_tree() -> None:
    docs = ROOT / "docs" / "performance.md"
    text = docs.read_text()
    for name in report.TABLES:
        assert f"<!-- table: {name} -->" in text
    assert report.rendered(text, report.tables(report.load(ROOT / "benchmarks" / "results"))) == text, "run python -m benchmarks.report"


def test_a_dry_run_measures_reports_and_resumes(tmp_path: Path) -> None:
    flags = ("--grid", "paged", "--only", "32x4096 32/8 page 16", "--no-peers")
    written = dry_run(runner.main, tmp_path, *flags)["decode_paged"]
    (entry,) = written["entries"]
    assert entry["results"]["flashtile"]["gpu_us"] > 0
    assert entry["results"]["beside"]["error"] < 5e-3
    assert written["protocol"].startswith("DRY RUN")
    assert "of the contiguous cache's speed" in report.tables({"paged": written})["paged"]
    # a process that died leaves the entry that ran; a resumed one records it and measures the rest
    (tmp_path / "decode_paged.json").write_text(json.dumps(written | {"entries": [], "running": entry["name"]}))
    (entry,) = dry_run(runner.main, tmp_path, *flags, "--resume")["decode_paged"]["entries"]
    assert entry["failed"] == "the process died or was stopped here"
