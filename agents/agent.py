"""What an agent is, what most agents have in common, and how one is found by its name.

An agent is a trainable, evaluable model with named components, built from *widths* (the size of every pruning
group), so that a pruned agent is one with smaller widths and a smaller state. Any class with the members of
`Agent` is one; it need not inherit anything. Below `Agent` stands what it may have besides: `Student`,
`Rankable`, `Resumable`, `Shrinkable`, `Comparing`, `calibration_program`, `shared_ratios`,
`searchable_options`, `task_loss`, `measurements`, `rehearsal`.
`tests/agent_contract.py` checks what is promised here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from components.errors import UserError, nearest

Split = Literal["validation", "test"]
"""The search sees validation only; what is reported at its end comes from test."""

Progress = Callable[[int, int, str], None]
"""Called along long work with (steps done, steps in total, a few words)."""


def unwatched(done: int, total: int, note: str) -> None:
    """A `Progress` that nobody watches."""


BUILT_IN: Mapping[str, str] = {
    "autoencoder": "agents.autoencoder:Autoencoder",
    "tdmpc": "agents.tdmpc.agent:TDMPC",
}
"""Kind -> `module:Class` of the agents that come with the package; imported when asked for."""


@dataclass(frozen=True)
class Objective:
    """Something measured that is to become small or large.

    Attributes:
        name: as in results and configurations, such as `reconstruction_error`.
        direction: which way is better.
        unit: for people, such as `MSE per pixel`.
    """

    name: str
    direction: Literal["minimize", "maximize"]
    unit: str

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("an objective needs a name")
        if self.direction not in ("minimize", "maximize"):
            raise UserError(
                f"the direction of {self.name!r} is {self.direction!r}: it must be 'minimize' or 'maximize'"
            )


class Tracker(Protocol):
    """What a training loop tells whoever gathers importance statistics (`components.tracker`).

    A loop with several losses names each. The tracker changes nothing: training is the same without it.
    """

    def is_due(self, loss: str = "model") -> bool:
        """Whether the next step of a loss is one that is looked at; of the others it is only told."""

    def capture(self, loss: str = "model") -> AbstractContextManager[None]:
        """Around the forward and backward pass of one step."""

    def update(self, loss: str = "model") -> None:
        """After the backward pass, before clipping; every gradient there is has to be this loss's."""


class Agent(Protocol):
    """A model with named components that can be trained, pruned, fine-tuned, evaluated and deployed.

    Two agents built from the same options, widths and data and trained with the same seed end with the same
    bits, on one device and thread count. Tensors passed in are never written to.
    """

    performance: ClassVar[Objective]
    """What `evaluate` measures and `trivial` gives a floor for."""

    fine_tune_methods: ClassVar[tuple[str, ...]]
    """Names that `fine_tune` takes; the first is the default."""

    def __init__(
        self,
        options: Mapping[str, Any],
        widths: Mapping[str, int] | None = None,
        data: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        """Build an untrained agent. Cheap: a search does it for every trial.

        Args:
            options: as in an experiment's `agent:` block, without `kind`; what is left out gets its default.
            widths: group -> size, of a pruned agent; None is the dense shape that the options describe.
            data: what `data()` of another agent with these options gave; None loads it when first needed.
            device: torch device of the model and of everything returned, `data()` included.

        Raises:
            UserError: an unknown option or an impossible value, in one sentence.
        """

    @property
    def options(self) -> Mapping[str, Any]:
        """All options, defaults filled in; JSON-able, and builds the same agent again."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Group -> size: what `components.trace(...).widths` gives for the model (groups of size 1 apart)."""

    @property
    def model(self) -> nn.Module:
        """The networks. Always the same object; in evaluation mode but while training."""

    @property
    def components(self) -> Mapping[str, Sequence[str]]:
        """Component -> module path prefixes; together they cover every parameter of `model`."""

    @property
    def ties(self) -> Sequence[tuple[str, str]]:
        """Pairs of outputs of `program` whose last axes are the same channels; `(x, x)` makes x internal."""

    def data(self) -> dict[str, Tensor]:
        """Everything that fine-tuning and evaluating need; workers get it instead of loading it."""

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all that the agent uses of a model of this shape, on inputs as `calibration_inputs` gives.

        Returns the named outputs; those that no tie names are external. `model` may be a pruned one.
        """

    def calibration_inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """Inputs of `program` from training data, first axis `rows` (fewer where there are not so many)."""

    def states(self) -> dict[str, dict[str, Tensor]]:
        """`model`: its state_dict; further sections by parameter name and of its shape (moments, targets).

        Copies: what the agent does afterwards does not change them.
        """

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `states` of an agent with these widths gave; sections left out start afresh."""

    def train(self, seed: int, tracker: Tracker | None, progress: Progress) -> None:
        """Train from new random weights, as long as the options say; the model stays the same object."""

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Progress
    ) -> Mapping[str, float] | None:
        """Train on from the present weights, for a number of gradient updates.

        `progress` is told after every update, or trials of a `Rankable` agent cannot be stopped there. It may
        raise, also what is no `Exception`: the agent then only has to clean up.

        Returns what is worth knowing of it, by name: finite numbers, kept with the trial's result; None where
        there is nothing to tell. An agent that tells `held_out_loss_before` and `held_out_loss`, of data that
        it did not learn from, lower better, says by that whether it performs better than before: where the
        loss has fallen, a trial may spare itself to measure that (`search.trial.is_most_likely_better`).

        Raises:
            UserError: no such method.
        """

    def evaluate(self, split: Split) -> dict[str, float]:
        """Measure what `act` does on a split: `performance.name` and whatever else is worth knowing.

        The same bits every time.
        """

    def trivial(self, split: Split) -> float:
        """J0: the performance measure of an agent that has learnt nothing, measured the same way."""

    def act(self, inputs: Tensor) -> Tensor:
        """What is deployed: batch first, no gradients."""

    def example_inputs(self, count: int) -> Tensor:
        """Always the same `count` inputs of `act`, from evaluation data."""

    def contract(self) -> dict[str, Any]:
        """What a deployment has to know about `act`; JSON-able.

        `{"inputs": [{"name", "shape", "dtype", "range"}], "outputs": [...], "control_step_s": ...}`: shapes
        without the batch axis, a range as [low, high] or None, the control step in seconds or None.
        """


