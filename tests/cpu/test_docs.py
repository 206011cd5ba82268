"""Documents describe this program: examples run, commands and files exist, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import flashtile
from flashtile.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
# On a GPU host too, examples run as a user would run them.
PLAIN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def page_id(page: Path) -> str:
    return page.name


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a heading can be linked by: lower case, spaces as dashes, punctuation gone."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `flashtile ...` in inline code and after a prompt."""
    for found in re.findall(r"(?:`|^\$ )flashtile ([a-z][^`\n]*)", text, flags=re.MULTILINE):
        yield found.split()


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def is_whole(words: list[str]) -> bool:
    """Whether a command can be run as it stands: it explains, and says what, or it asks for nothing."""
    return words == ["env"] or (words[0] == "explain" and any(word.startswith("--") for word in words))


EXAMPLES = {f"{page.name}:{number}": code for page in PAGES for number, code in enumerate(examples(page), start=1)}
RUN_ALL = """
import contextlib, io, json, sys, traceback
done = {}
for name, code in json.load(sys.stdin).items():
    printed, trouble = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile("from __future__ import annotations\\n" + code, name, "exec"), {"__name__": "__main__"})
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else ""
            trouble = f"no module named {missing}" if missing == "transformers" else traceback.format_exc()
    done[name] = [printed.getvalue(), trouble]
json.dump(done, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, str]]:
    """What each example printed, and how it failed; all in one process that knows nothing of the tests'."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(EXAMPLES), capture_output=True, text=True, env=PLAIN, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: (printed, trouble) for name, (printed, trouble) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, outcomes: dict[str, tuple[str, str]]) -> None:
    _, trouble = outcomes[name]
    if trouble.startswith("no module named "):
        pytest.skip(trouble)
    assert not trouble, trouble


def test_readme_has_examples_and_one_explains(outcomes: dict[str, tuple[str, str]]) -> None:
    printed = [text for name, (text, _) in outcomes.items() if name.startswith("README.md:")]
    assert len(printed) >= 3
    assert any("block_m" in text for text in printed)


EXPLAINED = {" ".join(words): words for page in PAGES for words in commands(page.read_text(encoding="utf-8")) if is_whole(words)}


@pytest.mark.parametrize("command", EXPLAINED)
def test_commands_that_need_no_gpu_run(command: str) -> None:
    outcome = CliRunner().invoke(app, EXPLAINED[command])
    assert outcome.exit_code == 0, outcome.output


def test_readme_shows_what_explain_prints() -> None:
    (shown,) = re.findall(r"<!-- explain -->\n```console\n(.*?)\n```\n<!-- end -->", README, flags=re.DOTALL)
    command, _, printed = shown.partition("\n")
    assert command.startswith("$ flashtile explain ")
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", *command.split()[2:]],
        capture_output=True,
        text=True,
        check=True,
        env={**PLAIN, "COLUMNS": "200"},
    )
    now = done.stdout.partition("The other tiles")[0].rstrip()
    assert printed == now, f"the planner says something else by now; README's example should read:\n{now}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, f"{page.name}: flashtile {' '.join(words)}"
            command = command.commands[words.pop(0)]
        flags = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word for word in words if word.startswith("--")} - flags
        assert not unknown, f"{page.name}: no {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named <= targets, f"{page.name}: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_exist(page: Path) -> None:
    files = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for top in ("flashtile", "tests", "benchmarks", "docs", "examples")
        for path in (ROOT / top).rglob("*")
    ]
    files += [f"/{path.name}" for path in ROOT.iterdir()]
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|toml|md))`", page.read_text(encoding="utf-8")):
        assert any(path.endswith(f"/{name}") for path in files), f"{page.name} names {name}"


def test_every_page_is_in_the_site() -> None:
    index = ROOT / "docs" / "index.md"
    trees = re.findall(r"^```{toctree}\n(.*?)^```", index.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted((index.parent / f"{line}.md").resolve() for line in listed) == [page for page in PAGES if page != index]


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, flags=re.MULTILINE))
    missing = {name for name in flashtile.__all__ if not name.startswith("__")} - named
    assert not missing, f"docs/api.md lacks {sorted(missing)}"


def test_map_of_the_house_is_complete() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    here = {path.name for path in (ROOT / "flashtile").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    missing = {name for name in here if not re.search(rf"(?<![\w/]){re.escape(name)}(?!\w)", text)}
    assert not missing, f"CONTRIBUTING.md's map lacks {sorted(missing)}"


@pytest.mark.parametrize("part", ["planner", "kernels", "cli", "testing"])
def test_design_names_every_module(part: str) -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w*]+(?:\.py|\.c|/))`", text)
    here = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "flashtile" / part).iterdir()
        if not path.name.startswith(("__", "data", "tuned"))
    }
    missing = {name for name in here if not any(fnmatch(name, pattern) for pattern in named)}
    assert not missing, f"docs/design.md lacks {sorted(missing)}"
