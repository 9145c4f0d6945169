"""What must hold for every family of models, against an oracle that masks channels and knows no graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, Family, Maskable, program, randomise
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

import components
from components import DependencyGraph, Group, Member, UnsupportedOperatorError, UserError
from components.pruning import restricted

TOLERANCE = 1e-12
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@functools.cache
def graph_of(family: Family) -> DependencyGraph:
    return components.trace(family.model(), program, components=family.components, ties=family.ties)


def random_keep(graph: DependencyGraph, seed: int, share: float | None, least: int = 1) -> dict[str, Tensor]:
    """Random channels of every group: this share, or (None) a random one for each, 2 % to all."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in graph.groups:
        of_group = 50 ** -float(torch.rand(1, generator=generator)) if share is None else share
        count = max(least, round(of_group * group.size))
        keep[group.name] = torch.zeros(group.size, dtype=torch.bool)
        keep[group.name][torch.randperm(group.size, generator=generator)[:count]] = True
    return keep


pytestmark = pytest.mark.usefixtures("one_thread")


KEEPS = [(0, 0.5), (1, 0.02), (2, None), (3, None)]


def copy_of(
    family: Family, state: Mapping[str, Tensor], keep: Mapping[str, Tensor] | None = None
) -> Maskable:
    """A model with this state: as wide as `keep` leaves it, or of the family's own widths."""
    widths = {name: int(mask.sum()) for name, mask in keep.items()} if keep is not None else family.widths
    model = family.empty(widths)
    model.load_state_dict(state)
    return model


def masked_copy(family: Family, model: Maskable, keep: Mapping[str, Tensor]) -> Maskable:
    masked = copy_of(family, model.state_dict())
    masked.masks = dict(keep)
    return masked


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    assert actual.shape == expected.shape, what
    worst = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert worst <= TOLERANCE * scale, f"{what}: {worst:.1e} off at scale {scale:.1e}"


@dataclass(frozen=True)
class Expected:
    """What the masked model computes, and the buffers that it updates, cut to what is kept."""

    outputs: dict[str, Tensor]
    buffers: dict[str, Tensor]


def masked_run(family: Family, model: Maskable, keep: Mapping[str, Tensor]) -> Expected:
    masked = masked_copy(family, model, keep)
    with torch.no_grad():
        outputs = masked.run()
    external = family.external(outputs)
    kept = {name: out if name in external else out[..., keep["latent"]] for name, out in outputs.items()}
    return Expected(kept, components.prune(graph_of(family), dict(masked.named_buffers()), keep))


def assert_sliced_is(
    family: Family, expected: Expected, state: Mapping[str, Tensor], keep: Mapping[str, Tensor]
) -> None:
    sliced = copy_of(family, state, keep)
    with torch.no_grad():
        actual = sliced.run()
    for name, output in expected.outputs.items():
        assert_close(actual[name], output, name)
    for name, buffer in expected.buffers.items():
        assert_close(sliced.get_buffer(name), buffer, name)


def assert_equivalent(
    family: Family, graph: DependencyGraph, model: Maskable, keep: Mapping[str, Tensor]
) -> None:
    """The sliced model computes what the masked one does: all outputs, and the buffers that it updates."""
    state = components.prune(graph, model.state_dict(), keep)
    assert_sliced_is(family, masked_run(family, model, keep), state, keep)


# --- what is found -----------------------------------------------------------------------------------------


@every_family
def test_finds_exactly_the_expected_groups(family: Family) -> None:
    graph = graph_of(family)
    assert list(graph.widths.items()) == list(family.widths.items())
    everything = {name: set(family.components) for name in family.widths}
    for group in graph.groups:
        assert group.components == (family.couplings or everything)[group.name], group.name
        assert group.is_coupling == (len(group.components) > 1)
    assert graph.shapes == {
        name: tensor.shape
        for name, tensor in family.model().state_dict().items()
        if name not in (graph.aliases or {})
    }


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_the_graph_without_some_channels_is_that_of_the_narrower_model(family: Family, seed: int) -> None:
    graph = graph_of(family)
    noise = torch.Generator().manual_seed(seed)
    keep = {
        name: torch.randperm(size, generator=noise) < max(2, round(0.4 * size))
        for name, size in family.widths.items()
    }
    narrow = family.model({name: int(mask.sum()) for name, mask in keep.items()})
    traced = components.trace(narrow, program, components=family.components, ties=family.ties)
    found = restricted(graph, keep)
    assert found.widths == traced.widths
    assert found.shapes == traced.shapes
    assert found.consumers == traced.consumers
    for ours, theirs in zip(found.groups, traced.groups, strict=True):
        assert ours.components == theirs.components
        assert slices_of(ours) == slices_of(theirs)


