"""FlashAttention-3's functions under their own names, over flashtile's operations: put ``flashtile.`` before the module's name.

``docs/migrating.md`` says of every argument whether and how it differs. FlashAttention-2's are in `flashtile.flash_attn`.
"""

from __future__ import annotations

from flashtile.flash_attn_interface.caches import flash_attn_combine, flash_attn_with_kvcache, get_scheduler_metadata
from flashtile.flash_attn_interface.training import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
