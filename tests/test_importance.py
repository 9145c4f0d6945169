"""Importance metrics against brute force over channels, and greedy OBS against least squares on the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hand_made_graphs import FAMILIES, graph_of, group, make, one_each
from torch import Tensor, nn
from torch.nn import functional

from components import importance
from components.dependency import Consumer, DependencyGraph, Group, Member
from components.errors import UserError
from components.gram import Gram, Grams, SplitGram
from components.importance import METRICS, MissingStatisticsError, score
from components.tracker import GradientStatistics


def masks_of(graph: DependencyGraph, group: Group, channel: int) -> dict[str, Tensor]:
    """The scalars of one channel, as a mask over each parameter; buffers left out."""
    masks: dict[str, Tensor] = {}
    for member in group.members:
        if "running" in member.parameter:
            continue
        mask = masks.setdefault(
            member.parameter, torch.zeros(graph.shapes[member.parameter], dtype=torch.bool)
        )
        for index in member.indices[channel]:
            mask.select(member.axis, int(index)).fill_(True)
    return masks


def per_channel(
    graph: DependencyGraph, of_channel: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    return {
        g.name: torch.stack([of_channel(masks_of(graph, g, channel)) for channel in range(g.size)])
        for g in graph.groups
    }


def brute_sums(graph: DependencyGraph, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return per_channel(
        graph, lambda masks: torch.stack([values[name][mask].sum() for name, mask in masks.items()]).sum()
    )


def brute_layer_sums(
    graph: DependencyGraph, values: dict[str, Tensor], layer: Callable[[str], str]
) -> dict[str, Tensor]:
    """Sums over each layer, divided by their mean over the channels, then added."""
    totals = {}
    for g in graph.groups:
        layers: dict[str, Tensor] = {}
        for channel in range(g.size):
            for name, mask in masks_of(graph, g, channel).items():
                sums = layers.setdefault(layer(name), torch.zeros(g.size, dtype=torch.float64))
                sums[channel] += values[name][mask].sum()
        totals[g.name] = torch.stack([sums / sums.mean() for sums in layers.values()]).sum(0)
    return totals


def layer_of(name: str) -> str:
    bare = {"shift": "stack"}  # the bias of a bare parameter
    return name.rpartition(".")[0] or bare.get(name, name)


def statistics_of(graph: DependencyGraph, seed: int = 0, steps: int = 9) -> GradientStatistics:
    generator = torch.Generator().manual_seed(seed)

    def positive() -> dict[str, Tensor]:
        return {n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in graph.shapes.items()}

    gates = {g.name: torch.rand(g.size, generator=generator) for g in graph.groups}
    per_parameter = [positive() for _ in range(7)]
    return GradientStatistics(*per_parameter, gates=gates, steps=steps)


def assert_scores(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, DependencyGraph]:
    model, graph, _ = make(request.param)
    return model, graph


# --- sums over channels ------------------------------------------------------------------------------------


def test_channel_sums_equal_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    model, graph = family
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_scores(importance.channel_sums(graph, parameters), brute_sums(graph, parameters))


def test_scalar_on_two_axes_of_a_channel_counts_once() -> None:
    weight = torch.arange(9.0).reshape(3, 3)
    members = [Member("w", 0, one_each(3), False), Member("w", 1, one_each(3), True)]
    graph = DependencyGraph((group("h", 3, members),), {"net": ("",)}, {"w": weight.shape})
    sums = importance.channel_sums(graph, {"w": weight})["h"]
    assert sums.tolist() == [float(weight[c].sum() + weight[:, c].sum() - weight[c, c]) for c in range(3)]


def test_scalar_on_three_axes_with_several_positions_counts_once() -> None:
    cube = torch.rand(4, 4, 4, 3, dtype=torch.float64)
    indices = torch.tensor([[0, 3], [2, 1]])
    members = [Member("w", axis, indices, False) for axis in range(3)]
    graph = DependencyGraph((group("h", 2, members),), {"net": ("",)}, {"w": cube.shape})
    assert_scores(importance.channel_sums(graph, {"w": cube}), brute_sums(graph, {"w": cube}))


def test_two_members_on_one_axis_are_one_channel() -> None:
    weight = torch.rand(2, 6, dtype=torch.float64)
    members = [Member("w", 1, one_each(3), True), Member("w", 1, one_each(3) + 3, True)]
    graph = DependencyGraph((group("h", 3, members),), {"net": ("",)}, {"w": weight.shape})
    assert_scores(importance.channel_sums(graph, {"w": weight}), brute_sums(graph, {"w": weight}))


def test_channel_sums_reads_only_what_is_given() -> None:
    _, graph, _ = make("mlp")
    sums = importance.channel_sums(graph, {"second.bias": torch.ones(5), "unknown": torch.ones(2)})
    assert sums["first"].tolist() == [0.0] * 7
    assert sums["second"].tolist() == [1.0] * 5


def test_half_precision_is_summed_in_single() -> None:
    members = [Member("w", 0, one_each(1), False)]
    graph = DependencyGraph((group("h", 1, members),), {"net": ("",)}, {"w": torch.Size((1, 4096))})
    sums = importance.channel_sums(graph, {"w": torch.ones(1, 4096, dtype=torch.bfloat16)})["h"]
    assert sums.dtype == torch.float32
    assert sums.tolist() == [4096.0]


# --- metrics of parameters ---------------------------------------------------------------------------------


def test_l1_equals_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    model, graph = family
    state = model.state_dict()
    absolute = {name: tensor.abs() for name, tensor in state.items()}
    assert_scores(importance.l1(graph, state), brute_layer_sums(graph, absolute, layer_of))


def test_l2_equals_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    model, graph = family
    state = model.state_dict()
    sums = brute_layer_sums(graph, {name: tensor**2 for name, tensor in state.items()}, layer_of)
    assert_scores(importance.l2(graph, state), {name: values.sqrt() for name, values in sums.items()})


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_scale_of_a_layer_does_not_matter(metric: str) -> None:
    model, graph, _ = make("mlp")
    state = model.state_dict()
    scaled = {name: tensor * (1000.0 if name.startswith("left.") else 1.0) for name, tensor in state.items()}
    assert_scores(score(metric, graph, state=scaled), score(metric, graph, state=state))


def test_layer_of_zeros_adds_nothing() -> None:
    model, graph, _ = make("mlp")
    state = {**model.state_dict(), "right.weight": torch.zeros(3, 5, dtype=torch.float64)}
    without = {name: tensor for name, tensor in state.items() if not name.startswith("right.")}
    members = tuple(m for m in graph.groups[1].members if not m.parameter.startswith("right."))
    smaller = DependencyGraph(
        (graph.groups[0], group("second", 5, members)), graph.components, graph.shapes, graph.consumers
    )
    assert_scores(importance.l1(graph, state), importance.l1(smaller, without))


def test_running_statistics_are_not_scored() -> None:
    model, graph, _ = make("convolutional")
    state = model.state_dict()
    other = {name: tensor + 5 if "running" in name else tensor for name, tensor in state.items()}
    assert_scores(importance.l1(graph, other), importance.l1(graph, state))


def test_missing_parameter_is_named() -> None:
    model, graph, _ = make("mlp")
    state = model.state_dict()
    del state["norm.weight"]
    with pytest.raises(UserError, match=r"no parameter 'norm\.weight'"):
        importance.l2(graph, state)


# --- metrics of training statistics ------------------------------------------------------------------------


def test_gradient_equals_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    _, graph = family
    statistics = statistics_of(graph)
    expected = brute_layer_sums(graph, dict(statistics.gradient), layer_of)
    assert_scores(importance.gradient(graph, statistics), expected)


def test_taylor_equals_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    _, graph = family
    statistics = statistics_of(graph)
    assert_scores(importance.taylor(graph, statistics), brute_sums(graph, dict(statistics.taylor)))


def test_fisher_equals_brute_force(family: tuple[nn.Module, DependencyGraph]) -> None:
    _, graph = family
    s = statistics_of(graph)
    expected = brute_sums(graph, {name: s.weight[name] ** 2 * s.square[name] / 2 for name in s.weight})
    assert_scores(importance.fisher(graph, s), expected)


def test_bayesian_is_signal_to_noise(family: tuple[nn.Module, DependencyGraph]) -> None:
    _, graph = family
    s = statistics_of(graph)
    signal = brute_sums(graph, {name: s.activity[name] * mean**2 for name, mean in s.mean.items()})
    noise = brute_sums(graph, {name: s.activity[name] * variance for name, variance in s.variance.items()})
    expected = {name: signal[name] / (noise[name] + 1e-3 * noise[name].mean()) for name in signal}
    assert_scores(importance.bayesian(graph, s), expected)


@pytest.mark.parametrize("activity", [0.0, 1e-4])
def test_bayesian_does_not_take_dead_units_for_certain(activity: float) -> None:
    """A unit that received no gradient, or none since early on, stands still."""
    _, graph, _ = make("mlp")
    s = statistics_of(graph)
    for member in graph.by_name["first"].members:
        s.variance[member.parameter].select(member.axis, 2).fill_(1e-9)
        s.activity[member.parameter].select(member.axis, 2).fill_(activity)
    assert int(importance.bayesian(graph, s)["first"].argmin()) == 2


def test_gate_fisher_hands_out_a_copy() -> None:
    _, graph, _ = make("mlp")
    statistics = statistics_of(graph)
    scores = importance.gate_fisher(graph, statistics)
    assert_scores(scores, dict(statistics.gates))
    scores["first"].zero_()
    assert bool((statistics.gates["first"] > 0).any())


def test_missing_statistics_name_the_parameter() -> None:
    _, graph, _ = make("mlp")
    statistics = statistics_of(graph)
    del statistics.square["second.bias"]  # type: ignore[attr-defined]
    with pytest.raises(MissingStatisticsError, match=r"never saw parameter 'second\.bias'"):
        importance.fisher(graph, statistics)


def test_missing_gate_names_the_group() -> None:
    _, graph, _ = make("mlp")
    statistics = statistics_of(graph)
    del statistics.gates["second"]  # type: ignore[attr-defined]
    with pytest.raises(MissingStatisticsError, match=r"activations of group 'second'.*capture"):
        importance.gate_fisher(graph, statistics)


def test_bayesian_needs_two_steps() -> None:
    _, graph, _ = make("mlp")
    with pytest.raises(MissingStatisticsError, match="at least two tracked steps, not 1"):
        importance.bayesian(graph, statistics_of(graph, steps=1))


# --- greedy reconstruction ---------------------------------------------------------------------------------


def repair_error(rows: Tensor, matrix: Tensor, gone: list[int], ridge: float) -> float:
    """The least error of any matrix without the columns `gone`, by least squares on the rows themselves.

    Error: mean squared difference of outputs plus `ridge` times that of the weights.
    """
    penalty = (len(rows) * ridge) ** 0.5 * torch.eye(rows.shape[1], dtype=rows.dtype)
    design = torch.cat([rows, penalty])  # the penalty as additional rows
    targets = design @ matrix.T
    kept = [column for column in range(rows.shape[1]) if column not in set(gone)]
    if not kept:
        return float(targets.square().sum()) / len(rows)
    fitted = torch.linalg.lstsq(design[:, kept], targets, driver="gelsd").solution
    return float((targets - design[:, kept] @ fitted).square().sum()) / len(rows)


Reader = tuple[Tensor, Tensor, Tensor, bool]
"""Rows `(E, n, d)`, matrices `(E, out, d)`, the columns `(size, k)` of each channel, and has it a bias."""


def brute_order(readers: list[Reader], ridge: float = importance.RIDGE) -> Tensor:
    """Remove what leaves the least repaired error, over all remaining channels, from scratch every time."""
    size = len(readers[0][2])
    order = torch.full((size,), float(size))
    gone: list[int] = []
    for step in range(1, size):
        best, least = -1, float("inf")
        for channel in set(range(size)) - set(gone):
            error = 0.0
            for rows, matrices, columns, has_bias in readers:
                outputs = rows @ matrices.mT
                variance = float((outputs - outputs.mean(1, keepdim=True)).square().sum()) / rows.shape[1]
                removed = columns[[*gone, channel]].flatten().tolist()
                for x, matrix in zip(rows - has_bias * rows.mean(1, keepdim=True), matrices, strict=True):
                    scale = ridge * float(x.square().mean())
                    error += repair_error(x, matrix, removed, scale) / variance
            if error < least:
                best, least = channel, error
        gone.append(best)
        order[best] = step
    return order


def grams_of(rows: dict[str, Tensor]) -> Grams:
    """Half of the rows to fit, half held out."""
    halves = {name: x.chunk(2, dim=-2) for name, x in rows.items()}
    return Grams({name: SplitGram(Gram.of(a), Gram.of(b)) for name, (a, b) in halves.items()})


@pytest.mark.parametrize("seed", range(3))
def test_reconstruction_of_two_consumers_equals_least_squares(seed: int) -> None:
    model, graph, _ = make("mlp", seed)
    with torch.no_grad():
        a, b = model.hidden(torch.randn(40, 6, dtype=torch.float64))
    scores = importance.reconstruction(
        graph, model.state_dict(), grams_of({"second.weight": a, "left.weight": b, "right.weight": b})
    )
    heads = [model.left, model.right]
    second = [(b[None], head.weight.detach()[None], one_each(5), head.bias is not None) for head in heads]
    first = [(a[None], model.second.weight.detach()[None], one_each(7), True)]
    assert_scores(scores, {"first": brute_order(first), "second": brute_order(second)})


def test_reconstruction_of_kernels_and_flattened_channels_equals_least_squares() -> None:
    model, graph, shape = make("convolutional")
    model.eval()
    with torch.no_grad():
        x = torch.randn(30, *shape, dtype=torch.float64)
        a = torch.tanh(model.norm(model.a(x)))
        b = torch.tanh(model.b(a))
    patches = (
        functional.unfold(a, 3, padding=1, stride=2).movedim(1, 2).flatten(0, 1)
    )  # (samples * positions, 27)
    scores = importance.reconstruction(
        graph, model.state_dict(), grams_of({"b.weight": patches, "out.weight": b.flatten(1)})
    )
    kernel = model.b.weight.detach().flatten(1)
    first = [(patches[None], kernel[None], torch.arange(27).reshape(3, 9), True)]
    last = model.out.weight.detach()
    second = [(b.flatten(1)[None], last[None], torch.arange(16).reshape(4, 4), True)]
    assert_scores(scores, {"a": brute_order(first), "b": brute_order(second)})


def test_reconstruction_of_stacks_and_transposed_layouts_equals_least_squares() -> None:
    model, graph, _ = make("functional")
    a = torch.randn(3, 50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    h = torch.randn(50, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    pixels = 1 + torch.randn(50, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    state = model.state_dict()
    scores = importance.reconstruction(graph, state, grams_of({"stack": a, "b": h, "up": pixels}))
    up = state["up"].permute(1, 0, 2, 3).flatten(1)
    assert_scores(
        scores,
        {
            "a": brute_order([(a, state["stack"].mT, one_each(6), True)]),
            "stack": brute_order([(h[None], state["b"][None], one_each(5), False)]),
            "b": brute_order([(pixels[None], up[None], torch.arange(8).reshape(2, 4), False)]),
        },
    )


def test_reconstruction_uses_columns_that_stay_and_wide_outputs() -> None:
    """The head also reads inputs that are never removed, and has more outputs than inputs."""
    torch.manual_seed(3)
    head = nn.Linear(8, 30, bias=False).double()
    members = [Member("weight", 1, one_each(5) + 1, True)]
    graph = graph_of(head, [group("h", 5, members)], [Consumer("weight", "linear", 1, 0, None)])
    x = torch.randn(60, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    scores = importance.reconstruction(graph, head.state_dict(), grams_of({"weight": x}))
    assert_scores(scores, {"h": brute_order([(x[None], head.weight.detach()[None], one_each(5) + 1, False)])})


def test_reconstruction_of_a_grouped_convolution_equals_least_squares() -> None:
    torch.manual_seed(4)
    layer = nn.Conv1d(6, 4, 2, groups=2, bias=False).double()  # weight: (4, 3, 2)
    members = [Member("weight", 1, one_each(3), True)]
    graph = graph_of(
        layer, [group("h", 3, members)], [Consumer("weight", "convolution", 1, 0, None, groups=2)]
    )
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    scores = importance.reconstruction(graph, layer.state_dict(), grams_of({"weight": x}))
    matrices = layer.weight.detach().reshape(2, 2, 6)
    assert_scores(scores, {"h": brute_order([(x, matrices, torch.arange(6).reshape(3, 2), False)])})


def test_reconstruction_sees_redundancy() -> None:
    """Of two equal channels one is free, the other then worth both: one-shot ranking would drop the pair."""
    torch.manual_seed(5)
    head = nn.Linear(4, 6, bias=False).double()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([1.0, 1.0, 0.3, 0.1], dtype=torch.float64))
    x = torch.randn(80, 4, dtype=torch.float64)
    x[:, 1] = x[:, 0]
    graph = graph_of(
        head,
        [group("h", 4, [Member("weight", 1, one_each(4), True)])],
        [Consumer("weight", "linear", 1, 0, None)],
    )
    order = importance.reconstruction(graph, head.state_dict(), grams_of({"weight": x}))["h"]
    assert sorted(order[:2].tolist()) == [1.0, 4.0]


@pytest.mark.parametrize("rows", [40, 300])
def test_reconstruction_of_many_channels_is_a_permutation(rows: int) -> None:
    """Past several compactions, with an input that never varies, one that repeats another, and few rows."""
    torch.manual_seed(6)
    head = nn.Linear(60, 7).double()
    x = torch.randn(rows, 60, dtype=torch.float64)
    x[:, 11], x[:, 12] = 3.0, x[:, 13]
    graph = graph_of(
        head,
        [group("h", 60, [Member("weight", 1, one_each(60), True)])],
        [Consumer("weight", "linear", 1, 0, "bias")],
    )
    order = importance.reconstruction(graph, head.state_dict(), grams_of({"weight": x}))["h"]
    assert sorted(order.tolist()) == list(range(1, 61))
    if rows > 60:  # the constant, which the bias takes over, and one of the pair cost nothing
        assert {float(order[11]), float(order[12:14].min())} == {1.0, 2.0}


def test_reconstruction_of_a_group_nobody_reads_is_neutral() -> None:
    graph = DependencyGraph(
        (group("h", 3, [Member("w", 0, one_each(3), False)]),), {"net": ("",)}, {"w": torch.Size((3, 2))}
    )
    assert importance.reconstruction(graph, {"w": torch.ones(3, 2)}, Grams({}))["h"].tolist() == [
        1.0,
        1.0,
        1.0,
    ]


def test_consumer_with_zero_output_is_no_obstacle() -> None:
    model, graph, _ = make("mlp")
    state = {
        name: torch.zeros_like(t) if name.startswith("right") else t for name, t in model.state_dict().items()
    }
    with torch.no_grad():
        a, b = model.hidden(torch.randn(40, 6, dtype=torch.float64))
    grams = grams_of({"second.weight": a, "left.weight": b, "right.weight": b})
    order = importance.reconstruction(graph, state, grams)["second"]
    assert_scores(
        {"h": order}, {"h": brute_order([(b[None], state["left.weight"][None], one_each(5), True)])}
    )


def test_missing_gram_names_weight_and_group() -> None:
    model, graph, _ = make("mlp")
    with pytest.raises(
        MissingStatisticsError, match=r"Gram matrix of 'second\.weight', which reads group 'first'"
    ):
        importance.reconstruction(graph, model.state_dict(), Grams({}))


def test_reconstruction_rejects_what_is_not_finite_or_does_not_fit() -> None:
    model, graph, _ = make("mlp")
    rows = {
        "second.weight": torch.randn(9, 7),
        "left.weight": torch.randn(9, 5),
        "right.weight": torch.randn(9, 5),
    }
    state = model.state_dict()
    bad = {**state, "left.weight": torch.full_like(state["left.weight"], float("nan"))}
    with pytest.raises(UserError, match=r"weight 'left\.weight' is not finite"):
        importance.reconstruction(graph, bad, grams_of(rows))
    with pytest.raises(UserError, match=r"Gram matrix of 'second\.weight' is not finite"):
        importance.reconstruction(
            graph, state, grams_of({**rows, "second.weight": torch.full((9, 7), float("inf"))})
        )
    with pytest.raises(UserError, match=r"'left\.weight' is \(1, 4, 4\), which does not fit"):
        importance.reconstruction(graph, state, grams_of({**rows, "left.weight": torch.randn(9, 4)}))


# --- by name -----------------------------------------------------------------------------------------------


def test_every_metric_scores_every_channel_and_changes_nothing() -> None:
    model, graph, _ = make("mlp")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = statistics_of(graph)
    before = {name: tensor.clone() for name, tensor in statistics.to_tensors().items()}
    rows = {
        "second.weight": torch.randn(20, 7),
        "left.weight": torch.randn(20, 5),
        "right.weight": torch.randn(20, 5),
    }
    for name in METRICS:
        scores = score(name, graph, state=state, statistics=statistics, grams=grams_of(rows), seed=3)
        assert {group: tuple(values.shape) for group, values in scores.items()} == {
            "first": (7,),
            "second": (5,),
        }
        assert all(bool((values >= 0).all() & values.isfinite().all()) for values in scores.values())
        assert all(values.is_floating_point() for values in scores.values())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.to_tensors().items())


def test_unknown_metric_names_the_nearest() -> None:
    _, graph, _ = make("mlp")
    with pytest.raises(UserError, match="no importance metric 'fischer': did you mean 'fisher'"):
        score("fischer", graph)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("l2", "state"), ("fisher", "statistics"), ("reconstruction", "grams"), ("random", "seed")],
)
def test_metric_without_its_data_says_what_it_needs(name: str, missing: str) -> None:
    model, graph, _ = make("mlp")
    state = None if missing == "state" else model.state_dict()
    with pytest.raises(MissingStatisticsError, match=f"metric '{name}' needs .*pass {missing}="):
        score(name, graph, state=state)


def test_random_depends_on_the_seed_alone() -> None:
    _, graph, _ = make("mlp")
    assert_scores(importance.random(graph, 7), importance.random(graph, 7), tolerance=0.0)
    assert not torch.equal(importance.random(graph, 7)["first"], importance.random(graph, 8)["first"])