def slices_of(group: Group) -> set[frozenset[tuple[str, int, int, bool]]]:
    """What every channel owns, in whatever order channels come."""
    return {
        frozenset(
            (member.parameter, member.axis, int(index), member.consumes)
            for member in group.members
            for index in member.indices[channel]
        )
        for channel in range(group.size)
    }


@every_family
def test_every_index_is_in_at_most_one_channel(family: Family) -> None:
    graph = graph_of(family)
    owners: dict[tuple[str, int, int], tuple[str, int]] = {}
    for group in graph.groups:
        for member in group.members:
            assert member.indices.shape[0] == group.size
            for channel, indices in enumerate(member.indices.tolist()):
                for index in indices:
                    place = member.parameter, member.axis, index
                    assert place not in owners, place
                    assert 0 <= index < graph.shapes[member.parameter][member.axis]
                    owners[place] = group.name, channel


@every_family
def test_tracing_is_deterministic(family: Family) -> None:
    again = components.trace(family.model(seed=5), program, components=family.components, ties=family.ties)
    first = graph_of(family)
    assert again.widths == first.widths
    assert again.consumers == first.consumers
    for group, other in zip(first.groups, again.groups, strict=True):
        for member, same in zip(group.members, other.members, strict=True):
            assert (member.parameter, member.axis) == (same.parameter, same.axis)
            assert torch.equal(member.indices, same.indices)


@every_family
def test_consumers_read_what_they_say(family: Family) -> None:
    """The layers that may be refitted: their axes are right, and nothing else uses their weight or bias."""
    graph = graph_of(family)
    state = family.model().state_dict()
    assert len({consumer.weight for consumer in graph.consumers}) == len(graph.consumers)
    producing = {(m.parameter, m.axis): g.name for g in graph.groups for m in g.members if not m.consumes}
    reading = {(m.parameter, m.axis) for g in graph.groups for m in g.members if m.consumes}
    for consumer in graph.consumers:
        assert (consumer.weight, consumer.output_axis) not in reading
        assert (consumer.weight, consumer.input_axis) not in producing
        if consumer.bias is not None:
            outputs = state[consumer.weight].shape[consumer.output_axis] * (
                consumer.groups if consumer.kind == "transposed_convolution" else 1
            )
            assert state[consumer.bias].shape[-1] == outputs
            of_bias = producing.get((consumer.bias, state[consumer.bias].dim() - 1))
            assert of_bias == producing.get((consumer.weight, consumer.output_axis))


def test_a_weight_with_two_uses_is_no_consumer_to_refit() -> None:
    consumers = {
        name: {c.weight: c.bias for c in graph_of(f).consumers} for f in FAMILIES if (name := f.name)
    }
    assert consumers["tied"] == {}
    assert "step.weight" not in consumers["shared"]  # one weight, two biases
    assert consumers["embedding"] == {"mix.weight": None}  # the table is read by rows as well
    assert consumers["attention"]["head.weight"] == "head.bias"  # called on different shapes
    assert consumers["gru"]["cell.weight_hh"] == "cell.bias_hh"
    assert consumers["vmap_ensemble"]["stack.second_weight"] == "stack.second_bias"


# --- sliced is masked --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "share"), KEEPS)
@every_family
def test_sliced_equals_masked(family: Family, seed: int, share: float | None) -> None:
    graph, model = graph_of(family), family.model(seed=seed)
    assert_equivalent(family, graph, model, random_keep(graph, seed, share))


@every_family
def test_one_group_at_a_time(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=4)
    some = random_keep(graph, 4, 0.3)
    for group in graph.groups:
        assert_equivalent(family, graph, model, {**graph.keep_all(), group.name: some[group.name]})


