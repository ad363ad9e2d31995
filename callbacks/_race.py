"""The race of learning rates inside a fit: several trainings on the same batches, of which the Trainer sees one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from hypergrad import (
    HypergradError,
    Race,
    TrainingState,
    UnsupportedOptimizerError,
    boldest_arms,
    exchange_tensors,
    has_learned,
    live_tensors,
    write_tensors,
)
from hypergrad.callbacks._agreement import anyone
from hypergrad.callbacks._attachment import Attachment
from hypergrad.callbacks._placement import beside, room
from hypergrad.callbacks._training import StepLoss

_Mark = tuple[str, ...]


class NoScoreError(HypergradError):
    """No arm has a validation loss that is a number, so that none can be chosen."""


class ChangedOutsideError(HypergradError):
    """Something changes between steps, as a hook makes it, and would not do so in the arms that stand by."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, which trainings that stand by would not see")


class Heat:
    """Stands behind each optimizer step until one arm is left, which is then the training.

    The Trainer trains the live arm. Right after its step every other one takes the same step from where it stands: the
    same batches and randomness, its own weights, buffers and optimizer state.

    Args:
        race: the rules.
        steps: of the whole run.
        attachment: of the only optimizer.
        score: the validation loss of the module as it stands.

    Arms that stand by do so on the host until a step has shown that the device has room for them.
    """

    def __init__(
        self,
        race: Race,
        steps: int,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        attachment: Attachment,
        score: Callable[[], float],
    ) -> None:
        self._trainer, self._module, self._attachment, self._score = trainer, module, attachment, score
        groups = attachment.optimizer.param_groups
        own = max(float(group.get("initial_lr", group["lr"])) for group in groups)
        self.rates = race.arms(own)
        self.scores: list[dict[float, float]] = []  # of each rung, by learning rate
        self.untrained = score()
        self.live = 0
        self._ends, self._forks = race.ends(steps), race.forks
        self._standing = list(range(len(self.rates)))
        self._on = beside(module.device)
        self._is_placed = False
        # Of what nothing trains, such as the weights beside an adapter, arms have no copies.
        self._frozen = {n for n, p in module.named_parameters() if not p.requires_grad and p not in self._held()}
        self._states = {arm: self._here() for arm in self._standing[1:]}
        self._means: dict[int, dict[str, torch.Tensor]] = {}
        self._averaged = 0
        self._first_loss = math.nan
        self._losses: dict[int, float] = {}
        self._fallen: list[int] = []  # since the last rung
        self._step = 0
        self._left: dict[str, _Mark] = {}  # as the last step left them
        self._still: dict[str, _Mark] = {}  # those of them that the next one does not move either

    @property
    def is_over(self) -> bool:
        """Whether the training has its learning rate."""
        return len(self._standing) == 1 and not self._states

    @property
    def has_learned(self) -> bool:
        """Whether the winner has come further than noise would take it."""
        return bool(self.scores) and has_learned(min(self.scores[-1].values()), self.untrained)

    @property
    def winner(self) -> float:
        """The learning rate of the live arm."""
        return self.rates[self.live]

    def after_step(self, loss: StepLoss | None) -> None:
        """Let every other arm take the step that the live one has just taken.

        Raises:
            UnsupportedOptimizerError: at the first step, where arms cannot be kept apart; the live one is as it was.
            ChangedOutsideError: see `before_step`; the same.
        """
        if not self._is_placed and anyone(self._trainer, self._attachment.has_other_hooks):
            raise ChangedOutsideError("a step of the optimizer may be changed by a hook of its own")
        thawed = [n for n, p in self._module.named_parameters() if n in self._frozen and p in self._held()]
        if thawed:
            raise ChangedOutsideError(f"the optimizer is given {thawed[0]!r} outside of it")
        stepped = self._stepped()
        live = live_tensors(self._module) if self._still else {}
        self._compare({name: t for name, t in self._still.items() if live.get(name) not in stepped})
        self._step += 1
        if not self._is_placed:
            self._place()
        if loss is not None:
            self._averaged += 1
            self._add_to_mean(self.live)
            self._losses[self.live] = loss.value
            params = [p for group in self._attachment.optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in params]
            try:
                for arm, state in self._states.items():
                    state.exchange()
                    try:
                        self._losses[arm] = self._take_step(arm, loss, params)
                        self._add_to_mean(arm)
                    finally:
                        state.exchange()
            finally:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                self._attachment.place_lr(self._offset(self.live))
            if math.isnan(self._first_loss):
                self._first_loss = self._losses[self.live]
            self._drop_fallen()
        if self._ends and self._step >= self._ends[0][0]:
            self._judge(self._ends.pop(0)[1])
        self._remember()

    def before_step(self) -> None:
        """A training step is about to be run.

        Raises:
            ChangedOutsideError: if a parameter or buffer is not as the last step has left it, such as an average that a
                hook keeps.
        """
        left, self._left = self._left, {}
        self._compare(left)

    def validated(self) -> None:
        """A validation has been run since the last step, which may have changed buffers that only it uses."""
        params = dict(self._module.named_parameters()).keys()
        self._left = {name: t for name, t in self._left.items() if name in params}

    def _stepped(self) -> set[torch.Tensor]:
        return {p for p in self._held() if p.requires_grad}

    def _held(self) -> set[torch.Tensor]:
        return {p for group in self._attachment.optimizer.param_groups for p in group["params"]}

    def _remember(self) -> None:
        """Where everything stands that no optimizer moves, and after the first steps the rest as well."""
        stepped, params = self._stepped(), dict(self._module.named_parameters()).keys()
        live = live_tensors(self._module) if len(self._standing) > 1 else {}
        # Several processes begin every step with the buffers of the first.
        several = self._trainer.world_size > 1
        live = {name: t for name, t in live.items() if t.layout == torch.strided and (name in params or not several)}
        self._left = {name: _mark(t) for name, t in live.items() if self._averaged <= 2 or t not in stepped}
        self._still = {name: m for name, m in self._left.items() if name in params and live[name] not in stepped}

    def _compare(self, left: dict[str, _Mark]) -> None:
        live = live_tensors(self._module) if left else {}
        found = next((name for name, then in left.items() if name not in live or _mark(live[name]) != then), "")
        # All processes or none.
        if anyone(self._trainer, bool(found)):
            what = f"{found!r} changes outside of it" if found else "something changes in another process"
            raise ChangedOutsideError(what)

    def state_dict(self) -> dict[str, Any]:
        """Where the race stands."""
        return {
            "rates": list(self.rates),
            "scores": [dict(s) for s in self.scores],
            "live": self.live,
            "ends_left": len(self._ends),
            "standing": list(self._standing),
            "states": {arm: state.state_dict() for arm, state in self._states.items()},
            "means": {arm: dict(mean) for arm, mean in self._means.items()},
            "numbers": [self._averaged, self._first_loss, self._step],
            "losses": dict(self._losses),
            "fallen": list(self._fallen),
            "untrained": self.untrained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the race that returned `state`."""
        self.rates, self.live = list(state["rates"]), state["live"]
        self.scores = [dict(s) for s in state["scores"]]
        self._ends = self._ends[len(self._ends) - state["ends_left"] :]
        self._standing = list(state["standing"])
        self._states = {}
        for arm, saved in state["states"].items():
            self._states[arm] = self._here()
            self._states[arm].load_state_dict(saved)
        live = live_tensors(self._module)
        self._means = {
            arm: {n: t.to(self._on or live[n].device) for n, t in mean.items()} for arm, mean in state["means"].items()
        }
        self._averaged, self._first_loss, self._step = state["numbers"]
        self._losses = dict(state["losses"])
        self._fallen = list(state.get("fallen", []))
        self.untrained = state.get("untrained", math.nan)  # older versions did not know it

    def _here(self) -> TrainingState:
        return TrainingState(self._module, self._attachment.optimizer, self._on, frozen=False)

    def _place(self) -> None:
        """Take the arms that stand by to the device, if that leaves half of its room."""
        self._is_placed = True
        device = self._module.device
        live = live_tensors(self._module).items()
        weights = sum(t.numel() * t.element_size() for name, t in live if name not in self._frozen)
        entries = [v for state in self._attachment.optimizer.state.values() for v in state.values()]
        kept = sum(v.numel() * v.element_size() for v in entries if isinstance(v, torch.Tensor))
        arms = len(self._standing)
        needed, left = (arms - 1) * (weights + kept) + arms * weights, room(device)
        if needed <= left / 2:
            self._on = None
            for state in self._states.values():
                state.move(None)
            self._means = {arm: {n: t.to(device) for n, t in mean.items()} for arm, mean in self._means.items()}
        elif not self.scores:
            rank_zero_info(
                "HyperGradient: the other trainings of the race stand by on the host, for they take "
                f"{needed / 1e9:.2g} GB and {device} has {left / 1e9:.2g} GB left: until it is over, steps take longer."
            )

    def _offset(self, arm: int) -> float:
        return math.log(self.rates[arm] / self.rates[0])

    def _take_step(self, arm: int, loss: StepLoss, params: list[torch.Tensor]) -> float:
        trained = [p for p in params if p.requires_grad]
        value, grads, buffers = loss.gradients(trained)
        if self._averaged == 1:
            taken = any(g is not None and p.grad is None for p, g in zip(trained, grads, strict=True))
            if anyone(self._trainer, taken):
                raise ChangedOutsideError("a gradient is taken away outside of it")
        for p, grad in zip(trained, grads, strict=True):
            p.grad = grad
        self._module.configure_gradient_clipping(
            self._attachment.optimizer, self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm
        )
        self._attachment.place_lr(self._offset(arm))
        with torch.no_grad():
            if self._averaged == 1:
                self._check_groups(self._attachment.step_again)
            else:
                self._attachment.step_again()
        write_tensors(self._module, buffers)
        return value

    def _check_groups(self, step: Callable[[], None]) -> None:
        """An arm has parameters and `state` of its own, but no param groups."""
        optimizer = self._attachment.optimizer
        before = [{k: copy.copy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        step()
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            changed = [k for k, v in settings.items() if isinstance(v, (int, float)) and group[k] != v]
            group.update({k: settings[k] for k in changed})
            if changed:
                self._attachment.place_lr(self._offset(self.live))
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps {changed[0]!r} in its param groups from step to step"
                )

    @torch.no_grad()
    def _add_to_mean(self, arm: int) -> None:
        now = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
        if arm not in self._means:
            self._means[arm] = {n: torch.zeros_like(p, device=self._on or p.device) for n, p in now.items()}
        mean = self._means[arm]
        for name, p in now.items():
            if name in mean:
                mean[name].lerp_(p.to(mean[name].device), 1.0 / self._averaged)

    def _drop_fallen(self) -> None:
        """An arm whose training loss has blown up is out at once; its steps would be wasted."""
        limit = 4.0 * abs(self._first_loss) + 3.0
        fallen = [a for a in self._standing if not self._losses.get(a, 0.0) <= limit]
        if fallen and len(fallen) < len(self._standing):
            self._fallen += fallen
            rest = [a for a in self._standing if a not in fallen]
            self._keep(rest, min(rest, key=lambda a: (self._losses.get(a, math.inf), a)))

    def _judge(self, keep: int) -> None:
        scores = {self.live: self._score_of_mean(self.live)}
        for arm, state in self._states.items():
            state.exchange()
            try:
                scores[arm] = self._score_of_mean(arm)
            finally:
                state.exchange()
        if not any(map(math.isfinite, scores.values())):
            raise NoScoreError(f"the validation loss is no number for any learning rate, at step {self._step}")
        everyone = {**dict.fromkeys(self._fallen, math.inf), **scores}
        self.scores.append({self.rates[arm]: score for arm, score in sorted(everyone.items())})
        self._fallen = []
        self._means, self._averaged = {}, 0
        self._is_placed = self._on is None  # fewer may find room
        kept = boldest_arms(scores, self.rates, keep, self.untrained)
        self._keep(kept, kept[0])
        if len(self._ends) == 1:
            self._fork()

    def _fork(self) -> None:
        """The live arm goes on under other learning rates beside its own, from where it stands."""
        for factor in self._forks:
            arm = len(self.rates)
            self.rates.append(self.winner * factor)
            self._standing.append(arm)
            self._states[arm] = self._here()

    def _score_of_mean(self, arm: int) -> float:
        """The validation loss at the mean of the rung's weights, which is less noisy than at the last ones."""
        mean = self._means.get(arm, {})
        exchange_tensors(self._module, mean, self._on)
        try:
            return self._score()
        finally:
            exchange_tensors(self._module, mean, self._on)

    def _keep(self, arms: list[int], leader: int) -> None:
        """The leader becomes the live arm if the live one is out."""
        if self.live not in arms:
            self._states[leader].exchange()
            self._states[self.live] = self._states.pop(leader)
            self.live = leader
            self._attachment.place_lr(self._offset(leader))
        self._standing = list(arms)
        self._states = {arm: state for arm, state in self._states.items() if arm in arms}
        self._means = {arm: mean for arm, mean in self._means.items() if arm in arms}


def _mark(tensor: torch.Tensor) -> _Mark:
    """What tells a tensor from itself after a change, without a copy of it."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = values.double()
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    size, total = torch.linalg.vector_norm(values, dtype=wide), values.sum(dtype=wide)
    # Words, for no number equals itself if it is none.
    return tuple(map(str, (tensor.shape, tensor.dtype, tensor.device, size.item(), total.item())))
