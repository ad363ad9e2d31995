"""Where a training stands: parameters, buffers and optimizer state, apart from the live ones or in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hypergrad.errors import ConfigurationError
from hypergrad.loss_hyperparameter import loss_hyperparameters


class TrainingState:
    """A copy of the parameters and buffers of a module and of the state of its optimizer.

    Values of `Hyperparameter` modules are left out: they are what is learned, not where the training stands. Live
    tensors are written in place, so that whatever refers to them keeps doing so.

    Args:
        module: whose parameters and buffers are copied.
        optimizer: whose state is copied, for the parameters that it has then.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._tensors = {name: t.detach().clone() for name, t in live_tensors(module).items()}
        self._states = {p: _copied(state) for p, state in optimizer.state.items()}

    def install(self) -> None:
        """Make the live training stand here; this copy stays as it is."""
        write_tensors(self._module, self._tensors)
        self._put_states({p: _copied(state) for p, state in self._states.items()})

    def exchange(self) -> None:
        """The live training stands here, and this is where it stood."""
        mine, theirs = self._tensors, {name: t.detach().clone() for name, t in live_tensors(self._module).items()}
        write_tensors(self._module, mine)
        states = dict(self._optimizer.state)
        self._put_states(self._states)
        self._tensors, self._states = theirs, states

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the optimizer's state by the position of the parameter in it."""
        at = {p: i for i, p in enumerate(_params(self._optimizer))}
        return {"tensors": dict(self._tensors), "states": {at[p]: dict(state) for p, state in self._states.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be the copy that returned `state`, of a module and an optimizer of the same structure.

        Raises:
            ConfigurationError: if the module has other parameters or buffers.
        """
        live, params = live_tensors(self._module), _params(self._optimizer)
        if state["tensors"].keys() != live.keys():
            missing = sorted(state["tensors"].keys() ^ live.keys())
            raise ConfigurationError(
                f"The checkpoint was written by a module with other parameters or buffers: {', '.join(missing[:5])}."
            )
        self._tensors = {name: t.to(live[name].device) for name, t in state["tensors"].items()}
        self._states = {params[i]: _placed(entry, params[i].device) for i, entry in state["states"].items()}

    def _put_states(self, states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        self._optimizer.state.clear()
        self._optimizer.state.update(states)


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, without the values of `Hyperparameter` modules."""
    learned = {id(h.value) for h in loss_hyperparameters(module).values()}
    buffers = {name: b for name, b in module.named_buffers() if id(b) not in learned}
    return {**dict(module.named_parameters()), **buffers}


@torch.no_grad()
def write_tensors(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the parameters and buffers of these names, in place."""
    for name, t in live_tensors(module).items():
        value = values.get(name)
        if value is None:
            continue
        if t.shape == value.shape:
            t.copy_(value)
        else:  # a buffer that grows
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, value.clone())


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def _placed(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    # Step counts stay on the host, where torch keeps them unless a rule is capturable or fused.
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for key, value in state.items()
    }
