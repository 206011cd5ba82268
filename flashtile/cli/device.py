"""The ``--device`` of commands that run something: which torch device a word means, or which GPU's model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from flashtile.planner.device import Device

RunDevice = Annotated[str, typer.Option("--device", help="Where to run: auto (a GPU if there is one), cpu, cuda or cuda:1.")]
WarmupDevice = Annotated[
    str,
    typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1; or the name of one that need not be here: h200, t4."),
]


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


def pick_device_or_model(text: str) -> torch.device | Device:
    """A GPU's model where ``text`` is its name, else what ``pick_device`` says."""
    model = Device.model(text)
    if model is not None:
        return model
    try:
        return pick_device(text)
    except typer.BadParameter as error:
        names = ", ".join(name for name in Device.names() if name != "cpu")
        raise typer.BadParameter(f"{error.message} Or name the model of a GPU that is elsewhere: {names}.", param_hint="--device") from None


def device_name(device: torch.device) -> str:
    """A line about the hardware: a GPU's name, or the CPU and its threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"
