"""flash_attn_3.flash_attn_interface by flashtile."""

from flashtile.flash_attn_interface import *  # noqa: F403
