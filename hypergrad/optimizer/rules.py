"""What is known of torch's own update rules, so that their derivatives cost less.

Every entry holds for all flags of its class and is tested equal to the general derivative. Matched by exact class:
a subclass may compute something else.
"""

from __future__ import annotations

import torch

from hypergrad.hyperparameter import ParamGroup

# theta' = theta - lr * d(theta, g, s), decoupled decay included: d(theta')/d(lr) = (theta' - theta) / lr.
_LINEAR_IN_LR = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adadelta,
    }
)
# Rules that treat every element of a tensor alike: many tensors may be packed into one, which makes the cost of a step
# independent of how many tensors the model has.
ELEMENTWISE = _LINEAR_IN_LR | {torch.optim.ASGD, torch.optim.Rprop}
# Of these, the rules whose steps have elements of about the size of lr whatever the size of the gradient.
_NORMALIZED = frozenset(
    {torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax, torch.optim.RMSprop}
)
_DECOUPLED_WHEN_ASKED = frozenset({torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam})


def lr_from_difference(optimizer: torch.optim.Optimizer, group: ParamGroup, lr: float) -> bool:
    """Whether d(theta')/d(lr) may be read off the step itself, as (theta' - theta) / lr.

    Only where the subtraction does not cancel the digits that count: for rules that normalise the gradient, from
    lr = 1000 eps (1.2e-4 in float32) on, and not in half precision. Elsewhere `is_linear_in_lr` leads to a step at a
    large lr, which costs a little more and loses nothing.
    """
    if type(optimizer) not in _NORMALIZED or group.get("eps", 0.0) > 1e-6:
        return False
    return all(p.is_floating_point() and lr >= 1e3 * torch.finfo(p.dtype).eps for p in group["params"])


def is_known(optimizer: torch.optim.Optimizer, name: str) -> bool:
    """Whether the closed forms serve this hyperparameter in every param group, so that there is nothing to verify."""
    groups = optimizer.param_groups
    if name == "lr":
        half = any(p.dtype == torch.float16 for group in groups for p in group["params"])
        return is_linear_in_lr(optimizer) and not half and all(isinstance(g["lr"], (int, float)) for g in groups)
    return name == "weight_decay" and all(decay_is_decoupled(optimizer, group) for group in groups)


def is_linear_in_lr(optimizer: torch.optim.Optimizer) -> bool:
    """Whether theta' is linear in lr, given the state before the step."""
    return type(optimizer) in _LINEAR_IN_LR


def decay_is_decoupled(optimizer: torch.optim.Optimizer, group: ParamGroup) -> bool:
    """Whether the rule is theta' = (1 - lr * weight_decay) * theta - ..., so d(theta')/d(weight_decay) = -lr * theta.

    In Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2, line 12.
    """
    return type(optimizer) in _DECOUPLED_WHEN_ASKED and bool(group.get("decoupled_weight_decay", False))


def decay_rate(optimizer: torch.optim.Optimizer, group: ParamGroup) -> float | None:
    """What one step's decay takes from the weights in the end, in units of lr * weight_decay * weights.

    1 where decay is decoupled; with SGD it also goes through momentum, which repeats it. None where decay is changed on
    its way, as by the denominator of `Adam`, or where the rule is not known.
    """
    if decay_is_decoupled(optimizer, group):
        return 1.0
    if type(optimizer) is not torch.optim.SGD:
        return None
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    if momentum == 0.0:
        return 1.0
    return (1.0 - dampening) / (1.0 - momentum) if momentum < 1.0 and dampening < 1.0 else None
