"""A copy of a training comes back as it was, wherever it is kept, and neither touches the other."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from hypergrad import ConfigurationError, Hyperparameter, TrainingState, live_tensors, parts_of_others

# As on an accelerator, whose copies stand by on another device: what belongs where is written down for each.
PLACES = pytest.mark.parametrize("on", [None, torch.device("cpu")], ids=["in place", "elsewhere"])


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.penalty = Hyperparameter(0.1)


def training(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> tuple[Module, Any]:
    torch.manual_seed(0)
    module = Module()
    return module, kind(module.net.parameters(), **{"lr": 0.1, **options})  # type: ignore[call-arg]


def step(module: Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module.net(x).square().mean().backward()
    optimizer.step()


def everything(module: Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [v for p in module.net.parameters() for _, v in sorted(optimizer.state.get(p, {}).items())]
    return [t.detach().clone() for t in (*live_tensors(module).values(), *states)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@PLACES
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_copy_is_installed_as_often_as_one_likes(kind: type[torch.optim.Optimizer], on: torch.device | None) -> None:
    module, optimizer = training(kind, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    step(module, optimizer, 0)
    state, then = TrainingState(module, optimizer, on), everything(module, optimizer)
    for _ in range(2):
        step(module, optimizer, 1)
        state.install()
        assert_equal(everything(module, optimizer), then)


@PLACES
def test_two_trainings_take_turns(on: torch.device | None) -> None:
    # Each is what it would be alone, also the first time, when one has a state and the other has none.
    module, optimizer = training()
    other = TrainingState(module, optimizer, on)
    for seed in range(3):
        step(module, optimizer, seed)
        other.exchange()
        step(module, optimizer, 10 + seed)
        other.exchange()
    for first, seeds in ((False, range(3)), (True, range(10, 13))):
        if first:
            other.exchange()
        alone, own = training()
        for seed in seeds:
            step(alone, own, seed)
        assert_equal(everything(module, optimizer), everything(alone, own))


def test_live_tensors_stay_the_same_objects_and_hyperparameters_what_they_are() -> None:
    module, optimizer = training()
    before, state = {n: t.data_ptr() for n, t in live_tensors(module).items()}, TrainingState(module, optimizer)
    with torch.no_grad():
        module.penalty.value.add_(1.0)
    step(module, optimizer, 0)
    learned = module.penalty.value.clone()
    state.exchange()
    assert {n: t.data_ptr() for n, t in live_tensors(module).items()} == before
    assert torch.equal(module.penalty.value, learned)


@PLACES
def test_a_buffer_that_has_grown_or_come_up_since_is_kept_apart(on: torch.device | None) -> None:
    module, optimizer = training()
    module.register_buffer("queue", torch.zeros(2))
    state = TrainingState(module, optimizer, on)
    module.queue = torch.ones(5)
    module.register_buffer("late", torch.ones(1))
    state.exchange()
    assert module.queue.tolist() == [0.0, 0.0]
    with torch.no_grad():
        module.late.zero_()
    state.exchange()
    assert module.queue.tolist() == [1.0] * 5
    assert module.late.tolist() == [1.0]


@PLACES
def test_what_is_written_down_is_read_back(on: torch.device | None) -> None:
    module, optimizer = training()
    step(module, optimizer, 0)
    written, then = TrainingState(module, optimizer, on).state_dict(), everything(module, optimizer)
    step(module, optimizer, 1)
    state = TrainingState(module, optimizer, on)
    state.load_state_dict(written)
    state.exchange()
    assert_equal(everything(module, optimizer), then)


def test_a_copy_of_another_module_is_refused() -> None:
    module, optimizer = training()
    written = TrainingState(module, optimizer).state_dict()
    module.register_buffer("more", torch.zeros(1))
    with pytest.raises(ConfigurationError, match=r"other parameters or buffers: more"):
        TrainingState(module, optimizer).load_state_dict(written)


def test_copies_move_to_another_device() -> None:
    # "meta" keeps no values, but is another device: the only one that is always there.
    module, optimizer = training()
    step(module, optimizer, 0)
    state = TrainingState(module, optimizer)
    state.move(torch.device("meta"))
    written = state.state_dict()
    assert {t.device.type for t in written["tensors"].values()} == {"meta"}
    assert {v.device.type for entry in written["states"].values() for v in entry.values()} == {"meta"}


@PLACES
def test_tensors_of_one_memory_are_exchanged_together(on: torch.device | None) -> None:
    module, optimizer = training()
    first, last = module.net[0], module.net[2]
    last.weight.data = first.weight.data[:1].view(1, 3).expand(1, 3)
    module.register_buffer("same", first.weight.data)
    state, then = TrainingState(module, optimizer, on), first.weight.detach().clone()
    with torch.no_grad():
        first.weight.add_(1.0)
    state.exchange()
    assert torch.equal(first.weight, then)
    state.exchange()
    assert torch.equal(first.weight, then + 1.0)
    assert torch.equal(last.weight, then[:1] + 1.0)


def test_parts_of_others() -> None:
    whole = torch.zeros(4, 3)
    first, second = whole[:2], whole[2:]
    apart = {"sparse": torch.eye(2).to_sparse(), "empty": torch.zeros(0), "other": torch.zeros(3)}
    tensors = {"first": first, "second": second, "column": whole[:, 1], "row": first[1], **apart}
    assert parts_of_others(tensors, [whole]) == {"first", "second", "column", "row"}
    # Slices of one memory that do not overlap are no parts of each other.
    assert parts_of_others({"first": first, "second": second, "row": first[1], **apart}, []) == {"row"}
    assert parts_of_others({"a": first, "b": first.view(-1)}, []) == {"b"}  # of two that are alike one is kept


class InLists(torch.optim.SGD):
    """Keeps tensors in a list and in a dictionary, and changes them in place."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p].setdefault(
                    "kept", [torch.zeros_like(p), OrderedDict(squares=torch.zeros_like(p)), "name"]
                )
                kept[0].add_(p.grad)
                kept[1]["squares"].add_(p.grad.square())
        return super().step(closure)


