"""The tracker against plain averages, and its gate derivatives against one backward pass per sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import pytest
import torch
from hand_made_graphs import FAMILIES, Mlp, graph_of, group, make, one_each
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from components import importance
from components.channel_sums import channel_sums
from components.dependency import Consumer, DependencyGraph, Member
from components.errors import UserError
from components.importance import MissingStatisticsError
from components.tracker import EVERY, GradientStatistics, ImportanceHistory, ImportanceTracker


def inputs(shape: tuple[int, ...], count: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def train(
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    tracker: ImportanceTracker | None = None,
    watch: Callable[[], None] = lambda: None,
    factor: float = 1.0,
) -> None:
    """A few optimizer steps on random regression; `watch` sees the gradients that the tracker sees."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        x = inputs(shape, seed=step)
        optimizer.zero_grad()
        with tracker.capture() if tracker else nullcontext():
            loss = factor * (model(x) - 0.1).square().mean()
            loss.backward()
        watch()
        if tracker:
            tracker.update()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


# --- averages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_averages_equal_plain_ones(every: int) -> None:
    model, graph, shape = make("mlp")
    names = [name for name, _ in model.named_parameters() if name not in ("left.bias",)]  # outside all groups
    seen: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []

    def watch() -> None:
        parameters = dict(model.named_parameters())
        if len(seen) in (2, 6, 7, 9):  # a unit that is asleep now and then
            parameters["second.weight"].grad[1] = 0.0
        seen.append(
            {n: (parameters[n].grad.numpy().copy(), parameters[n].detach().numpy().copy()) for n in names}
        )

    tracker = ImportanceTracker(graph, model, decay=0.9, every=every)
    train(model, shape, 14, tracker, watch)
    found = tracker.statistics()
    tracked = seen[::every]

    mean_square, scaled = 0.0, []
    for step, gradients in enumerate(tracked, start=1):
        flat = np.concatenate([g.ravel() for g, _ in gradients.values()])
        mean_square = 0.9 * mean_square + 0.1 * np.mean(flat**2)
        scaled.append(np.sqrt(mean_square / (1 - 0.9**step)))
    ages = np.arange(len(tracked))[::-1]
    ema = 0.9**ages / np.sum(0.9**ages)
    i = np.arange(1, len(tracked) + 1)
    tail = i * (i + 1) * (i + 2) / np.sum(i * (i + 1) * (i + 2))

    assert found.steps == len(tracked)
    for name in names:
        g = np.stack([step[name][0] / scale for step, scale in zip(tracked, scaled, strict=True)])
        theta = np.stack([step[name][1] for step in tracked])
        mean = np.tensordot(tail, theta, 1)
        expected = {
            "gradient": np.tensordot(ema, np.abs(g), 1),
            "taylor": np.tensordot(ema, np.abs(theta * g), 1),
            "square": np.tensordot(ema, g**2, 1),
            "mean": mean,
            "variance": np.tensordot(tail, (theta - mean) ** 2, 1),
            "activity": np.tensordot(tail, g != 0, 1),
            "weight": dict(model.named_parameters())[name].detach().numpy(),
        }
        for field, value in expected.items():
            np.testing.assert_allclose(getattr(found, field)[name].numpy(), value, rtol=1e-9, atol=1e-15)


def test_tail_weights_lie_in_the_last_half() -> None:
    i = np.arange(1, 1001)
    weights = i * (i + 1) * (i + 2) / np.sum(i * (i + 1.0) * (i + 2))
    assert weights[500:].sum() > 0.93


def test_scale_of_the_loss_does_not_matter() -> None:
    found = []
    for factor in (1.0, 1024.0):  # a power of two, which rounds nothing
        model, graph, shape = make("mlp")
        tracker = ImportanceTracker(graph, model, every=1)
        for step in range(4):
            model.zero_grad()
            with tracker.capture():
                (factor * model(inputs(shape, seed=step)).square().mean()).backward()
            tracker.update()
        found.append(tracker.statistics().to_tensors())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-12, atol=0.0)


