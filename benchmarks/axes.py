"""Plan variants as text: ``kernel=gluon.decode_sm90 block_m=8,16 block_n=64,128 num_stages=2,3 num_splits=1,1w,2w``.

Every field of DecodePlan may have several values; a spec stands for their product, where each value of ``num_splits`` (a
grid) and each of ``num_programs`` (stream-K) is one way to share out the keys. A number that ends in ``w`` is in waves:
``2w`` splits are as many as make two programs an SM, ``1w`` programs one an SM. ``tiles`` splits are one for each key
tile. What a spec does not name is the planner's choice for the problem, but for ``swapped``, which
is whatever the planner takes with the rest.

A file of specs is a JSON list of such texts, or of objects ``{"block_m": [8, 16], "problems": "32/8"}``; ``problems``, in both
forms, confines a spec to problems whose name contains it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

from flashtile.planner.device import Device
from flashtile.planner.plans import DecodePlan
from flashtile.planner.splits import even_splits
from flashtile.problem import Problem
from flashtile.testing.variants import Share, accepted, shared_out

FIELDS = {field.name for field in fields(DecodePlan)} - {"source"}
_WORDS = {"true": True, "false": False}


class BadSpec(Exception):
    """A text that describes no plans; says what is wrong with it."""


@dataclass(frozen=True)
class Variants:
    """Values for fields of a plan, and the problems that they are meant for (a part of their names)."""

    axes: dict[str, tuple[Any, ...]]
    problems: str = ""

    @classmethod
    def of(cls, spec: str | dict[str, Any], known: Collection[str] = FIELDS) -> Variants:
        if isinstance(spec, str):
            pairs = _pairs(spec)
        else:
            pairs = {name: value if isinstance(value, list) else [value] for name, value in spec.items()}
        problems = "".join(pairs.pop("problems", ()))
        if unknown := sorted(set(pairs) - set(known)):
            raise BadSpec(f"{', '.join(unknown)}: no field of a plan; there are {', '.join(sorted(known))}, problems")
        return cls({name: tuple(values) for name, values in pairs.items()}, problems)

    def plans(self, base: DecodePlan, problem: Problem, device: Device) -> Iterator[DecodePlan]:
        """The product of the axes around ``base``, splits in whole key tiles; what the planner refuses is among them."""
        fixed = {name: values for name, values in self.axes.items() if name not in ("num_splits", "num_programs")}
        for values in product(*fixed.values()):
            tile = base.with_(**dict(zip(fixed, values)), source="explicit")
            for share in self._shares(tile, problem, device):
                plan = shared_out(tile, problem, device, share)
                yield plan if "swapped" in fixed else accepted(problem, plan, device)

    def _shares(self, tile: DecodePlan, problem: Problem, device: Device) -> Iterator[Share]:
        """How the keys are shared out: as the tile has it unless the axes say otherwise; splits in whole key tiles."""
        units = max(1, problem.units * ceil(problem.rows / tile.block_m))
        for splits in self.axes.get("num_splits", ()):
            count = _splits(splits, tile, units, problem, device)
            yield Share(even_splits(problem, tile.block_n, count).num_splits)
        for programs in self.axes.get("num_programs", ()):
            count = _programs(programs, device)
            yield Share(max(1, ceil(count / units)), count)
        if not self.axes.keys() & {"num_splits", "num_programs"}:
            yield Share(tile.num_splits, tile.num_programs)


def read(specs: list[str], known: Collection[str] = FIELDS) -> list[Variants]:
    """Each spec is a text, or the path of a JSON list of them; ``known`` are the fields of a plan. Raises BadSpec."""
    found = []
    for spec in specs:
        if "=" in spec:
            found.append(Variants.of(spec, known))
            continue
        try:
            listed = json.loads(Path(spec).read_text())
        except (OSError, ValueError) as error:
            raise BadSpec(f"{spec}: neither field=value pairs nor a JSON file ({error})") from error
        found += [Variants.of(one, known) for one in listed]
    return found


def _pairs(text: str) -> dict[str, list[Any]]:
    pairs: dict[str, list[Any]] = {}
    name = ""
    for word in text.split():
        head, equals, value = word.partition("=")
        if equals:
            name = head
            pairs[name] = [_value(part) for part in value.split(",")] if name != "problems" else [value]
        elif name == "problems":  # names of problems have spaces
            pairs[name].append(" " + word)
        else:
            raise BadSpec(f"{word!r} in {text!r} is no field=value")
    return pairs


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text


def _waves(value: Any) -> float | None:
    if isinstance(value, str) and value.endswith("w"):
        try:
            return float(value[:-1])
        except ValueError:
            pass
    return None


def _programs(value: Any, device: Device) -> int:
    if (waves := _waves(value)) is not None:
        return max(1, round(waves * device.num_sms))
    if isinstance(value, str):
        raise BadSpec(f"num_programs {value!r} is neither a number nor waves (1w)")
    return int(value)


def _splits(value: Any, plan: DecodePlan, units: int, problem: Problem, device: Device) -> int:
    if value == "tiles":
        return max(1, ceil(problem.seqlen_k / plan.block_n))
    if (waves := _waves(value)) is not None:
        return max(1, round(waves * device.num_sms / units))
    if isinstance(value, str):
        raise BadSpec(f"num_splits {value!r} is neither a number, waves (1w) nor tiles")
    return int(value)
