"""Effects that papers report, as the examples show them: shorter runs of the same code, and what their tables claim."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def _table(name: str, tmp_path: Path) -> tuple[dict[str, list[float]], str]:
    """The rows that an example prints, by their label, and the rest of what it says."""
    command = [sys.executable, str(EXAMPLES / name), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(\S.*?) {2,}([\d.].*)$", done.stdout, re.MULTILINE))
    return {label: [float(n) for n in re.findall(r"\d+\.\d+", rest)] for label, rest in rows.items()}, done.stdout


def test_greedy_learning_rates_collapse_and_the_full_horizon_finds_the_best_constant(tmp_path: Path) -> None:
    """Wu et al. 2018."""
    rows, said = _table("short_horizon_bias.py", tmp_path)
    greedy, whole = rows.pop("horizon 1"), rows.pop("horizon 40")
    ((label, best),) = rows.items()
    assert label.startswith("constant")
    first_lr, last_lr, loss = greedy[:3]
    assert last_lr < 0.3 * first_lr
    assert last_lr < 0.3 * whole[1]
    assert whole[2] < 0.9 * loss
    # Found from 0.1 by gradient: as good as the best of all those tried.
    assert best[0] / 1.5 < whole[0] < 1.5 * best[0]
    assert whole[2] < 1.05 * best[2]
    root = tmp_path / "runs" / "short_horizon_bias"
    assert "runs/short_horizon_bias" in said
    assert list(root.glob("horizon 1/events.*"))
    assert (root / "curves.png").is_file() == (find_spec("matplotlib") is not None)


def test_a_penalty_per_weight_overfits_the_validation_set(tmp_path: Path) -> None:
    """Lorraine et al. 2020."""
    rows, said = _table("overfit_validation.py", tmp_path)
    (count,) = re.findall(r"of ([\d,]+) hyperparameters", said)
    assert int(count.replace(",", "")) >= 100_000
    before, after = rows["equal penalties"], rows["learned penalties"]
    val_loss, val_accuracy, test_loss, test_accuracy = after
    assert before[1] < 90.0
    assert val_accuracy == 100.0
    assert val_loss < 0.2 * before[0]
    # The validation set promises what the test set does not keep.
    assert test_loss > 0.5 * before[2] > val_loss
    assert test_accuracy < 92.0
    (price,) = re.findall(r"time of (\d+) training gradients", said)
    assert 10 < int(price) < 200


def test_learned_weights_find_wrong_labels(tmp_path: Path) -> None:
    """Franceschi et al. 2017; Shu et al. 2019."""
    rows, _ = _table("clean_labels.py", tmp_path)
    mean = {label: numbers[0] for label, numbers in rows.items()}
    # Chance is 40% precision, whatever the recall.
    assert mean["recall: flipped labels found"] > 80.0
    assert mean["precision: found labels flipped"] > 80.0
    accuracy = {label.removeprefix("test accuracy, "): mean[label] for label in mean if label.startswith("test")}
    assert accuracy["learned weights"] > accuracy["100 clean only"] + 1.0
    assert accuracy["all labels clean"] > accuracy["learned weights"]
