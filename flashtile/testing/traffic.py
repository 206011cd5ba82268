"""What production traffic looks like: traces in the Azure format, and the quantiles of two that the package carries."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from flashtile.errors import ArgumentError, message

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Request:
    """One request: when it arrives (seconds after the first), its prompt and its answer (tokens)."""

    arrival: float
    context_tokens: int
    generated_tokens: int

    def cut(self, longest: int) -> Request:
        """The same request with prompt and answer of ``longest`` tokens at most."""
        return replace(self, context_tokens=min(self.context_tokens, longest), generated_tokens=min(self.generated_tokens, longest))


@dataclass(frozen=True)
class Quantiles:
    """The percentiles 0 to 100 of a trace's columns, with where they come from."""

    source: str
    citation: str
    requests: int
    seconds: int
    context_tokens: tuple[int, ...]
    generated_tokens: tuple[int, ...]

    def draw(self, count: int, seed: int = 0) -> list[Request]:
        """``count`` requests that arrive at once: one from each of ``count`` equal slices of the prompt lengths, shuffled.

        Slices keep a small batch true to the distribution, its long tail included.
        """
        rng = random.Random(seed)
        requests = [
            Request(
                0.0,
                round(_interpolate(self.context_tokens, (index + rng.random()) / count)),
                round(_interpolate(self.generated_tokens, rng.random())),
            )
            for index in range(count)
        ]
        rng.shuffle(requests)
        return requests


def conversation_quantiles() -> Quantiles:
    """Azure's conversation service in November 2023 (19,366 requests)."""
    return _shipped("azure_conv_2023.json")


def code_quantiles() -> Quantiles:
    """Azure's code service in November 2023 (8,819 requests): longer prompts, short answers."""
    return _shipped("azure_code_2023.json")


def _shipped(file: str) -> Quantiles:
    data = json.loads(resources.files("flashtile.testing").joinpath(f"data/{file}").read_text(encoding="utf-8"))
    return Quantiles(
        source=data["source"],
        citation=data["citation"],
        requests=data["requests"],
        seconds=data["seconds"],
        context_tokens=tuple(data["context_tokens"]),
        generated_tokens=tuple(data["generated_tokens"]),
    )


def read_trace(path: Path | str) -> list[Request]:
    """Reads a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens, sorted by arrival.

    Raises ArgumentError, naming the line, for a file that cannot be read or is not in this format.
    """
    fix = f"Pass a CSV file with the columns {','.join(COLUMNS)}."
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ArgumentError(message("trace", f"the columns of a trace in {path}", f"none named {', '.join(missing)}", fix))
            rows = [_parse_row(row, path, reader.line_num) for row in reader]
    except OSError as error:
        raise ArgumentError(message("trace", "a readable CSV file", f"{path} ({error.strerror})", fix)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArgumentError(message("trace", "a CSV file in UTF-8", f"{path} ({error})", fix)) from error
    if not rows:
        raise ArgumentError(message("trace", "at least one request", f"no rows in {path}", fix))
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    return [Request(seconds - start, context, generated) for seconds, context, generated in rows]


def _parse_row(row: dict[str, str], path: Path | str, line: int) -> tuple[float, int, int]:
    """(seconds since 1970, context tokens, generated tokens)."""
    try:
        context, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        if context < 1 or generated < 0:
            raise ValueError("a prompt has at least one token, an answer at least none")
        return _parse_timestamp(row["TIMESTAMP"]), context, generated
    except (TypeError, ValueError) as error:
        expected = "a timestamp like 2023-11-16 18:15:46.68, then two token counts"
        raise ArgumentError(message("trace", f"{expected} on line {line} of {path}", list(row.values()), f"({error})")) from error


def _parse_timestamp(text: str) -> float:
    """Seconds since 1970; traces carry up to seven decimals, which datetime does not read."""
    whole, _, decimals = text.strip().removesuffix("Z").partition(".")
    decimals = decimals.partition("+")[0]
    moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    return moment.timestamp() + (float(f"0.{decimals}") if decimals else 0.0)


def _interpolate(percentiles: Sequence[int], fraction: float) -> float:
    position = fraction * (len(percentiles) - 1)
    below = min(int(position), len(percentiles) - 2)
    return percentiles[below] + (position - below) * (percentiles[below + 1] - percentiles[below])
