"""FlashAttention-2's functions under their own names, over flashtile's operations: put ``flashtile.`` before the module's name.

``docs/migrating.md`` says of every argument whether and how it differs. FlashAttention-3's are in `flashtile.flash_attn_interface`.
"""

from __future__ import annotations

from flashtile.flash_attn.dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flashtile.flash_attn.kvcache import flash_attn_with_kvcache
from flashtile.flash_attn.varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
