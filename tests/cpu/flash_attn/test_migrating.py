"""docs/migrating.md is current: every argument has its row, every row its test, and what it calls refused is refused."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashtile.errors import UnsupportedError

HERE = Path(__file__).parent


def sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


migrating = sibling("migrating")
GROUPS = migrating.GROUPS


def test_page_is_current() -> None:
    again = "python tests/cpu/flash_attn/migrating.py > docs/migrating.md"
    assert migrating.PAGE.read_text(encoding="utf-8") == migrating.page(), f"run {again}"


def test_every_function_is_in_a_group() -> None:
    listed = {(group.module, name) for group in GROUPS for name in group.functions}
    known = {(module, name) for module, functions in migrating.signatures.SIGNATURES.items() for name in functions}
    assert known - listed == {(migrating.TWO, "_get_block_size_n")}


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_every_argument_has_a_note_and_every_note_an_existing_test(group: Any) -> None:
    assert set(group.arguments()) <= set(group.notes)
    for name in group.arguments():
        file, _, test = group.notes[name].held_by.partition("::")
        assert re.search(rf"^def {test}\(", (HERE / file).read_text(encoding="utf-8"), flags=re.MULTILINE), f"{name}: {file}::{test}"


REFUSALS = [
    (group.module, function, name)
    for group in GROUPS
    for name, note in group.notes.items()
    if note.supported == "no"
    for function in group.functions
    if name in migrating.signatures.arguments(migrating.signatures.SIGNATURES[group.module][function])
]


@pytest.mark.parametrize(("module", "function", "name"), REFUSALS, ids=["-".join(row) for row in REFUSALS])
def test_what_is_called_refused_is_refused(module: str, function: str, name: str) -> None:
    x, starts = torch.zeros(1, 2, 3, 1, 8), torch.tensor([0, 2], dtype=torch.int32)
    values: dict[str, Any] = {"attention_chunk": 4, "sm_margin": 4, "num_splits": 4, "max_seqlen_k_new": 4}
    needed: dict[str, Any] = {"batch_size": 1, "num_heads_q": 1, "num_heads_kv": 1, "headdim": 8, "qkv": x, "cache_seqlens": starts[1:]}
    needed |= dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), x[:, :, 0]) | dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), 2)
    needed |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), starts) | {"dropout_p": 0.0, "softmax_scale": 1.0, "causal": False}
    text = migrating.signatures.SIGNATURES[module][function]
    given = {argument: needed[argument] for argument, default in migrating.signatures.arguments(text).items() if not default}
    with pytest.raises(UnsupportedError, match=f"{function}: {name}"):
        getattr(importlib.import_module(module), function)(**given | {name: values.get(name, starts)})
