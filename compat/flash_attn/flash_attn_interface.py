"""flash_attn.flash_attn_interface by flashtile."""

from flashtile.flash_attn.flash_attn_interface import *  # noqa: F403