@PLACES
def test_state_in_containers_is_kept_apart(on: torch.device | None) -> None:
    module, optimizer = training(InLists)

    def sums() -> list[float]:
        kept = [optimizer.state[p]["kept"] for p in module.net.parameters()]
        assert all(k[2] == "name" for k in kept)
        return [t.sum().item() for k in kept for t in (k[0], k[1]["squares"])]

    step(module, optimizer, 0)
    state, then = TrainingState(module, optimizer, on), sums()
    step(module, optimizer, 1)
    later = sums()
    state.exchange()
    assert sums() == then
    state.exchange()
    assert sums() == later
    for seed in (2, 3):
        state.install()
        assert sums() == then
        step(module, optimizer, seed)


@pytest.mark.parametrize("fused", [False, True])
def test_of_a_checkpoint_state_goes_to_its_parameter_and_counts_to_the_host(fused: bool) -> None:
    # As torch's own load_state_dict has it. "meta" stands for an accelerator, the host for where a checkpoint comes to.
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(2))])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
    for p in net:
        p.grad = torch.ones_like(p)
    optimizer.step()
    written = TrainingState(net, optimizer).state_dict()
    away = torch.nn.ParameterList([torch.nn.Parameter(torch.ones((), device="meta"))])
    away.append(torch.nn.Parameter(torch.ones(2, device="meta")))
    there = torch.optim.Adam(away.parameters(), lr=0.1)
    there.param_groups[0]["fused"] = fused
    state = TrainingState(away, there)
    state.load_state_dict(written)
    for entry in state.state_dict()["states"].values():
        assert {key: t.device.type for key, t in entry.items()} == {
            "step": "meta" if fused else "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }
