"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def tiny_gpt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_gpt", EXAMPLES / "tiny_gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_gpt"] = module
    spec.loader.exec_module(module)
    return module


def test_tiny_gpt_trains_alike_by_either_attention_and_writes(
    tiny_gpt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_gpt, "BATCH", 2)
    plot = None
    if importlib.util.find_spec("matplotlib") is not None:
        plot = tmp_path / "curves.svg"
    curves: list[list[float]] = []
    train = tiny_gpt.train

    def noted(*args: Any) -> Any:
        model, losses = train(*args)
        curves.append(losses)
        return model, losses

    monkeypatch.setattr(tiny_gpt, "train", noted)
    tiny_gpt.main(steps=3, seed=0, device="cpu", prompt="The planner ", plot=plot)
    ours, torchs = curves
    assert len(ours) == 3
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(torchs, abs=1e-3)
    printed = capsys.readouterr().out
    assert len(printed.partition("---\nThe planner ")[2]) == tiny_gpt.CONTEXT - len("The planner ") + 1
    assert plot is None or plot.read_text().startswith("<?xml")


def test_tiny_gpt_computes_through_its_cache_what_it_computes_at_once(tiny_gpt: Any) -> None:
    torch.manual_seed(0)
    model, tokens = tiny_gpt.TinyGpt(20), torch.randint(20, (1, 9))
    with torch.no_grad():
        expected = model(tokens, tiny_gpt.by_flashtile)
        torch.testing.assert_close(model(tokens, tiny_gpt.by_torch), expected)
        cache, found = tiny_gpt.Cache(tokens.device), []
        for first, last in ((0, 5), (5, 6), (6, 9)):
            cache.advance(last - first)
            found.append(model(tokens[:, first:last], cache.attend, first))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
