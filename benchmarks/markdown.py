"""Tables in Markdown, and how figures are written in them."""

from __future__ import annotations

from typing import Any


def table(header: list[str], cells: list[list[str]], mark: str = "---:") -> str:
    """Columns after the first are numbers, on the right; ``mark`` "---" is for words."""
    marks = ["---"] + [mark] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *cells]) + "\n"


def items(title: str, lines: list[str] | tuple[str, ...]) -> str:
    """A titled list; nothing where it is empty."""
    return f"{title}:\n\n" + "\n".join(f"- {line.splitlines()[0]}" for line in lines) + "\n" if lines else ""


def provenance(data: dict[str, Any]) -> str:
    """Where, when and how a result file was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version not in ("None", "not installed"))
    driver = f", driver {data['driver']}" if data["driver"] else ""
    return f"Measured {data['date']} on {data['device']}{driver}; {versions}; commit {data['commit']}. {sentence(data['protocol'])}\n"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def times(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}x"


def rate(value: float | None) -> str:
    """TFLOP/s: whole numbers of a GPU, hundredths of a CPU."""
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2f}"
