"""Random operations whose probability can be learned: reparameterised, so that a gradient reaches it."""

from __future__ import annotations

import math

import torch

from hypergrad.errors import ConfigurationError


def relaxed_dropout(
    x: torch.Tensor, p: torch.Tensor | float, training: bool = True, *, temperature: float = 0.1
) -> torch.Tensor:
    """Dropout with a probability that is differentiated: a mask of numbers in (0, 1), nearly all close to 0 or 1.

        z = sigmoid((logit p + logit u) / temperature),    u uniform in (0, 1);    x * (1 - z) / (1 - p)

    The concrete relaxation of Gal et al. 2017, "Concrete dropout", eq. 5. With p = `Hyperparameter(0.2,
    transform="logit")()` the dropout probability of a layer is learned like any other hyperparameter in the loss.

    Args:
        x: any shape.
        p: probability that an element is dropped, in (0, 1); broadcast to the shape of x.
        training: False returns x as it is, as in `torch.nn.functional.dropout`.
        temperature: how close to 0 and 1 the mask is, in (0, 1]: small is closer, and its gradient noisier.

    Raises:
        ConfigurationError: for a temperature outside its range.
    """
    if not (math.isfinite(temperature) and 0.0 < temperature <= 1.0):
        raise ConfigurationError(f"`temperature` must lie in (0, 1], but got {temperature!r}.")
    if not training:
        return x
    p = torch.as_tensor(p, dtype=x.dtype, device=x.device)
    tiny = torch.finfo(x.dtype).eps
    u = torch.rand_like(x).clamp(tiny, 1.0 - tiny)
    dropped = ((p.logit() + u.logit()) / temperature).sigmoid()
    return x * (1.0 - dropped) / (1.0 - p)
