"""flashtile: exact attention with no hard-coded tile."""
