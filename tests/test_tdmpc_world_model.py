"""The world model of TD-MPC: its groups, and that slicing channels out equals masking them, in all it does.

The oracle knows nothing of graphs: a dense model in which removed channels are zero after every activation
and layer normalisation takes its statistics from the kept ones. Whatever a removed channel holds then has
neither influence nor gradient, so that the oracle needs no masks of parameters. Only the consistency loss, a
mean over the latent's coordinates, has to be told how many there are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from model_families import layer_norm
from torch import nn
from torch.nn import functional

import components
from agents.tdmpc.activations import Tanh
from agents.tdmpc.agent import TDMPC
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.learning import TARGETS, Learner, UpdateNoise
from agents.tdmpc.planner import Planner, PlannerSettings, PlanNoise
from agents.tdmpc.replay_buffer import Batch
from agents.tdmpc.world_model import (
    Network,
    WorldModel,
    dense_widths,
    random_shifts,
    shift_padding,
    with_noise,
)
from components.size import parameter_count

STATE = {
    "task": "gymnasium:toy_environments:Point-v0",
    "encoder_width": 30,
    "mlp_width": 50,
    "latent": 20,
    "horizon": 3,
    "batch_size": 6,
}
PIXELS = {
    **STATE,
    "task": "gymnasium:toy_environments:Picture-v0",
    "observation": "pixels",
    "image_side": 64,
    "frame_stack": 2,
    "channels": 10,
}
KINDS = {"state": STATE, "pixels": PIXELS}
SETTINGS = PlannerSettings(
    samples=24,
    iterations=3,
    horizon=3,
    elite_share=0.25,
    policy_share=0.2,
    temperature=0.5,
    momentum=0.1,
    discount=0.97,
    min_std=0.05,
    policy_std=0.1,
)
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@lru_cache
def agent_of(kind):
    return TDMPC(KINDS[kind])


@lru_cache
def graph_of(kind):
    agent = agent_of(kind)
    inputs = agent.calibration_inputs(2, 0)
    return components.trace(
        agent.model,
        lambda model: agent.program(model, inputs),
        components=agent.components,
        ties=agent.ties,
    )


# --- groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_the_hidden_layers_and_the_latent(kind):
    graph = graph_of(kind)
    options = TDMPCOptions(**KINDS[kind])
    assert graph.widths == dense_widths(options) == agent_of(kind).widths
    assert list(graph.widths) == list(dense_widths(options))
    couplings = {name: set(group.components) for name, group in graph.by_name.items() if group.is_coupling}
    assert couplings == {"latent": {"encoder", "dynamics", "reward", "q1", "q2", "policy"}}


@pytest.mark.parametrize("kind", KINDS)
def test_twin_q_functions_are_pruned_apart(kind):
    groups = graph_of(kind).by_name
    for name in ("q1.0", "q1.3", "q2.0", "q2.3"):
        assert {member.parameter.partition(".")[0] for member in groups[name].members} == {name[:2]}
    normed = {(m.parameter, m.axis) for m in groups["q1.0"].members}
    assert {("q1.1.weight", 0), ("q1.1.bias", 0)} <= normed


@pytest.mark.parametrize("kind", KINDS)
def test_observations_actions_and_outputs_stay_whole(kind):
    """Every axis of every parameter is made of groups, but for what the world gives and takes."""
    agent, graph = agent_of(kind), graph_of(kind)
    latent, spec = agent.widths["latent"], agent.spec
    owned = {}
    for group in graph.groups:
        for member in group.members:
            owned.setdefault((member.parameter, member.axis), []).extend(member.indices.flatten().tolist())
    outside = {("encoder.0.weight", 1): range(spec.observation_shape[0])}
    for head in ("dynamics", "reward", "q1", "q2"):  # latent first, then the action
        outside[f"{head}.0.weight", 1] = range(latent, latent + spec.action_size)
    for last, size in (("reward.4", 1), ("q1.5", 1), ("q2.5", 1), ("policy.4", spec.action_size)):
        outside |= {(f"{last}.weight", 0): range(size), (f"{last}.bias", 0): range(size)}
    for name, parameter in agent.model.named_parameters():
        for axis in range(1 if parameter.dim() == 1 else 2):
            free = sorted(set(range(parameter.shape[axis])) - set(owned.get((name, axis), ())))
            assert free == list(outside.get((name, axis), ())), (name, axis)


def test_widths_are_those_of_the_paper():
    options = TDMPCOptions(task="cartpole-swingup")
    widths = dense_widths(options)
    assert widths["encoder.0"] == 256
    assert widths["latent"] == 50
    assert {size for name, size in widths.items() if name not in ("encoder.0", "latent")} == {512}
    model = WorldModel(widths, (5,), 1)
    mlp = 50 * 512 + 512 + 512 * 512 + 512
    by_hand = (5 * 256 + 256) + (256 * 50 + 50)
    by_hand += (mlp + 512 + 512 * 50 + 50) + (mlp + 512 + 512 + 1) + (mlp + 512 + 1)
    by_hand += 2 * (mlp + 512 + 2 * 512 + 512 + 1)
    assert parameter_count(model) == by_hand


def test_new_weights_are_orthogonal_and_values_begin_at_zero():
    model = WorldModel(dense_widths(TDMPCOptions(**STATE)), (4,), 2)
    weight = model.dynamics[2].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    z, a = torch.randn(3, 20), torch.randn(3, 2)
    assert not model.reward_of(z, a).any()
    assert not any(q.any() for q in model.q_values(z, a))


# --- the oracle ------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A dense world model in which the removed channels of `keep` are zero after every activation."""

    def __init__(self, model, keep):
        super().__init__()
        self.model, self.keep = model, keep
        self.kept = int(keep["latent"].sum())

    def _gate(self, group, x):
        return x * self.keep[group].to(x.dtype)

    def encode(self, observations):
        layers = self.model.encoder
        if not self.model.is_visual:
            hidden = self._gate("encoder.0", functional.elu(layers[0](observations)))
            return self._gate("latent", layers[2](hidden))
        hidden = observations.double() / 255
        for i in range(0, 8, 2):
            gate = self.keep[f"encoder.{i}"].double().view(-1, 1, 1)
            hidden = torch.relu(layers[i](hidden)) * gate
        return self._gate("latent", layers[9](hidden.flatten(1)))

    def head(self, name, x):
        layers = getattr(self.model, name)
        hidden = self._gate(f"{name}.0", functional.elu(layers[0](x)))
        hidden = self._gate(f"{name}.2", functional.elu(layers[2](hidden)))
        outputs = layers[4](hidden)
        return self._gate("latent", outputs) if name == "dynamics" else outputs

    def q(self, name, x):
        layers = getattr(self.model, name)
        hidden = layer_norm(layers[1], layers[0](x), self.keep[f"{name}.0"])
        hidden = self._gate(f"{name}.0", torch.tanh(hidden))
        hidden = self._gate(f"{name}.3", functional.elu(layers[3](hidden)))
        return layers[5](hidden)

    def smaller_q(self, x):
        return torch.minimum(self.q("q1", x), self.q("q2", x)).squeeze(-1)


