"""The examples run, and do what they say; what documents quote of them is what they wrote."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_gpt() -> Iterator[ModuleType]:
    """As `python examples/tiny_gpt.py` finds its modules: in its own folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("tiny_gpt")
    sys.path.remove(str(ROOT / "examples"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_gpt_trains_alike_by_either_attention_and_writes(
    tiny_gpt: Any, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = tiny_gpt.Size(context=48, batch=2, layers=2, heads_q=4, heads_kv=2, head_dim=16)
    monkeypatch.setitem(tiny_gpt.SIZES, "tiny", size)
    monkeypatch.setattr(tiny_gpt, "read_documents", lambda: "The planner picks the query tile, and says why. " * 9)
    plot = tmp_path / "curves.svg" if importlib.util.find_spec("matplotlib") else None
    tiny_gpt.main(
        steps=12, seed=0, device="cpu", size=tiny_gpt.SizeName["tiny"], dtype=tiny_gpt.Dtype[dtype], yardstick=True, prompt="The planner ",
        plot=plot, as_json=True,
    )  # fmt: skip
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    ours, torchs, _ = document["losses"].values()
    assert len(ours) == 12
    assert ours[-1] < 0.8 * ours[0]
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert ours == pytest.approx(torchs, abs=tolerance)
    assert document["apart"]["flashtile"]["of any step"] == max(abs(a - b) for a, b in zip(ours, torchs))
    assert document["cache"] < (1e-4 if dtype == "float32" else 0.1)
    assert document["written"].startswith("The planner ")
    assert len(document["written"]) == size.context
    assert all(seconds["first step"] > 0 and seconds["after"] > 0 for seconds in document["seconds"].values())
    assert document["seconds"].keys() == document["losses"].keys()
    assert re.search(r"torch SDPA: loss .* at last; first step [\d.]+ s, then [\d.]+ s for 11 steps", printed.err)
    assert "flashtile is at most" in printed.err
    assert plot is None or plot.read_text().startswith("<?xml")


def test_tiny_gpt_tells_the_step_that_compiles_apart(tiny_gpt: Any) -> None:
    training = tiny_gpt.Training([4.0] * 401, first_step=23.0, after=4.0)
    assert training.in_words(compiles=True) == "first step (compiles) 23.00 s, then 4.00 s for 400 steps"
    assert training.in_words(compiles=False) == "first step 23.00 s, then 4.00 s for 400 steps"


@pytest.mark.parametrize("way", ["by_torch", "by_torchs_plain_products", "cache"])
def test_tiny_gpt_computes_the_same_every_way(tiny_gpt: Any, way: str) -> None:
    """More characters than its window has."""
    torch.manual_seed(0)
    size = tiny_gpt.Size(context=64, batch=1, layers=2, heads_q=4, heads_kv=2, head_dim=16)
    model, tokens = tiny_gpt.TinyGpt(20, size), torch.randint(20, (1, 50))
    with torch.no_grad():
        expected = model(tokens, tiny_gpt.by_flashtile)
        if way == "cache":
            cache, parts = tiny_gpt.Cache(size, tokens.device, torch.float32), []
            for first, last in ((0, 40), (40, 41), (41, 50)):
                cache.advance(last - first)
                parts.append(model(tokens[:, first:last], cache.attend, first))
            found = torch.cat(parts, dim=1)
        else:
            found = model(tokens, getattr(tiny_gpt, way))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_curves_are_smoothed_by_means(tiny_gpt: Any) -> None:
    curves = importlib.import_module("loss_curves")
    assert curves.smoothed([float(i) for i in range(12)]) == [4.5, 5.5, 6.5]
    assert curves.smoothed([1.0, 3.0]) == [2.0]
    assert curves.apart([1.0, 2.0, 3.0], [1.5, 2.0, 1.0]) == 2.0


def test_runs_are_drawn_beside_their_files(tiny_gpt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shipped = ROOT / "docs" / "figures" / "tiny_gpt_cpu.json"
    run = tmp_path / "run.json"
    run.write_text(shipped.read_text())
    importlib.import_module("loss_curves").main([run])
    assert "| x86_64 CPU | float32 | tiny | 300 |" in capsys.readouterr().out
    assert run.with_suffix(".svg").read_text().startswith("<?xml")


def test_the_training_pages_example_trains() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example, names)
    assert all(weight.grad.any() for weight in names["layer"].parameters())


def test_documents_quote_the_runs_of_tiny_gpt_as_they_went(tiny_gpt: Any) -> None:
    curves = importlib.import_module("loss_curves")
    runs = [json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "figures").glob("tiny_gpt_*.json"))]
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    expected = f"<!-- tiny_gpt -->\n{curves.table(runs)}\n<!-- end -->"
    assert expected in text, f"docs/training.md should read:\n{expected}"
    assert f"```text\n{runs[0]['written']}\n```" in text
    for run in runs:
        assert set(run["losses"]) == {"flashtile", "torch SDPA", "torch SDPA, plain products"}
        torch_smoothed = curves.smoothed(run["losses"]["torch SDPA"])
        assert run["apart"]["flashtile"]["smoothed"] == curves.apart(curves.smoothed(run["losses"]["flashtile"]), torch_smoothed)
        assert run["losses"]["flashtile"][-1] < 0.5 * run["losses"]["flashtile"][0]


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["tiny_gpt.py", "--device", "gpu"], "--device"),
        (["tiny_gpt.py", "--prompt", ""], "--prompt"),
        (["loss_curves.py", "no-such-file.json"], "no-such-file.json"),
        (["long_context_decode.py"], "torchrun --nproc-per-node"),
    ],
)
def test_examples_name_what_is_wrong(command: list[str], named: str) -> None:
    program = [sys.executable, str(ROOT / "examples" / command[0]), *command[1:]]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