def test_two_losses_are_scaled_apart() -> None:
    """A loss a million times larger elsewhere leaves the other's statistics as they are."""
    found = []
    for factor in (1.0, 1e6):
        model, graph, shape = make("mlp")
        tracker = ImportanceTracker(graph, model, every=1)
        for step in range(5):
            for loss, scale, head in (("left", 1.0, model.left), ("right", factor, model.right)):
                model.zero_grad()
                with tracker.capture(loss):
                    (scale * head(model.hidden(inputs(shape, seed=step))[1]).square().mean()).backward()
                tracker.update(loss)
        found.append(tracker.statistics())
    assert found[0].steps == 10
    for name in ("left.weight", "right.weight", "first.weight"):
        torch.testing.assert_close(found[1].square[name], found[0].square[name], rtol=1e-6, atol=0.0)


def test_every_loss_is_tracked_at_its_own_steps() -> None:
    """Every second step of each of two losses; of their sum, it would be one of them alone."""
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=2)
    for _ in range(6):
        for head in ("left", "right"):
            model.zero_grad()
            with tracker.capture(head):
                getattr(model, head)(model.hidden(inputs(shape))[1]).square().mean().backward()
            tracker.update(head)
    assert tracker.steps == 6
    statistics = tracker.statistics()
    for head in ("left", "right"):
        assert bool(statistics.gradient[f"{head}.weight"].all())


def test_parameter_without_gradient_has_zeros() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)
    for _ in range(3):
        model.zero_grad()
        model.left(model.hidden(inputs(shape))[1]).square().mean().backward()
        tracker.update()
    statistics = tracker.statistics()
    assert model.right.weight.grad is None
    assert not bool(statistics.gradient["right.weight"].any())
    assert not bool(statistics.variance["right.weight"].any())
    assert bool(statistics.gradient["left.weight"].all())
    importance.bayesian(graph, statistics)


def test_gradient_that_is_not_finite_is_left_out() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)
    train(model, shape, 2, tracker)
    before = tracker.statistics().to_tensors()
    model.zero_grad()
    with tracker.capture():
        (model(inputs(shape)).mean() * float("nan")).backward()
    tracker.update()
    model.zero_grad()
    tracker.update()  # no gradients at all
    after = tracker.statistics().to_tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "weight/" not in name)


def test_statistics_are_a_copy() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)
    train(model, shape, 3, tracker)
    statistics = tracker.statistics()
    before = {name: tensor.clone() for name, tensor in statistics.to_tensors().items()}
    train(model, shape, 3, tracker)
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.to_tensors().items())


def test_half_precision_parameters_are_averaged_in_single() -> None:
    model, graph, shape = make("mlp")
    model.to(torch.bfloat16)
    tracker = ImportanceTracker(graph, model, every=1)
    for _ in range(2):
        model.zero_grad()
        hidden = model.norm(model.first(inputs(shape).bfloat16()))
        model.left(model.second(hidden)).square().mean().backward()
        tracker.update()
    assert tracker.statistics().square["first.weight"].dtype == torch.float32


# --- training is not disturbed -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_bit_for_bit(family: str) -> None:
    trained = []
    for tracked in (False, True):
        model, graph, shape = make(family)
        model.float()
        tracker = ImportanceTracker(graph, model, every=2, snapshots=3) if tracked else None
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(9):
            x = inputs(shape, seed=step).float()
            optimizer.zero_grad()
            with tracker.capture() if tracker else nullcontext():
                loss = (model(x) - torch.randn(1)).square().mean()
                loss.backward()
            if tracker:
                tracker.update()
            optimizer.step()
        trained.append({**model.state_dict(), "random": torch.rand(3)})
    assert all(torch.equal(trained[0][name], tensor) for name, tensor in trained[1].items())


