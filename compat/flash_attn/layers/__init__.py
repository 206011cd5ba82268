"""flash_attn.layers by flashtile."""
