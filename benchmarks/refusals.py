"""Why a contestant takes no part in a timing."""

from __future__ import annotations


class Refused(Exception):
    """A peer cannot run a problem, or is not there; says why."""


class WrongResult(Exception):
    """A contestant's result is off; it is not timed."""
