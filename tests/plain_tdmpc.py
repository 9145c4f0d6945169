"""TD-MPC as its pseudocode reads, one step after the other: the oracle and the yardstick of `agents.tdmpc`.

Hansen, Wang and Su (2022, arXiv 2203.04955): `Plain.plan` is algorithm 1, `Plain.update` the learning half
of algorithm 2. One episode and one decision at a time, ordinary modules, ordinary Adam. Everything random
comes in as standard normal tensors, so that both sides can be given the same. Nothing here imports `agents`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLIP = 0.3
"""The policy's noise goes no further."""
INSIDE = 1e-6
"""Actions of the policy keep this distance from -1 and 1."""
LARGEST = 1e4
"""Losses and priorities of one subtrajectory count for no more."""


@dataclass(frozen=True)
class Numbers:
    """Of the planner and of learning, as `TDMPCOptions` names them; the paper's values."""

    samples: int = 512
    iterations: int = 6
    horizon: int = 5
    elites: int = 64
    policy_trajectories: int = 25
    temperature: float = 0.5
    momentum: float = 0.1
    discount: float = 0.99
    min_std: float = 0.05
    max_std: float = 2.0
    policy_std: float = 0.05
    rho: float = 0.5
    consistency: float = 2.0
    reward: float = 0.5
    value: float = 0.1
    learning_rate: float = 1e-3
    gradient_clip: float = 10.0
    target_every: int = 2
    target_rate: float = 0.01


@dataclass(frozen=True)
class Draws:
    """Everything random in one decision of one episode; standard normal but for `choice`, uniform in [0, 1).

    Attributes:
        samples: `(iterations, horizon, samples, actions)`.
        ends: `(iterations, samples, actions)`, of the policy after the last sampled action.
        policy: `(horizon, policy trajectories, actions)`, along trajectories of the policy.
        policy_ends: `(policy trajectories, actions)`, after them; the same in every iteration.
        choice: which elite acts.
        exploration: `(actions,)`.
    """

    samples: Tensor
    ends: Tensor
    policy: Tensor
    policy_ends: Tensor
    choice: Tensor
    exploration: Tensor

    @classmethod
    def draw(cls, numbers: Numbers, actions: int, generator: torch.Generator) -> Draws:
        """New ones."""
        n, p, h = numbers.samples, numbers.policy_trajectories, numbers.horizon

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, actions, generator=generator, device=generator.device)

        choice = torch.rand((), generator=generator, device=generator.device)
        return cls(
            normal(numbers.iterations, h, n),
            normal(numbers.iterations, n),
            normal(h, p),
            normal(p),
            choice,
            normal(),
        )


