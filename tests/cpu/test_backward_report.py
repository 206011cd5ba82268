"""What the backward benchmarks are held to, and what their tables say."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import (
    backward_targets,
    report,
)
from benchmarks.backward_grids import EVERY_NAME


def row(name: str, own: float, head_dim: int = 128, **others: float) -> dict[str, Any]:
    results = {who: {"gpu_us": us, "tflops": 1e3 / us, "ratio": us / own} for who, us in {"flashtile": own, **others}.items()}
    plan = {"kernel": "gluon.backward_sm90", "block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 3, "dq_block_m": 128,
            "dq_block_n": 64, "dq_num_warps": 8, "dq_num_stages": 4, "num_programs": 132, "one_pass": False}  # fmt: skip
    return {"name": name, "head_dim": head_dim, "flops": 1e9, "plan": plan, "results": results}


def data(*entries: dict[str, Any]) -> dict[str, Any]:
    head = {"commit": "abc", "date": "2026-01-01", "device": "a GPU", "driver": "1", "versions": {"torch": "2"}, "protocol": "medians"}
    return {**head, "entries": list(entries)}


def goals(results: dict[str, list[dict[str, Any]]], grid: str) -> list[Any]:
    return [goal for goal in backward_targets.goals(results) if goal.grid == grid]


def test_dense_is_held_to_the_faster_peer_on_each_and_to_cudnn_in_the_mean() -> None:
    rows = [row("a", 10.0, cudnn=11.0, fa4=9.4), row("b", 10.0, 64, cudnn=11.0, fa4=12.0), row("c", 10.0, 256, cudnn=1.0)]
    both, cudnn = goals({"dense": rows}, "dense")
    assert (both.reached, both.met) == ("1.017x over 2, lowest 0.940x at a", True)
    assert (cudnn.reached, cudnn.met) == ("1.100x over 2, lowest 1.100x at a", True)
    slow, _ = goals({"dense": [*rows, row("d", 10.0, cudnn=11.0, fa4=9.2)]}, "dense")
    assert slow.met is False
    assert backward_targets.misses("dense", [row("d", 10.0, cudnn=11.0, fa4=9.2)]) == [
        "d: 0.920x the faster of cuDNN and FA4, target 0.93x"
    ]


def test_a_peer_that_was_not_there_is_named() -> None:
    both, _ = goals({"dense": [row("a", 10.0, cudnn=11.0)]}, "dense")
    assert both.reached == "1.100x; fa4 not measured"


def test_uneven_lengths_are_compared_by_operations_a_second() -> None:
    entry = row("64 log-uniform", 10.0, beside=10.0) | {"beside": {"flops": 1.1e9}}
    (goal,) = goals({"varlen": [entry]}, "varlen")
    assert (goal.reached, goal.met) == ("0.909x", True)


@pytest.mark.parametrize(
    ("grid", "peer", "least"),
    [("wide", "fa4", 1.15), ("deterministic", "cudnn", 1.0), ("portable", "torch_flash", 1.0), ("block", "cudnn", 1.0)],
)
def test_other_grids_are_held_to_one_figure(grid: str, peer: str, least: float) -> None:
    for share in (1.01, 0.99):
        (goal,) = goals({grid: [row("a", 10.0, 256, **{peer: 10.0 * least * share})]}, grid)
        assert goal.met is (share > 1)


def peaks(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"name": str(n), "seqlens_q": {"max": n}, "results": {"flashtile": {"peak_bytes": peak}}} for n, peak in pairs]


def test_memory_has_to_lie_on_a_straight_line() -> None:
    (line,) = goals({"memory": peaks(*((n, 5000 + 2048 * n) for n in (1000, 2000, 4000, 8000)))}, "memory")
    assert (line.reached, line.met) == ("2.0 KiB a token from 1000 to 8000, within 0.0%", True)
    (square_law,) = goals({"memory": peaks(*((n, 0.5 * n * n) for n in (1000, 2000, 4000, 8000)))}, "memory")
    assert square_law.met is False
    (short,) = goals({"memory": peaks((1000, 1.0), (1500, 1.5), (2000, 2.0))}, "memory")
    assert short.met is None


def test_the_tables_show_plans_speeds_targets_and_what_is_missing() -> None:
    whole = replace_plan(row("b", 20.0, cudnn=10.0), one_pass=True)
    wrong = {"name": "w", "results": {"flashtile": {"wrong": "WrongResult: off"}}, "flops": 1e9, "head_dim": 128}
    results = {
        "backward-dense": data(row("a", 10.0, cudnn=8.0, torch_flash=20.0), whole, wrong),
        "backward-memory": data(*peaks((1000, 2**21))),
    }
    made = report.tables(results)
    table = made["backward-dense"]
    assert "| a | gluon 128 x 64, 8, 3; 128 x 64, 8, 4; 132 | 10.00 | 100 | 125 | 50 | cuDNN | 0.800x |" in table
    assert "| b | gluon 128 x 64, 8, 3, one pass; 132 | 20.00 |" in table
    assert "- a: 0.800x the faster of cuDNN and FA4, target 0.93x" in table
    assert "- w: wrong, WrongResult: off" in table
    assert "**no** | abc |" in made["backward-targets"]
    assert "| 1000 | 2.0 | 2.05 |" in made["backward-memory"]
    assert made["backward-gqa"] == "Not measured yet.\n"
    assert {f"backward-{name}" for name in EVERY_NAME} <= set(made)


def replace_plan(entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return entry | {"plan": entry["plan"] | changes}
