"""What documents, examples and benchmarks say of clients runs."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: an extra, from Python 3.11 on, which the oldest environment leaves out")

from benchmarks import transformers_generate

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_examples_of_the_page_run() -> None:
    examples = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    assert len(examples) == 4
    for example in examples:
        exec(example, {})


def test_the_example_writes_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "transformers_generate.py"))["main"]
    main(device="cpu", tokens=8, seed=0)
    assert "the same tokens" in capsys.readouterr().out


def test_the_benchmark_measures_both(tmp_path: Path) -> None:
    transformers_generate.main(tmp_path, batches="1,2", seqlen=20, caches="dynamic", rounds=1, budget=60.0, tiny=True, commit="c")
    written = json.loads((tmp_path / "transformers_generate.json").read_text())
    assert [entry["name"] for entry in written["entries"]] == ["dynamic cache, 1 x 20", "dynamic cache, 2 x 20"]
    for entry in written["entries"]:
        assert entry["results"].keys() == {"sdpa", "flashtile"}
        assert all(result["token_ms"] > 0 and result["prefill_ms"] > 0 for result in entry["results"].values())
        assert entry["results"]["sdpa"]["same_tokens"] == 1 + transformers_generate.TOKENS