# --- what an agent may have besides ----------------------------------------------------------------------


@runtime_checkable
class Student(Protocol):
    """An agent that learns from the one it was pruned from, as distillation does."""

    def learn_from(self, base: Agent, kept: Mapping[str, Tensor]) -> None:
        """Be told which trained, unpruned agent this one was pruned from, and how.

        Called once, right after this agent was built and its states were loaded; states that are loaded later
        change nothing about it.

        Args:
            base: serves many students: neither it nor its data may be changed.
            kept: group -> indices of the channels of the base that this agent has, `(width,)`, int64,
                ascending, on the agent's device; all groups of the graph.
        """


@runtime_checkable
class Rankable(Protocol):
    """An agent that can tell while it is fine-tuned how far it has come, so that hopeless trials end early.

    Where only some of its `fine_tune_methods` allow that, it names them in `rung_methods`.
    """

    def rung_loss(self) -> float:
        """How far the present weights are from what the fine-tuning aims at; lower is better.

        Called from the `progress` of a running `fine_tune`. Comparable among all agents pruned from one base,
        cheap beside the updates between two calls, and the same bits for the same weights. Nothing about the
        fine-tuning changes: neither weights, gradients, generators nor the training mode. NaN or infinity
        says that it has diverged.
        """


class StorableTracker(Tracker, Protocol):
    """A tracker that can be interrupted as well."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that going on needs, flat."""

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `to_tensors` gave."""


@runtime_checkable
class Resumable(Protocol):
    """An agent whose training survives its process."""

    def train_from(self, seed: int, tracker: StorableTracker, progress: Progress, checkpoint: Path) -> None:
        """`train`, from the checkpoint in a directory if there is one, keeping one there every minute or so.

        The agent and the tracker end with the bits of a training that was never interrupted.

        Args:
            seed, tracker, progress: as in `train`; the tracker is new.
            checkpoint: a directory, made as needed.

        Raises:
            UserError: the checkpoint is damaged, or of another training.
        """


@runtime_checkable
class Shrinkable(Protocol):
    """An agent that can lose channels in the middle of its training or its fine-tuning."""

    @property
    def training_steps(self) -> int:
        """What the `progress` of `train` is told as the total."""

    @property
    def training_updates(self) -> int:
        """How many gradient updates a training makes, which a tracker is told of."""

    def shrink(self, kept: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with fewer channels.

        Called from the `progress` of a running `train` or `fine_tune`, which `states` has described just
        before, moments of the optimizers included. `model` stays the same object, with narrower layers.

        Args:
            kept: group -> indices of the present channels that stay, `(width,)`, int64, ascending, on the
                agent's device.
            states: every section of `states`, cut to these channels; the model's may be repaired besides.
        """

    def fine_tune(
        self, method: str, updates: int, seed: int, progress: Progress, tracker: Tracker | None = None
    ) -> Mapping[str, float] | None:
        """As `Agent.fine_tune`, telling a tracker of every update, as `train` does."""


