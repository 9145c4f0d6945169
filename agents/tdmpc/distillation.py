"""Repair of a pruned world model by distillation: it learns to compute what the dense one computes.

Over subtrajectories that both roll out from the same observation with the same actions, the student's latents
are regressed on the base's kept latent coordinates, and its rewards, Q values and policy means on the base's.
Every term is divided by the variance of its target: raw, they differ by four orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from agents.adam import half_cosine, moments_of, new_adam, set_learning_rate, set_moments
from agents.agent import UNTRACKED, Tracker
from agents.cuda_graphs import CudaGraphs
from agents.tdmpc.replay_buffer import ReplayBuffer
from agents.tdmpc.world_model import WorldModel
from components.errors import UserError

HELD_OUT = 8
"""One in so many subtrajectories is held out of the training."""

BETAS = (0.9, 0.95)
"""Decay of Adam's moments; the second is short, because gradients shrink fast in a few hundred updates."""

LABELLED_AT_ONCE = 512
"""Sequences."""

ON_POLICY_SHARE = 0.25
"""Of every batch, once there are episodes that the student played itself."""


@dataclass(frozen=True)
class Sequences:
    """What both models roll out: `(n, ...)` observations and `(horizon, n, actions)` actions."""

    observations: Tensor
    actions: Tensor


@dataclass(frozen=True)
class Targets:
    """What the base makes of sequences; time first.

    Attributes:
        latents: `(horizon + 1, n, latent)`.
        rewards, q1, q2: `(horizon, n)`.
        policy: `(horizon + 1, n, actions)`.
    """

    latents: Tensor
    rewards: Tensor
    q1: Tensor
    q2: Tensor
    policy: Tensor

    def rows(self, chosen: Tensor) -> Targets:
        """Those of some of the sequences."""
        return Targets(*(getattr(self, field.name)[:, chosen] for field in fields(self)))

    def coordinates(self, kept: Tensor) -> Targets:
        """With some of the latent's coordinates only."""
        return Targets(self.latents[..., kept], self.rewards, self.q1, self.q2, self.policy)


@dataclass(frozen=True)
class Lessons:
    """Sequences with what the base makes of them."""

    sequences: Sequences
    targets: Targets


def draw_sequences(buffer: ReplayBuffer, count: int, horizon: int, generator: torch.Generator) -> Sequences:
    """Subtrajectories from all over the buffer; every other one with random actions, not those played."""
    begins = buffer.places(horizon)
    if len(begins) == 0:
        raise UserError(f"no stored episode has {horizon} decisions, as many as the horizon")
    picks = torch.randint(len(begins), (count,), generator=generator, device=generator.device)
    places = begins[picks.to(begins.device)]
    times = torch.arange(horizon, device=places.device).unsqueeze(1) + places
    played = buffer.actions(times)
    uniform = 2 * torch.rand(played.shape, generator=generator, device=generator.device).to(played.device) - 1
    is_random = (torch.arange(count, device=places.device) % 2 == 1).view(1, -1, 1)
    return Sequences(buffer.observations(places), torch.where(is_random, uniform, played))


def outputs(model: WorldModel, sequences: Sequences) -> Targets:
    """Everything that a model makes of sequences, rolled out in its own latent."""
    rolled = model.roll_out(sequences.observations, sequences.actions)
    both = torch.cat([rolled[:-1], sequences.actions], dim=2)
    return Targets(
        latents=rolled,
        rewards=model.reward(both).squeeze(2),
        q1=model.q1(both).squeeze(2),
        q2=model.q2(both).squeeze(2),
        policy=model.policy_mean(rolled),
    )


@torch.no_grad()
def label(base: WorldModel, sequences: Sequences) -> Lessons:
    """Sequences with what the base makes of them, some at a time: thousands of images take gigabytes."""
    parts = zip(
        torch.split(sequences.observations, LABELLED_AT_ONCE),
        torch.split(sequences.actions, LABELLED_AT_ONCE, dim=1),
        strict=True,
    )
    labelled = [Sequences(observations, actions) for observations, actions in parts]
    return joined(Lessons(part, outputs(base, part)) for part in labelled)


def joined(lessons: Iterable[Lessons]) -> Lessons:
    """All sequences of several lessons, in their order."""
    parts = list(lessons)
    return Lessons(
        Sequences(
            torch.cat([part.sequences.observations for part in parts]),
            torch.cat([part.sequences.actions for part in parts], dim=1),
        ),
        Targets(
            *(
                torch.cat([getattr(part.targets, field.name) for part in parts], dim=1)
                for field in fields(Targets)
            )
        ),
    )


