"""The ``--device`` of commands that run something: which torch device a word means."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

RunDevice = Annotated[str, typer.Option("--device", help="Where to run: auto (a GPU if there is one), cpu, cuda or cuda:1.")]


def pick_device(text: str) -> torch.device:
    """The device that ``text`` names; raises BadParameter where it does not exist here."""
    if text == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise typer.BadParameter(f"{text!r} is not a device. Use auto, cpu, cuda or cuda:1.", param_hint="--device") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise typer.BadParameter(f"no kernel runs on {device.type!r}. Use auto, cpu or cuda.", param_hint="--device")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted: int | None = device.index
    index = wanted if wanted is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise typer.BadParameter(f"{text} is not here: torch sees {count} GPUs. Use --device cpu.", param_hint="--device")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """A line about the hardware: a GPU's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"
