"""How TD-MPC learns: the losses of the world model and of its policy, and one update of both.

(Hansen, Wang and Su, 2022, algorithm 2.) What the pseudocode does one decision after the other is done for
all decisions at once where nothing depends on the one before: targets, rewards, Q values and the policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.functional import mse_loss

from agents.adam import moments_of, new_adam, set_moments
from agents.agent import UNTRACKED, Tracker
from agents.cuda_graphs import CudaGraphs
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.replay_buffer import Batch
from agents.tdmpc.world_model import WorldModel, random_shifts, shift_padding, with_noise

LARGEST_LOSS = 1e4
"""A loss of one subtrajectory counts for no more."""

TARGETS = ("encoder", "q1", "q2")
"""The components that have a slowly moving target."""


@dataclass(frozen=True)
class UpdateNoise:
    """Everything random in an update, standard normal unless said.

    Attributes:
        targets: `(H, B, actions)`, of the policy in the TD targets.
        policy: `(H + 1, B, actions)`, of the policy in its own loss.
        shifts: `(H + 1, B, 2)` whole pixels, of every observation; None for states.
    """

    targets: Tensor
    policy: Tensor
    shifts: Tensor | None = None

    @classmethod
    def draw(cls, batch: Batch, generator: torch.Generator, side: int | None) -> UpdateNoise:
        """For one batch; `side` is that of its images, None for states."""
        h, b, a = batch.actions.shape
        both = torch.randn(2 * h + 1, b, a, generator=generator, device=batch.actions.device)
        shifts = None
        if side is not None:
            most = shift_padding(side)
            shifts = torch.randint(
                -most, most + 1, (h + 1, b, 2), generator=generator, device=batch.actions.device
            )
        return cls(both[:h], both[h:], shifts)


@dataclass(frozen=True)
class Losses:
    """Means over a batch, each as it enters the sum but for its weight; and the new priorities, `(B,)`."""

    consistency: Tensor
    reward: Tensor
    value: Tensor
    policy: Tensor
    priorities: Tensor


class Learner:
    """A world model, its target and its optimizers.

    Args:
        model: is trained in place.
        options: weights, rates and the like.
        target: state of the target network, by parameter name; None is the model's own.
        moments: `adam_mean` and `adam_square` by parameter name; None begins at zero.
        adam_steps: optimizer steps that the moments are from; None where that is not known.
        precision: of the products in hidden layers, but the encoder's, which reads observations; None is that
            of the model. Weights, last layers, losses and moments keep the model's.
    """

    def __init__(
        self,
        model: WorldModel,
        options: TDMPCOptions,
        *,
        target: Mapping[str, Tensor] | None = None,
        moments: Mapping[str, Mapping[str, Tensor]] | None = None,
        adam_steps: int | None = 0,
        precision: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self._graphs = CudaGraphs()
        self._options, self._precision = options, precision
        named = dict(model.named_parameters())
        self._sources = [p for n, p in named.items() if n.partition(".")[0] in TARGETS]
        self.target = {n: p.detach().clone() for n, p in named.items() if n.partition(".")[0] in TARGETS}
        for name, value in (target or {}).items():
            self.target[name].copy_(value)
        self._policy_parameters = list(model.policy.parameters())
        policy_ids = {id(p) for p in self._policy_parameters}
        self._model_parameters = [p for p in named.values() if id(p) not in policy_ids]
        self._optimizers = [
            new_adam(parameters, options.learning_rate)
            for parameters in (self._model_parameters, self._policy_parameters)
        ]
        if moments:
            mean, square = moments["adam_mean"], moments["adam_square"]
            set_moments(self._optimizers, named, mean, square, adam_steps)
        self._weights = torch.tensor(
            [options.rho**t for t in range(options.horizon + 1)],
            dtype=self._policy_parameters[0].dtype,
            device=self._policy_parameters[0].device,
        ).unsqueeze(1)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """`adam_mean` and `adam_square` by parameter name; copies."""
        mean, square = moments_of(self._optimizers, dict(self.model.named_parameters()))
        return {"adam_mean": mean, "adam_square": square}

    def update(self, batch: Batch, noise: UpdateNoise, number: int, tracker: Tracker = UNTRACKED) -> Losses:
        """One step of the world model, one of the policy, and the target's move every `target_every` updates.

        Args:
            batch: subtrajectories of `horizon` decisions.
            noise: everything random.
            number: how many updates came before.
            tracker: told of both backward passes: `model` and `policy`.
        """
        if tracker.is_due("model") or tracker.is_due("policy"):
            losses = self._step(batch, noise, tracker)
        else:
            losses = self._untracked_step(batch, noise)
            for loss in ("model", "policy"):
                tracker.update(loss)
        increment_version([*self._model_parameters, *self._policy_parameters])  # fused Adam does not
        if number % self._options.target_every == 0:
            sources = [p.detach() for p in self._sources]
            torch._foreach_lerp_(list(self.target.values()), sources, self._options.target_rate)
        return losses

    def _untracked_step(self, batch: Batch, noise: UpdateNoise) -> Losses:
        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            observations, actions, rewards, terminated, indices, weights, *drawn = tensors
            made = self._step(
                Batch(observations, actions, rewards, terminated, indices, weights), UpdateNoise(*drawn)
            )
            return made.consistency, made.reward, made.value, made.policy, made.priorities

        sampled = (batch.observations, batch.actions, batch.rewards, batch.terminated, batch.indices)
        drawn = (noise.targets, noise.policy, *(() if noise.shifts is None else (noise.shifts,)))
        return Losses(*self._graphs.run("step", step, *sampled, batch.weights, *drawn))

    def _step(self, batch: Batch, noise: UpdateNoise, tracker: Tracker = UNTRACKED) -> Losses:
        """One step of the world model and one of the policy."""
        observations = batch.observations
        if noise.shifts is not None:
            flat = random_shifts(observations.flatten(0, 1), noise.shifts.flatten(0, 1))
            observations = flat.view(*observations.shape[:2], *flat.shape[1:])
        model_optimizer, policy_optimizer = self._optimizers
        clip = self._options.gradient_clip

        model_optimizer.zero_grad(set_to_none=True)
        policy_optimizer.zero_grad(set_to_none=True)
        with self._low_precision():
            next_latents, returns = self._targets(batch, observations[1:], noise)
        with tracker.capture("model"), self._low_precision():
            latents, consistency, reward, value, priorities = self._model_losses(
                batch, observations[0], next_latents, returns
            )
            chosen = self._options
            total = (
                chosen.consistency_weight * consistency.clamp(max=LARGEST_LOSS)
                + chosen.reward_weight * reward.clamp(max=LARGEST_LOSS)
                + chosen.value_weight * value.clamp(max=LARGEST_LOSS)
            )
            weighted = (total * batch.weights).mean() / chosen.horizon
            weighted.backward(inputs=self._model_parameters)  # type: ignore[no-untyped-call]
        tracker.update("model")
        nn.utils.clip_grad_norm_(self._model_parameters, clip)
        model_optimizer.step()

        model_optimizer.zero_grad(set_to_none=True)
        with tracker.capture("policy"), self._low_precision():
            policy = self._policy_loss(latents.detach(), noise.policy)
            policy.backward(inputs=self._policy_parameters)  # type: ignore[no-untyped-call]
        tracker.update("policy")
        nn.utils.clip_grad_norm_(self._policy_parameters, clip)
        policy_optimizer.step()
        return Losses(
            consistency.detach().mean(),
            reward.detach().mean(),
            value.detach().mean(),
            policy.detach(),
            priorities.clamp(max=LARGEST_LOSS),
        )

    def _low_precision(self) -> AbstractContextManager[Any]:
        if self._precision is None:
            return nullcontext()
        return torch.autocast(self._policy_parameters[0].device.type, dtype=self._precision)

    @torch.no_grad()
    def _targets(self, batch: Batch, observations: Tensor, noise: UpdateNoise) -> tuple[Tensor, Tensor]:
        """The target's latents `(H, B, latent)` and the TD targets `(H, B)`, of what follows."""
        horizon, rows = batch.rewards.shape
        flat = observations.flatten(0, 1)
        with torch.autocast(flat.device.type, enabled=False):  # as in `WorldModel.encode`
            slow = self._through_target("encoder", self.model.scaled(flat))
        latents = self.model.encode(flat)
        std = self._options.min_std
        actions = with_noise(self.model.policy_mean(latents), std * noise.targets.flatten(0, 1))
        both = torch.cat([latents, actions], dim=1)
        q = torch.minimum(self._through_target("q1", both), self._through_target("q2", both))
        following = self._options.discount * (1.0 - batch.terminated) * q.view(horizon, rows)
        return slow.view(horizon, rows, -1), batch.rewards + following

    def _through_target(self, component: str, inputs: Tensor) -> Tensor:
        """What the target's copy of a component makes of its inputs."""
        network: nn.Module = getattr(self.model, component)
        prefix = component + "."
        state = {n.removeprefix(prefix): p for n, p in self.target.items() if n.startswith(prefix)}
        outputs: Tensor = torch.func.functional_call(network, state, (inputs,))
        return outputs

    def _model_losses(
        self, batch: Batch, first: Tensor, next_latents: Tensor, returns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Latents `(H + 1, B, latent)` and, `(B,)` each, three losses and the priorities."""
        model, horizon = self.model, len(batch.actions)
        rolled = model.roll_out(first, batch.actions)
        both = torch.cat([rolled[:-1], batch.actions], dim=2)  # (H, B, latent + actions)
        weights = self._weights[:horizon]
        consistency = (mse_loss(rolled[1:], next_latents, reduction="none").mean(2) * weights).sum(0)
        reward = ((model.reward(both).squeeze(2) - batch.rewards).square() * weights).sum(0)
        errors = torch.stack([model.q1(both).squeeze(2), model.q2(both).squeeze(2)]) - returns  # (2, H, B)
        value = (errors.square().sum(0) * weights).sum(0)
        priorities = (errors.detach().abs().sum(0) * weights).sum(0)
        return rolled, consistency, reward, value, priorities

    def _policy_loss(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Minus the value of the policy's actions along `(H + 1, B, latent)`; no gradient reaches the Qs."""
        actions = with_noise(self.model.policy_mean(latents), self._options.min_std * noise)
        q = torch.minimum(*self.model.q_values(latents, actions)).squeeze(2)  # (H + 1, B)
        return -(q.mean(1, keepdim=True) * self._weights[: len(latents)]).sum()


def finite(losses: Losses) -> bool:
    """Whether every loss is a number."""
    values: Iterable[Tensor] = (losses.consistency, losses.reward, losses.value, losses.policy)
    return bool(torch.isfinite(torch.stack(list(values))).all())
