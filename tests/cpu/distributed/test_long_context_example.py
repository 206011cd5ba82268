"""The example runs under torchrun, and decodes what one process decodes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "long_context_decode.py"


def test_long_context_decode_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE), "--keys", "500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "500 keys on 2 ranks, 256 each" in done.stdout
    apart = [float(found) for found in re.findall(r"at most ([\d.e+-]+) apart", done.stdout)]
    assert len(apart) == 4 and max(apart) < 1e-5
