"""A small GPT over characters, trained on this repository's own documents, and then asked to write.

It is trained from one seed with `flashtile.attention` and with torch's scaled_dot_product_attention, so that the loss curves can be
laid over each other. The model that flashtile trained then writes through `flashtile.decode` and a key-value cache.

    python examples/tiny_gpt.py                     # a minute or two on a laptop's CPU
    python examples/tiny_gpt.py --device cuda --size small --dtype bfloat16 --steps 500 --yardstick --plot tiny_gpt.svg
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from loss_curves import apart, draw, smoothed
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashtile
from flashtile.cli.device import pick_device

ROOT = Path(__file__).resolve().parents[1]
NEAR = 32  # every second layer sees this many characters, its own included; the others see all that came before
SLOWEST = 100.0  # the slowest turn of a position, in characters a radian
TOLD_EVERY = 10  # steps


@dataclass(frozen=True)
class Size:
    """Characters of a sequence, sequences of a step, and what the model is made of."""

    context: int
    batch: int
    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads_q * self.head_dim


SIZES = {"tiny": Size(128, 8, 3, 4, 2, 32), "small": Size(512, 8, 6, 8, 2, 64)}
SizeName = Enum("SizeName", {name: name for name in SIZES}, type=str)
Dtype = Enum("Dtype", {name: name for name in ("float32", "bfloat16")}, type=str)

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q, k, v) to out: q (batch, seqlen, heads_q, head_dim), k and v with heads_kv heads, out like q."""


def window_of(layer: int) -> tuple[int, int] | None:
    return (NEAR - 1, 0) if layer % 2 else None


def by_flashtile(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flashtile.attention(q, k, v, causal=True, window=window_of(layer))


def by_torch(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group, seqlen = q.shape[2] // k.shape[2], q.shape[1]
    # as many key heads as query heads: not each of torch's kernels takes groups
    q, k, v = q.transpose(1, 2), *(keys.repeat_interleave(group, dim=2).transpose(1, 2) for keys in (k, v))
    if window_of(layer) is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    near = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).tril().triu(1 - NEAR)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(1, 2)


def by_torchs_plain_products(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return by_torch(layer, q, k, v)


def turned(x: torch.Tensor, first: int) -> torch.Tensor:
    """q or k with every pair of its dims turned by an angle that grows with the position (rotary embedding); ``first`` is that of row 0.

    Source: RoFormer (Su et al. 2021).
    """
    half = x.shape[-1] // 2
    positions = torch.arange(first, first + x.shape[1], device=x.device)
    angles = positions[:, None, None] * SLOWEST ** -(torch.arange(half, device=x.device) / half)  # (seqlen, 1, half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1).to(x.dtype)


class Cache:
    """Keys and values of one sequence for every layer, and attention over them: what generation has in the place of training's."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.k, self.v = torch.zeros(2, size.layers, 1, size.context, size.heads_kv, size.head_dim, device=device, dtype=dtype)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.filled = 0

    def advance(self, num_tokens: int) -> None:
        """Makes room for new tokens, whose keys `attend` writes and counts."""
        self.filled += num_tokens
        self.length += num_tokens

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = slice(self.filled - q.shape[1], self.filled)
        self.k[layer][:, new], self.v[layer][:, new] = k, v
        return flashtile.decode(q, self.k[layer], self.v[layer], self.length, window=window_of(layer))


class Block(nn.Module):
    """Attention, then two layers of a perceptron; each adds to its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.size = size.width, size
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (size.heads_q + 2 * size.heads_kv) * size.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, layer: int, attend: Attend, first: int) -> torch.Tensor:
        # (batch, seqlen, heads_q + 2 * heads_kv, head_dim): v goes to attention as the view of it that it is
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, self.size.head_dim))
        q, k, v = qkv.split([self.size.heads_q, self.size.heads_kv, self.size.heads_kv], dim=2)
        x = x + self.out(attend(layer, turned(q, first), turned(k, first), v).flatten(2))
        added: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return added