@dataclass(frozen=True)
class Experience:
    """B subtrajectories of H decisions, time first.

    Attributes:
        observations: `(H + 1, B, n)`.
        actions: `(H, B, actions)`.
        rewards: `(H, B)`.
        terminated: `(H, B)`, 1 where nothing follows.
        weights: `(B,)`, of importance sampling.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    weights: Tensor


class Model(nn.Module):
    """The six networks, of the shapes and with the weights of a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.encoder = network(state, "encoder", [nn.ELU])
        self.dynamics = network(state, "dynamics", [nn.ELU, nn.ELU])
        self.reward = network(state, "reward", [nn.ELU, nn.ELU])
        self.q1 = network(state, "q1", [nn.Tanh, nn.ELU])
        self.q2 = network(state, "q2", [nn.Tanh, nn.ELU])
        self.policy = network(state, "policy", [nn.ELU, nn.ELU])
        weight = state["policy.0.weight"]
        self.to(weight.device, weight.dtype)
        self.load_state_dict(dict(state))

    def pi(self, z: Tensor, noise: Tensor) -> Tensor:
        """The policy's actions for noise of its deviation, truncated; gradients ignore the truncation."""
        mean = torch.tanh(self.policy(z))
        action = mean + torch.clamp(noise, -CLIP, CLIP)
        inside = torch.clamp(action, -1 + INSIDE, 1 - INSIDE)
        return inside.detach() + action - action.detach()

    def next(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next latent and the reward, `(n,)`."""
        x = torch.cat([z, action], dim=-1)
        return self.dynamics(x), self.reward(x)[:, 0]

    def q(self, z: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both Q values, `(n,)`."""
        x = torch.cat([z, action], dim=-1)
        return self.q1(x)[:, 0], self.q2(x)[:, 0]


def network(state: Mapping[str, Tensor], name: str, activations: Sequence[type[nn.Module]]) -> nn.Sequential:
    """Linear layers with activations between them; before a tanh comes a LayerNorm."""
    layers: list[nn.Module] = []
    for activation in (*activations, None):
        outputs, inputs = state[f"{name}.{len(layers)}.weight"].shape
        layers.append(nn.Linear(inputs, outputs))
        if activation is nn.Tanh:
            layers.append(nn.LayerNorm(outputs))
        if activation is not None:
            layers.append(activation())
    return nn.Sequential(*layers)


class Plain:
    """A model that plans and learns."""

    def __init__(self, state: Mapping[str, Tensor], numbers: Numbers) -> None:
        self.numbers = numbers
        self.model = Model(state)
        self.target = copy.deepcopy(self.model)
        self.policy = list(self.model.policy.parameters())
        rest = [p for name, p in self.model.named_parameters() if not name.startswith("policy.")]
        self.rest = rest
        self.model_optimizer = torch.optim.Adam(rest, lr=numbers.learning_rate)
        self.policy_optimizer = torch.optim.Adam(self.policy, lr=numbers.learning_rate)
        self.updates = 0

    # --- algorithm 1 -------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self, observation: Tensor, before: Tensor | None, draws: Draws, *, explore: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The action `(actions,)` for one observation `(n,)`, and the means `(horizon, actions)` of the plan.

        Args:
            observation: of one episode.
            before: the means of the decision before; None at the start of the episode.
            draws: everything random.
            explore: add the noise of the training.
        """
        chosen, model = self.numbers, self.model
        horizon, size = draws.policy.shape[0], draws.policy.shape[-1]
        z = model.encoder(observation[None])

        policy_actions = []
        z_policy = z.repeat(chosen.policy_trajectories, 1)
        for t in range(horizon):
            action = model.pi(z_policy, chosen.policy_std * draws.policy[t])
            policy_actions.append(action)
            z_policy, _ = model.next(z_policy, action)

        mean = torch.zeros(horizon, size, dtype=z.dtype, device=z.device)
        deviation = torch.full_like(mean, chosen.max_std)
        if before is not None:
            mean[:-1] = before[1:]
        for j in range(chosen.iterations):
            sampled = torch.clamp(mean[:, None] + deviation[:, None] * draws.samples[j], -1, 1)
            actions = torch.cat([sampled, torch.stack(policy_actions)], dim=1)  # (horizon, n, actions)
            ends = torch.cat([draws.ends[j], draws.policy_ends])
            value = torch.nan_to_num(self.value(z, actions, ends), nan=0.0)
            best, places = torch.topk(value, chosen.elites)
            elites = actions[:, places]
            score = torch.exp(chosen.temperature * (best - best.max()))
            score = score / score.sum()
            new_mean = (score[:, None] * elites).sum(dim=1)
            variance = (score[:, None] * (elites - new_mean[:, None]) ** 2).sum(dim=1)
            deviation = torch.clamp(torch.sqrt(variance), chosen.min_std, chosen.max_std)
            mean = chosen.momentum * mean + (1 - chosen.momentum) * new_mean

        passed = 0
        while passed < len(score) - 1 and float(score[: passed + 1].sum()) < float(draws.choice):
            passed += 1
        action = elites[0, passed]
        if explore:
            action = action + deviation[0] * draws.exploration
        return torch.clamp(action, -1, 1), mean

    def value(self, z: Tensor, actions: Tensor, ends: Tensor) -> Tensor:
        """The return `(n,)` of action sequences `(horizon, n, actions)` from a latent: rewards, then a Q."""
        z = z.repeat(actions.shape[1], 1)
        total, weight = torch.zeros(len(z), dtype=z.dtype, device=z.device), 1.0
        for action in actions:
            z, reward = self.model.next(z, action)
            total = total + weight * reward
            weight *= self.numbers.discount
        last = self.model.pi(z, self.numbers.policy_std * ends)
        return total + weight * torch.minimum(*self.model.q(z, last))

    # --- algorithm 2 -------------------------------------------------------------------------------------

    def update(self, batch: Experience, target_noise: Tensor, policy_noise: Tensor) -> dict[str, Tensor]:
        """One update of everything.

        Args:
            batch: subtrajectories.
            target_noise: `(H, B, actions)`, of the policy in the TD targets.
            policy_noise: `(H + 1, B, actions)`, of the policy in its own loss.

        Returns:
            Means over the batch of `consistency`, `reward`, `value`, then `policy` and `priorities` `(B,)`.
        """
        chosen, model = self.numbers, self.model
        horizon = len(batch.actions)
        self.model_optimizer.zero_grad()
        z = model.encoder(batch.observations[0])
        latents = [z.detach()]
        consistency: Tensor | float = 0.0
        reward_loss: Tensor | float = 0.0
        value_loss: Tensor | float = 0.0
        priorities: Tensor | float = 0.0
        for t in range(horizon):
            q1, q2 = model.q(z, batch.actions[t])
            z, reward = model.next(z, batch.actions[t])
            with torch.no_grad():
                observation = batch.observations[t + 1]
                target_z = self.target.encoder(observation)
                goal = self.td_target(observation, batch.rewards[t], batch.terminated[t], target_noise[t])
            latents.append(z.detach())
            weight = chosen.rho**t
            consistency = consistency + weight * ((z - target_z) ** 2).mean(dim=1)
            reward_loss = reward_loss + weight * (reward - batch.rewards[t]) ** 2
            value_loss = value_loss + weight * ((q1 - goal) ** 2 + (q2 - goal) ** 2)
            priorities = priorities + weight * ((q1 - goal).abs() + (q2 - goal).abs()).detach()
        assert isinstance(consistency, Tensor)
        assert isinstance(reward_loss, Tensor)
        assert isinstance(value_loss, Tensor)
        assert isinstance(priorities, Tensor)
        total = (
            chosen.consistency * torch.clamp(consistency, max=LARGEST)
            + chosen.reward * torch.clamp(reward_loss, max=LARGEST)
            + chosen.value * torch.clamp(value_loss, max=LARGEST)
        )
        ((total * batch.weights).mean() / horizon).backward()
        nn.utils.clip_grad_norm_(self.rest, chosen.gradient_clip)
        self.model_optimizer.step()

        policy_loss = self.policy_step(latents, policy_noise)

        if self.updates % chosen.target_every == 0:
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.model.parameters(), strict=True):
                    slow.data = (1 - chosen.target_rate) * slow.data + chosen.target_rate * fast.data
        self.updates += 1
        return {
            "consistency": consistency.detach().mean(),
            "reward": reward_loss.detach().mean(),
            "value": value_loss.detach().mean(),
            "policy": policy_loss,
            "priorities": torch.clamp(priorities, max=LARGEST),
        }

    def td_target(self, observation: Tensor, reward: Tensor, terminated: Tensor, noise: Tensor) -> Tensor:
        """The reward and the slow network's value of what follows, `(n,)`."""
        z = self.model.encoder(observation)
        action = self.model.pi(z, self.numbers.policy_std * noise)
        return reward + self.numbers.discount * (1 - terminated) * torch.minimum(*self.target.q(z, action))

    def policy_step(self, latents: Sequence[Tensor], noise: Tensor) -> Tensor:
        """One step of the policy uphill in the value of its actions; the Q functions stay."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("policy."))
        self.policy_optimizer.zero_grad()
        loss = torch.zeros((), dtype=latents[0].dtype, device=latents[0].device)
        for t, z in enumerate(latents):
            action = self.model.pi(z, self.numbers.policy_std * noise[t])
            loss = loss - self.numbers.rho**t * torch.minimum(*self.model.q(z, action)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy, self.numbers.gradient_clip)
        self.policy_optimizer.step()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        return loss.detach()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Adam's `adam_mean` and `adam_square` by parameter name."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states = {**self.model_optimizer.state, **self.policy_optimizer.state}
        return {
            section: {names[parameter]: state[key] for parameter, state in states.items()}
            for section, key in (("adam_mean", "exp_avg"), ("adam_square", "exp_avg_sq"))
        }


class World:
    """What `returns` needs of an environment: `agents.environments.Environment` fits."""

    def reset(self, seed: int):
        """The first observation."""

    def step(self, action):
        """Observation, reward, terminated, truncated."""


def returns(
    plain: Plain,
    environment: World,
    seeds: Sequence[int],
    draws: Callable[[torch.Generator], Draws],
    device: torch.device | str = "cpu",
) -> list[float]:
    """The return of one episode for every seed, one after the other, planned one observation at a time.

    Args:
        plain: who acts, without exploration.
        environment: is reset for every episode.
        seeds: of an episode's environment and noise.
        draws: a decision's noise from an episode's generator.
        device: of the model.
    """
    found = []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(seed)
        observation, means, total, over = environment.reset(seed), None, 0.0, False
        while not over:
            action, means = plain.plan(torch.as_tensor(observation, device=device), means, draws(generator))
            observation, reward, terminated, truncated = environment.step(action.cpu().numpy())
            total += reward
            over = terminated or truncated
        found.append(total)
    return found
