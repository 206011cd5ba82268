"""Generation by transformers with a random Llama of 1.2 billion parameters: flashtile beside torch's attention.

    python -m benchmarks.transformers_generate --out results            batch 1 and 16, 4096 tokens of prompt, some two minutes on an H200
    python -m benchmarks.transformers_generate --out results --caches dynamic,static

Protocol: bfloat16, greedy, no end token. A round is one generation by each contestant, in turn; a generation is timed by the host's
clock from an idle device to an idle device. prefill_ms is the least time for one new token; token_ms that for TOKENS more, less the
former, by the token. Contestants come in both orders. Cache dynamic is transformers' default; static is compiled by it at its first use,
which is not timed. same_tokens is how many greedy tokens come before the first that differs from sdpa's, least over the batch: in bfloat16
with random weights two exact attentions may part anywhere.

Needs the extra `transformers`. Nothing is downloaded.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.record import Record, heading

PROTOCOL = " ".join((__doc__ or "").split("Protocol: ")[1].split("Needs the extra")[0].split())
CONTESTANTS = ("sdpa", "flashtile")
TOKENS = 64
# meta-llama's 3.2 of this size: 16 layers, 32/8 heads of 64.
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True, "eos_token_id": None,
    "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
TINY = {**LLAMA_1B, "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1}  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="folder for transformers_generate.json")],
    batches: Annotated[str, typer.Option(help="sequences, several by commas")] = "1,16",
    seqlen: Annotated[int, typer.Option(help="tokens of the prompt")] = 4096,
    caches: Annotated[str, typer.Option(help="dynamic, static, or both by commas")] = "dynamic",
    rounds: Annotated[int, typer.Option(help="generations by each contestant and length")] = 3,
    budget: Annotated[float, typer.Option(help="seconds after which no entry is begun")] = 500.0,
    tiny: Annotated[bool, typer.Option(help="a model of a few thousand parameters, to try the script")] = False,
    commit: Annotated[str, typer.Option(help="what is measured, where there is no checkout")] = "",
) -> None:
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(TINY if tiny else LLAMA_1B, device)
    head = heading("transformers_generate", device, commit, PROTOCOL, {})
    record = Record.open(out / "transformers_generate.json", head | {"parameters": sum(p.numel() for p in model.parameters())}, False)
    for cache in caches.split(","):
        for batch in (int(count) for count in batches.split(",")):
            name = f"{cache} cache, {batch} x {seqlen}"
            if time.perf_counter() - begin > budget:
                print(f"no time for {name}")
                continue
            record.begin(name)
            entry = {"name": name, "cache": cache, "batch": batch, "seqlen": seqlen}
            entry["results"] = measure(model, cache, batch, seqlen, rounds)
            record.add(entry)
            for contestant, result in entry["results"].items():
                print(f"{name:24} {contestant:10}", *(f"{key} {value}" for key, value in result.items()), flush=True)


def make_model(config: dict[str, Any], device: torch.device) -> Any:
    """With random weights, made where they stay."""
    import transformers

    import flashtile.integrations.transformers as integration

    integration.register()
    torch.manual_seed(0)
    with device:
        return transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**config), attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()  # fmt: skip


def measure(model: Any, cache: str, batch: int, seqlen: int, rounds: int) -> dict[str, dict[str, float]]:
    """Each contestant's prefill_ms, token_ms and same_tokens."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, model.config.vocab_size, (batch, seqlen), generator=generator).to(model.device)
    tokens = {name: generate(model, name, cache, prompt, 1 + TOKENS)[1] for name in CONTESTANTS}  # compiles everything
    for name in CONTESTANTS:
        generate(model, name, cache, prompt, 1)
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in CONTESTANTS for count in (1, 1 + TOKENS)}
    for turn in range(rounds):
        for name in CONTESTANTS if turn % 2 else reversed(CONTESTANTS):
            for count in (1, 1 + TOKENS):
                times[name, count].append(generate(model, name, cache, prompt, count)[0])
    results = {}
    for name in CONTESTANTS:
        first, all_of_them = (min(times[name, count]) for count in (1, 1 + TOKENS))
        same = (tokens[name] == tokens[CONTESTANTS[0]])[:, seqlen:].cumprod(dim=1).sum(dim=1).amin()
        results[name] = {
            "prefill_ms": round(first * 1e3, 3), "token_ms": round((all_of_them - first) / TOKENS * 1e3, 4), "same_tokens": int(same)
        }  # fmt: skip
    return results


def generate(model: Any, attention: str, cache: str, prompt: torch.Tensor, count: int) -> tuple[float, torch.Tensor]:
    """Seconds, and the tokens."""
    model.set_attn_implementation(attention)
    more = {"cache_implementation": "static"} if cache == "static" else {}
    _wait(prompt)
    begin = time.perf_counter()
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False, **more
    )
    _wait(prompt)
    return time.perf_counter() - begin, tokens


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


if __name__ == "__main__":
    typer.run(main)
