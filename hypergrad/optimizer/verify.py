"""Is this optimizer's step really differentiated correctly? Asked of the class itself, on a problem of 15 numbers.

No table of supported optimizers can cover those that users bring. Before anything is learned, the derivative of
each named hyperparameter is compared with central differences of the optimizer's own step in float64. A tangent that
got lost, or a rule that is no function of the hyperparameter, shows here and not in somebody's training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hypergrad.errors import HyperparameterError, UnsupportedOptimizerError
from hypergrad.hyperparameter import OptimizerHyperparameter, ParamGroup
from hypergrad.optimizer.recorded import RecordedStep
from hypergrad.optimizer.shadow import shadow, single_tensor_group
from hypergrad.optimizer.step import Direction, StateVector, differentiate_step
from hypergrad.rng import preserved_rng
from hypergrad.torch_internals import raw_step

_VERIFIED: set[object] = set()
_WARM_UP = 8  # RAdam's rectified branch starts at step 6 with its default betas
_TOLERANCE = 1e-3  # a lost term shows as an error of order one


def verify(
    optimizer: torch.optim.Optimizer,
    hyperparameters: Sequence[OptimizerHyperparameter],
    *,
    carried: bool = False,
    backwards: bool = False,
) -> None:
    """Check each hyperparameter of each kind of param group; changes nothing.

    Args:
        carried: also check tangents that are carried over several steps, through parameters, gradients and state.
        backwards: also check that a step taken backwards is the transpose of the step forwards.

    Raises:
        HyperparameterError: if the step does not depend on the hyperparameter.
        UnsupportedOptimizerError: if the step cannot be differentiated, or its derivative is wrong.
    """
    if not hyperparameters and not backwards:
        return
    # What torch's own classes do depends on the settings and on nothing else, so that once is enough.
    seen = _VERIFIED if type(optimizer).__module__.startswith("torch.optim.") else set[object]()
    kinds: dict[str, ParamGroup] = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        flags = {k: v for k, v in settings.items() if not isinstance(v, (float, torch.Tensor))}
        zeros = sorted(k for k, v in settings.items() if isinstance(v, float) and v == 0.0)
        kinds.setdefault(repr((flags, zeros)), group)
    coupled = len(optimizer.param_groups) > 1
    asked = (type(optimizer), tuple(h.name for h in hyperparameters), carried, backwards, coupled)
    kinds = {kind: group for kind, group in kinds.items() if (*asked, kind) not in seen}
    if not kinds:
        return
    with preserved_rng(0), _untouched(optimizer):
        for kind, group in kinds.items():
            problem = _Problem(optimizer, group)
            for hyperparameter in hyperparameters:
                problem.check(hyperparameter)
                if carried:
                    problem.check_carried(hyperparameter)
            if backwards:
                problem.check_transpose(hyperparameters)
            seen.add((*asked, kind))


@contextmanager
def _untouched(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A shadow works on copies; an optimizer that also keeps its tensors elsewhere would move the real ones."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        pairs = list(zip(params, before, strict=True))
        moved = [p for p, old in pairs if not torch.allclose(p.detach(), old, 0.0, 0.0, equal_nan=True)]
        with torch.no_grad():
            for p, old in pairs:
                p.copy_(old)
        if moved:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} keeps parameters outside `param_groups`, so its step cannot be tried on "
                "copies. The parameters were put back. Use an optimizer that works on its `param_groups`."
            )


class _Problem:
    """A small optimizer of the same class that has taken a few steps under the settings of one param group."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: ParamGroup) -> None:
        self._name = type(optimizer).__name__
        self._optimizer = optimizer
        self._group = group
        self._shapes: list[tuple[int, ...]] = [(4, 3), (3,)]
        try:
            self._twin = self._warmed_up()
        except UnsupportedOptimizerError:
            self._shapes = [(4, 3)]  # Muon and its like take matrices only
            self._twin = self._warmed_up()
        self._params: list[torch.Tensor] = self._twin.param_groups[0]["params"]
        self._check_reproducible()

    def _warmed_up(self, groups: int = 1) -> torch.optim.Optimizer:
        """The same optimizer at every call: same parameters, same gradients, at the same step, about to step again."""
        generator = torch.Generator().manual_seed(0)
        settings = []
        for _ in range(groups):
            params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self._shapes]
            settings.append(single_tensor_group(_detached(self._group), params) | _plain(self._group))
        first = {p: _made_by_constructor(self._optimizer, group, p) for group in settings for p in group["params"]}
        twin = shadow(self._optimizer, settings, {p: state for p, state in first.items() if state})
        for step in range(_WARM_UP + 1):
            for p in (p for group in twin.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if step < _WARM_UP:
                self._step(twin)
        return twin

    def _check_reproducible(self) -> None:
        """A step on copies of parameters and state must be the step that the optimizer itself would take."""
        real = self._warmed_up()
        copied = self._parameters_after(None, 0.0)
        self._step(real)
        if not _close(copied, real.param_groups[0]["params"]):
            ends = [self._end(seed) for seed in (0, 1, 0)]
            if _close(ends[0], ends[2]) and not _close(ends[0], ends[1]):
                raise UnsupportedOptimizerError(
                    f"{self._name} draws random numbers in its step, which is then no function of its hyperparameters. "
                    "Add the noise to the gradients or to the loss, in training_step, or use another optimizer."
                )
            raise UnsupportedOptimizerError(
                f"{self._name} keeps state outside `state[parameter]`, so its step cannot be tried on copies. Keep "
                "momentum, counters and the like in `self.state[p]`, or use another optimizer."
            )

    def _end(self, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)  # the caller's stream is put back at the end of it all
        twin = self._warmed_up()
        self._step(twin)
        params: list[torch.Tensor] = twin.param_groups[0]["params"]
        return params

    def _check_alone(self, hyperparameter: OptimizerHyperparameter, value: float, where: str) -> None:
        """With several param groups, the hyperparameter of one must not act on the parameters of another."""
        here, there = self._warmed_up(groups=2), self._warmed_up(groups=2)
        hyperparameter.write(there.param_groups[0], value)
        for twin in (here, there):
            self._step(twin)
        if not _close(here.param_groups[1]["params"], there.param_groups[1]["params"]):
            raise UnsupportedOptimizerError(
                f"In {where}, {hyperparameter.name!r} of one param group acts on the parameters of another: there is "
                f"no hypergradient per group. Use one param group, or leave {hyperparameter.name!r} out."
            )

    def _check_read_late(
        self, hyperparameter: OptimizerHyperparameter, value: float, expected: list[torch.Tensor]
    ) -> None:
        """Learned values are written when the gradients are there, so they must be read after the closure has run."""
        twin, called = self._warmed_up(), []

        def closure() -> float:
            called.append(True)
            hyperparameter.write(twin.param_groups[0], value)
            return 0.0

        try:
            with torch.no_grad():
                raw_step(twin, closure)
        except Exception:
            return  # it takes no closure, or makes more of it than a value to return
        if called and not _close(twin.param_groups[0]["params"], expected):
            raise UnsupportedOptimizerError(
                f"{self._name} reads {hyperparameter.name!r} before it runs the closure, so a learned value would come "
                "too late: read the param groups after `loss = closure()`, as torch's own optimizers do."
            )

    def check(self, hyperparameter: OptimizerHyperparameter) -> None:
        value = hyperparameter.read(self._twin.param_groups[0])
        where = f"{self._name} at {hyperparameter.name}={value:g}"
        moved = self._derivative(hyperparameter, where)
        step = _difference_step(value)
        if len(self._optimizer.param_groups) > 1:
            self._check_alone(hyperparameter, value + step, where)
        up, down = (self._parameters_after(hyperparameter, value + sign * step) for sign in (1.0, -1.0))
        expected = torch.cat([((u - d) / (2 * step)).reshape(-1) for u, d in zip(up, down, strict=True)])
        actual = torch.cat([moved.get(p, torch.zeros_like(p)).reshape(-1) for p in self._params])
        rounding = 8 * torch.finfo(torch.float64).eps * torch.cat([u.reshape(-1) for u in up]).norm() / step
        if bool(torch.maximum(actual.norm(), expected.norm()) <= rounding):
            raise HyperparameterError(
                f"One step of {where} does not depend on {hyperparameter.name!r}: there is nothing to learn. "
                "Leave it out, or start from a value that switches it on."
            )
        error = (actual - expected).norm()
        if not bool(error <= _TOLERANCE * expected.norm() + rounding):
            raise UnsupportedOptimizerError(
                f"The step of {where} is not differentiated correctly with respect to {hyperparameter.name!r}: "
                f"the derivative is off by {float(error):.2g} where its size is {float(expected.norm()):.2g} "
                "(the step computes it outside torch's differentiable operations, or in low precision). "
                f"Leave {hyperparameter.name!r} out and learn the others, or use another optimizer."
            )
        self._check_read_late(hyperparameter, value + step, up)

    def check_carried(self, hyperparameter: OptimizerHyperparameter) -> None:
        """A run of a few steps on half a square: each gradient is a noise plus the parameter itself."""
        value = hyperparameter.read(self._twin.param_groups[0])
        step = _difference_step(value)
        twin, tangents = self._warmed_up(), StateVector()
        for _ in self._run(twin):
            try:
                tangents = differentiate_step(
                    twin, Direction({(0, hyperparameter): 1.0}, tangents.params, tangents.params, tangents.state)
                )
            except Exception as error:  # whatever a foreign step() raises when it meets tensors that it did not expect
                raise UnsupportedOptimizerError(
                    f"Several steps of {self._name} cannot be differentiated with respect to {hyperparameter.name!r}: "
                    f"{type(error).__name__}: {error}. Use Online(), which differentiates one."
                ) from error
        ends, groups = [], []
        for sign in (1.0, -1.0):
            moved = self._warmed_up()
            hyperparameter.write(moved.param_groups[0], value + sign * step)
            for _ in self._run(moved):
                pass
            groups.append(moved.param_groups[0])
            ends.append(torch.cat([p.reshape(-1) for p in moved.param_groups[0]["params"]]))
        self._check_no_memory_in_groups(hyperparameter, *groups)
        expected = (ends[0] - ends[1]) / (2 * step)
        params = twin.param_groups[0]["params"]
        actual = torch.cat([tangents.params.get(p, torch.zeros_like(p)).reshape(-1) for p in params])
        rounding = 8 * torch.finfo(torch.float64).eps * ends[0].norm() / step
        off = (actual - expected).norm()
        if not bool(off <= 10 * _TOLERANCE * expected.norm() + rounding):
            raise UnsupportedOptimizerError(
                f"Over several steps, {self._name} is not differentiated correctly with respect to "
                f"{hyperparameter.name!r}: the derivative is off by {float(off):.2g} where its size is "
                f"{float(expected.norm()):.2g}. Use Online(), which differentiates one step, or another optimizer."
            )

    def _check_no_memory_in_groups(self, hyperparameter: OptimizerHyperparameter, a: ParamGroup, b: ParamGroup) -> None:
        """Tangents are carried by parameters and `state`; what a param group remembers of past steps has none."""
        for key in sorted(a.keys() - {"params", hyperparameter.key}):
            numeric = isinstance(a[key], (int, float, torch.Tensor))
            if numeric and not torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])):
                raise UnsupportedOptimizerError(
                    f"{self._name} keeps {key!r} in its param groups from step to step, and it depends on what "
                    f"{hyperparameter.name!r} was before: over several steps that part of the derivative would be "
                    "lost. Use Online(), which differentiates one step."
                )

    def check_transpose(self, hyperparameters: Sequence[OptimizerHyperparameter]) -> None:
        """c . (J d) = (J' c) . d for the Jacobian J of the step and random c, d."""
        twin, generator = self._twin, torch.Generator().manual_seed(2)

        def random(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, generator=generator, dtype=torch.float64)

        def vector() -> StateVector:
            entries = {p: {k: v for k, v in twin.state[p].items() if isinstance(v, torch.Tensor)} for p in self._params}
            return StateVector(
                {p: random(p) for p in self._params},
                {
                    p: {k: random(v) for k, v in s.items() if k != "step" and v.is_floating_point()}
                    for p, s in entries.items()
                },
            )

        before, cotangent = vector(), vector()
        grads = {p: random(p) for p in self._params}
        rates = {(0, h): float(torch.randn((), generator=generator)) for h in hyperparameters}
        try:
            after = differentiate_step(twin, Direction(rates, before.params, grads, before.state))
            back = RecordedStep(twin).pull_back(cotangent, rates)
        except Exception as error:  # whatever a foreign step() raises when it meets tensors that it did not expect
            raise UnsupportedOptimizerError(
                f"A step of {self._name} cannot be differentiated backwards: {type(error).__name__}: {error}. "
                "Use Forward()."
            ) from error
        forwards = _dot(cotangent, after)
        backwards = _dot(back.before, before) + _dot(StateVector(back.grads), StateVector(grads))
        backwards += sum(rate * float(back.hyperparameters[c]) for c, rate in rates.items())
        if not abs(forwards - backwards) <= _TOLERANCE * max(abs(forwards), abs(backwards)):
            raise UnsupportedOptimizerError(
                f"A step of {self._name} is not differentiated correctly backwards ({backwards:.4g} where it is "
                f"{forwards:.4g} forwards). Use Forward()."
            )

    def _run(self, twin: torch.optim.Optimizer) -> Iterator[None]:
        """Yields before each of a few steps, when the gradients are there, and takes it."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in twin.param_groups[0]["params"]:
                p.grad = p + torch.randn(p.shape, generator=generator, dtype=torch.float64)
            yield
            self._step(twin)

    def _derivative(self, hyperparameter: OptimizerHyperparameter, where: str) -> dict[torch.Tensor, torch.Tensor]:
        direction = Direction(hyperparameters={(0, hyperparameter): 1.0})
        try:
            return differentiate_step(self._twin, direction).params
        except UnsupportedOptimizerError as error:
            raise UnsupportedOptimizerError(
                f"{error} Leave {hyperparameter.name!r} out and learn the others."
            ) from error
        except Exception as error:  # whatever a foreign step() raises when it meets tensors that it did not expect
            raise UnsupportedOptimizerError(
                f"The step of {where} cannot be differentiated with respect to {hyperparameter.name!r}: "
                f"{type(error).__name__}: {error}. Leave it out, or start from a value that switches it on."
            ) from error

    def _parameters_after(self, hyperparameter: OptimizerHyperparameter | None, value: float) -> list[torch.Tensor]:
        params = [p.clone() for p in self._params]
        for clone, p in zip(params, self._params, strict=True):
            clone.grad = None if p.grad is None else p.grad.clone()
        group = {**copy.deepcopy(_detached(self._twin.param_groups[0])), "params": params}
        if hyperparameter is not None:
            hyperparameter.write(group, value)
        state = {c: copy.deepcopy(self._twin.state[p]) for c, p in zip(params, self._params, strict=True)}
        setting = "" if hyperparameter is None else f" with {hyperparameter.name}={value:g}"
        self._step(shadow(self._twin, [group], state), setting)
        return params

    def _step(self, optimizer: torch.optim.Optimizer, setting: str = "") -> None:
        try:
            with torch.no_grad():
                raw_step(optimizer)
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"The step of {self._name}{setting} could not be tried on a problem of 15 numbers, as is done before "
                f"anything is learned: {type(error).__name__}: {error}. If the optimizer must be made ready for a step "
                "(put into training mode, say), do so where it is constructed, in configure_optimizers; otherwise use "
                "another one."
            ) from error


def _made_by_constructor(
    optimizer: torch.optim.Optimizer, group: ParamGroup, param: torch.Tensor
) -> dict[str, torch.Tensor]:
    """State that a parameter has before its first step: Adagrad's, in the older versions of torch."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    accumulated = torch.full_like(param, group.get("initial_accumulator_value", 0.0))
    return {"step": torch.tensor(0.0), "sum": accumulated}


def _dot(a: StateVector, b: StateVector) -> float:
    total = sum(float((t * b.params[p]).sum()) for p, t in a.params.items() if p in b.params)
    pairs = [(t, b.state.get(p, {}).get(key)) for p, entry in a.state.items() for key, t in entry.items()]
    return total + sum(float((t * other).sum()) for t, other in pairs if other is not None)


def _close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True) for x, y in zip(a, b, strict=True))


def _detached(group: ParamGroup) -> ParamGroup:
    return {key: value for key, value in group.items() if key != "params"}


def _plain(group: ParamGroup) -> dict[str, Any]:
    """Settings of the ordinary, not differentiable path: the reference is the step that users take."""
    plain: dict[str, Any] = {"differentiable": False} if "differentiable" in group else {}
    if "lr" in group:
        plain["lr"] = float(group["lr"]) or 0.1  # a warm-up that starts at 0 would hide every other hyperparameter
    return plain


def _difference_step(value: float) -> float:
    """Small against the distance to 0 and to 1, where most rules have a pole or a bound."""
    if value == 0.0:
        return 1e-6
    distance = min(abs(value), abs(1.0 - value)) if 0.0 < value < 1.0 else abs(value)
    return 1e-2 * distance
