"""What tests/gpu said: counted out of pytest's reports, runs merged, and shown by test file and by feature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import gpu_tests, gpu_tests_report, report

ROOT = Path(__file__).parents[2]
DEVICE = {"device": "NVIDIA H200", "driver": "1", "versions": {"torch": "2"}}
SKIP = '<skipped type="pytest.skip" message="needs two GPUs">conftest.py:9: needs two GPUs</skipped>'


def case(module: str, name: str, inside: str = "") -> str:
    return f'<testcase classname="tests.gpu.{module}" name="{name}" time="0.1">{inside}</testcase>'


def run(folder: Path, name: str, *cases: str) -> Path:
    path = folder / name
    path.write_text(
        f'<testsuites><testsuite name="pytest" timestamp="2026-01-02T03:04:05.6+00:00">{"".join(cases)}</testsuite></testsuites>'
    )
    return path


@pytest.fixture
def like(tmp_path: Path) -> Path:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(DEVICE))
    return path


def test_outcomes_are_counted_with_why(tmp_path: Path) -> None:
    one = run(
        tmp_path,
        "one.xml",
        case("test_api_gpu", "test_a[1-bfloat16]"),
        case("test_api_gpu", "test_b", SKIP),
        case("test_api_gpu", "test_c", '<failure message="AssertionError: off&#10;by one">trace</failure>'),
        case("test_api_gpu", "test_d"),
        case("test_api_gpu", "test_d", '<error message="failed on teardown">trace</error>'),
        # a module that is skipped as a whole has no class name
        '<testcase classname="" name="tests.gpu.test_gluon_decode_gpu" time="0"><skipped message="needs a GPU of sm_90"/></testcase>',
    )
    found = gpu_tests.merged([one])
    assert found == {
        "test_api_gpu.py": {
            "passed": 1, "skipped": 1, "failed": 2, "skips": {"needs two GPUs": 1},
            "failures": {"test_c": "AssertionError: off by one", "test_d": "failed on teardown"}, "failed_before": [],
        },
        "test_gluon_decode_gpu.py": {
            "passed": 0, "skipped": 1, "failed": 0, "skips": {"needs a GPU of sm_90": 1}, "failures": {}, "failed_before": [],
        },
    }  # fmt: skip


def test_the_last_run_of_a_test_counts_and_a_failure_before_it_is_told(tmp_path: Path) -> None:
    failure = '<failure message="off">trace</failure>'
    first = run(tmp_path, "1.xml", case("test_api_gpu", "test_a"), case("test_api_gpu", "test_b", failure))
    second = run(tmp_path, "2.xml", case("test_api_gpu", "test_b"), case("test_append_gpu", "test_a"))
    tests = gpu_tests.merged([first, second])["test_api_gpu.py"]
    assert (tests["passed"], tests["failed"], tests["failed_before"]) == (2, 0, ["test_b"])
    tests = gpu_tests.merged([second, first])["test_api_gpu.py"]
    assert (tests["passed"], tests["failed"], tests["failed_before"]) == (1, 1, [])


def test_a_run_that_skips_a_test_says_nothing_of_it(tmp_path: Path, like: Path) -> None:
    ran = run(tmp_path, "1.xml", case("test_distributed_gpu", "test_a"), case("test_api_gpu", "test_a", SKIP))
    skipped = run(tmp_path, "2.xml", case("test_distributed_gpu", "test_a", SKIP))
    tests = gpu_tests.merged([ran, skipped])["test_distributed_gpu.py"]
    assert (tests["passed"], tests["skipped"], tests["failed_before"]) == (1, 0, [])
    for reports, commit in (([ran], "abc"), ([skipped], "def")):
        gpu_tests.main(reports, commit=commit, out=tmp_path, like=like)
    files = json.loads((tmp_path / "gpu_tests.json").read_text())["files"]
    assert (files["test_distributed_gpu.py"]["commit"], files["test_distributed_gpu.py"]["passed"]) == ("abc", 1)
    assert files["test_api_gpu.py"]["skipped"] == 1


def test_a_test_of_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"test_band\.test_a is no test of tests/gpu"):
        gpu_tests.read(run(tmp_path, "1.xml", '<testcase classname="tests.cpu.test_band" name="test_a"/>'))


def test_a_later_call_replaces_its_files_and_keeps_the_others(tmp_path: Path, like: Path) -> None:
    out = tmp_path / "results"
    first = run(tmp_path, "1.xml", case("test_api_gpu", "test_a"), case("test_append_gpu", "test_a", SKIP))
    gpu_tests.main([first], commit="abc", out=out, like=like)
    gpu_tests.main([run(tmp_path, "2.xml", case("test_append_gpu", "test_a"))], commit="def", out=out, like=like)
    document = json.loads((out / "gpu_tests.json").read_text())
    assert {file: (tests["commit"], tests["passed"]) for file, tests in document["files"].items()} == {
        "test_api_gpu.py": ("abc", 1),
        "test_append_gpu.py": ("def", 1),
    }
    assert (document["commit"], document["date"], document["device"]) == ("def", "2026-01-02 03:04", "NVIDIA H200")
    like.write_text(json.dumps(DEVICE | {"device": "NVIDIA A100"}))
    with pytest.raises(typer.BadParameter, match="is of NVIDIA H200, and these tests ran on NVIDIA A100"):
        gpu_tests.main([first], commit="abc", out=out, like=like)


def test_without_a_gpu_the_machine_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(typer.BadParameter, match="no GPU here"):
        gpu_tests.main([run(tmp_path, "1.xml")], commit="abc", out=tmp_path, like=None)


def test_reports_of_pytest_itself_are_read(tmp_path: Path) -> None:
    """Of this machine, where tests/gpu is skipped; one file alone, for all import CUDA's world."""
    path = tmp_path / "run.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_append_gpu.py", "-q", "-n0", "-p", "no:cacheprovider", f"--junitxml={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    tests = gpu_tests.merged([path])["test_append_gpu.py"]
    assert tests["skips"] == {"torch sees no GPU": tests["skipped"]}
    assert tests["skipped"] > 10
    assert tests["passed"] == tests["failed"] == 0


def shown(tmp_path: Path, like: Path, *cases: str) -> dict[str, str]:
    gpu_tests.main([run(tmp_path, "1.xml", *cases)], commit="abc", out=tmp_path, like=like)
    return gpu_tests_report.tables(report.load(tmp_path))


def test_a_test_file_is_shown_with_what_it_tests_and_why_tests_were_skipped(tmp_path: Path, like: Path) -> None:
    refused = [f'<skipped message="block_m {rows} wants {2 * rows} registers"/>' for rows in (64, 128)]
    skips = [case("test_append_gpu", f"test_{i}", why) for i, why in enumerate([*refused, SKIP])]
    failed = case("test_append_gpu", "test_c", '<failure message="off by one"/>')
    table = shown(tmp_path, like, *skips, failed, case("test_append_gpu", "test_d"))["gpu-tests"]
    assert "| `test_append_gpu.py` | Appends to a cache on a GPU, key by key against float64;" in table
    assert "| 1 | 3 | 1 | abc |" in table
    assert "- `test_append_gpu.py`: 2, block_m 64 wants 128 registers" in table
    assert "- `test_append_gpu.py`: 1, needs two GPUs" in table
    assert "Failed:\n\n- `test_append_gpu.py`: test_c: off by one" in table
    assert table.count("| not run | - | - | - |") == len(list((ROOT / "tests" / "gpu").glob("test_*.py"))) - 1


def test_a_feature_adds_up_its_test_files(tmp_path: Path, like: Path) -> None:
    table = shown(tmp_path, like, case("test_forward_gpu", "test_a"), case("test_distributed_gpu", "test_a", SKIP))["ran"]
    assert "| forward | 1 passed, 0 skipped, 0 failed; `test_attention_api_gpu.py` not run (abc) |" in table
    assert "| several GPUs | not run: 1 skipped, needs two GPUs (abc) |" in table
    assert "| decode | not run |" in table
    assert "| compute-sanitizer | not run yet |" in table


def test_every_test_file_belongs_to_one_feature() -> None:
    files = [gpu_tests_report.file_of(part) for feature in gpu_tests_report.FEATURES for part in feature.files]
    assert sorted(files) == sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))


def test_the_sanitizers_reports_are_told_of_all_calls() -> None:
    summary: dict[str, Any] = {"found": 3, "launches": {}, "ended": 5, "trials": 6, "failed": []}
    watched = {"commit": "abc", "trials": 70, "tools": {"memcheck": summary, "racecheck": summary | {"found": None, "ended": 0}}}
    table = gpu_tests_report.tables({"sanitize": watched})["ran"]
    assert "| memcheck: 3 reports in 5 of 70 calls, racecheck: did not end in 0 of 70 calls (abc); [what they are]" in table
    assert "| decode | not counted yet |" in table
