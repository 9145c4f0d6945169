"""The options of the TD-MPC agent: task, shape, learning, planning, evaluation and repair."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class TDMPCOptions(BaseModel):
    """The `agent:` block of an experiment, without `kind`.

    Symbols and defaults are those of Hansen, Wang and Su (2022, arXiv 2203.04955, appendix), for state
    observations. A *decision* is one choice of an action, an *environment step* one step of the simulator:
    `action_repeat` of these make a decision. Schedules count decisions.

    Attributes:
        task: `cartpole-swingup` and the like are dm_control's; `gymnasium:Pendulum-v1` is any gymnasium
            environment with a bounded continuous action space.
        observation: `state`, flattened, or `pixels`: rendered images, which need a renderer.
        action_repeat: environment steps per decision; None is what is customary for the task.
        frame_stack: images that make one observation of pixels.
        image_side: height and width of an image, pixels.
        step_limit: environment steps of an episode; None is the task's own limit.
        encoder_width: units of the encoder's hidden layer (`state`).
        channels: feature maps of each of the encoder's four convolutions (`pixels`).
        mlp_width: units of both hidden layers of dynamics, reward, Q functions and policy.
        latent: units of the latent z.
        steps: environment steps of the training.
        seed_decisions: decisions at random before learning begins; as many updates follow at once.
        batch_size: subtrajectories per update.
        learning_rate: Adam's, of world model and policy.
        discount: gamma, of rewards per decision.
        horizon: H, decisions that are planned ahead and learnt over.
        rho: weight of a loss t decisions ahead is rho ** t.
        consistency_weight, reward_weight, value_weight: of the three losses; the paper's c3, c1 and c2.
        priority_exponent, importance_exponent: alpha and beta of prioritised replay.
        gradient_clip: largest norm of a gradient.
        target_every: updates between two moves of the target network.
        target_rate: how far it moves, tau.
        exploration_decisions: over which the planner's smallest deviation falls from `max_std` to `min_std`.
        horizon_decisions: over which the planning horizon grows from 1 to `horizon`.
        max_std, min_std: of the planner's samples; `min_std` is the policy's deviation too.
        samples: action sequences per iteration of the planner, N.
        iterations: of the planner, J.
        elite_share: of the samples that the next iteration is made of, k / N.
        policy_share: policy trajectories over samples.
        temperature: of the weights of the elites.
        momentum: of the planned means from one iteration to the next.
        precision: of the products in hidden layers, when planning and when learning. `auto` is `bfloat16`
            where this CPU multiplies it in hardware and the layers are wide enough to gain, else `float32`.
        validation_episodes, test_episodes: episodes that an evaluation measures.
        stability: the Lyapunov candidate that the empirical stability is measured by along those episodes:
            `value`, the base's value function; `quadratic`, a form in its latents around the goal; or `none`.
        stability_window: decisions within which it has to decrease by a tenth, n.
        stored_decisions: decisions of the replay buffer that are kept for repair, spread over the training.
        distillation_sequences: subtrajectories whose targets the base computes once.
        distillation_batch_size: of those, per update.
        distillation_learning_rate: at the start; it falls to 0 along a half cosine.
        on_policy_episodes: episodes in which the pruned agent visits what the base then labels; 0 repairs
            without the environment.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    task: str
    observation: Literal["state", "pixels"] = "state"
    action_repeat: Positive | None = None
    frame_stack: Positive = 3
    image_side: Annotated[int, Field(ge=64)] = 84
    step_limit: Positive | None = None

    encoder_width: Positive = 256
    channels: Positive = 32
    mlp_width: Positive = 512
    latent: Positive = 50

    steps: Positive = 500_000
    seed_decisions: Positive = 5000
    batch_size: Positive = 512
    learning_rate: Rate = 1e-3
    discount: Share = 0.99
    horizon: Positive = 5
    rho: Share = 0.5
    consistency_weight: Weight = 2.0
    reward_weight: Weight = 0.5
    value_weight: Weight = 0.1
    priority_exponent: Share = 0.6
    importance_exponent: Share = 0.4
    gradient_clip: Rate = 10.0
    target_every: Positive = 2
    target_rate: Share = 0.01

    exploration_decisions: Positive = 25_000
    horizon_decisions: Positive = 25_000
    max_std: Rate = 0.5
    min_std: Rate = 0.05
    samples: Annotated[int, Field(ge=2)] = 512
    iterations: Positive = 6
    elite_share: Annotated[float, Field(gt=0, le=1)] = 0.125
    policy_share: Share = 0.05
    temperature: Rate = 0.5
    momentum: Share = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    validation_episodes: Positive = 5
    test_episodes: Positive = 10

    stability: Literal["value", "quadratic", "none"] = "value"
    stability_window: Positive = 5

    stored_decisions: Positive = 20_000
    distillation_sequences: Annotated[int, Field(ge=2)] = 4096
    distillation_batch_size: Positive = 256
    distillation_learning_rate: Rate = 1e-2
    on_policy_episodes: NonNegative = 3

    @model_validator(mode="after")
    def _consistent(self) -> TDMPCOptions:
        if self.min_std > self.max_std:
            raise ValueError(f"min_std is {self.min_std}, which is more than max_std, {self.max_std}")
        return self

    def min_std_after(self, decisions: int) -> float:
        """The planner's smallest deviation after so many decisions of training."""
        return linear(self.max_std, self.min_std, decisions / self.exploration_decisions)

    def horizon_after(self, decisions: int) -> int:
        """The planning horizon after so many decisions of training."""
        return int(min(self.horizon, linear(1.0, float(self.horizon), decisions / self.horizon_decisions)))


def linear(first: float, last: float, progress: float) -> float:
    """From `first` at progress 0 to `last` at progress 1 and beyond."""
    done = min(max(progress, 0.0), 1.0)
    return (1.0 - done) * first + done * last


def elites(samples: int, share: float) -> int:
    """How many of the samples are elites, at least one."""
    return max(1, min(samples, math.floor(samples * share + 0.5)))