class MaskedNetworks:
    """What a planner calls, from a masked model."""

    def __init__(self, masked, action_size):
        self.masked, self.action_size = masked, action_size
        self.sum_type, self.device, self.block = torch.float64, torch.device("cpu"), 7  # blocks of any size

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float64)

    def encode(self, observations):
        return self.masked.encode(observations)

    def dynamics(self, inputs):
        return self.masked.head("dynamics", inputs)

    def reward(self, inputs):
        return self.masked.head("reward", inputs)

    def act(self, latents, noise):
        means = torch.tanh(self.masked.head("policy", latents))
        return (means + noise.clamp(-0.3, 0.3)).clamp(-1 + 1e-6, 1 - 1e-6)

    def q(self, inputs):
        return self.masked.smaller_q(inputs)


def random_model(agent, seed, widths=None):
    """Float64, with parameters that hide nothing: no zeros, no ones, affine parts of the norms included."""
    generator = torch.Generator().manual_seed(seed)
    model = WorldModel(widths or agent.widths, agent.spec.observation_shape, agent.spec.action_size).double()
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        parameter.data.copy_(1.2 * values / math.sqrt(fan_in))
    return model


def random_keep(agent, share, seed, twins_alike):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, size in agent.widths.items():
        of_this = share * (0.5 if name.startswith("q2") and not twins_alike else 1)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.randperm(size, generator=generator)[: max(1, round(of_this * size))]] = True
        keep[name] = mask
    return keep


def pair(kind, share, seed):
    """A masked model and the sliced one."""
    agent, graph = agent_of(kind), graph_of(kind)
    dense = random_model(agent, seed)
    keep = random_keep(agent, share, seed + 100, twins_alike=seed % 2 == 0)
    sliced = random_model(agent, 999, {name: int(mask.sum()) for name, mask in keep.items()})
    sliced.load_state_dict(components.prune(graph, dense.state_dict(), keep))
    return agent, graph, keep, Masked(dense, keep), sliced