@runtime_checkable
class Comparing(Protocol):
    """An agent that measures some things by the trained dense base, also where it was not pruned from it."""

    def compare_with(self, base: Agent) -> None:
        """Be told of the base; before `evaluate`, once the agent is trained.

        Args:
            base: serves many agents: neither it nor its data may be changed.
        """


def taught_methods(agent: Agent) -> tuple[str, ...]:
    """Fine-tuning methods that need the base: a `Student`'s `taught_methods`, or all of them; else none."""
    if not isinstance(agent, Student):
        return ()
    methods: tuple[str, ...] = getattr(agent, "taught_methods", agent.fine_tune_methods)
    return methods


def rung_methods(agent: Agent) -> tuple[str, ...]:
    """Fine-tuning methods under which an agent has a rung loss: its `rung_methods`, all, or none."""
    if not isinstance(agent, Rankable):
        return ()
    methods: tuple[str, ...] = getattr(agent, "rung_methods", agent.fine_tune_methods)
    return methods


CallProgram = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a model on calibration inputs, as `Agent.program` does."""


def calibration_program(agent: Agent) -> CallProgram:
    """What reconstruction runs on calibration inputs: the agent's `calibration_program`, or its `program`.

    An agent whose program calls a layer several times, as a rollout does, has a
    `calibration_program(self, model, inputs)` of one step besides, which calls each layer once, by the same
    operators and on the same inputs.
    """
    program: CallProgram = getattr(agent, "calibration_program", agent.program)
    return program


def shared_ratios(agent: Agent) -> Mapping[str, str]:
    """Which groups are pruned by one ratio: the agent's `shared_ratios`, or none.

    Group -> key; groups with one key share one kept share, and a group that is not named has its own name for
    key: `{"q2.0": "q1.0"}` ties the second Q function to the first.
    """
    shared: Mapping[str, str] = getattr(agent, "shared_ratios", {})
    return shared


def searchable_options(agent: Agent) -> tuple[str, ...]:
    """Options that `search.options` may choose for every trial: the agent's `searchable_options`, or none.

    Whole numbers from 1 that change how the agent acts, such as a planner's `samples`, and neither the shapes
    of the model nor what its state means.
    """
    names: tuple[str, ...] = getattr(agent, "searchable_options", ())
    return names


def task_loss(agent: Agent, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor | None:
    """What a model that made these outputs loses, by the agent's own account; None where it has none.

    An agent whose outputs can be judged without the base's has a `task_loss(self, outputs, inputs)` of what
    `program` made of the inputs of `calibration_inputs`: a scalar, lower better, differentiable, about 1 for
    a trivial agent. `search.sampler: gradient` minimises it.
    """
    own: Callable[..., Tensor] | None = getattr(agent, "task_loss", None)
    return None if own is None else own(outputs, inputs)


def measurements(agent: Agent) -> Mapping[str, str]:
    """What `evaluate` reports besides the performance, so that constraints may bound it, name -> unit.

    The agent's `measurements`, or none. The evaluation of a trained agent, and of one that was pruned from it
    and told so (`Student`), reports each of them, finite, on every split.
    """
    named: Mapping[str, str] = getattr(agent, "measurements", {})
    return named


@dataclass(frozen=True)
class Rehearsal:
    """How to train an agent so briefly that it learns nothing, to measure what training and trials cost.

    Attributes:
        options: all of them, for a training of seconds that tells of its progress several times, after the
            first at the speed of the whole training; the agent has the same shapes, and data for trials then.
        steps: what `progress` is told as the total of the whole training, in the same unit.
    """

    options: Mapping[str, Any]
    steps: int


def rehearsal(agent: Agent) -> Rehearsal | None:
    """How to rehearse the training: the agent's `rehearsal`; None for one that can be stopped at any step.

    An agent whose trials need what only a finished training leaves, as experience, has a `rehearsal`.
    """
    how: Rehearsal | None = getattr(agent, "rehearsal", None)
    return how


# --- parts of agents -------------------------------------------------------------------------------------


class Untracked:
    """A tracker that takes no notice."""

    def is_due(self, loss: str = "model") -> bool:
        """Never."""
        return False

    def capture(self, loss: str = "model") -> AbstractContextManager[None]:
        """Around nothing in particular."""
        return nullcontext()

    def update(self, loss: str = "model") -> None:
        """Nothing happens."""


UNTRACKED: Tracker = Untracked()
"""For training loops that are written with a tracker and run without one."""


class PlainAgent:
    """What is alike in most agents of one's own: inherit it, or write these members oneself.

    For an agent whose only state is `model` and that acts by calling it on a batch of inputs.
    """

    fine_tune_methods: ClassVar[tuple[str, ...]] = ("supervised",)
    ties: Sequence[tuple[str, str]] = ()
    model: nn.Module

    def reset(self, seed: int) -> None:
        """Give every layer new random weights, in place; torch's global generators stay as they were."""
        devices = {p.device for p in self.model.parameters() if p.device.type != "cpu"}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            for layer in self.model.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The model's state_dict, copied."""
        return {"model": {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}}

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the model's state."""
        self.model.load_state_dict(dict(states["model"]))

    def act(self, inputs: Tensor) -> Tensor:
        """What the model makes of the inputs, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            outputs: Tensor = self.model(inputs)
        return outputs

    def contract(self: Agent) -> dict[str, Any]:
        """One input and one output of the shapes that `example_inputs` and `act` have, of any range."""
        inputs = self.example_inputs(1)
        outputs = self.act(inputs)
        return {
            "inputs": [_described("input", inputs)],
            "outputs": [_described("output", outputs)],
            "control_step_s": None,
        }


def _described(name: str, batch: Tensor) -> dict[str, Any]:
    dtype = str(batch.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(batch.shape[1:]), "dtype": dtype, "range": None}


def agent_class(kind: str) -> type[Agent]:
    """The class of a kind of agent.

    Args:
        kind: a built-in one, or `package.module:Class` for a user's own; modules in the current directory are
            found too, after installed ones.

    Raises:
        UserError: there is no such kind, module or class, the module fails on import, or the class lacks
            members of `Agent`.
    """
    path = BUILT_IN.get(kind, kind)
    module_name, separator, class_name = path.partition(":")
    if not separator or not module_name or not class_name:
        raise UserError(
            f"unknown agent {kind!r}: {nearest(kind, BUILT_IN)}, or your own as 'package.module:Class'"
        )
    module = _imported(module_name, kind)
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        own = [value.__name__ for value in vars(module).values() if _is_defined_in(value, module)]
        hint = f"; {nearest(class_name, own)}" if own else ""
        raise UserError(f"agent {kind!r}: module {module_name} has no class {class_name!r}{hint}")
    _require_members(found, kind)
    return cast("type[Agent]", found)


def source_of(kind: str) -> Path | None:
    """Where the code of a user's own agent is: the directory of its package, or its module; else None.

    Raises:
        UserError: as `agent_class`.
    """
    if kind in BUILT_IN:
        return None
    agent_class(kind)
    top = sys.modules[kind.partition(":")[0].partition(".")[0]]
    file = getattr(top, "__file__", None)
    place = Path(file) if file else Path(next(iter(top.__path__)))
    return place.parent if place.name == "__init__.py" else place


def _is_defined_in(value: object, module: ModuleType) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__


def _imported(name: str, kind: str) -> ModuleType:
    """The module of a user's agent; the current directory comes last on the path, so it hides nothing."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"agent {kind!r}: there is no module {name!r}, neither installed nor in {here}"
            ) from None
        raise UserError(
            f"agent {kind!r}: module {name} needs {error.name!r}, which is not installed"
        ) from error
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"agent {kind!r}: importing {name} failed with {reason}") from error


_METHODS = tuple(
    name for name, value in vars(Agent).items() if inspect.isfunction(value) and not name.startswith("_")
)


def _require_members(found: type, kind: str) -> None:
    """Refuse a class that cannot be an agent; what its instances hold is known only once there is one."""
    missing = [name for name in _METHODS if not callable(getattr(found, name, None))]
    if not isinstance(getattr(found, "performance", None), Objective):
        missing.append("performance (an Objective)")
    methods = getattr(found, "fine_tune_methods", None)
    if not (isinstance(methods, tuple) and methods and all(isinstance(name, str) for name in methods)):
        missing.append("fine_tune_methods (a tuple of names)")
    if missing:
        raise UserError(f"agent {kind!r} lacks {', '.join(missing)}: see agents.agent.Agent")
