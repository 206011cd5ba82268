"""flash_attn.bert_padding by flashtile."""

from flashtile.flash_attn.bert_padding import *  # noqa: F403