def observations_of(agent, generator, *shape):
    if agent.options["observation"] == "pixels":
        size = (*shape, *agent.spec.observation_shape)
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return torch.randn(*shape, *agent.spec.observation_shape, generator=generator, dtype=torch.float64)


CASES = [
    (kind, share, seed)
    for kind, seeds in (("state", 3), ("pixels", 2))
    for share in (0.7, 0.3, 0.1, 0.02)
    for seed in range(seeds)
]


# --- sliced is masked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "share", "seed"), CASES)
def test_sliced_computes_what_masked_computes(kind, share, seed):
    agent, _, keep, masked, sliced = pair(kind, share, seed)
    generator = torch.Generator().manual_seed(seed)
    observations = observations_of(agent, generator, 5)
    with torch.no_grad():
        dense_z, z = masked.encode(observations), sliced.encode(observations)
        for _ in range(4):
            actions = torch.randn(5, agent.spec.action_size, generator=generator, dtype=torch.float64)
            both = torch.cat([dense_z, actions], dim=1)
            torch.testing.assert_close(z, dense_z[:, keep["latent"]], **TOLERANCE)
            assert not dense_z[:, ~keep["latent"]].any()
            torch.testing.assert_close(sliced.reward_of(z, actions), masked.head("reward", both), **TOLERANCE)
            for made, name in zip(sliced.q_values(z, actions), ("q1", "q2"), strict=True):
                torch.testing.assert_close(made, masked.q(name, both), **TOLERANCE)
            wanted = torch.tanh(masked.head("policy", dense_z))
            torch.testing.assert_close(sliced.policy_mean(z), wanted, **TOLERANCE)
            dense_z, z = masked.head("dynamics", both), sliced.next_latent(z, actions)
        assert float(z.abs().max()) < 1e3  # nothing is told by saturation alone


def masked_planner(masked, action_size):
    planner = Planner(masked.model, SETTINGS)
    planner._networks = MaskedNetworks(masked, action_size)
    return planner


@pytest.mark.parametrize(("kind", "share", "seed"), CASES)
def test_sliced_plans_what_masked_plans(kind, share, seed):
    """The same noise, three decisions of three episodes that go on from the plan before."""
    agent, _, _, masked, sliced = pair(kind, share, seed)
    generator = torch.Generator().manual_seed(seed)
    size = agent.spec.action_size
    slow, fast = masked_planner(masked, size), Planner(sliced, SETTINGS)
    generators = [torch.Generator().manual_seed(10 * seed + i) for i in range(3)]
    dense_means = means = None
    seen = []
    for decision in range(3):
        observations = observations_of(agent, generator, 3)
        noise = PlanNoise.draw(SETTINGS, size, generators)
        explore = decision == 1
        wanted, dense_means = slow.decide(observations, dense_means, noise, explore=explore)
        actions, means = fast.decide(observations, means, noise, explore=explore)
        torch.testing.assert_close(actions, wanted, **TOLERANCE)
        torch.testing.assert_close(means, dense_means, **TOLERANCE)
        seen.append(actions)
    assert len(torch.stack(seen).unique()) > 3  # not all at the bounds


def test_plans_tell_models_apart():
    """What the comparison above would not notice were all plans the same."""
    agent, _, _, masked, sliced = pair("state", 0.3, 0)
    noise = PlanNoise.draw(SETTINGS, 2, [torch.Generator().manual_seed(0)])
    observations = torch.ones(1, *agent.spec.observation_shape, dtype=torch.float64)
    with_all, _ = Planner(masked.model, SETTINGS).decide(observations, None, noise)
    pruned, _ = Planner(sliced, SETTINGS).decide(observations, None, noise)
    assert not torch.allclose(with_all, pruned, atol=1e-3)


# --- sliced learns what masked learns --------------------------------------------------------------------


