"""The drop-in's functions have FlashAttention's names, arguments in its order, and its defaults; and so have the modules in compat/."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


def sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


signatures = sibling("signatures")
FUNCTIONS = [(module, name, text) for module, functions in signatures.SIGNATURES.items() for name, text in functions.items()]


@pytest.mark.parametrize(("module", "name", "text"), FUNCTIONS, ids=[f"{m.removeprefix('flashtile.')}.{n}" for m, n, _ in FUNCTIONS])
def test_signature(module: str, name: str, text: str) -> None:
    function = getattr(importlib.import_module(module), name)
    assert signatures.plain(inspect.signature(function)) == text
    assert function.__doc__
    assert name in getattr(importlib.import_module(module), "__all__", [name])


def test_public_functions_are_at_the_top_as_well() -> None:
    import flashtile.flash_attn
    from flashtile.flash_attn import flash_attn_interface

    for name in flashtile.flash_attn.__all__:
        assert getattr(flashtile.flash_attn, name) is getattr(flash_attn_interface, name)
    public = {name for name in flash_attn_interface.__all__ if not name.startswith("_")}
    assert public == set(flashtile.flash_attn.__all__)


def test_shadow_modules_are_the_same_functions() -> None:
    """In a process of its own, where compat/ is on PYTHONPATH."""
    code = """
import flash_attn, flash_attn_3.flash_attn_interface as newer, flash_attn_interface
import flashtile.flash_attn_interface, flashtile.flash_attn.flash_attn_interface as two
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, __version__
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_backward, _get_block_size_n
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_torch
assert flash_attn_func is two.flash_attn_func and _flash_attn_forward is two._flash_attn_forward
assert flash_attn_interface.flash_attn_func is flashtile.flash_attn_interface.flash_attn_func is not flash_attn_func
assert newer.flash_attn_with_kvcache is flash_attn_interface.flash_attn_with_kvcache
assert int(__version__.split('.')[0]) == 2
"""
    paths = os.pathsep.join([str(ROOT / "compat"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr
