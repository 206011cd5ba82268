"""Small drawings as SVG: a white card with boxes, words and arrows, readable on any page, in grey too."""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, DARK, MIDDLE, LIGHT, EMPTY = "#222222", "#0072B2", "#E69F00", "#DDDDDD", "#FFFFFF"


class Picture:
    """A card of so many pixels; shapes are drawn in the order of the calls."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str = EMPTY, edge: str = INK, thick: float = 0.8) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{edge}" stroke-width="{thick:g}"/>'
        )

    def words(self, x: float, y: float, text: str, size: float = 12, anchor: str = "start", bold: bool = False, color: str = INK) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.shapes.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{INK}" stroke-width="1.2" marker-end="url(#tip)"/>'
        )

    def grid(self, x: float, y: float, cell: float, fills: list[list[str]]) -> None:
        """Squares, a list a row; their fills are colors."""
        for i, row in enumerate(fills):
            for j, fill in enumerate(row):
                self.box(x + j * cell, y + i * cell, cell, cell, fill, edge="#FFFFFF")

    def labelled(self, x: float, y: float, width: float, height: float, text: str, fill: str = EMPTY) -> None:
        """A box with words in its middle."""
        self.box(x, y, width, height, fill)
        self.words(x + width / 2, y + height / 2 + 4, text, anchor="middle", color=EMPTY if fill == DARK else INK)

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
            'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">'
        )
        card = f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{EMPTY}"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", tip, card, *self.shapes, "</svg>"]) + "\n"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg(), encoding="utf-8")
