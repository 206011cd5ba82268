"""The forward benchmarks without a GPU: what is measured, how it is checked and judged, and what a run that dies leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from benchmarks import forward as script
from benchmarks import forward_grids, forward_measure, forward_peers, forward_targets, report, runner, speed_tables, timed_trials, timing
from benchmarks.forward_check import Oracle
from benchmarks.forward_grids import Shape, shrunk, square
from benchmarks.forward_sets import InputSets, num_sets, problem_of
from benchmarks.refusals import Refused, WrongResult
from benchmarks.trials import DeviceLost, Trials
from flashtile.band import Band
from flashtile.planner.choose import plan_forward
from flashtile.planner.device import Device
from flashtile.problem import Problem
from tests.cpu.dry_runs import dry_run

CPU = torch.device("cpu")
H200 = Device.named("h200")
EVERY = [shape for name in forward_grids.GRID_NAMES for shape in forward_grids.grid(name)]


def one_of(name: str) -> Shape:
    return shrunk(forward_grids.grid(name)[0], longest=40, max_heads=4)


def test_every_problem_has_a_name_of_its_own() -> None:
    for name in forward_grids.GRID_NAMES:
        names = [shape.name for shape in forward_grids.grid(name)]
        assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("name", ["dense", "dims", "gqa", "rescale", "portable"])
def test_dense_problems_have_16k_tokens_and_heads_that_divide(name: str) -> None:
    for shape in forward_grids.grid(name):
        assert sum(shape.seqlens_q) == (32768 if shape.seqlens_q[0] == 32768 else 16384)
        assert shape.num_heads_q % shape.num_heads_kv == 0
        if name == "dense":
            assert shape.num_heads_q * shape.head_dim == 2048


def test_varlen_lengths_are_the_same_every_time_and_in_their_range() -> None:
    (first,), (again,) = forward_grids.varlen(), forward_grids.varlen()
    assert first == again
    assert len(first.seqlens_q) == 64
    assert 128 <= min(first.seqlens_q) < 256
    assert 4096 < max(first.seqlens_q) <= 8192


def test_flops_are_counted_as_flash_attention_does() -> None:
    full, causal = (square(2, 4096, (16, 16), causal=mask) for mask in (False, True))
    assert full.flops == 4 * 4096**2 * 128 * 16 * 2
    assert causal.flops == full.flops / 2
    uneven = square(1, 64, (4, 4), head_dim=192, head_dim_v=128)
    assert uneven.flops == 2 * 64 * 64 * 4 * (192 + 128)


@pytest.mark.parametrize("window", [None, (7, 0), (3, 5), (None, 2)])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 12), (12, 5), (9, 9)])
def test_windows_and_unlike_lengths_count_visible_pairs(seqlen_q: int, seqlen_k: int, window: tuple[int | None, int | None] | None) -> None:
    shape = Shape("x", (seqlen_q, 3), (seqlen_k, 3), 2, 2, causal=window is None, window=window, varlen=True)
    visible = sum(int(shape.band.dense(m, n).sum()) for m, n in ((seqlen_q, seqlen_k), (3, 3)))
    assert shape.pairs == visible
    assert shape.flops == 4 * visible * 128 * 2


def test_the_window_shows_1024_keys() -> None:
    shape = forward_grids.window()[0]
    assert shape.band == Band(1023, 0)
    assert shape.pairs == 1024 * 1025 / 2 + (16384 - 1024) * 1024


@pytest.mark.parametrize("shape", EVERY, ids=lambda shape: shape.name)
def test_every_problem_has_a_plan_on_an_h200_without_memory(shape: Shape) -> None:
    problem = problem_of(shape)
    assert problem.operation == "forward"
    assert problem.lse
    assert plan_forward(problem, H200).kernel != "cpu.forward"
    if shape.kernel:
        assert forward_measure.plan_of(shape, H200)[1].kernel == shape.kernel


@pytest.mark.parametrize("name", forward_grids.GRID_NAMES)
def test_real_inputs_pose_the_problem_that_was_planned(name: str) -> None:
    shape = one_of(name)
    assert Problem.forward(**InputSets(shape, CPU).args(0), lse=True) == problem_of(shape)


@pytest.mark.parametrize("name", ["dense", "chunked", "varlen", "window", "gqa", "rescale"])
def test_the_check_passes_what_is_right_and_names_what_is_not(name: str) -> None:
    sets = InputSets(one_of(name), CPU)
    oracle = Oracle(sets)
    out, lse = sets.contestant()(0)
    assert oracle.exact((out, lse)) < 5e-3
    assert oracle.error([out, None]) < 5e-3
    with pytest.raises(WrongResult, match="lse differs"):
        oracle.exact((out, lse + 0.1))
    with pytest.raises(WrongResult, match="relative L2"):
        oracle.error(out * 1.1)
    out.view(-1)[7] = float("nan")
    with pytest.raises(WrongResult, match="1 elements NaN"):
        oracle.error(out)


def test_growing_scores_move_every_maximum_in_either_direction() -> None:
    shape = Shape("x", (1,), (1024,), 2, 2, growth=12.0)
    sets = InputSets(shape, CPU)
    scores = torch.einsum("qhd,khd->hk", sets.q[0][0].double(), sets.k[0][0].double()) * sets.scale / torch.log(torch.tensor(2.0))
    tops = scores.view(2, 8, 128).amax(-1)
    steps = tops.diff(dim=1)
    assert (steps[0] > 8).all()
    assert (steps[1] < -8).all()


def test_one_input_set_is_enough_where_it_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    gpu = torch.device("cuda")
    assert num_sets(square(4, 4096, (16, 16)), gpu) == 2
    assert num_sets(square(1, 32768, (16, 16)), gpu) == 1
    assert num_sets(square(1, 256, (16, 16)), gpu) == 64


@pytest.mark.parametrize(("name", "reason"), [("varlen", "packed"), ("window", "window"), ("chunked", "packed")])
def test_sdpa_refuses_what_it_cannot_say(name: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        forward_peers.sdpa(InputSets(one_of(name), CPU))


def test_fa3_gets_every_problem_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(forward_peers, "operator", lambda library, name: lambda *args: calls.append(args) or list(args[:1]))
    dense, window, paged = (InputSets(one_of(name), CPU) for name in ("dense", "window", "chunked"))
    for sets in (dense, window, paged):
        forward_peers.fa3(sets)(0)
    assert all(len(call) == 37 for call in calls)
    assert [call[0].ndim for call in calls] == [3, 3, 3]
    assert calls[0][8] is dense.cu_seqlens_k
    assert calls[0][24:27] == (True, -1, -1)
    assert calls[1][24:27] == (True, 1023, 0)
    assert (calls[2][8], calls[2][11], calls[2][14]) == (None, paged.seqused_k, paged.page_table)
    assert calls[2][1].ndim == 4


def row(name: str, own: float, head_dim: int = 128, **others: float) -> dict[str, Any]:
    results = {who: {"gpu_us": us, "tflops": 1e3 / us, "ratio": us / own} for who, us in {"flashtile": own, **others}.items()}
    plan = {"kernel": "gluon.forward_sm90", "block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2, "num_programs": 132}
    return {"name": name, "head_dim": head_dim, "flops": 1e9, "plan": plan, "results": results}


def data(*entries: dict[str, Any]) -> dict[str, Any]:
    head = {"commit": "abc", "date": "2026-01-01", "device": "a GPU", "driver": "1", "versions": {"torch": "2"}, "protocol": "medians"}
    return {**head, "entries": list(entries)}


def goal(results: dict[str, list[dict[str, Any]]], what: str) -> Any:
    (found,) = [goal for goal in forward_targets.goals(results) if goal.what.startswith(what)]
    return found


def test_a_head_dim_is_held_to_the_fastest_peer_on_each_problem_and_in_the_mean() -> None:
    rows = [row("a", 10.0, cudnn=11.0, fa3=12.0, torch_flash=1.0), row("b", 10.0, cudnn=13.0, fa4=12.0)]
    found = goal({"dense": rows}, "head dim 128")
    assert found.met
    assert found.reached == "1.149x over 2, lowest 1.100x at a"
    slow = goal({"dense": [*rows, row("c", 10.0, cudnn=9.9)]}, "head dim 128")
    assert slow.met is False
    assert forward_targets.misses("dense", [*rows, row("c", 10.0, cudnn=9.9)]) == [
        "c: 0.990x the fastest of cuDNN, FA3 and FA4, target 1.00x"
    ]
    even = goal({"dense": [row("a", 10.0, cudnn=10.0)]}, "head dim 128")
    assert even.met is False  # on each, but not in the mean
    assert goal({"dense": rows}, "head dim 64").met is None


def test_64_and_256_have_bars_of_their_own() -> None:
    rows = [row("a", 10.0, 64, fa4=9.8), row("b", 10.0, 64, fa4=11.2), row("c", 10.0, 256, fa3=9.8), row("d", 10.0, 256, fa3=10.1)]
    assert goal({"dense": rows}, "head dim 64").met
    assert goal({"dense": rows}, "head dim 256").met is False


def test_chunks_are_held_to_the_same_without_pages_and_to_fa3() -> None:
    rows = [row("512 on 16k, pages of 16", 10.0, beside=9.1, fa3=9.9)]
    of = [goal for goal in forward_targets.goals({"chunked": rows}) if goal.grid == "chunked"]
    assert [(goal.reached, goal.met) for goal in of] == [("0.910x", True), ("0.990x", False)]


def test_host_time_is_the_slowest_of_its_problems() -> None:
    rows = [row("a", 5.0), row("b", 5.0)]
    rows[0]["results"]["flashtile"]["host_us"], rows[1]["results"]["flashtile"]["host_us"] = 24.0, 26.0
    found = goal({"host": rows}, "host time")
    assert (found.reached, found.met) == ("24.0 to 26.0 us", False)
    assert forward_targets.misses("host", rows) == ["b: 26.0 us, target 25"]


def test_the_tables_show_speeds_targets_misses_and_failures() -> None:
    wrong = {"name": "w", "results": {"flashtile": {"wrong": "WrongResult: off"}, "fa3": {"gpu_us": 1.0}}, "flops": 1e9, "head_dim": 128}
    made = report.tables({"forward-dense": data(row("a", 10.0, cudnn=8.0, torch_flash=20.0), wrong)})
    table = made["forward-dense"]
    assert "| a | gluon 128 x 128, 8, 2, 132 | 10.00 | 100 | 125 | - | 50 | cuDNN | 0.800x |" in table
    assert "- a: 0.800x the fastest" in table
    assert "- w: wrong, WrongResult: off" in table
    assert "| head dim 128, full and causal, the fastest of cuDNN, FA3 and FA4 |" in made["forward-targets"]
    assert "**no** | abc |" in made["forward-targets"]
    assert made["forward-gqa"] == "Not measured yet.\n"


def test_a_line_for_the_terminal_names_who_failed() -> None:
    entry = row("a", 10.0, cudnn=8.0)
    entry["results"]["fa4"] = {"failed": "RuntimeError: no"}
    assert "cudnn 125.0 (0.800x)" in speed_tables.line(entry)
    assert "fa4 failed: RuntimeError: no" in speed_tables.line(entry)


class FakeGraph:
    """Stands for a captured graph: runs the calls."""

    def __init__(self, fn: Callable[[int], Any], sets: int, calls: int) -> None:
        self.calls, self.output, self.fn = calls, fn(0), fn

    def replay(self) -> None:
        for place, value in zip(timed_trials.floats_of(self.output), timed_trials.floats_of(self.fn(0))):
            place.copy_(value)


def test_on_a_gpu_what_a_graph_cannot_hold_is_issued_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = one_of("dense")
    sets = InputSets(shape, CPU)
    oracle = Oracle(sets)

    def capture(fn: Callable[[int], Any], sets: int, calls: int) -> FakeGraph:
        if fn is stubborn:
            raise RuntimeError("not in a graph")
        return FakeGraph(fn, sets, calls)

    stubborn = forward_peers.sdpa(sets)
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing, "replay_in_turn", lambda issued, rounds, seconds: {name: timing.Timing((2.0,)) for name in issued})
    trials = Trials(CPU)
    forward_measure._enter_ours(trials, "flashtile", sets, oracle)
    trials.enter("sdpa", lambda: stubborn, oracle)
    trials.enter("off", lambda: lambda i: sets.contestant()(i)[0] * 2, oracle)
    judges = {"flashtile": oracle.exact, "sdpa": oracle.error}
    timed_trials.time_on_gpu(trials, judges, sets, timed_trials.Options(CPU))
    assert trials.results["flashtile"]["gpu_us"] == 2.0
    assert trials.results["flashtile"]["error_after"] < 5e-3
    assert trials.results["sdpa"]["eager"] == "RuntimeError: not in a graph"
    assert "wrong" in trials.results["off"]


def test_a_dry_run_measures_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    flags = ("--grid", "chunked,host", "--only", "1")
    files = dry_run(script.main, tmp_path, *flags)
    (chunk,) = files["forward_chunked"]["entries"]
    assert chunk["results"]["flashtile"]["gpu_us"] > 0
    assert chunk["results"]["beside"]["error"] < 5e-3
    assert chunk["results"]["sdpa"]["refused"]
    assert files["forward_host"]["protocol"].startswith("DRY RUN")
    assert files["forward_host"]["entries"][0]["results"]["sdpa"]["ratio"] > 0
    # a process that died in our own call leaves a failure; one that died in a peer's is measured again without it
    path = tmp_path / "forward_host.json"
    path.write_text(json.dumps(files["forward_host"] | {"entries": [], "running": "128 causal 1x256", "step": "flashtile"}))
    resumed = dry_run(script.main, tmp_path, *flags, "--resume")["forward_host"]["entries"]
    assert resumed[0]["failed"] == "the process died or was stopped here (flashtile)"
    path.write_text(json.dumps(files["forward_host"] | {"entries": [], "running": "128 causal 1x256", "step": "sdpa"}))
    again = dry_run(script.main, tmp_path, *flags, "--resume")["forward_host"]
    assert again["entries"][0]["results"].keys() == {"flashtile"}
    assert again["peers_missing"] == {"sdpa": f"{runner.DIED} at 128 causal 1x256"}
    assert dry_run(script.main, tmp_path, *flags, "--resume")["forward_host"]["peers_missing"] == again["peers_missing"]


def test_a_device_lost_in_a_peers_call_is_the_peers_loss(tmp_path: Path) -> None:
    def lost_in(who: str) -> runner.Runner:
        def measured(shape: Shape, grid: str, seconds: float, step: Callable[[str], None]) -> dict[str, Any]:
            step(who)
            raise DeviceLost("gone")

        return runner.Runner("forward", CPU, tmp_path, "abc", {}, measured, speed_tables.line, "medians", limit=30.0, peers=("fa4",))

    shape = one_of("host")
    for who in ("fa4", "flashtile"):
        with pytest.raises(typer.Exit):
            lost_in(who).run("host", [shape], runner.Budget(time.monotonic() + 60))
        written = json.loads((tmp_path / "forward_host.json").read_text())
        if who == "fa4":
            assert written["entries"] == []
            assert runner.died_in_peers(tmp_path, "forward", ["host"], ("fa4",)) == {"fa4": f"{runner.DIED} at {shape.name}"}
        else:
            assert written["entries"][0]["failed"] == "device lost: gone"


def test_a_step_that_hangs_ends_the_process_and_says_where() -> None:
    hangs = "import time\nfrom benchmarks.runner import Watch\nWatch(0.2).step('ours')\ntime.sleep(30)"
    done = subprocess.run(
        [sys.executable, "-c", hangs], capture_output=True, text=True, timeout=25, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