def test_many_readers_of_one_tensor_are_not_disturbed() -> None:
    """Gradients of five readers of one tensor are added in the same order."""
    gradients = []
    for tracked in (False, True):
        torch.manual_seed(0)
        trunk, heads = nn.Linear(3, 9), nn.ModuleList(nn.Linear(9, 4) for _ in range(5))
        model = nn.ModuleDict({"trunk": trunk, "heads": heads})
        members = [Member("trunk.weight", 0, one_each(9), False)]
        members += [Member(f"heads.{i}.weight", 1, one_each(9), True) for i in range(5)]
        consumers = [Consumer(f"heads.{i}.weight", "linear", 1, 0, f"heads.{i}.bias") for i in range(5)]
        tracker = ImportanceTracker(graph_of(model, [group("trunk", 9, members)], consumers), model, every=1)
        with tracker.capture() if tracked else nullcontext():
            h = trunk(torch.randn(64, 3)).relu()
            sum(head(h).exp().mean() for head in heads).backward()
        gradients.append(trunk.weight.grad)
    assert torch.equal(*gradients)


# --- gates -------------------------------------------------------------------------------------------------


def gate_oracle(model: nn.Module, graph: DependencyGraph, x: Tensor) -> dict[str, Tensor]:
    """Mean over samples of the squared derivative of one sample's loss by explicit gates on the channels."""
    squared = {g.name: torch.zeros(g.size, dtype=x.dtype) for g in graph.groups}
    for sample in x:
        gates = {g.name: torch.ones(g.size, dtype=x.dtype, requires_grad=True) for g in graph.groups}
        loss = (model(sample[None], gates) - 0.1).square().mean()
        for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            squared[name] += gradient.square() / len(x)
    return squared


