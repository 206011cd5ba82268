"""Who may import whom, read from the source; and what an import brings in, seen in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashtile

ROOT = Path(flashtile.__file__).parent
MODULES = {
    ".".join(("flashtile", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

GROUND = ("flashtile.errors", "flashtile.band", "flashtile.arguments", "flashtile.rounding", "flashtile.problem")
PLANNER = (*GROUND, "flashtile.planner")
ENGINE = (*PLANNER, "flashtile.dropout", "flashtile.kernels.call", "flashtile.checking", "flashtile.facts", "flashtile.ops")
# What each part may import at module level or later, by longest matching prefix; whatever is not listed may not be imported.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "flashtile.errors": (),
    "flashtile.band": ("flashtile.errors",),
    "flashtile.arguments": ("flashtile.errors", "flashtile.arguments"),
    "flashtile.rounding": (),
    "flashtile.problem": GROUND,
    "flashtile.dropout": (),
    "flashtile.reference": (*GROUND, "flashtile.dropout"),
    "flashtile.planner": PLANNER,
    "flashtile.kernels": (*PLANNER, "flashtile.dropout", "flashtile.kernels"),
    "flashtile.kernels.call": (),
    "flashtile.kernels.tile": (*GROUND, "flashtile.kernels.tile"),
    "flashtile.checking": ("flashtile.errors", "flashtile.kernels.call"),
    "flashtile.facts": (*PLANNER, "flashtile.facts"),
    "flashtile.ops": ENGINE,
    "flashtile.api": (*ENGINE, "flashtile.api"),
    "flashtile.flash_attn": (*ENGINE, "flashtile.api", "flashtile.dropout", "flashtile.flash_attn"),
    "flashtile.flash_attn_interface": (*ENGINE, "flashtile.api", "flashtile.flash_attn", "flashtile.flash_attn_interface"),
    "flashtile.paged": (*ENGINE, "flashtile.api"),
    "flashtile.distributed": (*ENGINE, "flashtile.api", "flashtile.distributed"),
    "flashtile.integrations": (*ENGINE, "flashtile.api", "flashtile.flash_attn", "flashtile.integrations"),
}
TOP = ("flashtile.cli", "flashtile.__main__")
MAY_IMPORT_TRITON = (
    "flashtile.kernels.append",
    "flashtile.kernels.decode",
    "flashtile.kernels.combine",
    "flashtile.kernels.forward",
    "flashtile.kernels.backward_delta",
    "flashtile.kernels.backward_keys",
    "flashtile.kernels.backward_queries",
    "flashtile.kernels.gluon",
    "flashtile.kernels.direct",
    "flashtile.kernels.launch",
    "flashtile.kernels.native",
    "flashtile.kernels.on_disk",
    "flashtile.kernels.rotary",
    "flashtile.kernels.spec",
    "flashtile.kernels.tile",
    "flashtile.kernels.compiled",
)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def rule_for(module: str) -> tuple[str, ...] | None:
    homes = [name for name in MAY_IMPORT if within(module, (name,))]
    return MAY_IMPORT[max(homes, key=len)] if homes else None


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """(what is imported, whether at module level) for every import outside TYPE_CHECKING blocks."""
    tree = ast.parse(MODULES[module].read_text())

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), top
        inner = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    return walk(tree, True)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    rule = rule_for(module)
    for name, _ in imports_of(module):
        if name.startswith("flashtile") and rule is not None:
            assert within(name, rule), f"{module} imports {name}"
        if not within(module, TOP):
            assert not within(name, TOP), f"{module} imports {name}: only the command line knows the command line"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_kernels_import_triton(module: str) -> None:
    for name, top in imports_of(module):
        if name.split(".")[0] == "triton" and not within(module, MAY_IMPORT_TRITON):
            assert not top, f"{module} imports {name} at module level"
            assert not within(module, ("flashtile.planner",)), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if within(name, PLANNER)])
def test_planning_imports_no_torch(module: str) -> None:
    assert not [name for name, top in imports_of(module) if top and name.split(".")[0] == "torch"]


def loaded_after(code: str) -> set[str]:
    """Which of the heavy modules a fresh process has loaded after ``code``."""
    report = "\nimport sys; print(*[name for name in ('torch', 'triton', 'typer', 'rich', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(run.stdout.splitlines()[-1].split())


def test_import_is_light() -> None:
    assert loaded_after("import flashtile; flashtile.Problem; flashtile.DecodePlan; flashtile.ForwardPlan; flashtile.Band") == set()


def test_explain_needs_neither_torch_nor_triton() -> None:
    code = "import flashtile\nprint(*flashtile.explain(flashtile.Problem(batch=4, seqlen_k=4096), flashtile.Device.named('h200')).lines())"
    assert not loaded_after(code) & {"torch", "triton"}


def test_a_call_on_the_cpu_needs_no_triton() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['triton'] = None  # an import of it raises\n"
        "import torch, flashtile\n"
        "c = torch.randn(1, 8, 1, 8)\n"
        "print(flashtile.decode(torch.randn(1, 1, 1, 8), c, c, torch.tensor([5], dtype=torch.int32)).shape)\n"
        "print(flashtile.attention(c, c, c).shape)\n"
        "del sys.modules['triton']"
    )
    assert "triton" not in loaded_after(code)
