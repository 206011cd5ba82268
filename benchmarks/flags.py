"""Options that several of the scripts that measure take, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder for the JSON files.")]
Seconds = Annotated[float, typer.Option(help="Seconds for everything; what would not end in time is left out.")]
WithPeers = Annotated[bool, typer.Option("--peers/--no-peers", help="Time other libraries beside us.")]
Peer = Annotated[list[str] | None, typer.Option(help="Which peers; may be repeated.")]
PeersDir = Annotated[Path, typer.Option(help="Where the peers' libraries lie.")]
DeviceName = Annotated[str, typer.Option(help="cuda or cpu.")]
Commit = Annotated[str, typer.Option(help="The commit measured, where there is no git.")]
Rounds = Annotated[int, typer.Option(help="Rounds of replays.")]
Only = Annotated[str, typer.Option(help="Only problems whose name contains this.")]
Resume = Annotated[
    bool, typer.Option(help="Continue the files in OUT: without the peer in whose call the last process died, or past that problem.")
]
DryRun = Annotated[bool, typer.Option(help="Shrink every problem, to try the scripts themselves.")]
Workers = Annotated[int, typer.Option(help="Processes that compile ahead.")]
Plans = Annotated[list[str], typer.Option(help="field=value,value ... or the path of a JSON list of such; may be repeated.")]
Top = Annotated[int, typer.Option(help="Plans shown for each problem.")]
PEERS_DIR = Path("/opt/peers")
