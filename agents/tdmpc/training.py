"""Training of TD-MPC from its own experience, one episode after the other, and checkpoints that resume it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.agent import UNTRACKED, Tracker
from agents.environments import EnvironmentFaultError, EnvironmentSpec
from agents.lockstep import Trajectory
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.episodes import Episodes, Returns, episode_seeds
from agents.tdmpc.learning import Learner, UpdateNoise, finite
from agents.tdmpc.planner import PlanMemory, Planner, PlannerSettings
from agents.tdmpc.replay_buffer import ReplayBuffer
from agents.tdmpc.world_model import WorldModel
from components.errors import UserError

CHECK_EVERY = 50
"""Updates between two looks at whether the losses are still numbers; the first so many are all looked at."""

SECTIONS = frozenset({"model", "target", "adam_mean", "adam_square", "replay", "random"})
"""Of a checkpoint."""

FOLLOWER = "follower"
"""One more, where something follows the training: what that has gathered."""

CHECKPOINT = "checkpoint.safetensors"
"""Its file."""


class Training:
    """A training under way: plays an episode, then makes one update per decision.

    Everything random comes from the seed. Stopped after any episode, saved and loaded, it goes on with the
    same bits.

    Args:
        model: new; is trained in place.
        options: of the agent.
        episodes: of its task.
        seed: of everything random.
        device: of the model.
        precision: of hidden layers, when planning and when learning; None is that of the model.
    """

    def __init__(
        self,
        model: WorldModel,
        options: TDMPCOptions,
        episodes: Episodes,
        seed: int,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.learner = Learner(model, options, precision=precision)
        self._options, self._episodes, self._device = options, episodes, device
        self._precision = precision
        self._seed = seed
        self.buffer = new_buffer(options, episodes.spec, device)
        self.played = 0
        self.decisions = 0
        self.updates = 0
        self.latest_return = float("nan")
        if self.total_decisions < options.seed_decisions:
            raise UserError(
                f"steps is {options.steps}, which makes {self.total_decisions} decisions: "
                f"learning begins after {options.seed_decisions}, seed_decisions"
            )
        self._noise = torch.Generator(device).manual_seed(episode_seeds("training", seed, 1)[0])

    @property
    def total_decisions(self) -> int:
        """After which the training is done."""
        return total_decisions(self._options, self._episodes.spec)

    @property
    def done(self) -> bool:
        """Whether all decisions were made."""
        return self.decisions >= self.total_decisions

    def run_episode(self, tracker: Tracker = UNTRACKED) -> None:
        """Play one episode and learn from it.

        Raises:
            EnvironmentFaultError: an observation, a reward or a loss is not a number.
            UserError: no episode is as long as the horizon.
        """
        is_random = self.decisions < self._options.seed_decisions
        trajectory = self._play(is_random)
        self.buffer.add(
            trajectory.observations, trajectory.actions, trajectory.rewards, terminated=trajectory.terminated
        )
        self.played += 1
        self.decisions += len(trajectory.actions)
        self.latest_return = trajectory.episode_return
        if self.decisions < self._options.seed_decisions:
            return
        self.model.train()
        try:
            # The first time, as many updates as decisions were made so far.
            for _ in range(self.decisions if self.updates == 0 else len(trajectory.actions)):
                self._update(tracker)
        finally:
            self.model.eval()

    def shrink(self, states: Mapping[str, Mapping[str, Tensor]], precision: torch.dtype | None) -> None:
        """Go on, between two episodes, with a model that has lost channels.

        Args:
            states: `target`, `adam_mean` and `adam_square` of the narrower model.
            precision: as in `Training`, for its widths.
        """
        self._precision = precision
        self.learner = Learner(
            self.model,
            self._options,
            target=states["target"],
            moments=states,
            adam_steps=self.updates,
            precision=precision,
        )

    def evaluate(self, seeds: Sequence[int]) -> Returns:
        """Episodes without exploration, planned as the schedules have it now; changes nothing."""
        planner = Planner(self.model, planner_settings(self._options, self.decisions), self._precision)

        def act(observations: Tensor, memory: PlanMemory) -> Tensor:
            return planner.plan(observations, memory)

        return Returns.of(self._episodes.play(seeds, act, self._device))

    def _play(self, is_random: bool) -> Trajectory:
        seeds = episode_seeds("training", self._seed, 1, first=self.played + 1)
        if is_random:
            return self._episodes.play_randomly(seeds)[0]
        settings = planner_settings(self._options, self.decisions)
        planner = Planner(self.model, settings, self._precision)

        def act(observations: Tensor, memory: PlanMemory) -> Tensor:
            return planner.plan(observations, memory, explore=True)

        return self._episodes.play(seeds, act, self._device)[0]

    def _update(self, tracker: Tracker) -> None:
        chosen = self._options
        batch = self.buffer.sample(
            chosen.batch_size,
            chosen.horizon,
            self._noise,
            priority_exponent=chosen.priority_exponent,
            importance_exponent=chosen.importance_exponent,
        )
        noise = UpdateNoise.draw(batch, self._noise, image_side(chosen))
        losses = self.learner.update(batch, noise, self.updates, tracker)
        self.buffer.set_priorities(batch.indices, losses.priorities)
        self.updates += 1
        looks = self.updates <= CHECK_EVERY or self.updates % CHECK_EVERY == 0
        if looks and not finite(losses):
            raise EnvironmentFaultError(
                f"the losses of the TD-MPC agent are not finite after {self.updates} updates: "
                "use a smaller learning rate"
            )

    # --- checkpoints -------------------------------------------------------------------------------------

    def save(self, directory: Path, gathered: Mapping[str, Tensor] | None = None) -> None:
        """Write everything that going on needs, between two episodes; replaces what is there.

        Args:
            directory: of the checkpoint; made as needed.
            gathered: by whoever follows the training; `load` returns it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        sections = {
            "model": self.model.state_dict(),
            "target": self.learner.target,
            **self.learner.moments(),
            "replay": self.buffer.to_tensors(),
            "random": {"noise": self._noise.get_state()},
            FOLLOWER: gathered or {},
        }
        tensors = {
            f"{section}/{name}": tensor.detach().cpu().contiguous().clone()
            for section, state in sections.items()
            for name, tensor in state.items()
        }
        facts = {
            "options": self._options.model_dump(mode="json"),
            "widths": _shapes(self.model),
            "seed": self._seed,
            "played": self.played,
            "decisions": self.decisions,
            "updates": self.updates,
            "latest_return": None if np.isnan(self.latest_return) else self.latest_return,
        }
        # In one file, and moved into its place: there is always one whole checkpoint.
        new = directory / f"{CHECKPOINT}.new"
        try:
            save_file(tensors, new, metadata={"training": json.dumps(facts)})
            with new.open("rb+") as file:
                os.fsync(file.fileno())
        except (SafetensorError, OSError) as error:  # the disk is full, say
            new.unlink(missing_ok=True)
            raise OSError(errno.EIO, str(error), str(new)) from None
        new.replace(directory / CHECKPOINT)

    def load(self, directory: Path) -> Mapping[str, Tensor]:
        """Go on from a checkpoint of the same task, options, shape and seed.

        Returns:
            What whoever followed the training had gathered.

        Raises:
            UserError: there is none, it is damaged, or it is of something else; the sentence says of what.
        """
        path = directory / CHECKPOINT
        tensors, facts = _read(path)
        try:
            self._require_own(path, facts)
            self._take_over(tensors, facts)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"the checkpoint {path} is damaged, or of another device ({error})") from None
        return tensors.get(FOLLOWER, {})

    def _require_own(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Refuse what was learnt on another task, with other options, in another shape, from another seed."""
        mine = self._options.model_dump(mode="json")
        for name, value in facts["options"].items():
            if name != "steps" and mine.get(name) != value:
                raise UserError(
                    f"the checkpoint {path} is of a training with {name} {value!r}, this one has "
                    f"{mine.get(name)!r}"
                )
        for name, shape in _shapes(self.model).items():
            if facts["widths"].get(name) != shape:
                raise UserError(
                    f"the checkpoint {path} is of another architecture: its {name} has shape "
                    f"{facts['widths'].get(name)}, this model's {shape}"
                )
        if facts["seed"] != self._seed:
            raise UserError(
                f"the checkpoint {path} is of a training with seed {facts['seed']}, this one has {self._seed}"
            )

    def _take_over(self, tensors: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
        for section, own in (("target", self.learner.target), ("replay", self.buffer.to_tensors())):
            if odd := sorted(tensors[section].keys() ^ own.keys()):
                raise KeyError(f"{section}/{odd[0]}")
        self._noise.set_state(tensors["random"]["noise"])
        self.model.load_state_dict(tensors["model"])
        self.played, self.decisions = facts["played"], facts["decisions"]
        self.updates = facts["updates"]
        self.latest_return = float("nan") if facts["latest_return"] is None else facts["latest_return"]
        self.learner = Learner(
            self.model,
            self._options,
            target=tensors["target"],
            moments=tensors if self.updates else None,
            adam_steps=self.updates,
            precision=self._precision,
        )
        spec = self._episodes.spec
        self.buffer = ReplayBuffer.from_tensors(
            tensors["replay"],
            spec.observation_shape,
            horizon=self._options.horizon,
            frames=frames(self._options),
            device=self._device,
        )


def total_decisions(options: TDMPCOptions, spec: EnvironmentSpec) -> int:
    """Decisions of a whole training."""
    return -(-options.steps // spec.action_repeat)


def planner_settings(options: TDMPCOptions, decisions: int) -> PlannerSettings:
    """How the agent plans after so many decisions of training."""
    return PlannerSettings(
        samples=options.samples,
        iterations=options.iterations,
        horizon=options.horizon_after(decisions),
        elite_share=options.elite_share,
        policy_share=options.policy_share,
        temperature=options.temperature,
        momentum=options.momentum,
        discount=options.discount,
        min_std=options.min_std_after(decisions),
        policy_std=options.min_std,
    )


def new_buffer(options: TDMPCOptions, spec: EnvironmentSpec, device: torch.device) -> ReplayBuffer:
    """An empty replay buffer for a task."""
    return ReplayBuffer(
        spec.observation_shape,
        spec.action_size,
        horizon=options.horizon,
        frames=frames(options),
        device=device,
    )


def frames(options: TDMPCOptions) -> int:
    """Images that make one observation; 1 for states."""
    return options.frame_stack if options.observation == "pixels" else 1


def image_side(options: TDMPCOptions) -> int | None:
    """Of one image, pixels; None for states."""
    return options.image_side if options.observation == "pixels" else None


def _shapes(model: WorldModel) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _read(path: Path) -> tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    nested: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["training"])
        for name, tensor in load_file(path).items():
            section, _, rest = name.partition("/")
            nested.setdefault(section, {})[rest] = tensor
        if nested.keys() - {FOLLOWER} != SECTIONS or not isinstance(facts, dict):
            raise ValueError("not all parts of a checkpoint")
    except (SafetensorError, KeyError, ValueError, OSError):
        raise UserError(f"{path} is no checkpoint of a TD-MPC training, or a damaged one") from None
    return nested, facts
