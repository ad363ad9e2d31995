"""The schedule that whole-run hypergradients find, after a few rounds only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_few_rounds_beat_the_schedule_they_start_from(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "learn_schedule.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = {line[:26].strip(): float(line[26:]) for line in done.stdout.splitlines()[-4:]}
    assert losses["learned"] < 0.8 * losses["constant 0.01, the start"]
    assert any(name.startswith("best cosine") for name in losses)