class TinyGpt(nn.Module):
    """Characters (batch, seqlen) that stand at ``first`` and after it, to float32 logits of the next ones (batch, seqlen, characters).

    Products are computed in ``dtype``, by autocast.
    """

    def __init__(self, num_characters: int, size: Size, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size, self.dtype = size, dtype
        self.character = nn.Embedding(num_characters, size.width)
        nn.init.normal_(self.character.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, num_characters, bias=False)

    def forward(self, tokens: torch.Tensor, attend: Attend, first: int = 0) -> torch.Tensor:
        # A context for each step: autocast keeps the weights that it has cast until it ends.
        with torch.autocast(tokens.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            x = self.character(tokens)
            for layer, block in enumerate(self.blocks):
                x = block(x, layer, attend, first)
            logits: torch.Tensor = self.head(self.norm(x))
        return logits.float()


def read_documents() -> str:
    """The text of README.md and docs/*.md."""
    return "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


@dataclass
class Training:
    """What became of one: the loss at each step, in nats a character; seconds of the first step, and of all that came after it."""

    losses: list[float]
    first_step: float
    after: float

    def in_words(self, compiles: bool) -> str:
        """How long it took. Kernels are compiled in the first step, or loaded where they lie on disk."""
        first = "first step (compiles)" if compiles else "first step"
        return f"{first} {self.first_step:.2f} s, then {self.after:.2f} s for {len(self.losses) - 1} steps"


def train(model: TinyGpt, text: torch.Tensor, attend: Attend, steps: int, seed: int, told: Callable[[int, float], None]) -> Training:
    """Trains the model for some steps on the text's device.

    The same batches for one seed. Every few steps ``told`` hears how many there were, and the latest loss.
    """
    size = model.size
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 * (128 / size.width), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3 * (128 / size.width), total_steps=max(steps, 2))
    places = torch.arange(size.context + 1, device=text.device)
    losses = []
    began = first_done = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(text) - size.context, (size.batch, 1), generator=rng)
        batch = text[starts.to(text.device) + places]
        logits = model(batch[:, :-1], attend)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step == 0:
            wait_for(text.device)
            first_done = time.perf_counter()
        if (step + 1) % TOLD_EVERY == 0:
            told(step + 1, loss.item())
    wait_for(text.device)
    return Training(torch.stack(losses).tolist(), first_done - began, time.perf_counter() - first_done)


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def write(model: TinyGpt, prompt: torch.Tensor, seed: int, temperature: float = 0.7) -> tuple[list[int], float]:
    """Characters after the prompt (seqlen,) until the context is full, one decode step each.

    Also how far the steps' logits are from those of all characters at once, at most.
    """
    cache, rng = Cache(model.size, prompt.device, model.dtype), torch.Generator().manual_seed(seed)
    written: list[int] = []
    steps = []
    tokens = prompt[None]
    while cache.filled + tokens.shape[1] < model.size.context:
        first = cache.filled
        cache.advance(tokens.shape[1])
        steps.append(model(tokens, cache.attend, first)[0, -1])
        chances = torch.softmax(steps[-1].cpu() / temperature, dim=0)
        written.append(int(torch.multinomial(chances, 1, generator=rng)))
        tokens = torch.tensor([written[-1:]], device=prompt.device)
    whole = torch.cat([prompt, torch.tensor(written, device=prompt.device)])[None]
    at_once = model(whole[:, :-1], by_flashtile)[0, len(prompt) - 1 :]
    return written, float((at_once - torch.stack(steps)).abs().max())


@contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr; what it yields is told how many steps there were, and the latest loss."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=steps)
        yield lambda done, loss: bar.update(task, completed=done, description=f"{name}: loss {loss:.3f}")


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 300,
    seed: Annotated[int, typer.Option(help="Weights, batches and what is written follow from it.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    size: Annotated[SizeName, typer.Option(help="How large the model is.")] = SizeName["tiny"],
    dtype: Annotated[Dtype, typer.Option(help="What products are computed in; weights stay float32.")] = Dtype["float32"],
    yardstick: Annotated[bool, typer.Option("--yardstick", help="Train with torch's plain products, too.")] = False,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "The planner ",
    plot: Annotated[Path | None, typer.Option(help="A figure of the loss curves; needs matplotlib.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Trains a small GPT with flashtile and with torch's attention, compares the losses, and lets it write."""
    say = Console(stderr=as_json, soft_wrap=True, highlight=False, markup=False).print
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib: pip install matplotlib", param_hint="--plot")
    where, shape = pick_device(device), SIZES[size.value]
    text = read_documents()
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    if not any(character in index for character in prompt):
        raise typer.BadParameter(f"expected some character of the documents, got {prompt!r}", param_hint="--prompt")
    tokens = torch.tensor([index[character] for character in text], device=where)
    say(f"{len(text)} characters, {len(characters)} of them different; {steps} steps of {shape.batch} x {shape.context}")

    ways = {"flashtile": by_flashtile, "torch SDPA": by_torch}
    if yardstick:
        ways["torch SDPA, plain products"] = by_torchs_plain_products
    make = lambda: TinyGpt(len(characters), shape, getattr(torch, dtype.value)).to(where)  # noqa: E731
    # what torch itself loads at first use is nobody's
    train(make(), tokens, by_torchs_plain_products, 1, seed, lambda done, loss: None)
    curves, models, trainings = {}, {}, {}
    for name, attend in ways.items():
        torch.manual_seed(seed)
        models[name] = make()
        with progress(name, steps) as told:
            trainings[name] = train(models[name], tokens, attend, steps, seed, told)
        curves[name] = trainings[name].losses
        took = trainings[name].in_words(compiles=name == "flashtile" and where.type == "cuda")
        say(f"{name}: loss {curves[name][0]:.4f} at first, {smoothed(curves[name])[-1]:.4f} at last; {took}")
    known = torch.tensor([index[character] for character in prompt if character in index][: shape.context - 1], device=where)
    written, off = write(models["flashtile"], known, seed)

    reference, differences = curves["torch SDPA"], {}
    for name in (name for name in curves if name != "torch SDPA"):
        differences[name] = {"smoothed": apart(smoothed(curves[name]), smoothed(reference)), "of any step": apart(curves[name], reference)}
        say(f"{name} is at most {differences[name]['smoothed']:.2g} from torch SDPA ({differences[name]['of any step']:.2g} at a step)")
    say(f"logits through the cache are at most {off:.2g} from those of all characters at once")
    if plot is not None:
        draw(curves, plot)
        say(f"drawn: {plot}")
    continued = prompt + "".join(characters[i] for i in written)
    say("---\n" + continued)
    if as_json:
        document = {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU",
            "versions": {"flashtile": flashtile.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "dtype": dtype.value, "steps": steps, "seed": seed, "size": {"name": size.value, **asdict(shape)},
            "characters": len(text), "losses": curves, "apart": differences, "cache": off, "written": continued,
            "seconds": {name: {"first step": training.first_step, "after": training.after} for name, training in trainings.items()},
        }  # fmt: skip
        sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    typer.run(main)
