"""What a Hessian-vector product costs in gradients: reverse over reverse, as `Exact` has it, and forward over reverse.

Both from nothing, the gradient's own evaluation included; time of the processor, one thread, median of interleaved
repetitions. Run: `.venv/bin/python examples/benchmarks/products.py` (under a minute).
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent))
from estimators import TASKS, seconds


def ratios(task: str, repetitions: int = 15) -> tuple[float, float]:
    torch.manual_seed(0)
    make, inputs, targets = TASKS[task]
    model, x, y = make().eval(), inputs(), targets().flatten()
    params = dict(model.named_parameters())
    plain = {name: p.detach() for name, p in params.items()}
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(functional_call(model, weights, (x,)).flatten(0, -2), y)

    def gradient() -> None:
        torch.autograd.grad(loss(params), list(params.values()))

    def reverse_over_reverse() -> None:
        slopes = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
        torch.autograd.grad(slopes, list(params.values()), list(v.values()))

    def forward_over_reverse() -> None:
        jvp(grad(loss), (plain,), (v,))

    calls = (reverse_over_reverse, forward_over_reverse, gradient)
    for call in calls:
        call()
    times = [[seconds(call) for call in calls] for _ in range(repetitions)]
    return statistics.median(t[0] / t[2] for t in times), statistics.median(t[1] / t[2] for t in times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'in gradients':16}{'reverse over reverse':>24}{'forward over reverse':>24}")
    with sdpa_kernel(SDPBackend.MATH):
        for task in TASKS:
            backward, forward = ratios(task)
            print(f"{task:16}{backward:24.2f}{forward:24.2f}", flush=True)
