"""Programs in a process without Triton's interpreter, where kernels are compiled for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def answers(program: str, asked: object) -> list[Any]:
    """The lines of JSON that ``program`` prints, which reads ``asked`` as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(asked), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