def captured(tracker: ImportanceTracker, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gates of one captured step, without the division by the mean square gradient."""
    with tracker.capture():
        loss().backward()
    tracker.update()
    squares = [p.grad.square().flatten() for p in tracker._parameters.values() if p.grad is not None]
    return {name: gate * torch.cat(squares).mean() for name, gate in tracker.statistics().gates.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_equal_one_backward_pass_per_sample(family: str) -> None:
    model, graph, shape = make(family)
    model.eval()  # samples of a training BatchNorm are not independent
    x = inputs(shape)
    tracker = ImportanceTracker(graph, model, every=1)
    found = captured(tracker, lambda: (model(x) - 0.1).square().mean())
    expected = gate_oracle(model, graph, x)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)


def test_gates_of_a_vmapped_ensemble() -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict(
        {"first": torch.randn(3, 4), "w": torch.randn(5, 6, 4), "v": torch.randn(5, 2, 6)}
    )
    model.double()
    graph = graph_of(
        model,
        [
            group("first", 4, [Member("first", 1, one_each(4), False), Member("w", 2, one_each(4), True)]),
            group("w", 6, [Member("w", 1, one_each(6), False), Member("v", 2, one_each(6), True)]),
        ],
        [Consumer("w", "batched", 2, 1, None), Consumer("v", "batched", 2, 1, None)],
    )

    def run(x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        def member(w: Tensor, v: Tensor, a: Tensor) -> Tensor:
            return functional.linear(torch.tanh(functional.linear(a, w)) * gates["w"], v)

        a = torch.tanh(x @ model["first"]) * gates["first"]
        return torch.vmap(member, in_dims=(0, 0, None))(model["w"], model["v"], a).movedim(0, 1).flatten(1)

    x, ones = inputs((3,)), {"first": torch.ones(4), "w": torch.ones(6)}
    found = captured(ImportanceTracker(graph, model, every=1), lambda: (run(x, ones) - 0.1).square().mean())

    class Wrapped(nn.Module):
        def forward(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
            return run(x, gates)

    for name, values in gate_oracle(Wrapped(), graph, x).items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: functional.linear(x, w),
        lambda x, w: functional.linear(input=x, weight=w),
        lambda x, w: x @ w.t(),
        lambda x, w: x.matmul(w.T),
        lambda x, w: torch.mm(x, w.mT),
        lambda x, w: torch.addmm(torch.zeros(2).double(), x, w.t()),
        lambda x, w: (w @ x.t()).t(),
        lambda x, w: torch.matmul(w, x.unsqueeze(-1)).squeeze(-1),
        lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
        lambda x, w: functional.linear(x.unsqueeze(1).expand(-1, 1, -1), w).squeeze(1),
    ],
)
def test_gates_of_every_way_to_multiply(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict({"a": torch.randn(3, 4), "w": torch.randn(2, 4)}).double()
    graph = graph_of(
        model,
        [group("a", 4, [Member("a", 1, one_each(4), False), Member("w", 1, one_each(4), True)])],
        [Consumer("w", "linear", 1, 0, None)],
    )
    x = inputs((3,), count=1)  # one sample: then the number of samples is 1 in any layout
    tracker = ImportanceTracker(graph, model, every=1)
    found = captured(tracker, lambda: product(torch.tanh(x @ model["a"]), model["w"]).square().mean())
    gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = ((torch.tanh(x @ model["a"]) * gate) @ model["w"].t()).square().mean()
    torch.testing.assert_close(
        found["a"], torch.autograd.grad(loss, gate)[0].square(), rtol=1e-10, atol=1e-14
    )


def test_square_weight_used_transposed_is_not_mistaken() -> None:
    """`x @ W` contracts the output axis of a square W: these features are not the group's channels."""
    model = nn.ParameterDict({"a": torch.randn(3, 4), "w": torch.randn(4, 4)})
    graph = graph_of(
        model,
        [group("a", 4, [Member("a", 1, one_each(4), False), Member("w", 1, one_each(4), True)])],
        [Consumer("w", "linear", 1, 0, None)],
    )
    tracker = ImportanceTracker(graph, model, every=1)
    with tracker.capture():
        (torch.randn(5, 3) @ model["a"] @ model["w"]).square().mean().backward()
    tracker.update()
    assert not tracker.statistics().gates


def test_convolution_of_a_single_image_is_one_sample() -> None:
    model, graph, shape = make("convolutional")
    model.eval()
    image = inputs(shape, count=1)
    found = []
    for unbatched in (False, True):
        model.zero_grad()

        def loss(unbatched: bool = unbatched) -> Tensor:
            a = torch.tanh(model.norm(model.a(image)))
            return model.b(a[0] if unbatched else a).square().mean()

        found.append(captured(ImportanceTracker(graph, model, every=1), loss)["a"])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


def test_grouped_convolution_owns_the_same_place_in_every_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.Conv1d(6, 4, 2, groups=2)).double()
    members = [Member("0.weight", 0, torch.tensor([[0, 3], [1, 4], [2, 5]]), False)]
    members += [Member("1.weight", 1, one_each(3), True)]
    consumers = [Consumer("1.weight", "convolution", 1, 0, "1.bias", groups=2)]
    graph = graph_of(model, [group("0", 3, members)], consumers)
    x = inputs((2, 5))
    found = captured(ImportanceTracker(graph, model, every=1), lambda: (model(x) - 0.1).square().mean())

    class Gated(nn.Module):
        def forward(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
            return model[1](model[0](x) * gates["0"].repeat(2).unsqueeze(1))

    torch.testing.assert_close(found["0"], gate_oracle(Gated(), graph, x)["0"], rtol=1e-10, atol=1e-14)


def test_calls_with_other_batches_are_squared_apart() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)
    small, large = inputs(shape, count=3), inputs(shape, count=5, seed=2)
    both = captured(
        tracker, lambda: (model(small) - 0.1).square().mean() + (model(large) - 0.1).square().mean()
    )
    apart = [gate_oracle(model, graph, x) for x in (small, large)]
    for name, values in both.items():
        torch.testing.assert_close(values, apart[0][name] + apart[1][name], rtol=1e-10, atol=1e-14)


def test_targets_without_gradients_are_not_captured() -> None:
    model, graph, shape = make("mlp")
    x = inputs(shape)

    def loss() -> Tensor:
        with torch.no_grad():
            model(x)
        return (model(x) - 0.1).square().mean()

    found = captured(ImportanceTracker(graph, model, every=1), loss)
    for name, values in gate_oracle(model, graph, x).items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-14)


def test_capture_does_nothing_between_tracked_steps() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=4)
    modes = []
    for _ in range(8):
        with tracker.capture():
            modes.append(torch.overrides._len_torch_function_stack() > 0)
            model(inputs(shape)).mean().backward()
        tracker.update()
    assert modes == [True, False, False, False] * 2


