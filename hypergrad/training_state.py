"""Where a training stands: parameters, buffers and optimizer state, apart from the live ones or in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
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
        frozen: whether parameters are copied, too, that need no gradient and that the optimizer does not have.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        on: torch.device | None = None,
        *,
        frozen: bool = True,
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._on = on
        self._frozen = frozen
        self._tensors = {name: copied(t, on) for name, t in self._live().items()}
        self._states = {p: _State(state, on) for p, state in optimizer.state.items()}

    def install(self) -> None:
        """Make the live training stand here; this copy stays as it is."""
        write_tensors(self._module, self._tensors)
        self._optimizer.state.clear()
        self._optimizer.state.update({p: state.live(copy=True) for p, state in self._states.items()})

    def exchange(self) -> None:
        """The live training stands here, and this is where it stood."""
        for name, t in self._live().items():
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
        for name, t in self._live().items():
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
        # Versions before `frozen` wrote everything.
        if not self._live().keys() <= state["tensors"].keys() <= live.keys():
            missing = sorted(state["tensors"].keys() ^ live.keys())
            raise ConfigurationError(
                f"The checkpoint was written by a module with other parameters or buffers: {', '.join(missing[:5])}."
            )
        self._tensors = {name: t.to(self._on or live[name].device) for name, t in state["tensors"].items()}
        # As torch's own load_state_dict has it: step counts stay on the host unless a rule keeps them with the rest.
        counted = {
            p for g in self._optimizer.param_groups if g.get("capturable") or g.get("fused") for p in g["params"]
        }
        self._states = {
            params[i]: _State.loaded(entry, params[i].device, counts=params[i] in counted, on=self._on)
            for i, entry in state["states"].items()
        }

    def _live(self) -> dict[str, torch.Tensor]:
        live = live_tensors(self._module)
        if self._frozen:
            return live
        held = set(_params(self._optimizer))
        params = dict(self._module.named_parameters())
        return {n: t for n, t in live.items() if n not in params or t.requires_grad or t in held}


class _State:
    """The optimizer's state of one parameter, kept on a device of its own or where its tensors live.

    Args:
        live: as the optimizer has it: tensors, also in lists, tuples and dictionaries, and whatever else.
        on: see `TrainingState`.
        copy: whether tensors that stay on their device are copied.
    """

    def __init__(self, live: Mapping[str, Any], on: torch.device | None, *, copy: bool = True) -> None:
        self._homes: list[torch.device] = []  # of each tensor, in the order in which they are met

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            self._homes.append(tensor.device)
            return tensor.to(on or tensor.device, copy=copy)

        self.entries: dict[str, Any] = _each(dict(live), kept)

    @classmethod
    def loaded(
        cls, entries: Mapping[str, Any], device: torch.device, *, counts: bool, on: torch.device | None
    ) -> _State:
        """Of a checkpoint, whose tensors may have come to any device.

        Args:
            device: of the parameter.
            counts: whether its step counts belong there, too, and not on the host.
        """

        def home(key: str) -> Any:
            return lambda t: t if key == "step" and not counts else t.to(device)

        result = cls({key: _each(value, home(key)) for key, value in entries.items()}, None, copy=False)
        result.move(on)
        return result

    def live(self, *, copy: bool) -> dict[str, Any]:
        """As the optimizer takes it."""
        homes = iter(self._homes)
        found: dict[str, Any] = _each(self.entries, lambda t: t.to(next(homes), copy=copy))
        return found

    def move(self, on: torch.device | None) -> None:
        """See `TrainingState.move`."""
        homes = iter(self._homes)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            home = next(homes)
            return tensor.to(on or home)

        self.entries = _each(self.entries, moved)


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of plain containers in which every tensor is changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        result = copy.copy(value)  # of its own class
        for key, item in value.items():
            result[key] = _each(item, change)
        return result
    if type(value) in (list, tuple):
        return type(value)(_each(item, change) for item in value)
    return value


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

    One after the other, so that no more than one of them is there twice; those that share memory together.

    Args:
        on: the device that keeps what stood there; None: its own.
    """
    sharing: dict[object, list[tuple[str, torch.Tensor]]] = {}
    for name, t in live_tensors(module).items():
        if name in values:
            sharing.setdefault(place_of(t), []).append((name, t))
    for tensors in sharing.values():
        before = {name: copied(t, on) for name, t in tensors}
        for name, t in tensors:
            _write(module, name, t, values[name])
        values.update(before)


def place_of(tensor: torch.Tensor) -> tuple[object, int]:
    """The memory that a tensor is a view of: alike for tensors that share it."""
    if tensor.layout != torch.strided or not tensor.numel():
        return "apart", id(tensor)
    return tensor.device, tensor.untyped_storage().data_ptr()


def parts_of_others(tensors: Mapping[str, torch.Tensor], wholes: Iterable[torch.Tensor]) -> set[str]:
    """Names of the tensors that lie within one of `wholes`, or within a larger one of them: they change with it."""
    spans: dict[object, list[tuple[int, int]]] = {}
    for whole in wholes:
        spans.setdefault(place_of(whole), []).append(_span(whole))
    found = set()
    for name, t in sorted(tensors.items(), key=lambda item: -item[1].numel()):
        begin, end = _span(t)
        taken = spans.setdefault(place_of(t), [])
        if any(first <= begin and end <= last for first, last in taken):
            found.add(name)
        taken.append((begin, end))
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of the first and the last element, in the storage."""
    if tensor.layout != torch.strided:
        return 0, 0
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def _write(module: torch.nn.Module, name: str, live: torch.Tensor, value: torch.Tensor) -> None:
    strides = live.stride() if live.layout == torch.strided else ()
    is_expanded = any(stride == 0 and size > 1 for size, stride in zip(live.shape, strides, strict=False))
    if live.shape == value.shape and not is_expanded:
        live.copy_(value)
    elif live.shape != value.shape or not torch.equal(live, value.to(live.device)):  # a buffer that has grown
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, copied(value, live.device))


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