class Distillation:
    """Distils a base into a student, in place.

    Args:
        student: the pruned model.
        lessons: from the base; every eighth pair, one played and one random, is held out.
        kept: indices of the base's latent coordinates that the student kept.
        updates: how many there will be in all.
        batch_size: sequences per update.
        learning_rate: at the first update; it falls to 0 along a half cosine.
        seed: of the order of the batches.
    """

    def __init__(
        self,
        student: WorldModel,
        lessons: Lessons,
        kept: Tensor,
        *,
        updates: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._student = student
        self._kept = kept
        self._updates, self._batch_size, self._rate = updates, batch_size, learning_rate
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer, self._graphs = self._new_optimizer(), CudaGraphs()
        count = lessons.sequences.actions.shape[1]
        is_held_out = torch.arange(count) // 2 % HELD_OUT == HELD_OUT - 1  # pairs: one random, one played
        if bool(is_held_out.all()) or not bool(is_held_out.any()):
            is_held_out = torch.arange(count) == count - 1
        self._taught = (~is_held_out).nonzero().flatten()
        self._examined = is_held_out.nonzero().flatten()
        self._visited = torch.empty(0, dtype=torch.int64)
        self._sequences, self._targets = lessons.sequences, lessons.targets.coordinates(kept)
        self._drawn = count
        self._variances = self._variances_of_targets()
        self._done = 0

    def add_visited(self, lessons: Lessons) -> None:
        """Add what the student visited itself, labelled by the base."""
        before = self._sequences.actions.shape[1]
        added = Lessons(lessons.sequences, lessons.targets.coordinates(self._kept))
        together = joined([Lessons(self._sequences, self._targets), added])
        self._sequences, self._targets = together.sequences, together.targets
        self._graphs = CudaGraphs()
        self._visited = torch.arange(before, before + lessons.sequences.actions.shape[1])

    def shrink(self, kept: Tensor, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with a student that has lost channels.

        Args:
            kept: indices of its latent coordinates so far that stay.
            states: of the narrower student, with `distillation_mean` and `distillation_square`.
        """
        self._kept = self._kept[kept]
        self._targets = self._targets.coordinates(kept)
        self._variances = self._variances_of_targets()
        self._optimizer, self._graphs = self._new_optimizer(), CudaGraphs()
        mean, square = states["distillation_mean"], states["distillation_square"]
        set_moments([self._optimizer], dict(self._student.named_parameters()), mean, square, self._done)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Adam's moments by parameter name, as sections of a state; copies."""
        mean, square = moments_of([self._optimizer], dict(self._student.named_parameters()))
        return {"distillation_mean": mean, "distillation_square": square}

    def step(self, tracker: Tracker = UNTRACKED) -> Tensor:
        """One update; returns the loss, the sum of the four normalised terms."""
        set_learning_rate(self._optimizer, half_cosine(self._rate, self._done, self._updates))
        chosen = self._pick()
        if tracker.is_due("distillation"):
            loss = self._step(chosen, tracker)
        else:
            (loss,) = self._graphs.run("step", lambda picked: (self._step(picked),), chosen)
            tracker.update("distillation")
        increment_version(list(self._student.parameters()))  # fused Adam does not
        self._done += 1
        return loss

    def _step(self, chosen: Tensor, tracker: Tracker = UNTRACKED) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with tracker.capture("distillation"):
            loss = self._loss(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
        tracker.update("distillation")
        nn.utils.clip_grad_norm_(self._student.parameters(), 10.0)
        self._optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on the sequences that are held out; lower is better, 0 is the base itself."""
        return float(self._loss(self._examined))

    def _new_optimizer(self) -> torch.optim.Adam:
        return new_adam(self._student.parameters(), self._rate, BETAS)

    def _variances_of_targets(self) -> tuple[float, ...]:
        """Of latents, rewards, Q values and policy, over all sequences but those that the student visited."""
        targets = self._targets.rows(torch.arange(self._drawn, device=self._targets.rewards.device))
        return tuple(
            float(t.flatten(0, 1).var(dim=0, correction=0).sum()) or 1.0
            for t in (targets.latents, targets.rewards.unsqueeze(2), targets.q1.unsqueeze(2), targets.policy)
        )

    def _pick(self) -> Tensor:
        visited = round(self._batch_size * ON_POLICY_SHARE) if len(self._visited) else 0
        parts = [(self._taught, self._batch_size - visited), (self._visited, visited)]
        picked = [
            pool[torch.randint(len(pool), (count,), generator=self._generator)]
            for pool, count in parts
            if count
        ]
        return torch.cat(picked).to(self._targets.rewards.device)

    def _loss(self, chosen: Tensor) -> Tensor:
        sequences = Sequences(self._sequences.observations[chosen], self._sequences.actions[:, chosen])
        made, wanted = outputs(self._student, sequences), self._targets.rows(chosen)
        of_latents, of_rewards, of_q, of_policy = self._variances
        latents = (made.latents - wanted.latents).square().sum(2).mean() / of_latents
        rewards = (made.rewards - wanted.rewards).square().mean() / of_rewards
        q = ((made.q1 - wanted.q1).square().mean() + (made.q2 - wanted.q2).square().mean()) / (2 * of_q)
        policy = (made.policy - wanted.policy).square().sum(2).mean() / of_policy
        return latents + rewards + q + policy