def test_capture_left_by_an_exception_is_forgotten() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)

    def fail() -> None:
        with tracker.capture():
            model(inputs(shape)).mean().backward()
            raise RuntimeError("out of memory")

    with tracker.capture():  # never used by an update
        model(inputs(shape)).mean().backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    tracker.update()
    assert not tracker.statistics().gates


# --- history -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "total"), [(100, 100), (100, None), (333, 333), (333, None), (90, 1000)])
def test_history_spans_the_training(steps: int, total: int | None) -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=2, snapshots=10, total_steps=total)
    train(model, shape, steps, tracker)
    history = tracker.history()
    assert len(history.steps) <= 20
    closest = 2 * 8 if total is None else 0  # steps from one snapshot to the next, at first
    assert len(history.steps) >= (min(10, steps // closest if closest else 10) if total != 1000 else 1)
    assert bool((history.steps.diff() > 0).all())
    assert history.steps[0] <= max(max(steps, total or 0) / 9, closest + 1)
    assert history.steps[-1] == steps - (1 - steps % 2)  # the last tracked step
    metrics = {"gradient", "taylor", "fisher", "gate_fisher", "bayesian"}
    assert set(history.scores) == metrics
    for metric in metrics:
        now = importance.score(metric, graph, statistics=tracker.statistics())
        for g in graph.groups:
            course = history.scores[metric][g.name]
            assert course.shape == (len(history.steps), g.size)
            assert bool(course.isfinite().all())
            if metric == "gradient":  # the same but for one factor for each group: see the next test
                ratio = course[-1] / now[g.name].float()
                torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
            elif metric != "fisher":  # which reads the weights as they are now, one step later
                torch.testing.assert_close(course[-1], now[g.name].float())


def test_history_of_gradients_compares_groups_by_their_plain_sums() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1, snapshots=3)
    train(model, shape, 9, tracker)
    plain = channel_sums(graph, tracker.statistics().gradient)
    course = tracker.history().scores["gradient"]
    for g in graph.groups:
        torch.testing.assert_close(course[g.name][-1].mean(), plain[g.name].mean().float())


@pytest.mark.parametrize(("every", "interval", "steps"), [(1, 4, 22), (3, 4, 22), (2, 1, 9), (5, 100, 22)])
def test_history_at_a_chosen_interval_keeps_every_snapshot(every: int, interval: int, steps: int) -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=every, snapshots=2, interval=interval)
    train(model, shape, steps, tracker)
    tracked = range(1, steps + 1, every)
    expected, due = [], interval
    for step in tracked[1:]:
        if step >= due:
            expected.append(step)
            due = (step // interval + 1) * interval
    assert tracker.history().steps.tolist() == sorted({*expected, tracked[-1]})


class Interrupted:
    """A tracker that is stored and replaced by a new one after some steps."""

    def __init__(self, make_tracker: Callable[[], ImportanceTracker], after: int) -> None:
        self.tracker = make_tracker()
        self._make, self._left = make_tracker, after

    def capture(self) -> AbstractContextManager[None]:
        return self.tracker.capture()

    def update(self) -> None:
        self.tracker.update()
        self._left -= 1
        if self._left == 0:
            stored = load(save(self.tracker.to_tensors()))
            self.tracker = self._make()
            self.tracker.load_tensors(stored)


@pytest.mark.parametrize("after", [1, 2, 8, 21])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", [{"every": 1, "snapshots": 2}, {"every": 3}, {"every": 2, "interval": 4}, {"every": 24}]
)
def test_a_stored_tracker_goes_on_with_the_same_bits(
    settings: dict[str, int], family: str, after: int
) -> None:
    model, graph, shape = make(family)
    whole = ImportanceTracker(graph, model, **settings)
    train(model, shape, 22, whole)
    model, graph, shape = make(family)
    parts = Interrupted(lambda: ImportanceTracker(graph, model, **settings), after)
    train(model, shape, 22, cast("ImportanceTracker", parts))
    for expected, found in (
        (whole.statistics().to_tensors(), parts.tracker.statistics().to_tensors()),
        (whole.history().to_tensors(), parts.tracker.history().to_tensors()),
        (whole.to_tensors(), parts.tracker.to_tensors()),
    ):
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_what_another_model_gathered_is_refused() -> None:
    model, graph, _ = make("mlp")
    other, others_graph, shape = make("convolutional")
    gathered = ImportanceTracker(others_graph, other, every=1)
    train(other, shape, 3, gathered)
    with pytest.raises((KeyError, RuntimeError)):
        ImportanceTracker(graph, model, every=1).load_tensors(gathered.to_tensors())


