"""Numbers of one update: from the device to the host, by the names that users give them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import lightning.pytorch as pl
import torch

from hypergrad import Contraction, Measurement
from hypergrad.callbacks._agreement import mean
from hypergrad.callbacks._attachment import Attachment

# What is told of a tensor with several elements.
OF_VALUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.mean,
    "min": torch.min,
    "max": torch.max,
}
OF_HYPERGRADIENTS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"norm": torch.linalg.vector_norm}


def measured(
    trainer: pl.Trainer,
    loss: torch.Tensor,
    due: Sequence[Attachment],
    contractions: Sequence[Contraction],
    in_loss: Collection[str],
) -> tuple[float, list[Measurement]]:
    """The validation loss, and what was measured of the optimizers' hyperparameters, averaged over ranks.

    Args:
        due: the optimizers, one per contraction.
        in_loss: names of hyperparameters in the loss, which stay where they are.
    """
    numbers = iter(_to_host(trainer, loss, contractions, in_loss))
    value = next(numbers)
    measurements: list[Measurement] = []
    for attachment, contraction in zip(due, contractions, strict=True):
        hypergradients: dict[str, list[float]] = {}
        scales: dict[str, list[float] | None] = {}
        for name in (h.name for h in attachment.hyperparameters):
            count = len(contraction.hypergradients[name])
            hypergradients[name] = [next(numbers) for _ in range(count)]
            known = name in contraction.tangent_norms
            scales[name] = [next(numbers) for _ in range(count)] if known else None
        measurements += attachment.measurements(hypergradients, scales)
    return value, measurements


def _to_host(
    trainer: pl.Trainer, loss: torch.Tensor, contractions: Sequence[Contraction], in_loss: Collection[str]
) -> list[float]:
    """Every number of an update in one transfer, averaged over ranks."""
    columns = [loss.reshape(1)]
    for contraction in contractions:
        for name, hypergradients in contraction.hypergradients.items():
            if name in in_loss:
                continue
            columns.append(hypergradients)
            if name in contraction.tangent_norms:
                columns.append(contraction.tangent_norms[name] * contraction.gradient_norms[name])
    wide = torch.float64 if any(c.dtype == torch.float64 for c in columns) else torch.float32
    packed = torch.cat([c.to(loss.device, wide) for c in columns])
    return mean(trainer, packed).tolist()


def labels_of(attachments: Sequence[Attachment], module: torch.nn.Module) -> dict[str, str]:
    """What a user calls each coordinate, by its key."""
    labels = {}
    per_tensor = any(h.per == "tensor" for a in attachments for h in a.hyperparameters)
    parameters: dict[torch.Tensor, str] = {p: name for name, p in module.named_parameters()} if per_tensor else {}
    for i, attachment in enumerate(attachments):
        groups = attachment.optimizer.param_groups
        names = [str(group.get("name", f"group_{at}")) for at, group in enumerate(groups)]
        if len(set(names)) < len(names):
            names = [f"group_{at}" for at in range(len(groups))]
        for row in attachment.layout():
            for key, hyperparameter in row.learned.items():
                parts = [hyperparameter.name]
                if hyperparameter.per == "tensor":
                    parts.append(parameters.get(row.params[0], key))
                elif len(attachments) > 1:
                    parts.append(f"optimizer_{i}")
                if hyperparameter.per == "group" and len(groups) > 1:
                    parts.append(names[row.group])
                labels[key] = "/".join(parts)
    return labels


def described(
    name: str, tensor: torch.Tensor, of_many: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> dict[str, float]:
    """A single number as itself, several by numbers that describe them."""
    if tensor.numel() == 1:
        return {name: tensor.item()}
    return {f"{name}/{kind}": float(describe(tensor)) for kind, describe in of_many.items()}
