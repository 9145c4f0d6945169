"""The `tdmpc` agent: a world model that is trained on a control task and acts by planning in its latent."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from agents.agent import UNTRACKED, Objective, Progress, Rehearsal, Split, StorableTracker, Tracker
from agents.environments import EnvironmentSpec
from agents.lockstep import Trajectory
from agents.options import parse_options
from agents.shrinking import narrowed, take_layers
from agents.tdmpc import stability
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.distillation import Distillation, Lessons, Sequences, draw_sequences, label
from agents.tdmpc.episodes import Act, Episodes, Returns, episode_seeds, episodes_of
from agents.tdmpc.learning import Learner, UpdateNoise
from agents.tdmpc.planner import PlanMemory, Planner
from agents.tdmpc.replay_buffer import ReplayBuffer
from agents.tdmpc.training import CHECKPOINT, Training, frames, image_side, planner_settings, total_decisions
from agents.tdmpc.world_model import WorldModel, dense_widths
from agents.widths import complete
from components.errors import UserError, nearest

EXAMPLES = 64
"""Observations of a random episode that stand for the inputs of `act`."""

REHEARSAL_DECISIONS = 20
"""Of each of the three episodes of a rehearsal."""

CHECKPOINT_SECONDS, CHECKPOINT_RATIO = 60.0, 20.0
"""Between two checkpoints of a training, and at least so many times what writing the last one took."""

BFLOAT16_WIDTH = 64
"""Width of hidden layers from which bfloat16 products, conversions included, are the faster ones."""


class TDMPC:
    """TD-MPC after Hansen, Wang and Su (2022): see `agents.agent.Agent` for what its members promise.

    Its states are `model`, `target` (encoder and Q functions) and Adam's moments, `adam_mean` and
    `adam_square`.
    """

    performance: ClassVar[Objective] = Objective("return", "maximize", "reward per episode")
    fine_tune_methods: ClassVar[tuple[str, ...]] = ("distill", "td", "distill_td")
    rung_methods: ClassVar[tuple[str, ...]] = ("distill", "distill_td")
    taught_methods: ClassVar[tuple[str, ...]] = ("distill", "distill_td")
    searchable_options: ClassVar[tuple[str, ...]] = ("samples", "iterations", "horizon")
    components: Mapping[str, Sequence[str]] = {
        name: (name,) for name in ("encoder", "dynamics", "reward", "q1", "q2", "policy")
    }
    ties: Sequence[tuple[str, str]] = (("next_latent", "latent"), ("latent_after", "latent"))
    shared_ratios: Mapping[str, str] = {"q2.0": "q1.0", "q2.3": "q1.3"}

    def __init__(
        self,
        options: Mapping[str, Any],
        widths: Mapping[str, int] | None = None,
        data: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        self._options = parse_options(TDMPCOptions, options, "TD-MPC agent")
        self.options: Mapping[str, Any] = self._options.model_dump(mode="json")
        self.device = torch.device(device)
        self.widths: Mapping[str, int] = complete(widths, dense_widths(self._options), "TD-MPC agent")
        self.model: nn.Module = self._new_model(seed=0)
        self._target: dict[str, Tensor] | None = None
        self._moments: dict[str, dict[str, Tensor]] | None = None
        self._data = None if data is None else {name: rows.to(self.device) for name, rows in data.items()}
        self._planner: tuple[tuple[int, ...], Planner] | None = None
        self._lyapunov: tuple[tuple[object, ...], stability.Candidate] | None = None
        self._base: TDMPC | None = None
        self._judge: TDMPC | None = None
        self._kept_latent: Tensor | None = None
        # Under way, all of them:
        self._training: Training | None = None
        self._distilling: Distillation | None = None
        self._learning: Learner | None = None

    # --- the model and its data --------------------------------------------------------------------------

    @property
    def spec(self) -> EnvironmentSpec:
        """Of the task."""
        return self._episodes.spec

    def data(self) -> dict[str, Tensor]:
        """`examples`, observations of a random episode, and once trained `replay.*`, its experience."""
        if self._data is None:
            seed = episode_seeds("test", 0, 1)
            observations = torch.as_tensor(self._episodes.play_randomly(seed)[0].observations)
            picked = torch.linspace(0, len(observations) - 1, EXAMPLES).round().long()
            self._data = {"examples": observations[picked].to(self.device)}
        return dict(self._data)

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode `observations`, roll the dynamics out two decisions, and call every head on the way."""
        world, action = _world(model), inputs["actions"].to(self.device)
        latent = world.encode(inputs["observations"].to(self.device))
        next_latent = world.next_latent(latent, action)
        return {
            **self._heads(world, latent, action),
            "latent": latent,
            "next_latent": next_latent,
            **{f"{name}_after": made for name, made in self._heads(world, next_latent, action).items()},
            "latent_after": world.next_latent(next_latent, action),
        }

    def calibration_program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`program` without the roll-out: every layer is called once, on latents that the encoder made."""
        world, action = _world(model), inputs["actions"].to(self.device)
        latent = world.encode(inputs["observations"].to(self.device))
        heads = self._heads(world, latent, action)
        return {**heads, "latent": latent, "next_latent": world.next_latent(latent, action)}

    @staticmethod
    def _heads(world: WorldModel, latent: Tensor, action: Tensor) -> dict[str, Tensor]:
        q1, q2 = world.q_values(latent, action)
        policy = world.policy_mean(latent)
        return {"reward": world.reward_of(latent, action), "q1": q1, "q2": q2, "policy": policy}

    def calibration_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """`observations` of the training and `actions`, half of them as played, half random.

        Before the training both are random: enough to trace with.
        """
        generator = torch.Generator().manual_seed(seed)
        if self._training is None and not self._has_experience:
            examples = self.data()["examples"]
            picked = examples[torch.arange(rows, device=examples.device) % len(examples)]
            actions = 2 * torch.rand(rows, self.spec.action_size, generator=generator) - 1
            return {"observations": picked, "actions": actions.to(self.device)}
        replay = self._replay if self._training is None else self._training.buffer
        sequences = draw_sequences(replay, rows, 1, generator)
        return {"observations": sequences.observations, "actions": sequences.actions[0]}

    def states(self) -> dict[str, dict[str, Tensor]]:
        """`model` and, once trained, `target`, `adam_mean` and `adam_square`.

        While it is distilled, `distillation_mean` and `distillation_square` as well: moments of another Adam.
        """
        sections: dict[str, Mapping[str, Tensor]] = {"model": self.model.state_dict()}
        learner = self._training.learner if self._training is not None else self._learning
        if self._distilling is not None:
            sections |= self._distilling.moments()
        if learner is not None:
            sections |= {"target": learner.target, **learner.moments()}
        elif self._target is not None and self._moments is not None:
            sections |= {"target": self._target, **self._moments}
        return {
            section: {name: tensor.detach().clone() for name, tensor in state.items()}
            for section, state in sections.items()
        }

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over `model` and, where given, the target and the moments."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        if states["model"].keys() != shapes.keys():
            raise UserError("the state is that of a model of another architecture")
        for section in ("model", "target", "adam_mean", "adam_square"):
            for name, tensor in states.get(section, {}).items():
                if shapes.get(name) != tensor.shape:
                    raise UserError(
                        f"{section} {name!r} of shape {tuple(tensor.shape)} does not fit the model"
                    )
        self.model.load_state_dict(dict(states["model"]))
        self.__dict__.pop("lessons", None)
        whole = {"target", "adam_mean", "adam_square"} <= set(states)
        self._target = _copied(states["target"], self.device) if whole else None
        self._moments = (
            {name: _copied(states[name], self.device) for name in ("adam_mean", "adam_square")}
            if whole
            else None
        )

    # --- learning ----------------------------------------------------------------------------------------

    @property
    def training_updates(self) -> int:
        """One of the world model for every decision, and one of the policy."""
        return total_decisions(self._options, self.spec)

    @property
    def training_steps(self) -> int:
        """Environment steps of the training."""
        return self._options.steps

    def train(self, seed: int, tracker: Tracker | None, progress: Progress) -> None:
        """Play and learn for `steps` environment steps, from new random weights."""
        self._train(self.start_training(seed), tracker or UNTRACKED, progress)

    def train_from(self, seed: int, tracker: StorableTracker, progress: Progress, checkpoint: Path) -> None:
        """`train`, going on from the checkpoint in a directory and keeping one there."""
        training = self.start_training(seed)
        if (checkpoint / CHECKPOINT).is_file():
            gathered = training.load(checkpoint)
            try:
                tracker.load_tensors(gathered)
            except (KeyError, RuntimeError) as error:
                raise UserError(f"the checkpoint in {checkpoint} is damaged ({error})") from None
        due = time.monotonic() + CHECKPOINT_SECONDS

        def keep(done: int, total: int, note: str) -> None:
            nonlocal due
            progress(done, total, note)
            began = time.monotonic()
            if began >= due:
                training.save(checkpoint, tracker.to_tensors())
                now = time.monotonic()
                due = now + max(CHECKPOINT_SECONDS, CHECKPOINT_RATIO * (now - began))

        self._train(training, tracker, keep)

    def _train(self, training: Training, tracker: Tracker, progress: Progress) -> None:
        """The rest of a training; `progress` is called after every episode."""
        self._training = training
        try:
            while not training.done:
                training.run_episode(tracker)
                steps = training.decisions * self.spec.action_repeat
                note = f"return {training.latest_return:.1f}"
                progress(min(steps, self._options.steps), self._options.steps, note)
        finally:
            self._training = None
        self.finish_training(training)

    @property
    def rehearsal(self) -> Rehearsal:
        """Three short episodes, one random and two planned over the full horizon, and their updates."""
        decisions = max(REHEARSAL_DECISIONS, 2 * self._options.horizon)
        steps = decisions * self.spec.action_repeat
        schedules = {"seed_decisions": decisions, "exploration_decisions": 1, "horizon_decisions": 1}
        short = {"step_limit": steps, "steps": 3 * steps, **schedules}
        return Rehearsal({**self.options, **short}, self._options.steps)

    def start_training(self, seed: int) -> Training:
        """A training of this agent's model from new random weights; for checkpoints along the way."""
        self.model.load_state_dict(self._new_model(seed).state_dict())
        world = _world(self.model)
        return Training(world, self._options, self._episodes, seed, self.device, self._precision)

    def finish_training(self, training: Training) -> None:
        """Take over what a training of this agent's model has learnt and seen."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        self._target = _copied(training.learner.target, self.device)
        self._moments = training.learner.moments()
        replay = training.buffer.thinned(self._options.stored_decisions).to_tensors()
        examples = {"examples": self.data()["examples"]}
        self._data = {**examples, **{f"replay.{name}": tensor for name, tensor in replay.items()}}
        self.__dict__.pop("_replay", None)
        self.__dict__.pop("lessons", None)

    def learn_from(self, base: Any, kept: Mapping[str, Tensor]) -> None:
        """Which trained dense agent this one was pruned from, for distillation, and what it kept of it."""
        if not isinstance(base, TDMPC):
            raise UserError(f"a TD-MPC agent cannot learn from a {type(base).__name__}")
        self._base, self._kept_latent = base, kept["latent"]

    def compare_with(self, base: Any) -> None:
        """Which trained dense agent judges the stability of this one, which was not pruned from it."""
        if not isinstance(base, TDMPC):
            raise UserError(f"a TD-MPC agent cannot be compared with a {type(base).__name__}")
        self._judge = base

    def shrink(self, kept: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with fewer channels, moments included; of the base's latents those are learnt.

        The target network starts again from the present weights: sliced and not repaired as these are, it
        would bias what is learnt until it has caught up.
        """
        if "target" in states:
            target = {name: states["model"][name].clone() for name in states["target"]}
            states = {**states, "target": target}
        self.widths = narrowed(self.widths, kept)
        take_layers(self.model, self._new_model(seed=0), states["model"])
        self._planner = None
        self.__dict__.pop("lessons", None)
        latent = kept.get("latent", torch.arange(self.widths["latent"], device=self.device))
        if self._kept_latent is not None:
            self._kept_latent = self._kept_latent[latent]
        if self._training is not None:
            self._training.shrink(states, self._precision)
        if self._distilling is not None:
            self._distilling.shrink(latent, states)
        if self._learning is not None:
            self._learning = Learner(
                _world(self.model), self._options, target=states["target"], moments=states, adam_steps=None
            )
        elif "target" in states:
            self._target = dict(states["target"])
            self._moments = {name: dict(states[name]) for name in ("adam_mean", "adam_square")}

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Progress, tracker: Tracker | None = None
    ) -> dict[str, float]:
        """Train on from the present weights.

        Args:
            method: `distill` learns to compute what the base computes, `td` goes on with the stored
                experience, `distill_td` makes an update of either kind in turn.
            updates: gradient updates of each.
            seed: of everything random.
            progress: is told how far it is, after every update.
            tracker: is told of all backward passes: `distillation`, and `model` and `policy` of `td`.

        Returns:
            `on_policy_episodes` and `environment_steps` that it took, and the `held_out_loss` of the
            distillation; lower is better. Of `distill` alone also what that was before (`_before`): what
            TD-learning does to the agent, this loss does not tell.

        Raises:
            UserError: no such method, or nothing to learn from.
        """
        if method not in self.fine_tune_methods:
            known = nearest(method, self.fine_tune_methods)
            raise UserError(f"the TD-MPC agent has no fine-tuning method {method!r}: {known}")
        if not self._has_experience:
            raise UserError("the TD-MPC agent has no stored experience to fine-tune on: train it first")
        facts: dict[str, float] = {}
        if updates == 0:
            return facts
        self.__dict__.pop("lessons", None)  # those of the weights so far
        tracker = tracker or UNTRACKED
        distillation = self._distillation(updates, seed) if method != "td" else None
        self._learning = self._learner() if method != "distill" else None
        if distillation is not None and self._learning is None:
            facts["held_out_loss_before"] = distillation.held_out_loss()
        generator = torch.Generator(self.device).manual_seed(seed)
        self._distilling, note = distillation, ""
        self.model.train()
        try:
            for step in range(updates):
                if distillation is not None:
                    if step == updates // 3 and self._options.on_policy_episodes:
                        facts |= self._visit(distillation, seed)
                    loss = distillation.step(tracker)
                if self._learning is not None:
                    loss = self._td_update(self._learning, step, generator, tracker)
                if (step + 1) % 50 == 0 or step + 1 == updates:
                    note = f"loss {float(loss):.4g}"  # reading a loss waits for the device
                progress(step + 1, updates, note)
        finally:
            learner, self._learning = self._learning, None
            self._distilling = None
            self.model.eval()
            self.model.zero_grad(set_to_none=True)
        if distillation is not None:
            facts["held_out_loss"] = distillation.held_out_loss()
        if learner is not None:
            self._target, self._moments = _copied(learner.target, self.device), learner.moments()
        else:
            self._target = self._moments = None
        return facts

    def rung_loss(self) -> float:
        """The loss of the distillation under way on what it holds out; 0 is the base itself.

        The sum of the errors of latents, rewards, values and policy, each divided by its target's variance.

        Raises:
            RuntimeError: no distillation is under way.
        """
        if self._distilling is None:
            raise RuntimeError("the TD-MPC agent has a rung loss only while it is distilled")
        return self._distilling.held_out_loss()

    @cached_property
    def lessons(self) -> Lessons:
        """What this agent, as a base, teaches every agent that is pruned from it; computed once."""
        chosen = self._options
        generator = torch.Generator().manual_seed(0)
        sequences = draw_sequences(self._replay, chosen.distillation_sequences, chosen.horizon, generator)
        return label(_world(self.model), sequences)

    def _distillation(self, updates: int, seed: int) -> Distillation:
        if self._base is None or self._kept_latent is None:
            raise UserError(
                "distillation needs the base that the agent was pruned from: call learn_from first, "
                "or fine-tune with 'td'"
            )
        return Distillation(
            _world(self.model),
            self._base.lessons,
            self._kept_latent.to(self.device),
            updates=updates,
            batch_size=self._options.distillation_batch_size,
            learning_rate=self._options.distillation_learning_rate,
            seed=seed,
        )

    def _visit(self, distillation: Distillation, seed: int) -> dict[str, float]:
        """Play some episodes and add them, labelled by the base: what this agent, not the base, runs into."""
        assert self._base is not None
        self.model.eval()
        seeds = episode_seeds("on_policy", seed, self._options.on_policy_episodes)
        played = self._episodes.play(seeds, self.act, self.device)
        buffer = ReplayBuffer(
            self.spec.observation_shape, self.spec.action_size, frames=1, device=self.device
        )
        for trajectory in played:
            buffer.add(trajectory.observations, trajectory.actions, trajectory.rewards, terminated=False)
        horizon = len(self._base.lessons.sequences.actions)  # the base's: a student may plan over another
        places = buffer.places(min(horizon, max(len(t.actions) for t in played)))
        times = torch.arange(horizon, device=places.device).unsqueeze(1) + places
        sequences = Sequences(buffer.observations(places), buffer.actions(times))
        distillation.add_visited(label(_world(self._base.model), sequences))
        self.model.train()
        decisions = sum(len(trajectory.actions) for trajectory in played)
        return {
            "on_policy_episodes": float(len(played)),
            "environment_steps": float(decisions * self.spec.action_repeat),
        }

    def _learner(self) -> Learner:
        """Its target begins at the present weights: that of the base was sliced, and nothing repaired it."""
        return Learner(_world(self.model), self._options, moments=self._moments, adam_steps=None)

    def _td_update(
        self, learner: Learner, number: int, generator: torch.Generator, tracker: Tracker
    ) -> Tensor:
        chosen = self._options
        batch = self._replay.sample(
            chosen.batch_size,
            chosen.horizon,
            generator,
            priority_exponent=0.0,  # priorities are the training's, and this must not change them
            importance_exponent=0.0,
        )
        noise = UpdateNoise.draw(batch, generator, image_side(chosen))
        return learner.update(batch, noise, number, tracker).value

    # --- measuring and acting ----------------------------------------------------------------------------

    @property
    def measurements(self) -> Mapping[str, str]:
        """What `evaluate` reports besides the return, with units."""
        spread = dict.fromkeys(("return_standard_error", "worst_return"), self.performance.unit)
        return {**spread, **(stability.MEASUREMENTS if self._options.stability != "none" else {})}

    def evaluate(self, split: Split, *, policy_only: bool = False) -> dict[str, float]:
        """The mean return of episodes with fixed seeds, the same for every agent of the task.

        Args:
            split: `validation` or `test`: different seeds.
            policy_only: act by the policy's mean, without planning; the names begin with `policy_only_`.

        Returns:
            `return`, its `return_standard_error`, and `worst_return`, of one episode. Of the planner also the
            empirical `stability` of these episodes: see `agents.tdmpc.stability`. It takes the base to
            measure that, so an agent that was told of none has it only where it was itself trained.
        """
        act = self._act_by_policy if policy_only else self.act
        played = self._episodes.play(self.evaluation_seeds(split), act, self.device)
        returns = Returns.of(played)
        prefix = "policy_only_" if policy_only else ""
        return {
            f"{prefix}return": returns.mean,
            f"{prefix}return_standard_error": returns.standard_error,
            f"{prefix}worst_return": returns.worst,
            **({} if policy_only else self._stability(played)),
        }

    def _stability(self, played: Sequence[Trajectory]) -> dict[str, float]:
        """What the base makes of the states that this agent went through; empty without a base."""
        base = self._judge or self._base or (self if self._target is not None else None)
        if base is None or not base._has_experience or self._options.stability == "none":
            return {}
        return stability.measure(
            base._current_lyapunov(self._options.stability),
            [torch.as_tensor(trajectory.observations, device=self.device) for trajectory in played],
            self._options.stability_window,
            self.spec.control_step_s or 1.0,
        )

    def trivial(self, split: Split) -> float:
        """The mean return of random actions."""
        return Returns.of(self._episodes.play_randomly(self.evaluation_seeds(split))).mean

    def evaluation_seeds(self, split: Split) -> list[int]:
        """Of the episodes that `evaluate` plays; the same for every agent with these options."""
        chosen = self._options
        return episode_seeds(
            split, 0, chosen.validation_episodes if split == "validation" else chosen.test_episodes
        )

    def play(self, seeds: Sequence[int], act: Act | None = None) -> list[Trajectory]:
        """Whole episodes with these seeds, in lockstep.

        Args:
            seeds: one for every episode.
            act: actions for the observations of the episodes that still run and their memory; None plans.
        """
        return self._episodes.play(seeds, act or self.act, self.device)

    def act(self, inputs: Tensor, memory: PlanMemory | None = None) -> Tensor:
        """Planned actions `(n, actions)` in [-1, 1] for observations `(n, ...)`.

        Args:
            inputs: one observation for every episode.
            memory: of these episodes, from `remember`; planning then goes on from the decision before. None
                plans as at the start of an episode, with the same noise for every row and every call.
        """
        if memory is None:
            memory = PlanMemory.start([0] * len(inputs), self.device)
        return self._current_planner().plan(inputs.to(self.device), memory).clone()

    def remember(self, episodes: int = 1, seed: int = 0) -> PlanMemory:
        """What `act` takes along through a number of episodes that begin now."""
        return PlanMemory.start(episode_seeds("on_policy", seed, episodes), self.device)

    def _act_by_policy(self, inputs: Tensor, memory: PlanMemory) -> Tensor:
        with torch.no_grad():
            world = _world(self.model)
            return world.policy_mean(world.encode(inputs.to(self.device)))

    def example_inputs(self, count: int) -> Tensor:
        """Observations of a random episode, from the beginning again where there are not so many."""
        examples = self.data()["examples"]
        return examples[torch.arange(count, device=examples.device) % len(examples)]

    def contract(self) -> dict[str, Any]:
        """One observation in, one action in [-1, 1] out, with the bounds that the environment gives it."""
        spec = self.spec
        kind = "uint8" if self._options.observation == "pixels" else "float32"
        pixels = [0, 255] if self._options.observation == "pixels" else None
        return {
            "inputs": [
                {
                    "name": "observation",
                    "shape": list(spec.observation_shape),
                    "dtype": kind,
                    "range": pixels,
                    "names": list(spec.observation_names),
                }
            ],
            "outputs": [
                {
                    "name": "action",
                    "shape": [spec.action_size],
                    "dtype": "float32",
                    "range": [-1.0, 1.0],
                    "low": list(spec.action_low),
                    "high": list(spec.action_high),
                }
            ],
            "control_step_s": spec.control_step_s,
        }

    # --- parts -------------------------------------------------------------------------------------------

    @cached_property
    def _episodes(self) -> Episodes:
        return episodes_of(self._options)

    @property
    def _has_experience(self) -> bool:
        return "replay.rewards" in self.data()

    @cached_property
    def _replay(self) -> ReplayBuffer:
        tensors = {
            name.removeprefix("replay."): rows for name, rows in self.data().items() if name != "examples"
        }
        shape = self.spec.observation_shape
        return ReplayBuffer.from_tensors(tensors, shape, frames=frames(self._options), device=self.device)

    @property
    def _precision(self) -> torch.dtype | None:
        """Of the planner's hidden layers."""
        chosen = self._options.precision
        if chosen == "auto":
            hidden = [
                size for name, size in self.widths.items() if name.startswith(("dynamics", "reward", "q"))
            ]
            wide = min(hidden) >= BFLOAT16_WIDTH
            return torch.bfloat16 if wide and self.device.type == "cpu" and multiplies_bfloat16() else None
        return torch.bfloat16 if chosen == "bfloat16" else None

    @property
    def _versions(self) -> tuple[int, ...]:
        """Counters of the weights: whether what was made from some is still of the present ones."""
        return tuple(p._version for p in self.model.parameters())

    def _current_lyapunov(self, kind: Literal["value", "quadratic"]) -> stability.Candidate:
        """The candidate of the present weights, from the end of this agent's experience."""
        key = (kind, *self._versions)
        if self._lyapunov is None or self._lyapunov[0] != key:
            make = stability.value_candidate if kind == "value" else stability.quadratic_candidate
            episodes = self._replay.last_episodes(stability.REFERENCE_EPISODES)
            self._lyapunov = key, make(_world(self.model), episodes)
        return self._lyapunov[1]

    def _current_planner(self) -> Planner:
        """A planner with the present weights."""
        versions = self._versions
        if self._planner is None or self._planner[0] != versions:
            # After the training: with the horizon and the deviations that its schedules end with.
            settings = planner_settings(self._options, total_decisions(self._options, self.spec))
            self._planner = versions, Planner(_world(self.model), settings, self._precision)
        return self._planner[1]

    def _new_model(self, seed: int) -> WorldModel:
        """New networks with weights from this seed; the global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            spec = self.spec
            model = WorldModel(self.widths, spec.observation_shape, spec.action_size)
        return model.to(self.device).eval()


def _world(model: nn.Module) -> WorldModel:
    assert isinstance(model, WorldModel)
    return model


def _copied(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.detach().to(device, copy=True) for name, tensor in state.items()}


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware: AMX or AVX-512 BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
