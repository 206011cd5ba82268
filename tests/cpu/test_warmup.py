"""Kernels compiled ahead for a GPU that is not here: on disk, once, in whichever process."""

from __future__ import annotations

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import flashtile
from flashtile import Device, Problem
from flashtile.api.ahead import device_or_model
from flashtile.cli.app import app
from flashtile.errors import ArgumentError, ToolchainError
from flashtile.ops import ahead
from flashtile.ops.ahead import Kernel, compile_ahead, distinct_kernels, specs_of
from tests.cpu.kernels.uninterpreted import answers

SMALL: dict[str, Any] = {"seqlen_k": 64, "num_heads_q": 1, "num_heads_kv": 1, "head_dim": 16}
FORWARD = Problem(operation="forward", seqlen_q=64, lse=True, **SMALL)
PROBLEMS = (Problem(**SMALL), Problem(**SMALL | {"seqlen_k": 8192}), FORWARD, FORWARD.with_(operation="backward"))
KERNELS = {"decode_kernel", "combine_kernel", "forward_kernel", "backward_delta_kernel", "backward_keys_kernel", "backward_queries_kernel"}

WARM_UP = """
import json, os, sys
wanted, os.environ["TRITON_CACHE_DIR"] = json.load(sys.stdin)
import flashtile
for device, problems in wanted.items():
    print(json.dumps([plan.kernel for plan in flashtile.warmup([flashtile.Problem.from_json(text) for text in problems], device)]))
"""


def warmed_up(wanted: dict[str, tuple[Problem, ...]], folder: Path) -> list[list[str]]:
    """The plans' kernels by device, compiled into ``folder`` by a process without Triton's interpreter."""
    return answers(WARM_UP, [{device: [problem.to_json() for problem in problems] for device, problems in wanted.items()}, str(folder)])


