"""The command line. The library never imports it."""

from flashtile.cli.app import main

__all__ = ["main"]
