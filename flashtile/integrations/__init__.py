"""Other libraries' attention, sent here: `flashtile.integrations.transformers` and `flashtile.integrations.sdpa`."""
