"""A small Llama of transformers with random weights writes by flashtile, and by transformers' own attention: the same tokens.

    pip install .[transformers]
    python examples/transformers_generate.py                    # a second on a laptop's CPU
    python examples/transformers_generate.py --device cuda

A model from a checkpoint takes the same two lines: `register()`, and `attn_implementation="flashtile"`.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from flashtile.cli.device import pick_device
from flashtile.integrations.transformers import register

SIZE = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
PROMPTS = ("The planner picks the query tile,", "and says why.")


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="new tokens of each prompt")] = 32,
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    where = pick_device(device)
    register()
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZE, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).to(where).eval()
    written = []
    for attention in ("eager", "flashtile"):
        model.set_attn_implementation(attention)
        begin = time.perf_counter()
        written.append(model.generate(**padded(PROMPTS, where), max_new_tokens=tokens, do_sample=False).cpu())
        print(f"{attention:10} {len(PROMPTS)} x {tokens} tokens in {time.perf_counter() - begin:.2f} s: {written[-1][0, -8:].tolist()}")
    print("the same tokens" if torch.equal(*written) else "the tokens differ")


def padded(prompts: tuple[str, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """The characters of each prompt as tokens, padded on the left, and where they are."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + [ord(letter) for letter in prompt] for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


if __name__ == "__main__":
    typer.run(main)
