"""flash_attn.layers.rotary by flashtile."""

from flashtile.flash_attn.layers.rotary import *  # noqa: F403