def masked_update(masked, target, optimizers, batch, noise, number, options):
    """One update of the paper's algorithm 2, one decision after the other, on masked models."""
    horizon, rho = options.horizon, options.rho
    observations = batch.observations
    if noise.shifts is not None:
        observations = torch.stack(
            [random_shifts(images, by) for images, by in zip(observations, noise.shifts, strict=True)]
        )
    for optimizer in optimizers:
        optimizer.zero_grad()
    z = masked.encode(observations[0])
    rolled, total, priorities = [z], 0.0, 0.0
    for t in range(horizon):
        both = torch.cat([z, batch.actions[t]], dim=1)
        with torch.no_grad():
            after = masked.encode(observations[t + 1])
            means = torch.tanh(masked.head("policy", after))
            chosen = with_noise(means, options.min_std * noise.targets[t])
            value = target.smaller_q(torch.cat([after, chosen], dim=1))
            wanted = batch.rewards[t] + options.discount * (1 - batch.terminated[t]) * value
            wanted_z = target.encode(observations[t + 1])
        errors = [masked.q(name, both).squeeze(1) - wanted for name in ("q1", "q2")]
        reward = masked.head("reward", both).squeeze(1) - batch.rewards[t]
        z = masked.head("dynamics", both)
        rolled.append(z)
        consistency = (z - wanted_z).square().sum(1) / masked.kept  # removed coordinates do not count
        total = total + rho**t * (
            options.consistency_weight * consistency
            + options.reward_weight * reward.square()
            + options.value_weight * sum(error.square() for error in errors)
        )
        priorities = priorities + rho**t * sum(error.detach().abs() for error in errors)
    assert float(total.detach().max()) < 1e4  # below the largest loss that counts
    ((total * batch.weights).mean() / horizon).backward()
    model = [p for name, p in masked.model.named_parameters() if not name.startswith("policy")]
    nn.utils.clip_grad_norm_(model, options.gradient_clip)
    optimizers[0].step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = 0.0
    for t, latents in enumerate(rolled):
        means = torch.tanh(masked.head("policy", latents.detach()))
        actions = with_noise(means, options.min_std * noise.policy[t])
        loss = loss - rho**t * masked.smaller_q(torch.cat([latents.detach(), actions], dim=1)).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(list(masked.model.policy.parameters()), options.gradient_clip)
    optimizers[1].step()
    if number % options.target_every == 0:
        with torch.no_grad():
            for (name, slow), fast in zip(
                target.model.named_parameters(), masked.model.parameters(), strict=True
            ):
                if name.partition(".")[0] in TARGETS:
                    slow.lerp_(fast, options.target_rate)
    return priorities


def random_batch(agent, generator, options):
    h, b, a = options.horizon, options.batch_size, agent.spec.action_size
    return Batch(
        observations=observations_of(agent, generator, h + 1, b),
        actions=2 * torch.rand(h, b, a, generator=generator, dtype=torch.float64) - 1,
        rewards=torch.randn(h, b, generator=generator, dtype=torch.float64),
        terminated=(torch.rand(h, b, generator=generator, dtype=torch.float64) < 0.2).double(),
        indices=torch.arange(b),
        weights=torch.rand(b, generator=generator, dtype=torch.float64) + 0.1,
    )