def test_history_without_capture_lacks_gate_fisher_alone() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1, snapshots=3)
    for step in range(5):
        model(inputs(shape, seed=step)).square().mean().backward()
        tracker.update()
    assert set(tracker.history().scores) == {"gradient", "taylor", "fisher", "bayesian"}
    with pytest.raises(MissingStatisticsError, match="activations of group 'first'"):
        importance.gate_fisher(graph, tracker.statistics())


def test_history_of_one_step_is_empty() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model)
    train(model, shape, EVERY, tracker)
    history = tracker.history()
    assert history.steps.tolist() == []
    assert history.scores == {}


# --- storing -----------------------------------------------------------------------------------------------


def test_statistics_survive_storage() -> None:
    model, graph, shape = make("convolutional")
    tracker = ImportanceTracker(graph, model, every=1)
    train(model, shape, 3, tracker)
    statistics = tracker.statistics()
    again = GradientStatistics.from_tensors(load(save(statistics.to_tensors())))
    assert again.steps == 3
    assert again.to_tensors().keys() == statistics.to_tensors().keys()
    for metric in ("gradient", "taylor", "fisher", "gate_fisher", "bayesian"):
        expected = importance.score(metric, graph, statistics=statistics)
        for name, values in importance.score(metric, graph, statistics=again).items():
            assert torch.equal(values, expected[name])


def test_history_survives_storage() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1, snapshots=3)
    train(model, shape, 7, tracker)
    history = tracker.history()
    again = ImportanceHistory.from_tensors(load(save(history.to_tensors())))
    assert torch.equal(again.steps, history.steps)
    assert {m: set(groups) for m, groups in again.scores.items()} == {
        m: set(groups) for m, groups in history.scores.items()
    }
    assert torch.equal(again.scores["taylor"]["first"], history.scores["taylor"]["first"])


def test_damaged_storage_is_refused() -> None:
    model, graph, shape = make("mlp")
    tracker = ImportanceTracker(graph, model, every=1)
    train(model, shape, 2, tracker)
    tensors = tracker.statistics().to_tensors()
    with pytest.raises(UserError, match="have no 'gradients/first'"):
        GradientStatistics.from_tensors({**tensors, "gradients/first": torch.ones(1)})
    del tensors["steps"]
    with pytest.raises(UserError, match="lack 'steps'"):
        GradientStatistics.from_tensors(tensors)
    with pytest.raises(UserError, match="lacks 'steps'"):
        ImportanceHistory.from_tensors({})


# --- misuse ------------------------------------------------------------------------------------------------


def test_statistics_before_any_update_say_so() -> None:
    model, graph, _ = make("mlp")
    with pytest.raises(MissingStatisticsError, match=r"call update\(\) after each backward"):
        ImportanceTracker(graph, model).statistics()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay has to be in \[0, 1\), not 1.0"),
        ({"decay": -0.1}, r"decay has to be in \[0, 1\), not -0.1"),
        ({"every": 0}, "every has to be at least 1, not 0"),
        ({"snapshots": 0}, "snapshots has to be at least 1, not 0"),
        ({"interval": 0}, "interval has to be at least 1, not 0"),
        ({"total_steps": 0}, "total_steps has to be at least 1, not 0"),
    ],
)
def test_values_outside_their_range_are_refused(arguments: dict[str, float], message: str) -> None:
    model, graph, _ = make("mlp")
    with pytest.raises(UserError, match=message):
        ImportanceTracker(graph, model, **arguments)  # type: ignore[arg-type]


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="none of the dependency graph's parameters"):
        ImportanceTracker(Mlp().graph(), nn.Linear(2, 2))
