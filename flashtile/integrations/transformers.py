"""Hugging Face transformers: ``attn_implementation="flashtile"``.

    import flashtile.integrations.transformers
    flashtile.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashtile")

Needs transformers 5.23 or newer (``pip install flashtile[transformers]``), which is imported when `register` is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from flashtile.integrations.key_spans import key_spans
from flashtile.integrations.module_attention import module_attention

NAME = "flashtile"
# Where transformers asks whether a name stands for a FlashAttention package, to load one or to work around what it lacks.
_ASKING = ("transformers.modeling_utils", "transformers.generation.utils")
_QUESTION = "is_flash_attention_requested"


def register() -> None:
    """Makes ``attn_implementation="flashtile"`` known to transformers, for models made before and after. Twice does no harm.

    Models get attention by `module_attention` and masks by `key_spans`. Transformers takes each name with "flash" in it for one of
    the FlashAttention packages, which it would try to load, or replace by one that it knows; so the two modules that ask are told
    that this name is none.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, module_attention)
    AttentionMaskInterface.register(NAME, key_spans)
    for name in _ASKING:
        module = import_module(name)
        question = getattr(module, _QUESTION)
        if not hasattr(question, "__wrapped__"):
            setattr(module, _QUESTION, _but_not_this_one(question))


def _but_not_this_one(question: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(question)
    def answer(config: Any = None, requested_attention_implementation: str | None = None, **more: Any) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name != NAME and question(config, requested_attention_implementation, **more)

    return answer