@pytest.mark.parametrize("clip", [10.0, 0.05])
@pytest.mark.parametrize(
    ("kind", "share", "seed"),
    [case for case in CASES if case[0] == "state" or (case[2] == 0 and case[1] in (0.3, 0.02))],
)
def test_sliced_learns_what_masked_learns(kind, share, seed, clip):
    """Five updates from the middle of a training: model, target and moments are sliced alike."""
    agent, graph, keep, masked, sliced = pair(kind, share, seed)
    options = TDMPCOptions(**{**KINDS[kind], "gradient_clip": clip, "target_rate": 0.1})
    target = random_model(agent, seed + 50)
    generator = torch.Generator().manual_seed(seed)
    names = dict(masked.model.named_parameters())
    moments = {
        "adam_mean": {n: 0.01 * torch.randn(p.shape, generator=generator).double() for n, p in names.items()},
        "adam_square": {n: torch.rand(p.shape, generator=generator).double() + 0.1 for n, p in names.items()},
    }
    learner = Learner(
        sliced,
        options,
        target=components.prune(
            graph, {n: p.data for n, p in target.named_parameters() if n.partition(".")[0] in TARGETS}, keep
        ),
        moments={section: components.prune(graph, state, keep) for section, state in moments.items()},
        adam_steps=7,
    )
    of_policy = [n for n in names if n.startswith("policy")]
    of_model = [n for n in names if not n.startswith("policy")]
    optimizers = []
    for group in (of_model, of_policy):
        optimizer = torch.optim.Adam([names[n] for n in group], lr=options.learning_rate)
        for name in group:
            optimizer.state[names[name]] = {
                "step": torch.tensor(7.0),
                "exp_avg": moments["adam_mean"][name].clone(),
                "exp_avg_sq": moments["adam_square"][name].clone(),
            }
        optimizers.append(optimizer)
    before = {name: tensor.clone() for name, tensor in sliced.state_dict().items()}
    for number in range(5):
        batch = random_batch(agent, generator, options)
        noise = UpdateNoise.draw(batch, generator, 64 if kind == "pixels" else None)
        wanted = masked_update(masked, Masked(target, keep), optimizers, batch, noise, number, options)
        losses = learner.update(batch, noise, number)
        torch.testing.assert_close(losses.priorities, wanted, **TOLERANCE)

    def check(made, dense):
        cut = components.prune(graph, dense, keep)
        assert made.keys() == cut.keys()
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, cut[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")

    check(sliced.state_dict(), masked.model.state_dict())
    check(learner.target, {n: p.data for n, p in target.named_parameters() if n in learner.target})
    for section, key in (("adam_mean", "exp_avg"), ("adam_square", "exp_avg_sq")):
        state = {id(p): s for optimizer in optimizers for p, s in optimizer.state.items()}
        check(learner.moments()[section], {n: state[id(p)][key] for n, p in names.items()})
    assert all(not torch.equal(tensor, before[name]) for name, tensor in sliced.state_dict().items())


# --- parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [20, 21, 64, 84, 100, 128])
def test_random_shifts_move_whole_pixels_and_repeat_the_border(side):
    """Of the padded image, the window that lies so far right and down."""
    padding = shift_padding(side)
    assert padding == max(1, side // 21)
    random = np.random.default_rng(side)
    moves = [(x, y) for x in range(-padding, padding + 1) for y in range(-padding, padding + 1)]
    images = random.integers(0, 256, (len(moves), 2, side, side), dtype=np.uint8)
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode="edge")
    expected = [
        each[:, padding + y : padding + y + side, padding + x : padding + x + side]
        for each, (x, y) in zip(padded, moves, strict=True)
    ]
    shifted = random_shifts(torch.from_numpy(images), torch.tensor(moves))
    assert shifted.dtype == torch.float32
    np.testing.assert_array_equal(shifted, np.stack(expected))


def test_no_shift_changes_nothing():
    images = torch.rand(3, 9, 84, 84)
    assert torch.equal(random_shifts(images, torch.zeros(3, 2, dtype=torch.int64)), images)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_tanh_is_tanh(dtype, tolerance):
    x = torch.cat(
        [torch.linspace(-40, 40, 20001, dtype=dtype), torch.linspace(-0.01, 0.01, 101, dtype=dtype)]
    )
    x.requires_grad_()
    made, wanted = Tanh()(x), torch.tanh(x)
    torch.testing.assert_close(made, wanted, rtol=0, atol=tolerance)
    for output in (made, wanted):
        output.sum().backward(retain_graph=True)
    slope = torch.autograd.grad(made.sum(), x)[0]
    torch.testing.assert_close(slope, 1 - torch.tanh(x.detach()).square(), rtol=0, atol=tolerance)


def test_the_last_layer_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    network = Network(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 3))
    x = torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(x)
        hidden = network[1](network[0](x))
    assert hidden.dtype == torch.bfloat16
    assert made.dtype == torch.float32
    wanted = functional.linear(hidden.float(), network[2].weight, network[2].bias)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-7)
    assert torch.equal(network(x), network[2](network[1](network[0](x))))  # nothing happens without autocast
    assert not torch.equal(made, network(x))


def test_observations_are_encoded_in_full_precision():
    agent = agent_of("state")
    x = torch.randn(6, *agent.spec.observation_shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = agent.model.encode(x)
    assert torch.equal(made, agent.model.encode(x))


def test_the_noise_of_the_policy_is_clipped_and_passes_gradients():
    means = torch.tensor([-0.9, 0.0, 0.5, 0.95], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([-1.0, 0.2, -5.0, 0.1], dtype=torch.float64)
    actions = with_noise(means, noise)
    expected = [-1 + 1e-6, 0.2, 0.2, 1 - 1e-6]
    torch.testing.assert_close(actions.detach(), torch.tensor(expected, dtype=torch.float64))
    actions.sum().backward()
    assert means.grad.tolist() == [1.0] * 4


def test_pixels_are_scaled_and_states_are_not():
    state, pixels = agent_of("state").model, agent_of("pixels").model
    x = torch.tensor([[300.0, -2.0, 0.5, 1.0]])
    assert state.scaled(x) is x
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(pixels.scaled(images), torch.tensor([0.0, 0.2, 1.0]))
