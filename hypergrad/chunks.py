"""Large tensors a piece at a time, so that what is computed on the way stays in the cache and needs no memory."""

from __future__ import annotations

import torch

# Large temporaries are asked of the system again and again, and leave the cache. The size is measured, per thread.
_ON_CPU, _ON_DEVICE = 2**16, 2**22


def pieces_of(tensor: torch.Tensor) -> int:
    """Into how many pieces a tensor of this size and device is best taken."""
    size = _ON_CPU * torch.get_num_threads() if tensor.device.type == "cpu" else _ON_DEVICE
    return -(-tensor.numel() // size) or 1


def pieces(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The elements in order, in `count` flat pieces: views, where the tensor is contiguous."""
    flat = tensor.reshape(-1)
    return [flat] if count == 1 else list(flat.tensor_split(count))
