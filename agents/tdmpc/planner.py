"""Model-predictive path-integral planning in the latent, of many episodes at once.

One iteration samples action sequences around a mean, values each by the model's rewards and a Q value at the
end, and moves mean and deviation towards the best. Trajectories of the policy compete with the samples.
(Hansen, Wang and Su, 2022, algorithm 1.) All episodes of a batch are planned in the same tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from agents.cuda_graphs import CudaGraphs
from agents.tdmpc.activations import elu_in_place, tanh_in_place
from agents.tdmpc.config import elites
from agents.tdmpc.world_model import WorldModel

Layer = tuple[Tensor, Tensor]
"""A transposed weight `(inputs, outputs)` and a bias `(outputs,)`; `(2, ...)` each where two are stacked."""


BLOCK_SIZE = 32_768
"""Numbers in one activation of a block."""


@dataclass(frozen=True)
class PlannerSettings:
    """What a planner does; symbols as in `TDMPCOptions`.

    Attributes:
        samples, iterations, horizon, elite_share, policy_share, temperature, momentum, discount: see there.
        min_std: the smallest deviation of the samples.
        policy_std: the deviation of the policy's actions.
    """

    samples: int
    iterations: int
    horizon: int
    elite_share: float
    policy_share: float
    temperature: float
    momentum: float
    discount: float
    min_std: float
    policy_std: float

    @property
    def policy_trajectories(self) -> int:
        """How many trajectories of the policy compete with the samples."""
        return int(self.policy_share * self.samples)


@dataclass
class PlanMemory:
    """What a controller remembers from one decision to the next, of every episode; the planner changes it.

    Attributes:
        generators: one source of noise per episode, so that none depends on which others are planned with it.
        means: `(episodes, horizon, actions)`, the latest plan; None before the first decision.
    """

    generators: list[torch.Generator]
    means: Tensor | None = None

    @classmethod
    def start(cls, seeds: Sequence[int], device: torch.device) -> PlanMemory:
        """Before the first decision of one episode for every seed."""
        return cls([torch.Generator(device).manual_seed(seed) for seed in seeds])

    def only(self, which: Sequence[int]) -> PlanMemory:
        """Of some of the episodes, their generators shared with this one's."""
        means = None if self.means is None else self.means[list(which)]
        return PlanMemory([self.generators[i] for i in which], means)

    def keep(self, part: PlanMemory, which: Sequence[int]) -> None:
        """Take over what `only` of the same episodes has become."""
        if part.means is None:
            return
        if self.means is None:
            self.means = part.means.new_zeros(len(self.generators), *part.means.shape[1:])
        means = self.means.clone()  # made in inference mode: not to be written to outside
        means[list(which)] = part.means
        self.means = means


@dataclass(frozen=True)
class PlanNoise:
    """Everything random in one decision of E episodes; standard normal but for `choice`.

    Attributes:
        samples: `(iterations, horizon, E, samples, actions)`.
        ends: `(iterations, E, samples, actions)`, of the policy at the end of every sample.
        policy: `(horizon + 1, E, policy trajectories, actions)`, of the policy along its trajectories.
        choice: `(E,)` uniform in [0, 1): which elite acts.
        exploration: `(E, actions)`.
    """

    samples: Tensor
    ends: Tensor
    policy: Tensor
    choice: Tensor
    exploration: Tensor

    @classmethod
    def draw(
        cls, settings: PlannerSettings, action_size: int, generators: Sequence[torch.Generator]
    ) -> PlanNoise:
        """One decision's noise, every episode's from its own generator."""
        j, h, n = settings.iterations, settings.horizon, settings.samples
        p, a = settings.policy_trajectories, action_size
        counts = [j * h * n * a, j * n * a, (h + 1) * p * a, a]
        drawn = [
            torch.randn(sum(counts), generator=generator, device=generator.device) for generator in generators
        ]
        samples, ends, policy, exploration = torch.split(torch.stack(drawn), counts, dim=1)
        e = len(generators)
        choice = [torch.rand((), generator=generator, device=generator.device) for generator in generators]
        return cls(
            samples=samples.reshape(e, j, h, n, a).permute(1, 2, 0, 3, 4).contiguous(),
            ends=ends.reshape(e, j, n, a).transpose(0, 1).contiguous(),
            policy=policy.reshape(e, h + 1, p, a).transpose(0, 1).contiguous(),
            choice=torch.stack(choice),
            exploration=exploration,
        )


