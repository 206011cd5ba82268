"""A small GPT over characters, trained on this repository's own documents, and then asked to write.

It is trained twice from one seed, with `flashtile.attention` and with torch's scaled_dot_product_attention, so that the two loss
curves can be laid over each other. The model that flashtile trained then writes through `flashtile.decode` and a key-value cache.

    python examples/tiny_gpt.py                     # a minute or two on a laptop's CPU
    python examples/tiny_gpt.py --device cuda --steps 500 --plot tiny_gpt.svg
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional as F

import flashtile

ROOT = Path(__file__).resolve().parents[1]
CONTEXT, BATCH = 128, 8  # characters of a sequence, sequences of a step
LAYERS, HEADS_Q, HEADS_KV, HEAD_DIM = 3, 4, 2, 32
WIDTH = HEADS_Q * HEAD_DIM

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q, k, v) to out: q (batch, seqlen, HEADS_Q, HEAD_DIM), k and v with HEADS_KV heads, out like q."""


def by_flashtile(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flashtile.attention(q, k, v, causal=True)


def by_torch(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Cache:
    """Keys and values of one sequence for every layer, and attention over them: what generation has in the place of training's."""

    def __init__(self, device: torch.device) -> None:
        self.k, self.v = torch.zeros(2, LAYERS, 1, CONTEXT, HEADS_KV, HEAD_DIM, device=device)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.filled = 0

    def advance(self, num_tokens: int) -> None:
        """Makes room for new tokens, whose keys `attend` writes and counts."""
        self.filled += num_tokens
        self.length += num_tokens

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = slice(self.filled - q.shape[1], self.filled)
        self.k[layer][:, new], self.v[layer][:, new] = k, v
        return flashtile.decode(q, self.k[layer], self.v[layer], self.length)


class Block(nn.Module):
    """Attention, then two layers of a perceptron; each adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS_Q + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, layer: int, attend: Attend) -> torch.Tensor:
        # (batch, seqlen, HEADS_Q + 2 * HEADS_KV, HEAD_DIM): views of it go to attention as they are
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split([HEADS_Q, HEADS_KV, HEADS_KV], dim=2)
        x = x + self.out(attend(layer, q, k, v).flatten(2))
        added: torch.Tensor = x + self.mlp(self.norm_mlp(x))
        return added


class TinyGpt(nn.Module):
    """Characters (batch, seqlen) that stand at ``first`` and after it, to logits of the next ones (batch, seqlen, characters)."""

    def __init__(self, num_characters: int) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(num_characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, num_characters, bias=False)

    def forward(self, tokens: torch.Tensor, attend: Attend, first: int = 0) -> torch.Tensor:
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.character(tokens) + self.position(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def read_documents() -> str:
    """The text of README.md and docs/*.md."""
    return "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))


def train(
    text: torch.Tensor, num_characters: int, attend: Attend, steps: int, seed: int, device: torch.device
) -> tuple[TinyGpt, list[float]]:
    """A model trained for some steps, and its loss at each of them, in nats a character; the same batches for one seed."""
    torch.manual_seed(seed)
    model = TinyGpt(num_characters).to(device)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=rng)
        batch = text[starts + torch.arange(CONTEXT + 1)].to(device)
        logits = model(batch[:, :-1], attend)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def write(model: TinyGpt, prompt: torch.Tensor, seed: int, temperature: float = 0.7) -> list[int]:
    """Characters after the prompt (seqlen,) until the context is full, one decode step each."""
    cache, rng = Cache(prompt.device), torch.Generator().manual_seed(seed)
    written: list[int] = []
    tokens = prompt[None]
    while cache.filled + tokens.shape[1] < CONTEXT:
        first = cache.filled
        cache.advance(tokens.shape[1])
        logits = model(tokens, cache.attend, first)[0, -1]
        chances = torch.softmax(logits.float().cpu() / temperature, dim=0)
        written.append(int(torch.multinomial(chances, 1, generator=rng)))
        tokens = torch.tensor([written[-1:]], device=prompt.device)
    return written


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The loss curves in one figure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "flashtile"  # the same curves make the same file
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--")):
        axes.plot(losses, style, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats a character)")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of either model.")] = 300,
    seed: Annotated[int, typer.Option(help="Weights, batches and what is written follow from it.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "The planner ",
    plot: Annotated[Path | None, typer.Option(help="A figure of both loss curves; needs matplotlib.")] = None,
) -> None:
    """Trains a small GPT with flashtile and with torch's attention, compares the losses, and lets it write."""
    where = torch.device(device)
    text = read_documents()
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([index[character] for character in text])
    print(f"{len(text)} characters, {len(characters)} of them different; {steps} steps of {BATCH} x {CONTEXT}")

    curves, models = {}, {}
    for name, attend in (("flashtile", by_flashtile), ("torch SDPA", by_torch)):
        start = time.perf_counter()
        models[name], curves[name] = train(tokens, len(characters), attend, steps, seed, where)
        print(f"{name}: loss {curves[name][0]:.4f} at first, {curves[name][-1]:.4f} at last, {time.perf_counter() - start:.1f} s")
    apart = max(abs(a - b) for a, b in zip(*curves.values()))
    print(f"the curves are at most {apart:.2g} apart")
    if plot is not None:
        draw(curves, plot)
        print(f"drawn: {plot}")

    known = torch.tensor([index[character] for character in prompt if character in index][: CONTEXT - 1], device=where)
    print("---\n" + prompt + "".join(characters[i] for i in write(models["flashtile"], known, seed)))


if __name__ == "__main__":
    typer.run(main)
