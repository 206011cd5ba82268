"""The backward benchmarks without a GPU: what is measured, and how it is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import (
    axes,
    backward_block,
    backward_grids,
    backward_measure,
    backward_peers,
    backward_step,
    backward_sweep,
    timed_trials,
    timing,
)
from benchmarks import backward as script
from benchmarks.backward_check import GradientOracle
from benchmarks.backward_grids import EVERY_NAME, GRID_NAMES, BackwardShape, backward_of
from benchmarks.backward_sets import BackwardSets, backward_problem_of
from benchmarks.forward_grids import Shape, shrunk, square
from benchmarks.forward_sets import num_sets
from benchmarks.refusals import Refused, WrongResult
from benchmarks.trials import Trials
from flashtile import UnsupportedError, reference
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.testing.head_gradients import head_gradients
from tests.cpu.dry_runs import dry_run

CPU = torch.device("cpu")
H200 = Device.named("h200")
EVERY = [shape for name in GRID_NAMES for shape in backward_grids.grid(name)]


def one_of(name: str) -> BackwardShape:
    return shrunk(backward_grids.grid(name)[0], longest=40, max_heads=4)


def test_every_problem_has_a_name_of_its_own() -> None:
    for name in GRID_NAMES:
        names = [shape.name for shape in backward_grids.grid(name)]
        assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("name", ["dense", "wide", "deterministic", "portable", "dims"])
def test_problems_have_16k_tokens_and_2048_features(name: str) -> None:
    for shape in backward_grids.grid(name):
        assert sum(shape.seqlens_q) == (32768 if shape.seqlens_q[0] == 32768 else 16384)
        assert 2048 - shape.head_dim < shape.num_heads_q * shape.head_dim <= 2048
        assert shape.deterministic == (name == "deterministic")


def test_the_masks_lengths_and_head_dims_that_are_held_to_a_target_are_there() -> None:
    wanted = {(dim, causal, keys) for dim in (64, 128) for causal in (False, True) for keys in (1024, 2048, 4096, 8192, 16384, 32768)}
    for name in ("dense", "deterministic"):
        assert {(shape.head_dim, shape.causal, shape.seqlens_k[0]) for shape in backward_grids.grid(name)} == wanted


def test_operations_are_two_and_a_half_times_forwards_and_inputs_count_what_flows_in() -> None:
    forward = square(2, 64, (4, 2), 128, 64, causal=True)
    shape = backward_of(forward)
    assert shape.flops == 2.5 * forward.flops
    assert shape.bytes_in == forward.bytes_in + 2 * 2 * 64 * 4 * 64 * 2
    assert shape.facts()["flops"] == shape.flops


def test_groups_and_uneven_lengths_stand_beside_equal_work() -> None:
    for shape in backward_grids.grid("gqa"):
        assert isinstance(shape.beside, BackwardShape)
        assert (shape.num_heads_q, shape.num_heads_kv) == (32, 8)
        assert (shape.beside.num_heads_q, shape.beside.num_heads_kv, shape.beside.flops) == (32, 32, shape.flops)
    (uneven,) = backward_grids.grid("varlen")
    assert isinstance(uneven.beside, BackwardShape)
    assert uneven.beside.flops == pytest.approx(uneven.flops, rel=0.05)
    assert len(set(uneven.beside.seqlens_q)) == 1


@pytest.mark.parametrize("shape", EVERY, ids=lambda shape: shape.name)
def test_every_problem_has_a_plan_on_an_h200_without_memory(shape: BackwardShape) -> None:
    problem, plan = backward_measure.plan_of(shape, H200)
    assert (problem.operation, problem.deterministic) == ("backward", shape.deterministic)
    assert plan.kernel == (shape.kernel or plan.kernel) != "cpu.backward"
    assert not (shape.deterministic and plan.one_pass)


@pytest.mark.parametrize("name", GRID_NAMES)
def test_real_inputs_pose_the_problem_that_was_planned(name: str) -> None:
    shape = one_of(name)
    posed = Problem.forward(**BackwardSets(shape, CPU).args(0), lse=True)
    assert posed.with_(operation="backward", deterministic=shape.deterministic) == backward_problem_of(shape)


@pytest.mark.parametrize("shape", [
    Shape("cross", (37,), (50,), 4, 2, 16, causal=True, dtype="float32"),
    Shape("window", (41,), (41,), 2, 1, 8, window=(7, 3), dtype="float32"),
    Shape("more queries", (30,), (9,), 2, 2, 16, 8, causal=True, dtype="float32"),
], ids=lambda shape: shape.name)  # fmt: skip
def test_the_gradients_of_a_head_are_those_of_the_reference(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtile.testing.head_gradients._ROWS", 16)
    sets = BackwardSets(backward_of(shape), CPU)
    q, k, v, dout = (tensors[0].double() for tensors in (sets.q, sets.k, sets.v, sets.dout))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out, _ = reference.forward(*leaves, causal=shape.causal, window=shape.window, dtype=torch.float64)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    group = shape.num_heads_q // shape.num_heads_kv
    for head in range(shape.num_heads_kv):
        heads = slice(head * group, (head + 1) * group)
        with torch.no_grad():
            found = head_gradients(q[0, :, heads], k[0, :, head], v[0, :, head], dout[0, :, heads], shape.band)
        torch.testing.assert_close(found.dq, dq[0, :, heads])
        torch.testing.assert_close(found.dk, dk[0, :, head])
        torch.testing.assert_close(found.dv, dv[0, :, head])


@pytest.mark.parametrize("name", ["dense", "wide", "gqa", "varlen", "dims"])
def test_the_check_passes_what_is_right_and_names_what_is_not(name: str) -> None:
    sets = BackwardSets(one_of(name), CPU)
    oracle = GradientOracle(sets)
    grads = backward_measure.ours(sets)(0)
    assert oracle.exact(grads) < 7.5e-3
    for i, label in enumerate(("dq", "dk", "dv")):
        off = [grad * 1.1 if i == j else grad for j, grad in enumerate(grads)]
        with pytest.raises(WrongResult, match=f"of {label}, sequence"):
            oracle.error(off)
        broken = [grad.clone() for grad in grads]
        broken[i].view(-1)[7] = float("nan")
        with pytest.raises(WrongResult, match=f"{label} has 1 elements NaN"):
            oracle.error(broken)


def test_a_gradient_that_nobody_wrote_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = BackwardSets(one_of("dense"), CPU)
    monkeypatch.setattr(backward_measure, "bound", lambda *args: lambda call: (call.dq.zero_(), call.dv.zero_()))
    trials = Trials(CPU)
    backward_measure.enter_ours(trials, "flashtile", sets, GradientOracle(sets))
    assert "dk has" in trials.results["flashtile"]["wrong"]
    assert not trials.fns


def test_bits_that_differ_from_call_to_call_are_seen_where_they_must_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, noise = backward_measure.bound, iter(range(1, 9))

    def shaken(*args: Any) -> Callable[[Any], None]:
        run = bound(*args)
        return lambda call: (run(call), call.dq.view(-1)[0].add_(1e-3 * next(noise)))  # type: ignore[return-value]

    monkeypatch.setattr(backward_measure, "bound", shaken)
    for name in ("dense", "deterministic"):
        sets, trials = BackwardSets(one_of(name), CPU), Trials(CPU)
        backward_measure.enter_ours(trials, "flashtile", sets, GradientOracle(sets))
        assert ("other bits" in trials.results["flashtile"].get("wrong", "")) == (name == "deterministic")


@pytest.mark.parametrize("peer", ["cudnn", "torch_flash", "sdpa"])
def test_torchs_operators_refuse_packed_sequences(peer: str) -> None:
    with pytest.raises(Refused, match="packed"):
        backward_peers.PEERS[peer](BackwardSets(one_of("varlen"), CPU))


@pytest.mark.parametrize("name", ["dense", "varlen"])
def test_flash_attention_4_gets_our_forwards_results_and_the_starts_of_packed_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    fake = type("interface", (), {"_flash_attn_bwd": staticmethod(lambda *args, **kwargs: calls.append((args, kwargs)))})
    for module in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(__import__("sys").modules, module, type("package", (), {}))
    monkeypatch.setitem(__import__("sys").modules, "flash_attn.cute.interface", fake)
    sets = BackwardSets(one_of(name), CPU)
    backward_peers.flash_attention_4(sets)(0)
    ((q, k, v, out, dout, lse), options) = calls[0]
    assert (q is sets.q[0], k is sets.k[0], v is sets.v[0], dout is sets.dout[0]) == (True,) * 4
    assert (out.shape, lse.shape) == (dout.shape, (4, sum(sets.shape.seqlens_q)) if name == "varlen" else (*lse.shape[:1], 4, q.shape[1]))
    assert options["causal"] is sets.shape.causal
    assert (options.get("cu_seqlens_q") is sets.cu_seqlens_q) == (name == "varlen")


def test_one_input_set_is_enough_where_it_exceeds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("properties", (), {"L2_cache_size": 50 << 20}))
    assert num_sets(backward_grids.grid("dense")[0], torch.device("cuda")) == 1
    assert num_sets(backward_grids.grid("host")[0], torch.device("cuda")) > 10


class FakeGraph:
    """Stands for a captured graph: runs the calls."""

    def __init__(self, fn: Callable[[int], Any], sets: int, calls: int) -> None:
        self.calls, self.output, self.fn = calls, fn(0), fn

    def replay(self) -> None:
        for place, value in zip(self.output, self.fn(0)):
            place.copy_(value)


def test_on_a_gpu_what_the_timed_graph_wrote_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = BackwardSets(one_of("gqa"), CPU)
    oracle = GradientOracle(sets)
    monkeypatch.setattr(timing, "capture", FakeGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing, "replay_in_turn", lambda issued, rounds, seconds: {name: timing.Timing((2.0,)) for name in issued})
    trials = Trials(CPU)
    backward_measure.enter_ours(trials, "flashtile", sets, oracle)
    trials.enter("sdpa", lambda: backward_peers.sdpa(sets), oracle)
    timed_trials.time_on_gpu(trials, {"flashtile": oracle.exact, "sdpa": oracle.error}, sets, timed_trials.Options(CPU))
    assert all(result["gpu_us"] == 2.0 and result["error_after"] < 1e-2 for result in trials.results.values())


def test_a_training_step_has_the_gradients_of_both_libraries() -> None:
    sets = BackwardSets(one_of("host"), CPU)
    oracle = GradientOracle(sets)
    for name in ("flashtile", "sdpa"):
        assert oracle.error(backward_step.step_of(name, sets)(0)) < 1e-2


def test_a_block_is_held_to_float32_and_to_its_own_error_in_bf16() -> None:
    block = backward_block.shrunk(backward_block.blocks()[0])
    row = backward_block.measure(block, timed_trials.Options(CPU, ("torch_flash",), 1), lambda name: None)
    assert "refused" in row["results"]["torch_flash"]
    assert row["results"]["flashtile"]["error"] <= 2 * row["error_in_bf16"]
    assert row["results"]["flashtile"]["gpu_us"] > 0
    x = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    oracle = backward_block.BlockOracle(block, x, x)
    with pytest.raises(WrongResult, match="limit"):
        oracle.error([grad * 1.1 for grad in oracle.expected])
    with pytest.raises(WrongResult, match="NaN"):
        oracle.error([*oracle.expected[:-1], torch.full_like(oracle.expected[-1], float("nan"))])


def test_a_dry_run_measures_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    flags = ("--grid", "varlen,host", "--only", "6")
    files = dry_run(script.main, tmp_path, *flags)
    (uneven,) = files["backward_varlen"]["entries"]
    assert uneven["results"]["flashtile"]["error"] < 7.5e-3
    assert uneven["results"]["beside"]["gpu_us"] > 0
    assert uneven["results"]["sdpa"]["refused"]
    (step,) = files["backward_host"]["entries"]
    assert step["results"]["sdpa"]["ratio"] > 0
    assert files["backward_host"]["protocol"].startswith("DRY RUN")
    path = tmp_path / "backward_host.json"
    path.write_text(json.dumps(files["backward_host"] | {"entries": [], "running": step["name"], "step": "sdpa"}))
    again = dry_run(script.main, tmp_path, *flags, "--resume")["backward_host"]
    assert again["entries"][0]["results"].keys() == {"flashtile"}


def test_every_grid_has_a_share_of_the_time() -> None:
    assert set(script.SHARES) == set(EVERY_NAME) - {"cpu"}


def test_a_problem_keeps_its_kind_when_it_is_shrunk() -> None:
    shape = replace(backward_grids.grid("gqa")[0], deterministic=True)
    small = shrunk(shape)
    assert isinstance(small, BackwardShape)
    assert isinstance(small.beside, BackwardShape)
    assert (small.deterministic, small.num_heads_q // small.num_heads_kv) == (True, 4)


def test_a_sweep_times_variants_around_the_planners_choice(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(backward_sweep.main)
    usual = ["--device", "cpu", "--dry-run", "--rounds", "1", "--out", str(tmp_path), "--problems", "64 causal 1x16384"]
    outcome = CliRunner().invoke(app, [*usual, "--plans", "block_m=16,96", "--plans", "block_m=7 problems=128 full", "--peer", "sdpa"])
    assert outcome.exit_code == 0, outcome.output
    (entry,) = json.loads((tmp_path / "backward_sweep.json").read_text())["entries"]
    assert entry["plans"].keys() == {"block_m=16", "block_m=96"}
    assert entry["results"].keys() == {"flashtile", "block_m=16", "block_m=96", "sdpa"}
    assert all(result["gpu_us"] > 0 and result["error"] < 1e-2 for result in entry["results"].values())
    assert "block_m=16" in backward_sweep.table(entry, 9)
    wrong = CliRunner().invoke(app, [*usual, "--plans", "keys_per_split=1"])
    assert wrong.exit_code == 2


def test_a_refused_plan_of_a_sweep_says_why() -> None:
    shape = backward_grids.grid("dense")[0]
    choice = backward_measure.plan_of(shape, H200)[1]
    (plan,) = backward_sweep.variants(shape, axes.read(["num_stages=9"], backward_sweep.FIELDS), choice).values()
    with pytest.raises(UnsupportedError, match="num_stages"):
        backward_measure.plan_backward(backward_problem_of(shape), H200, plan=plan)
    assert backward_sweep.named("dense") == backward_grids.grid("dense")
    with pytest.raises(ValueError, match="no problem"):
        backward_sweep.named("128 causal 3x5")
