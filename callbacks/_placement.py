"""Where copies of a training stand by: beside it, or on the host where the device has no room for them."""

from __future__ import annotations

import torch

_HOST = torch.device("cpu")


def beside(device: torch.device) -> torch.device | None:
    """Where copies of what is on a device are kept if they are seldom touched; None: there."""
    return _HOST if device.type == "cuda" else None


def room(device: torch.device) -> float:
    """Bytes that a device has left at the peak of a step so far; infinity where that is not told.

    Call it after a step: before one its activations are not known.
    """
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device))
