"""Prioritised replay of subtrajectories (Schaul et al., 2016, 1511.05952), on whole episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.errors import UserError

PRIORITY_FLOOR = 1e-6
"""Added to every priority, so that nothing is forgotten for ever."""


@dataclass(frozen=True)
class Batch:
    """Subtrajectories of H decisions, time first.

    Attributes:
        observations: `(H + 1, B, ...)`.
        actions: `(H, B, actions)`.
        rewards: `(H, B)`.
        terminated: `(H, B)` 1.0 where the decision ended the task, so that nothing follows; not a time limit.
        indices: `(B,)` of the first decisions, for `ReplayBuffer.set_priorities`.
        weights: `(B,)` that correct for the priorities, at most 1.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    indices: Tensor
    weights: Tensor


class ReplayBuffer:
    """Whole episodes, in the order in which they were played; grows without bound.

    An episode of T decisions has T + 1 observations; images are stored once, whatever the stack.

    Args:
        observation_shape: of one observation as the agent sees it; `(frames * 3, side, side)` of pixels.
        action_size: numbers of an action.
        horizon: decisions of the subtrajectories that will be drawn.
        frames: images that make one observation; 1 for states.
        device: where it is stored and sampled.
    """

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        action_size: int,
        *,
        horizon: int = 1,
        frames: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape, self._horizon, self._frames = observation_shape, horizon, frames
        self._device = torch.device(device)
        stored = (observation_shape[0] // frames, *observation_shape[1:])
        kind = torch.uint8 if len(observation_shape) == 3 else torch.float32
        self._size, self._slots = 0, 0
        self._columns = {
            "observations": torch.empty((0, *stored), dtype=kind, device=self._device),
            "actions": torch.empty((0, action_size), device=self._device),
            "rewards": torch.empty(0, device=self._device),
            "terminated": torch.empty(0, device=self._device),
            "starts": torch.empty(0, dtype=torch.int64, device=self._device),
            "remaining": torch.empty(0, dtype=torch.int64, device=self._device),
            "priorities": torch.empty(0, device=self._device),
        }

    def __len__(self) -> int:
        """Decisions stored."""
        return int((self._column("remaining") > 0).sum())

    @property
    def episodes(self) -> int:
        """Episodes stored."""
        return int((self._column("remaining") == 0).sum())

    def add(
        self, observations: np.ndarray, actions: np.ndarray, rewards: np.ndarray, *, terminated: bool
    ) -> None:
        """Store an episode: `(T + 1, ...)` observations, `(T, actions)`, `(T,)` rewards."""
        length = len(actions)
        begin, end = self._size, self._size + length + 1
        self._reserve(end)
        self._size = end
        here = torch.as_tensor(observations, device=self._device)[:, -self._stored_channels() :]
        padded_rewards = torch.zeros(length + 1)
        padded_rewards[:length] = torch.as_tensor(rewards)
        ends = torch.zeros(length + 1)
        ends[length - 1] = float(terminated)
        drawn = self._columns["remaining"][:begin] >= self._horizon  # the others' priorities never change
        priorities = self._columns["priorities"][:begin][drawn]
        highest = float(priorities.max()) if len(priorities) else 1.0
        self._columns["observations"][begin:end] = here
        self._columns["actions"][begin : end - 1] = torch.as_tensor(actions)
        self._columns["actions"][end - 1] = 0
        self._columns["rewards"][begin:end] = padded_rewards
        self._columns["terminated"][begin:end] = ends
        self._columns["starts"][begin:end] = begin
        self._columns["remaining"][begin:end] = torch.arange(length, -1, -1)
        self._columns["priorities"][begin:end] = highest

    def sample(
        self,
        batch_size: int,
        horizon: int,
        generator: torch.Generator,
        *,
        priority_exponent: float,
        importance_exponent: float,
    ) -> Batch:
        """Different subtrajectories, drawn by priority; with repetition where there are too few.

        Raises:
            UserError: no stored episode is as long as the horizon.
        """
        open_ = self._column("remaining") >= horizon
        total = int(open_.sum())
        if total == 0:
            longest = int(self._column("remaining").max()) if self._size else 0
            raise UserError(
                f"the replay buffer's longest episode has {longest} decisions, fewer than the horizon of "
                f"{horizon}: use a smaller horizon or action repeat, or longer episodes"
            )
        mass = self._column("priorities").pow(priority_exponent) * open_
        if batch_size <= total:
            # The smallest of exponential variables with these rates: drawing without putting back.
            keys = torch.empty_like(mass).exponential_(generator=generator) / mass
            indices = keys.topk(batch_size, largest=False, sorted=False).indices
        else:
            indices = torch.multinomial(mass, batch_size, replacement=True, generator=generator)
        weights = (total * mass[indices] / mass.sum()).pow(-importance_exponent)
        times = torch.arange(horizon + 1, device=self._device).unsqueeze(1) + indices  # (H + 1, B)
        return Batch(
            observations=self.observations(times),
            actions=self._columns["actions"][times[:-1]],
            rewards=self._columns["rewards"][times[:-1]],
            terminated=self._columns["terminated"][times[:-1]],
            indices=indices,
            weights=weights / weights.max(),
        )

    def set_priorities(self, indices: Tensor, priorities: Tensor) -> None:
        """The latest errors of subtrajectories, both `(B,)`."""
        self._columns["priorities"][indices] = priorities.to(self._device) + PRIORITY_FLOOR

    def observations(self, places: Tensor) -> Tensor:
        """The observations at some places, `(*places.shape, *observation_shape)`, images stacked."""
        if self._frames == 1:
            return self._columns["observations"][places]
        starts = self._columns["starts"][places]
        back = torch.arange(self._frames - 1, -1, -1, device=self._device)
        stacked = torch.maximum(places.unsqueeze(-1) - back, starts.unsqueeze(-1))  # (..., frames)
        return self._columns["observations"][stacked].flatten(places.dim(), places.dim() + 1)

    def places(self, horizon: int) -> Tensor:
        """Where subtrajectories of so many decisions begin, in the order of play."""
        return (self._column("remaining") >= horizon).nonzero().flatten()

    def actions(self, places: Tensor) -> Tensor:
        """The actions at some places, `(*places.shape, actions)`."""
        return self._columns["actions"][places]

    def last_episodes(self, count: int) -> list[Tensor]:
        """Observations `(T + 1, ...)` of the last episodes, at most so many, in the order of play."""
        ends = (self._column("remaining") == 0).nonzero().flatten().tolist()
        begins = [0, *(end + 1 for end in ends[:-1])]
        episodes = list(zip(begins, ends, strict=False))[-count:]
        places = [torch.arange(begin, end + 1, device=self._device) for begin, end in episodes]
        return [self.observations(place) for place in places]

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything, as `from_tensors` takes it; copies."""
        return {name: self._column(name).clone() for name in self._columns if name != "starts"}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        observation_shape: tuple[int, ...],
        *,
        horizon: int = 1,
        frames: int = 1,
        device: torch.device | str = "cpu",
    ) -> ReplayBuffer:
        """A buffer with the content of another; the tensors are copied."""
        size = tensors["actions"].shape[-1]
        buffer = cls(observation_shape, size, horizon=horizon, frames=frames, device=device)
        size = len(tensors["rewards"])
        buffer._reserve(size)
        buffer._size = size
        for name, tensor in tensors.items():
            buffer._columns[name][:size] = tensor.to(buffer._device)
        ends = buffer._column("remaining") == 0  # the last observation of every episode
        numbers = ends.cumsum(0) - ends.long()
        begins = torch.cat([ends.new_zeros(1, dtype=torch.int64), ends.nonzero().flatten() + 1])
        buffer._columns["starts"][:size] = begins[numbers]
        return buffer

    def thinned(self, decisions: int) -> ReplayBuffer:
        """A buffer of at most so many decisions: whole episodes, evenly spread, the last always among them.

        As many as fit; the last one even where it alone does not. Episodes shorter than the horizon are left
        out unless there are no others.
        """
        last = (self._column("remaining") == 0).nonzero().flatten().tolist()
        episodes = list(zip([0, *(end + 1 for end in last[:-1])], last, strict=False))
        drawn = [(begin, end) for begin, end in episodes if end - begin >= self._horizon]
        begins, ends = zip(*(drawn or episodes), strict=True) if episodes else ((), ())
        chosen: list[int] = []
        for count in range(len(ends), 0, -1):  # episodes may differ in length
            chosen = [len(ends) - 1 - (i * len(ends)) // count for i in reversed(range(count))]
            if sum(ends[i] - begins[i] for i in chosen) <= decisions:
                break
        places = [torch.arange(begins[i], ends[i] + 1) for i in chosen]
        kept = torch.cat(places) if places else torch.arange(0)
        tensors = {name: tensor[kept.to(tensor.device)] for name, tensor in self.to_tensors().items()}
        return ReplayBuffer.from_tensors(
            tensors, self._shape, horizon=self._horizon, frames=self._frames, device=self._device
        )

    def _stored_channels(self) -> int:
        return int(self._columns["observations"].shape[1])

    def _column(self, name: str) -> Tensor:
        return self._columns[name][: self._size]

    def _reserve(self, size: int) -> None:
        """Room for `size` rows; doubles, so that adding episodes copies little."""
        if size <= self._slots:
            return
        self._slots = max(size, 2 * self._slots, 1024)
        for name, column in self._columns.items():
            grown = column.new_zeros((self._slots, *column.shape[1:]))
            grown[: self._size] = column[: self._size]
            self._columns[name] = grown