class Planner:
    """Plans with a snapshot of a world model: later changes of the model do not reach it.

    Args:
        model: the world model.
        settings: how to plan.
        precision: of the hidden layers; sums of rewards and values are always float32.
    """

    def __init__(
        self, model: WorldModel, settings: PlannerSettings, precision: torch.dtype | None = None
    ) -> None:
        self.settings = settings
        self._networks = PackedModel(model, precision)
        self._graphs = CudaGraphs()
        self._discounts = torch.tensor(
            [settings.discount**t for t in range(settings.horizon + 1)],
            device=self._networks.device,
            dtype=self._networks.sum_type,
        )

    @torch.inference_mode()
    def plan(self, observations: Tensor, memory: PlanMemory, *, explore: bool = False) -> Tensor:
        """Actions `(E, actions)` in [-1, 1] for observations `(E, ...)`; the memory goes on one decision.

        Args:
            observations: one of every episode.
            memory: of the same episodes.
            explore: add the noise of the training.
        """
        size = self._networks.action_size
        noise = PlanNoise.draw(self.settings, size, memory.generators)
        before = memory.means
        if before is None:
            shape = (len(observations), self.settings.horizon, size)
            before = torch.zeros(shape, dtype=self._networks.sum_type, device=self._networks.device)

        def decide(observations: Tensor, before: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
            return self.decide(observations, before, PlanNoise(*noise), explore=explore)

        drawn = (noise.samples, noise.ends, noise.policy, noise.choice, noise.exploration)
        actions, memory.means = self._graphs.run(explore, decide, observations, before, *drawn)
        return actions

    @torch.inference_mode()
    def decide(
        self, observations: Tensor, before: Tensor | None, noise: PlanNoise, *, explore: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Actions `(E, actions)` and the plan's means `(E, horizon, actions)`; a pure function.

        Args:
            observations: one of every episode.
            before: the means of the decision before; None at the start of an episode.
            noise: everything random.
            explore: add the noise of the training.
        """
        chosen, networks = self.settings, self._networks
        h, size = chosen.horizon, networks.action_size
        episodes, k = len(observations), elites(chosen.samples, chosen.elite_share)
        latents = networks.encode(observations)  # (E, latent)
        policy_actions, policy_values = self._policy_trajectories(latents, noise.policy.to(networks.sum_type))

        means = latents.new_zeros(h, episodes, 1, size)
        if before is not None:
            means[:-1, :, 0] = before.transpose(0, 1)[1:h]
        deviations = torch.full_like(means, 2.0)
        for i in range(chosen.iterations):
            actions = torch.addcmul(means, deviations, noise.samples[i].to(means.dtype)).clamp_(-1, 1)
            values = self._values(latents, actions, noise.ends[i].to(means.dtype))  # (E, samples)
            actions = torch.cat([actions, policy_actions], dim=2)  # (horizon, E, samples + policy, actions)
            values = torch.cat([values, policy_values], dim=1).nan_to_num_(0.0)
            best, places = values.topk(k, dim=1)  # (E, k)
            index = places.view(1, episodes, k, 1).expand(h, -1, -1, size)
            elite_actions = actions.gather(2, index)  # (horizon, E, k, actions)
            weights = torch.softmax(chosen.temperature * best, dim=1)  # (E, k)
            weighted = weights.view(1, episodes, k, 1)
            target = (weighted * elite_actions).sum(2, keepdim=True)
            spread = (weighted * (elite_actions - target).square_()).sum(2, keepdim=True)
            deviations = spread.sqrt_().clamp_(chosen.min_std, 2.0)
            means = torch.lerp(target, means, chosen.momentum)

        # The elite that acts is drawn by weight, as the authors' code does.
        place = torch.searchsorted(weights.cumsum(1), noise.choice.to(means.dtype).view(-1, 1)).clamp_(
            max=k - 1
        )
        first = elite_actions[0].gather(1, place.view(-1, 1, 1).expand(-1, -1, size)).squeeze(1)
        if explore:
            first = first + deviations[0, :, 0] * noise.exploration.to(means.dtype)
        return first.clamp(-1, 1), means.squeeze(2).transpose(0, 1)

    def _policy_trajectories(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions `(horizon, E, policy trajectories, actions)` and values `(E, policy trajectories)`."""
        networks, horizon = self._networks, self.settings.horizon
        episodes, count, size = noise.shape[1:]
        z, latent = latents.repeat_interleave(count, 0), latents.shape[1]
        actions = latents.new_empty(horizon, len(z), size)
        inputs = networks.empty(horizon, len(z), latent + size)
        for t in range(horizon):
            actions[t] = networks.act(z, self.settings.policy_std * noise[t].reshape(-1, size))
            inputs[t, :, :latent] = z
            inputs[t, :, latent:] = actions[t]
            z = networks.dynamics(inputs[t])
        last = self.settings.policy_std * noise[horizon].reshape(-1, size)
        values = self._returns(inputs, z, last)
        return actions.view(horizon, episodes, count, size), values.view(episodes, count)

    def _values(self, latents: Tensor, actions: Tensor, ends: Tensor) -> Tensor:
        """The value of every action sequence, `(E, samples)`."""
        horizon, episodes, samples, size = actions.shape
        flat = actions.view(horizon, -1, size)
        starts = latents.repeat_interleave(samples, 0)
        noise = self.settings.policy_std * ends.reshape(-1, size)
        block = self._networks.block
        values = [
            self._block_values(starts[i : i + block], flat[:, i : i + block], noise[i : i + block])
            for i in range(0, episodes * samples, block)
        ]
        return torch.cat(values).view(episodes, samples)

    def _block_values(self, z: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Values `(rows,)` of action sequences `(horizon, rows, actions)` from latents `(rows, latent)`."""
        networks, latent = self._networks, z.shape[1]
        inputs = networks.empty(len(actions), len(z), latent + actions.shape[2])
        inputs[:, :, latent:] = actions
        for t in range(len(actions)):
            inputs[t, :, :latent] = z
            z = networks.dynamics(inputs[t])
        return self._returns(inputs, z, noise)

    def _returns(self, inputs: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        """Discounted rewards along `(horizon, rows, latent + actions)` and the last Q value: `(rows,)`."""
        networks, horizon = self._networks, len(inputs)
        rewards = networks.reward(inputs.flatten(0, 1)).view(horizon, -1)
        end = networks.q(torch.cat([z, networks.act(z, noise).to(z.dtype)], dim=1))
        return self._discounts[:horizon] @ rewards + self._discounts[horizon] * end


class PackedModel:
    """The networks that a planner calls, laid out for speed; weights are copied.

    Twin Q functions of one shape run as one stacked product. Rewards, values and actions come in the model's
    own precision: values of several tens would lose their differences in bfloat16.

    Attributes:
        block: rows that are best run at once: their activations stay in the cache.
    """

    def __init__(self, model: WorldModel, precision: torch.dtype | None) -> None:
        first = model.policy[0]
        assert isinstance(first, nn.Linear)
        self.sum_type = first.weight.dtype
        self._type = precision or self.sum_type
        self.device = first.weight.device
        last = model.policy[-1]
        assert isinstance(last, nn.Linear)
        self.action_size = last.out_features
        self._encode = model.snapshot_of_encoder()
        self._dynamics = self._mlp(model.dynamics, self._type)
        self._reward = self._mlp(model.reward, self.sum_type)
        self._policy = self._mlp(model.policy, self.sum_type)
        shapes = [[tuple(p.shape) for p in q.parameters()] for q in (model.q1, model.q2)]
        self._twins = self._stacked(model.q1, model.q2) if shapes[0] == shapes[1] else None
        self._qs = [] if self._twins else [self._q_function(q) for q in (model.q1, model.q2)]
        widest = max(weight.shape[-1] for weight, _ in (*self._dynamics, *self._reward))
        self.block = max(256, BLOCK_SIZE // widest) if self.device.type == "cpu" else sys.maxsize

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of what the hidden layers read."""
        return torch.empty(shape, dtype=self._type, device=self.device)

    def encode(self, observations: Tensor) -> Tensor:
        """Observations `(rows, ...)` to latents `(rows, latent)`."""
        return self._encode(observations).to(self.sum_type)

    def dynamics(self, inputs: Tensor) -> Tensor:
        """Latents and actions `(rows, latent + actions)` to the next latents `(rows, latent)`."""
        return self._run(self._dynamics, inputs)

    def reward(self, inputs: Tensor) -> Tensor:
        """`(rows, 1)`."""
        return self._run(self._reward, inputs)

    def act(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The policy's actions with truncated noise that has its deviation already, `(rows, actions)`."""
        means = self._run(self._policy, latents).tanh_()
        return means.add_(noise.clamp(-0.3, 0.3)).clamp_(-1 + 1e-6, 1 - 1e-6)

    def q(self, inputs: Tensor) -> Tensor:
        """The smaller of the two Q values, `(rows,)`."""
        if self._twins is None:
            first, second = (self._run_q(q, inputs) for q in self._qs)
            return torch.minimum(first, second).squeeze(1)
        (w0, b0), (scale, shift), (w1, b1), (w2, b2) = self._twins
        x = torch.baddbmm(b0, inputs.to(self._type).expand(2, -1, -1), w0)
        x = tanh_in_place(torch.addcmul(shift, layer_norm(x, (x.shape[-1],)), scale))
        x = elu_in_place(torch.baddbmm(b1, x, w1))
        return torch.baddbmm(b2, x.to(w2.dtype), w2).amin(0).squeeze(1)

    def _run(self, layers: Sequence[Layer], inputs: Tensor) -> Tensor:
        (w0, b0), (w1, b1), (w2, b2) = layers
        x = elu_in_place(torch.addmm(b0, inputs.to(self._type), w0))
        x = elu_in_place(torch.addmm(b1, x, w1))
        return torch.addmm(b2, x.to(w2.dtype), w2)

    def _run_q(self, layers: Sequence[Layer], inputs: Tensor) -> Tensor:
        (w0, b0), (scale, shift), (w1, b1), (w2, b2) = layers
        x = torch.addmm(b0, inputs.to(self._type), w0)
        x = tanh_in_place(layer_norm(x, (x.shape[-1],), scale, shift))
        x = elu_in_place(torch.addmm(b1, x, w1))
        return torch.addmm(b2, x.to(w2.dtype), w2)

    def _mlp(self, network: nn.Sequential, last_type: torch.dtype) -> list[Layer]:
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        types = [*(self._type for _ in layers[:-1]), last_type]
        return [
            (layer.weight.detach().to(kind).t().contiguous().clone(), layer.bias.detach().to(kind, copy=True))
            for layer, kind in zip(layers, types, strict=True)
        ]

    def _q_function(self, network: nn.Sequential) -> list[Layer]:
        first, second, last = self._mlp(network, self.sum_type)
        norm = network[1]
        assert isinstance(norm, nn.LayerNorm)
        affine = norm.weight.detach().to(self._type, copy=True), norm.bias.detach().to(self._type, copy=True)
        return [first, affine, second, last]

    def _stacked(self, q1: nn.Sequential, q2: nn.Sequential) -> list[Layer]:
        pairs = zip(self._q_function(q1), self._q_function(q2), strict=True)
        return [
            (
                torch.stack([a[0], b[0]]) if a[0].dim() == 2 else torch.stack([a[0], b[0]]).unsqueeze(1),
                torch.stack([a[1], b[1]]).unsqueeze(1),
            )
            for a, b in pairs
        ]
