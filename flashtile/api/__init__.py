"""The public functions, one file for each operation."""

from __future__ import annotations

from flashtile.api.ahead import warmup
from flashtile.api.appending import append_kv
from flashtile.api.decoding import decode, decode_with_lse
from flashtile.api.forward import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse
from flashtile.api.parts import merge

__all__ = [
    "append_kv",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "decode",
    "decode_with_lse",
    "merge",
    "warmup",
]
