"""Seeds that depend on the study's seed and on what they are for, never on when or where it runs."""

from __future__ import annotations

import random

import numpy as np
import torch


def derived_seed(seed: int, *path: int) -> int:
    """A 32-bit seed for the part of a study that `path` names, such as a trial's number.

    Independent streams by `numpy.random.SeedSequence`: neighbouring numbers give unrelated seeds.

    >>> derived_seed(0, 7) == derived_seed(0, 7) != derived_seed(0, 8)
    True
    """
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the global streams of `random`, numpy and torch (CPU and, once it is used, CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
