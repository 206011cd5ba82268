"""The module name of FlashAttention-3, for programs that import it: flashtile's functions. Put ``compat`` on PYTHONPATH."""

from flashtile.flash_attn_interface import *  # noqa: F403