@every_family
def test_keeping_everything_is_bit_identical(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=1)
    for keep in (graph.keep_all(), {}):
        state = components.prune(graph, model.state_dict(), keep)
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor)
    with torch.no_grad():
        actual, expected = copy_of(family, state).run(), copy_of(family, model.state_dict()).run()
    for name, output in expected.items():
        assert torch.equal(actual[name], output)


@every_family
def test_pruning_twice_is_pruning_by_the_intersection(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=2)
    first = random_keep(graph, 2, 0.5, least=2)
    once = copy_of(family, components.prune(graph, model.state_dict(), first), first)
    again = components.trace(once, program, components=family.components, ties=family.ties)
    assert again.widths == {name: int(mask.sum()) for name, mask in first.items()}
    second = random_keep(again, 3, 0.5)
    both = {name: mask.clone() for name, mask in first.items()}
    for name, mask in both.items():
        mask[first[name]] = second[name]
    expected = components.prune(graph, model.state_dict(), both)
    for name, tensor in components.prune(again, once.state_dict(), second).items():
        assert torch.equal(tensor, expected[name])


@every_family
def test_order_within_a_group_does_not_matter(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    for group in graph.groups:
        order = torch.randperm(group.size, generator=generator)
        for member in group.members:
            tensor = state[member.parameter].movedim(member.axis, 0)  # a view
            tensor[member.indices.flatten()] = tensor[member.indices[order].flatten()].clone()
    for alias, name in (graph.aliases or {}).items():
        state[alias] = state[name]
    with torch.no_grad():
        expected = family.external(copy_of(family, model.state_dict()).run())
        actual = family.external(copy_of(family, state).run())
    assert any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for name, output in expected.items():
        assert_close(actual[name], output, name)


@every_family
def test_training_goes_on_as_if_masked(family: Family) -> None:
    """Five Adam steps with moments sliced mid-training; what the masked model masks counts nothing."""
    graph, model = graph_of(family), family.model(seed=4)
    keep = random_keep(graph, 4, 0.4)
    masked = masked_copy(family, model, keep)
    sliced = copy_of(family, components.prune(graph, model.state_dict(), keep), keep)
    generator = torch.Generator().manual_seed(4)
    moments = {
        name: torch.randn(p.shape, generator=generator).double() for name, p in model.named_parameters()
    }
    squares = {name: moment.square() + 0.5 for name, moment in moments.items()}

    def optimiser(of: Maskable, mean: Mapping[str, Tensor], square: Mapping[str, Tensor]) -> torch.optim.Adam:
        adam = torch.optim.Adam(of.parameters(), lr=0.01)
        for name, parameter in of.named_parameters():
            adam.state[parameter] = {
                "step": torch.tensor(7.0),
                "exp_avg": mean[name].clone(),
                "exp_avg_sq": square[name].clone(),
            }
        return adam

    models = {
        masked: optimiser(masked, moments, squares),
        sliced: optimiser(
            sliced, components.prune(graph, moments, keep), components.prune(graph, squares, keep)
        ),
    }
    for _ in range(5):
        for trained, adam in models.items():
            adam.zero_grad()
            outputs = family.external(trained.run()).values()
            sum((torch.sin(out) * (1 + torch.arange(out.shape[-1]))).sum() for out in outputs).backward()
            adam.step()
    state = components.prune(graph, masked.state_dict(), keep)
    for name, tensor in sliced.state_dict().items():
        assert_close(tensor, state[name], name)
    assert any(
        not torch.equal(tensor, model.state_dict()[name]) for name, tensor in masked.state_dict().items()
    )


# --- seeded faults: the checks above can fail --------------------------------------------------------------


def with_member(graph: DependencyGraph, group: Group, number: int, indices: Tensor | None) -> DependencyGraph:
    """The graph with the indices of one member replaced, or (None) with the member forgotten."""
    members: list[Member] = list(group.members)
    if indices is None:
        del members[number]
    else:
        members[number] = replace(members[number], indices=indices)
    faulty = replace(group, members=tuple(members))
    return replace(graph, groups=tuple(faulty if g.name == group.name else g for g in graph.groups))


@every_family
def test_every_member_off_by_one_channel_is_caught(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=5)
    state, keep = model.state_dict(), random_keep(graph, 5, 0.5)
    expected = masked_run(family, model, keep)
    assert_sliced_is(family, expected, components.prune(graph, state, keep), keep)
    for group in graph.groups:
        for number, member in enumerate(group.members):
            faulty = with_member(graph, group, number, member.indices.roll(1, 0))
            with pytest.raises(AssertionError, match="off at scale"):
                assert_sliced_is(family, expected, components.prune(faulty, state, keep), keep)


@every_family
def test_every_forgotten_member_is_caught(family: Family) -> None:
    graph, model = graph_of(family), family.model(seed=5)
    keep = random_keep(graph, 5, 0.5)
    for group in graph.groups:
        for number in range(len(group.members)):
            faulty = with_member(graph, group, number, None)
            with pytest.raises(RuntimeError, match="size mismatch"):
                copy_of(family, components.prune(faulty, model.state_dict(), keep), keep)


def family_named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def member_number(group: Group, parameter: str, axis: int = 0) -> int:
    return next(i for i, m in enumerate(group.members) if (m.parameter, m.axis) == (parameter, axis))


def test_shifted_cat_offset_is_caught() -> None:
    family = family_named("cat")
    graph, model = graph_of(family), family.model()
    keep = random_keep(graph, 0, 0.5)
    group = graph.by_name["b"]
    number = member_number(group, "c.weight", axis=1)
    indices = group.members[number].indices
    assert indices[:, 0].tolist() == list(range(53, 103))  # behind 50 channels and 3 slots of data
    state = components.prune(with_member(graph, group, number, indices - 1), model.state_dict(), keep)
    with pytest.raises(AssertionError, match="off at scale"):
        assert_sliced_is(family, masked_run(family, model, keep), state, keep)


def test_reordered_layer_norm_is_caught() -> None:
    family = family_named("layer_norm")
    graph, model = graph_of(family), family.model()
    keep = random_keep(graph, 0, 0.5)
    state = components.prune(graph, model.state_dict(), keep)
    state["norm.weight"] = state["norm.weight"].flip(0)
    with pytest.raises(AssertionError, match="off at scale"):
        assert_sliced_is(family, masked_run(family, model, keep), state, keep)


def test_bias_cut_at_the_wrong_end_is_caught() -> None:
    family = family_named("mlp")
    graph, model = graph_of(family), family.model()
    keep = random_keep(graph, 0, 0.5)
    state = components.prune(graph, model.state_dict(), keep)
    state["a.bias"] = model.state_dict()["a.bias"][: len(state["a.bias"])]
    with pytest.raises(AssertionError, match="off at scale"):
        assert_sliced_is(family, masked_run(family, model, keep), state, keep)


# --- tracing leaves no trace -------------------------------------------------------------------------------


@every_family
def test_tracing_changes_nothing(family: Family) -> None:
    model = family.model(seed=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    identities = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    versions = {name: tensor._version for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    components.trace(model, program, components=family.components, ties=family.ties)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name])
        assert id(tensor) == identities[name]
        assert tensor.grad is None
    assert {name: tensor._version for name, tensor in model.named_parameters()} == versions
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks


class Meddler(nn.Module):
    """A model that changes all it can reach while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.a(x))
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * torch.ones(4)
        self.scale.mul_(2.0)
        self.b.weight.mul_(1.5)
        self.eval()
        return self.b(h)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_run_changes_is_put_back(fails: bool) -> None:
    model, x = Meddler(), torch.randn(5, 3)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    mean, state = model.mean, torch.get_rng_state()

    def run(model: nn.Module) -> dict[str, Tensor]:
        outputs = {"y": model(x)}
        if fails:
            raise KeyError("stop")
        return outputs

    if fails:
        with pytest.raises(KeyError, match="stop"):
            components.trace(model, run, components={"all": [""]})
    else:
        graph = components.trace(model, run, components={"all": [""]})
        assert graph.widths == {"a": 4}
    assert model.training
    assert model.b.training
    assert model.mean is mean
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, before[name]), name
    assert not module_hooks._global_forward_hooks


# --- what it refuses ---------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)})
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.net["b"](self.step(self.net["a"](x)))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def run_two(model: nn.Module) -> dict[str, Tensor]:
    return {"y": model(X)}


def test_an_operator_without_a_rule_is_named_with_its_place() -> None:
    with pytest.raises(UnsupportedOperatorError) as raised:
        components.trace(Two(lambda h: h.flip(-1)), run_two, components={"all": ["net"]})
    message = str(raised.value)
    assert "aten.flip.default" in message
    assert "module 'Two'" in message
    assert "components/operators.py" in message
    model = Two()
    model.step = nn.Sequential(nn.Identity(), Inner())
    with pytest.raises(UnsupportedOperatorError, match=r"aten\.flip\.default in module 'step\.1'"):
        components.trace(model, run_two, components={"all": ["net"]})
    with pytest.raises(UnsupportedOperatorError, match="the program itself"):
        components.trace(
            Two(), lambda m: {"y": m.net["b"](m.net["a"](X).roll(1, -1))}, components={"all": ["net"]}
        )


def test_operators_on_data_alone_need_no_rule() -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        x = X.flip(-1).roll(1, 0).cumsum(0).sort(0).values
        index = torch.bucketize(x, torch.linspace(-1, 1, 3)).unique().float()
        return {"y": model(x) * index.mean(), "median": torch.linalg.svdvals(x)}

    assert components.trace(Two(), run, components={"all": ["net"]}).widths == {"net.a": 8}


def test_constants_need_no_rule() -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        causal = torch.full((4, 4), float("-inf")).triu(1).softmax(-1).nan_to_num()
        return {"y": model.net["b"](causal @ model.net["a"](X))}

    assert components.trace(Two(), run, components={"all": ["net"]}).widths == {"net.a": 8}


def test_a_view_made_before_tracing_is_refused() -> None:
    model = Two()
    transposed, rows = model.net["a"].weight.t(), model.net["a"].weight[:4]
    for view in (transposed, rows):
        with pytest.raises(UnsupportedOperatorError, match=r"view of parameter 'net\.a\.weight'"):
            components.trace(model, lambda m, view=view: {"y": view * 2}, components={"all": [""]})
    same = model.net["b"].weight.data  # the whole parameter, under another name

    def run(model: nn.Module) -> dict[str, Tensor]:
        return {"y": torch.relu(model.net["a"](X)) @ same.t()}

    graph = components.trace(model, run, components={"all": [""]})
    assert [(m.parameter, m.axis) for m in graph.by_name["net.a"].members] == [
        ("net.a.weight", 0),
        ("net.a.bias", 0),
        ("net.b.weight", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"components": {"all": ["net.a"]}}, r"parameter 'net\.b\.weight' belongs to no component"),
        ({"components": {}}, r"parameter 'net\.a\.weight' belongs to no component"),
        ({"components": {"all": ["net"], "q": ["_q1"]}}, r"component 'q' covers no parameter.*_q1"),
        (
            {"ties": [("y", "latnet")]},
            r"'latnet', which the program does not return; did you mean 'latent'\?",
        ),
        ({"ties": [("latent", "y")]}, "joins last axes of 8 and 3 channels"),
        ({"ties": [("loss", "loss")]}, "'loss', which is a scalar"),
        ({"ties": ["latent"]}, "tie 'latent' is not a pair"),
        ({"ties": [("latent",)]}, "is not a pair"),
    ],
)
def test_mistakes_are_one_clear_sentence(arguments: dict[str, object], message: str) -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        latent = model.net["a"](X)
        return {"latent": latent, "y": model.net["b"](latent), "loss": latent.sum()}

    with pytest.raises(UserError, match=message) as raised:
        components.trace(Two(), run, **{"components": {"all": ["net"]}, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_outputs_have_to_be_named_tensors() -> None:
    with pytest.raises(UserError, match="the program returned Tensor; it has to return a dict"):
        components.trace(Two(), lambda m: m(X), components={"all": ["net"]})  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="output 'loss' is float"):
        components.trace(Two(), lambda m: {"loss": 1.0}, components={"all": ["net"]})  # type: ignore[dict-item]


# --- names, ties and widths --------------------------------------------------------------------------------


class OneStep(nn.Module):
    """Encoder and dynamics, seen for one step only, and a reward that reads what the encoder makes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.dynamics, self.reward = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_tie_states_the_recurrence(tied: bool) -> None:
    """One step alone does not show that what the dynamics makes and what it reads are the same latents."""

    def run(model: nn.Module) -> dict[str, Tensor]:
        latent = model.encoder(X)
        return {"latent": latent, "next": model.dynamics(latent), "y": model.reward(latent)}

    graph = components.trace(
        OneStep(),
        run,
        components={name: [name] for name in ("encoder", "dynamics", "reward")},
        ties=[("next", "latent")] if tied else [("next", "next"), ("latent", "latent")],
    )
    assert graph.widths == ({"latent": 6} if tied else {"latent": 6, "next": 6})
    produced = {member.parameter for member in graph.by_name["latent"].members if not member.consumes}
    assert ("dynamics.weight" in produced) == tied
    assert graph.by_name["latent"].components == {"encoder", "dynamics", "reward"}


def test_what_nothing_reads_is_pinned() -> None:
    """A layer whose result the program leaves unused, and a statistic that it only updates."""
    model = Two()
    model.aside = nn.Linear(8, 4)
    model.register_buffer("mean", torch.zeros(8))

    def run(model: nn.Module) -> dict[str, Tensor]:
        h = model.net["a"](X)
        model.mean = 0.9 * model.mean
        model.aside(h)
        return {"y": model.net["b"](h)}

    graph = components.trace(model, run, components={"all": [""]})
    assert graph.widths == {"net.a": 8}
    assert {m.parameter for m in graph.groups[0].members} == {
        "net.a.weight",
        "net.a.bias",
        "net.b.weight",
        "aside.weight",
    }


def test_external_outputs_are_pinned() -> None:
    assert components.trace(Two(), run_two, components={"all": ["net"]}).widths == {"net.a": 8}
    both = components.trace(Two(), lambda m: {"y": m(X), "h": m.net["a"](X)}, components={"all": ["net"]})
    assert both.widths == {}


def test_a_component_is_the_longest_prefix_at_a_dot() -> None:
    model = nn.Module()
    model.q, model.q1 = nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    graph = components.trace(
        model,
        lambda m: {"y": m.q1(torch.relu(m.q(X)))},
        components={"q": ["q"], "rest": ["q1"], "last": ["q1.1"]},
    )
    assert {group.name: group.components for group in graph.groups} == {
        "q": {"q", "rest"},
        "q1.0": {"rest", "last"},
    }


def test_widths_of_one_have_no_group() -> None:
    family = family_named("mlp")
    graph = components.trace(family.model({"a": 1, "b": 5}), program, components=family.components)
    assert graph.widths == {"b": 5}


def test_width_batch_and_data_of_one_size_do_not_meet() -> None:
    """Everything is 6 wide: batch, tokens, input, channels, outputs; only structure tells them apart."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model.double()
    randomise(model, 0)
    x = torch.randn(6, 6, 6, dtype=torch.float64)
    graph = components.trace(model, lambda m: {"y": m(x)}, components={"all": [""]})
    assert graph.widths == {"0": 6, "2": 6}
    assert all(int(m.indices.sum()) == 15 for g in graph.groups for m in g.members)


def test_lengths_known_only_to_python_are_those_of_the_kept_channels() -> None:
    """Documented: `shape[-1]` in the program cannot be followed; the program sees the kept width."""

    def run(model: nn.Module) -> dict[str, Tensor]:
        h = model.net["a"](X)
        return {"y": model.net["b"](h / h.shape[-1] ** 0.5)}

    assert components.trace(Two(), run, components={"all": ["net"]}).widths == {"net.a": 8}


def test_torch_functional_alone() -> None:
    """A model that is nothing but a bag of parameters, used by functional calls."""
    model = nn.Module()
    model.w, model.v, model.b = (nn.Parameter(torch.randn(size)) for size in ((8, 5), (3, 8), (8,)))
    graph = components.trace(
        model, lambda m: {"y": F.linear(F.linear(X, m.w, m.b).tanh(), m.v)}, components={"all": [""]}
    )
    assert [(m.parameter, m.axis, m.consumes) for m in graph.groups[0].members] == [
        ("w", 0, False),
        ("v", 1, True),
        ("b", 0, False),
    ]
    assert graph.widths == {"w": 8}
