"""The commands, gathered, and what they share: one line and exit code 2 for every error made on purpose."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import flashtile
from flashtile.cli import bench, bench_backward, bench_forward, demo, env, explain, replay, study, tune, warmup
from flashtile.cli.output import errors
from flashtile.errors import AttentionError


class Commands(TyperGroup):
    """Turns flashtile's own errors into one line: a traceback would hide the sentence that was written for the user."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AttentionError as error:
            summary, *reasons = (line.strip() for line in str(error).splitlines())
            sentence = f"{summary} {'; '.join(reasons)}".rstrip()
            errors.print(f"flashtile: {sentence}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="flashtile",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Exact attention in which no query tile is hard-coded: see it run, ask why, measure it.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Time an operation on a grid of problems, peers beside it.")
bench_app.command("decode")(bench.decode)
bench_app.command("forward")(bench_forward.forward)
bench_app.command("backward")(bench_backward.backward)
app.command()(demo.demo)
app.command()(replay.replay)
app.command()(explain.explain)
app.add_typer(bench_app, name="bench")
app.command()(study.study)
app.command()(tune.tune)
app.command()(warmup.warmup)
app.command()(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashtile {flashtile.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def main() -> None:
    app()
