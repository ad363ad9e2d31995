"""Where a training stands: parameters, buffers and optimizer state, apart from the live ones or in their place."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
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
        on: the device that keeps the copies; None keeps each where its original is.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, on: torch.device | None = None
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._on = on
        self._tensors = {name: copied(t, on) for name, t in live_tensors(module).items()}
        self._states = {p: _State(state, on) for p, state in optimizer.state.items()}

    def install(self) -> None:
        """Make the live training stand here; this copy stays as it is."""
        write_tensors(self._module, self._tensors)
        self._optimizer.state.clear()
        self._optimizer.state.update({p: state.live(copy=True) for p, state in self._states.items()})

    def exchange(self) -> None:
        """The live training stands here, and this is where it stood."""
        for name, t in live_tensors(self._module).items():
            if name not in self._tensors:  # it has come up since
                self._tensors[name] = copied(t, self._on)
        exchange_tensors(self._module, self._tensors, self._on)
        mine, theirs = self._states, dict(self._optimizer.state)
        self._optimizer.state.clear()
        self._states = {}
        for p in list({**theirs, **mine}):  # one after the other: no more than one parameter's is there twice
            if p in theirs:
                self._states[p] = _State(theirs.pop(p), self._on, copy=False)
            if p in mine:
                self._optimizer.state[p] = mine.pop(p).live(copy=False)

    def move(self, on: torch.device | None) -> None:
        """Keep the copies on this device; None: each where its original is."""
        self._on = on
        for name, t in live_tensors(self._module).items():
            if name in self._tensors:
                self._tensors[name] = self._tensors[name].to(on or t.device)
        for state in self._states.values():
            state.move(on)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the optimizer's state by the position of the parameter in it."""
        at = {p: i for i, p in enumerate(_params(self._optimizer))}
        return {"tensors": dict(self._tensors), "states": {at[p]: dict(s.entries) for p, s in self._states.items()}}

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
        self._tensors = {name: t.to(self._on or live[name].device) for name, t in state["tensors"].items()}
        self._states = {params[i]: _State.loaded(entry, params[i], self._on) for i, entry in state["states"].items()}


class _State:
    """The optimizer's state of one parameter, kept on a device of its own or where its tensors live.

    Args:
        live: as the optimizer has it.
        on: see `TrainingState`.
        copy: whether tensors that stay on their device are copied.
    """

    def __init__(self, live: Mapping[str, Any], on: torch.device | None, *, copy: bool = True) -> None:
        self._homes = {key: value.device for key, value in live.items() if isinstance(value, torch.Tensor)}
        self.entries = {
            key: value.to(on or value.device, copy=copy) if isinstance(value, torch.Tensor) else value
            for key, value in live.items()
        }

    @classmethod
    def loaded(cls, entries: Mapping[str, Any], param: torch.Tensor, on: torch.device | None) -> _State:
        """Of a checkpoint, whose tensors may have come to any device."""
        # Step counts stay on the host, where torch keeps them unless a rule is capturable or fused.
        result = cls(entries, None, copy=False)
        result._homes.update({k: param.device for k in result._homes if entries[k].dim() > 0})
        result.move(on)
        return result

    def live(self, *, copy: bool) -> dict[str, Any]:
        """As the optimizer takes it."""
        return {
            key: value.to(self._homes[key], copy=copy) if key in self._homes else value
            for key, value in self.entries.items()
        }

    def move(self, on: torch.device | None) -> None:
        """See `TrainingState.move`."""
        for key, home in self._homes.items():
            self.entries[key] = self.entries[key].to(on or home)


def copied(tensor: torch.Tensor, on: torch.device | None = None) -> torch.Tensor:
    """A copy without a graph, on another device or on its own."""
    return tensor.detach().to(on or tensor.device, copy=True)


def live_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, without the values of `Hyperparameter` modules."""
    learned = {id(h.value) for h in loss_hyperparameters(module).values()}
    buffers = {name: b for name, b in module.named_buffers() if id(b) not in learned}
    return {**dict(module.named_parameters()), **buffers}


@torch.no_grad()
def write_tensors(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the parameters and buffers of these names, in place."""
    for name, t in live_tensors(module).items():
        if name in values:
            _write(module, name, t, values[name])


@torch.no_grad()
def exchange_tensors(
    module: torch.nn.Module, values: MutableMapping[str, torch.Tensor], on: torch.device | None = None
) -> None:
    """Put values into the parameters and buffers of these names, and what stood there in place of the values.

    One after the other, so that no more than one of them is there twice.

    Args:
        on: the device that keeps what stood there; None: its own.
    """
    for name, t in live_tensors(module).items():
        if name in values:
            before = copied(t, on)
            _write(module, name, t, values[name])
            values[name] = before


def _write(module: torch.nn.Module, name: str, live: torch.Tensor, value: torch.Tensor) -> None:
    if live.shape == value.shape:
        live.copy_(value)
    else:  # a buffer that grows
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, copied(value, live.device))


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
