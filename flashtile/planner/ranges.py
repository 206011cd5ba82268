"""Numbers of a plan that no kernel could be compiled for: each function says what is wrong in one sentence, or gives an empty list."""

from __future__ import annotations

from flashtile.planner.device import Device

MAX_GRID_X = 2**31 - 1
MAX_THREADS = 1024  # of a program


def power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def beyond_powers(name: str, value: int, limits: tuple[int, int]) -> list[str]:
    """Against a number that is not a power of two, from and to ``limits``."""
    least, most = limits
    return [] if power_of_two(value) and least <= value <= most else [f"{name} {value} is not a power of two from {least} to {most}"]


def beyond_warps(name: str, warps: int, device: Device) -> list[str]:
    """Against warps that are not a power of two, or more than a program has."""
    most = MAX_THREADS // device.warp_size
    return [] if power_of_two(warps) and warps <= most else [f"{name} {warps} is not a power of two of at most {most} warps"]


def beyond(name: str, value: int, limits: tuple[int, int]) -> list[str]:
    """Against a number outside of ``limits``."""
    least, most = limits
    return [] if least <= value <= most else [f"{name} {value} is not within {least} and {most}"]
