"""``python -m flashtile``."""

from flashtile.cli import main

main()