def binaries(folder: Path, kind: str) -> list[str]:
    return sorted(file.stem for file in folder.rglob(f"*.{kind}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache on disk with the kernels of PROBLEMS for a T4, and of the first one for an MI300X."""
    pytest.importorskip("triton")
    place = tmp_path_factory.mktemp("kernels")
    on_t4, on_mi300x = warmed_up({"t4": PROBLEMS, "mi300x": PROBLEMS[:1]}, place)
    assert on_t4 == ["triton.decode", "triton.decode", "triton.forward", "triton.backward"]
    assert on_mi300x == ["triton.decode"]
    return place


@pytest.mark.compiles
def test_every_operations_kernels_lie_on_disk(folder: Path) -> None:
    assert set(binaries(folder, "cubin")) == KERNELS
    assert len(binaries(folder, "cubin")) == 7  # decode's twice: the second one leaves parts to combine


@pytest.mark.compiles
def test_the_command_line_finds_them_in_processes_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")}
    line = "warmup --device T-4 --jobs 2 --heads 1 --kv-heads 1 --head-dim 16 --seqlen-k 64 --seqlen-k 8192 --json"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    cache = document["cache"]
    assert cache == {"folder": str(folder), "kernels": 3, "compiled": 0, "bytes": cache["bytes"]}
    assert cache["bytes"] > sum(path.stat().st_size for path in folder.rglob("combine_kernel.cubin"))
    assert document["device"].startswith("T4 (sm_75)")
    assert [row["kernel"] for row in document["problems"]] == ["triton.decode"] * 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.cubin")} == before


@pytest.mark.compiles
def test_an_amd_gpu_has_binaries_of_its_own(folder: Path) -> None:
    assert binaries(folder, "hsaco") == ["decode_kernel"]


def test_a_kernel_of_several_problems_is_compiled_once() -> None:
    pytest.importorskip("triton")
    figures = Device.named("h200")
    planned = [(problem, ahead.PLANNERS[problem.operation](problem, figures)) for problem in (*PROBLEMS, *PROBLEMS)]
    found = distinct_kernels(planned)
    assert {place for place, _ in found} == set(range(len(PROBLEMS)))
    assert len(found) == sum(len(specs_of(problem, plan)) for problem, plan in planned[: len(PROBLEMS)])


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    (problem, *_), figures = PROBLEMS, Device.named("t4")
    kernel = Kernel(problem, ahead.PLANNERS["decode"](problem, figures), 0)
    monkeypatch.setattr(ahead, "_interprets", lambda kernel: False)
    monkeypatch.setattr("flashtile.kernels.on_disk.compile_spec", lambda spec, target: 1 // 0)
    with pytest.raises(ToolchainError, match=r"triton\.decode.*sm_75.*ZeroDivisionError"):
        list(compile_ahead([kernel], "sm_75", jobs=1))


def test_without_triton_one_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"Triton: expected it to be installed.*pip install triton"):
        flashtile.warmup(PROBLEMS, "h200")
    result = CliRunner().invoke(app, ["warmup", "--device", "h200"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "pip install triton" in result.stderr


@pytest.mark.parametrize("name", ["H200", "h-200", "rtx 4090", "mi300x"])
def test_a_models_name_is_no_device_of_torchs(name: str) -> None:
    assert device_or_model(name) == Device.named(name)


def test_figures_of_ones_own_stand_for_a_gpu() -> None:
    assert device_or_model(Device.named("b200")) is Device.named("b200")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=str)
def test_devices_of_torchs_stay_what_they_are(device: torch.device | str) -> None:
    assert device_or_model(device) == torch.device("cpu")
    assert [plan.kernel for plan in flashtile.warmup(PROBLEMS[:1], device, jobs=2)] == ["cpu.decode"]
    assert [plan.kernel for plan in flashtile.warmup(PROBLEMS[:1], Device.named("cpu"))] == ["cpu.decode"]


def test_a_name_that_nobody_knows_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(ArgumentError, match=r"device: expected .*cuda:1.*H200.*MI300X.*got 'h2000'"):
        flashtile.warmup(PROBLEMS, "h2000")


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, None])
def test_jobs_is_a_count(jobs: Any) -> None:
    with pytest.raises(ArgumentError, match=r"jobs: expected an int of at least 1"):
        flashtile.warmup(PROBLEMS, "cpu", jobs=jobs)


@pytest.mark.parametrize("problems", [3, None, ["decode"]])
def test_what_is_no_problem_is_named(problems: Any) -> None:
    with pytest.raises(ArgumentError, match=r"problems: expected Problems"):
        flashtile.warmup(problems, "cpu")


def test_processes_compile_first_where_the_gpu_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[Any] = []

    class Module:
        @staticmethod
        def prepare(problem: Problem, plan: Any, device: torch.device) -> None:
            noted.append(problem)

    monkeypatch.setattr("flashtile.ops.kernel_module", lambda plan: Module)
    monkeypatch.setattr(Device, "of", lambda where: Device.named("t4"))
    monkeypatch.setattr("flashtile.api.ahead.distinct_kernels", lambda planned: [(0, "kernel")])
    monkeypatch.setattr("flashtile.api.ahead.compile_ahead", lambda *given: noted.append(given) or [])
    flashtile.warmup(PROBLEMS[:1], "cpu", jobs=3)
    assert noted == [(["kernel"], "sm_75", 3), PROBLEMS[0]]
    flashtile.warmup(PROBLEMS[:1], "cpu")
    assert noted[2:] == [PROBLEMS[0]]


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernel = Kernel(PROBLEMS[0], ahead.PLANNERS["decode"](PROBLEMS[0], Device.named("t4")), 0)

    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error: object) -> None: ...

        def submit(self, *job: object) -> Future[Any]:
            died: Future[Any] = Future()
            died.set_exception(BrokenProcessPool("terminated abruptly"))
            return died

        def shutdown(self, cancel_futures: bool) -> None: ...

    monkeypatch.setattr(ahead, "compiling_processes", lambda count: Pool())
    with pytest.raises(ToolchainError, match=r"jobs: expected 2 processes.*died.*Use fewer if memory ran out"):
        list(compile_ahead([kernel, kernel], "sm_75", jobs=2))
