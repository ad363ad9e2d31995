"""What `Implicit` is to find: the response of a damped minimum, by dense linear algebra."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from tests.callbacks.composition.estimators import DAMPING
from tests.callbacks.composition.features import VALIDATION
from tests.callbacks.composition.script import L2


class Dense(pl.Callback):
    """-d2L/(dtheta dl2) . (H + damping)^-1 grad L_val, of the losses of the last step at the weights after it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.batches: list[tuple[Any, torch.Tensor]] = []
        self.hypergradient = float("nan")

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch, torch.get_rng_state()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step > self.done:
            self.done = trainer.global_step
            if self.done == self.steps:
                buffers = {name: b.clone() for name, b in module.named_buffers()}
                with torch.random.fork_rng(devices=[]):
                    self.hypergradient = self._response(module, trainer.accumulate_grad_batches)
                for name, b in module.named_buffers():
                    b.copy_(buffers[name])
            self.batches = []

    def _response(self, module: Any, accumulated: int) -> float:
        params = [p for p in module.parameters() if p.requires_grad]

        def training_gradient(l2: float, graph: bool = False) -> torch.Tensor:
            module.l2.value.fill_(l2)
            total = torch.zeros(())
            for batch, rng in self.batches:
                torch.set_rng_state(rng)
                total = total + module.training_loss(batch) / accumulated
            return _flat(torch.autograd.grad(total, params, create_graph=graph))

        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            # The gradient is linear in l2.
            mixed = (training_gradient(L2 + 1e-2) - training_gradient(L2 - 1e-2)) / 2e-2
            gradient = training_gradient(L2, graph=True)
            hessian = torch.stack([_flat(torch.autograd.grad(g, params, retain_graph=True)) for g in gradient])
            module.eval()
            validation = _flat(torch.autograd.grad(module.loss(VALIDATION), params))
            module.train()
        return -float(mixed @ torch.linalg.solve(hessian + DAMPING * torch.eye(len(hessian)).to(hessian), validation))


def _flat(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
