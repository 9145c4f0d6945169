"""Environments to act in: dm_control's and gymnasium's, behind one small interface.

The only place that knows gymnasium, shimmy and dm_control. They are imported when the first environment is
made: importing dm_control takes half a second and fixes its renderer.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from components.errors import UserError, nearest

Observation = Literal["state", "pixels"]

ACTION_REPEATS: Mapping[str, int] = {
    "acrobot": 4,
    "ball_in_cup": 4,
    "cartpole": 8,
    "cheetah": 4,
    "dog": 2,
    "finger": 2,
    "fish": 4,
    "hopper": 4,
    "humanoid": 2,
    "quadruped": 4,
    "reacher": 4,
    "walker": 2,
}
"""Domain of dm_control -> environment steps per decision, as customary since PlaNet and TD-MPC."""
OTHER_ACTION_REPEAT = 4
"""Of the other dm_control domains."""
STEP_LIMIT = 1000
"""Environment steps of an episode where the environment itself names no limit; also dm_control's own."""
CAMERAS: Mapping[str, int] = {"quadruped": 2}
"""Domain of dm_control -> the camera that is customary for pixels; 0 for all others."""
GYMNASIUM = "gymnasium:"


class EnvironmentFaultError(UserError, ArithmeticError):
    """An environment (or what acts in it) came up with a number that is not finite."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """What is known of an environment before it is stepped.

    Attributes:
        task: as the user wrote it.
        observation_shape: `(n,)` of a flat float32 state; `(3 * frame_stack, side, side)` of uint8 pixels.
        action_size: numbers per action.
        action_low: the underlying environment's bounds, flattened.
        action_high: the same.
        action_repeat: environment steps per decision.
        decisions: the most that an episode can have.
        control_step_s: seconds between two decisions; None if unknown.
        observation_names: of the numbers of a state, such as `position.0`; empty for pixels.
    """

    task: str
    observation_shape: tuple[int, ...]
    action_size: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_repeat: int
    decisions: int
    control_step_s: float | None
    observation_names: tuple[str, ...]


class Step(NamedTuple):
    """What follows an action."""

    observation: NDArray[Any]
    reward: float
    terminated: bool
    truncated: bool


class _Simulator(Protocol):
    """An environment in its own units, one environment step at a time."""

    def reset(self, seed: int) -> Any:
        """The first raw observation; `seed` fits 32 bits."""

    def step(self, action: NDArray[Any]) -> tuple[Any, bool, bool]:
        """Reward, terminated, truncated by the environment itself."""

    def observe(self) -> Any:
        """The raw observation of the present state, after a step."""

    def frame(self, raw: Any) -> NDArray[np.uint8]:
        """`(height, width, 3)` of the present state, whose raw observation is `raw`."""

    def close(self) -> None:
        """Frees what it holds."""


class Environment:
    """An environment with actions in [-1, 1] and observations that are one array.

    Made by `make_environment`. An episode depends on its seed and its actions alone: not on what was run
    before, nor on the object that runs it.
    """

    def __init__(
        self, spec: EnvironmentSpec, simulator: _Simulator, reader: _Reader, action: _ActionSpace, limit: int
    ) -> None:
        self.spec = spec
        self._simulator = simulator
        self._reader = reader
        self._action = action
        self._limit = limit
        self._steps = 0
        self._decision = 0
        self._running = False

    def reset(self, seed: int) -> NDArray[Any]:
        """The first observation of the episode with this seed (any int >= 0)."""
        raw = self._simulator.reset(fold_seed(seed))
        self._steps, self._decision, self._running = 0, 0, True
        return self._observation(self._reader.first(raw, self._simulator))

    def step(self, action: NDArray[Any]) -> Step:
        """Does `action` for `action_repeat` environment steps, or fewer if the episode ends before.

        Args:
            action: `(action_size,)`, clipped to [-1, 1] and rescaled to the environment's bounds.

        Returns:
            The observation after the last of these steps and the sum of their rewards.

        Raises:
            EnvironmentFaultError: the action, an observation or a reward is not finite.
        """
        if not self._running:
            raise RuntimeError(f"{self.spec.task} was stepped outside an episode: call reset first")
        self._decision += 1
        rescaled = self._action.rescale(action)
        if rescaled is None:
            raise self._fault("the action")
        total, terminated, truncated = 0.0, False, False
        for _ in range(self.spec.action_repeat):
            try:
                reward, terminated, truncated = self._simulator.step(rescaled)
            except _DivergedError as error:
                raise self._fault("the state of the simulation") from error
            total += _number(reward)
            self._steps += 1
            truncated = truncated or self._steps >= self._limit
            if terminated or truncated:
                self._running = False
                break
        if not math.isfinite(total):
            raise self._fault("the reward")
        observation = self._reader.next(self._simulator.observe(), self._simulator)
        return Step(self._observation(observation), total, terminated, truncated)

    def close(self) -> None:
        """Frees the simulation and its renderer."""
        self._running = False
        self._simulator.close()

    def _observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        if observation.dtype == np.float32 and not np.isfinite(observation).all():
            names = self.spec.observation_names
            bad = names[int(np.flatnonzero(~np.isfinite(observation))[0])]
            raise self._fault(f"the observation ({bad})")
        return observation

    def _fault(self, what: str) -> EnvironmentFaultError:
        self._running = False
        return EnvironmentFaultError(f"{self.spec.task}: {what} is not finite at decision {self._decision}")


class _DivergedError(ArithmeticError):
    """The physics gave up."""


def default_action_repeat(task: str) -> int:
    """Environment steps per decision that are customary for a task: by domain for dm_control, else 1."""
    if task.startswith(GYMNASIUM):
        return 1
    return ACTION_REPEATS.get(_domain(task), OTHER_ACTION_REPEAT)


def check_task(
    task: str,
    *,
    action_repeat: int | None = None,
    observation: Observation = "state",
    frame_stack: int = 3,
    image_side: int = 84,
    step_limit: int | None = None,
) -> None:
    """Checks what can be known without making the environment: that the task exists, and the numbers.

    Args: as those of `make_environment`.

    Raises:
        UserError: it would refuse them too.
    """
    for name, value in (
        ("action_repeat", action_repeat),
        ("frame_stack", frame_stack),
        ("image_side", image_side),
        ("step_limit", step_limit),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    if observation not in ("state", "pixels"):
        raise UserError(f"unknown observation {observation!r}: {nearest(observation, ('state', 'pixels'))}")
    with _quiet_gymnasium():
        _registered(task, pixels=observation == "pixels")


def make_environment(
    task: str,
    *,
    action_repeat: int | None = None,
    observation: Observation = "state",
    frame_stack: int = 3,
    image_side: int = 84,
    step_limit: int | None = None,
) -> Environment:
    """An environment for a task.

    Args:
        task: `cartpole-swingup` (dm_control, as domain-task), or `gymnasium:` and an id of gymnasium, which
            may name the module that registers it: `gymnasium:Pendulum-v1`, `gymnasium:my_module:My-v0`.
        action_repeat: environment steps per decision; None means `default_action_repeat`.
        observation: `state` for the environment's own numbers, `pixels` for images of it.
        frame_stack: images per observation, oldest first (`pixels`).
        image_side: height and width of the images in pixels (`pixels`).
        step_limit: environment steps after which an episode is truncated; None means the environment's own
            limit, or 1000 if it has none.

    Raises:
        UserError: the task is unknown or cannot be made, its actions are not a bounded continuous box, its
            observations are not numbers, or nothing can render its pixels.
    """
    pixels = observation == "pixels"
    check_task(
        task,
        action_repeat=action_repeat,
        observation=observation,
        frame_stack=frame_stack,
        image_side=image_side,
        step_limit=step_limit,
    )
    env, own_limit = _make(task, pixels, image_side)
    try:
        return _assemble(
            task,
            env,
            repeat=action_repeat or default_action_repeat(task),
            limit=step_limit or own_limit or STEP_LIMIT,
            frames=frame_stack if pixels else None,
            side=image_side,
        )
    except BaseException:
        with _quiet_gymnasium(), suppress(Exception):  # a renderer that failed may fail again
            env.close()
        raise


def _assemble(task: str, env: Any, *, repeat: int, limit: int, frames: int | None, side: int) -> Environment:
    """`env`, made by gymnasium, as an `Environment`; `frames` is None for states."""
    action = _ActionSpace(task, env.action_space)
    simulator = _simulator(task, env)
    reader: _Reader
    if frames is None:
        reader = _StateReader(task, env.observation_space)
        _trial_reset(task, simulator)
    else:
        reader = _PixelReader(frames, side)
        _trial_render(task, simulator)
    seconds = _control_step(env)
    spec = EnvironmentSpec(
        task=task,
        observation_shape=reader.shape,
        action_size=len(action.low),
        action_low=tuple(action.low.tolist()),
        action_high=tuple(action.high.tolist()),
        action_repeat=repeat,
        decisions=math.ceil(limit / repeat),
        control_step_s=None if seconds is None else seconds * repeat,
        observation_names=reader.names,
    )
    return Environment(spec, simulator, reader, action, limit)


def _simulator(task: str, env: Any) -> _Simulator:
    if task.startswith(GYMNASIUM):
        return _GymnasiumSimulator(env)
    from dm_control.rl.control import Environment as SuiteEnvironment

    # Not of a subclass, which may do more in a step.
    return (_SuiteSimulator if type(env.unwrapped._env) is SuiteEnvironment else _DmControlSimulator)(env)


def _control_step(env: Any) -> float | None:
    """Seconds per environment step, if the environment tells."""
    try:
        seconds = float(env.unwrapped.dt)
    except (AttributeError, TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def fold_seed(seed: int) -> int:
    """A seed of any size as one of 32 bits, which is what dm_control takes; smaller ones stay as they are."""
    if seed < 0:
        raise ValueError(f"the seed is {seed}: it must be at least 0")
    if seed < 2**32:
        return int(seed)
    return int(np.random.SeedSequence(int(seed)).generate_state(1)[0])


def _number(reward: Any) -> float:
    """A reward as a float; some environments of gymnasium return arrays of one."""
    return float(reward.item()) if isinstance(reward, np.ndarray) else float(reward)


class _ActionSpace:
    """A bounded box, flattened.

    Attributes:
        low: `(n,)` float64.
        high: the same.
    """

    def __init__(self, task: str, space: Any) -> None:
        from gymnasium.spaces import Box

        problem = ""
        if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
            problem = "are"
        elif not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            problem = "are unbounded:"
        elif space.low.size == 0:
            problem = "are empty:"
        if problem:
            raise UserError(
                f"the actions of {task} {problem} {space}, but a bounded continuous Box is needed"
            )
        self.low: NDArray[np.float64] = space.low.astype(np.float64).ravel()
        self.high: NDArray[np.float64] = space.high.astype(np.float64).ravel()
        self._middle = (
            self.low / 2 + self.high / 2
        )  # not half the sum, nor half the difference: both may overflow
        self._half = self.high / 2 - self.low / 2
        self._shape: tuple[int, ...] = space.shape
        self._dtype = space.dtype

    def rescale(self, action: NDArray[Any]) -> NDArray[Any] | None:
        """From [-1, 1] to the bounds, in the environment's shape and dtype; None if not finite."""
        given = np.asarray(action, np.float64)
        if given.shape != self.low.shape:
            raise ValueError(f"the action has shape {given.shape}, not {self.low.shape}")
        if not np.isfinite(given).all():
            return None
        clipped = np.minimum(np.maximum(given, -1.0), 1.0)
        rescaled = np.minimum(np.maximum(self._middle + self._half * clipped, self.low), self.high)
        shaped: NDArray[Any] = rescaled.reshape(self._shape).astype(self._dtype)
        return shaped


class _Reader(Protocol):
    """Makes observations."""

    shape: tuple[int, ...]
    names: tuple[str, ...]

    def first(self, raw: Any, simulator: _Simulator) -> NDArray[Any]:
        """The observation after a reset."""

    def next(self, raw: Any, simulator: _Simulator) -> NDArray[Any]:
        """The observation after a step."""


class _StateReader:
    """Flattens a space's observations into float32."""

    def __init__(self, task: str, space: Any) -> None:
        parts = list(_parts(task, space, (), ""))
        self.names = tuple(name for part in parts for name in part.names)
        self.shape: tuple[int, ...] = (len(self.names),)
        if not self.names:
            raise UserError(f"the observations of {task} are empty: {space}")
        starts = np.cumsum([0, *(len(part.names) for part in parts)]).tolist()
        self._parts = [
            (part.path, slice(start, start + len(part.names)))
            for part, start in zip(parts, starts[:-1], strict=True)
        ]

    def first(self, raw: Any, simulator: _Simulator) -> NDArray[np.float32]:
        """The flat state."""
        return self.next(raw, simulator)

    def next(self, raw: Any, simulator: _Simulator) -> NDArray[np.float32]:
        """The flat state; numbers beyond float32 become infinite."""
        flat = np.empty(self.shape, np.float32)
        with np.errstate(over="ignore"):
            for path, where in self._parts:
                value = raw
                for key in path:
                    value = value[key]
                flat[where] = np.ravel(value)
        return flat


class _Part(NamedTuple):
    """A box inside a space: how to get at its observation, and the names of its numbers."""

    path: tuple[str | int, ...]
    names: list[str]


def _parts(task: str, space: Any, path: tuple[str | int, ...], name: str) -> Iterator[_Part]:
    """The boxes of a space in its own order."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _parts(task, inner, (*path, key), f"{name}.{key}" if name else key)
    elif isinstance(space, spaces.Tuple):
        for i, inner in enumerate(space.spaces):
            yield from _parts(task, inner, (*path, i), f"{name or 'observation'}.{i}")
    elif isinstance(space, spaces.Box):
        count = math.prod(space.shape)
        yield _Part(path, [f"{name or 'observation'}.{i}" for i in range(count)])
    else:
        raise UserError(f"the observations of {task} contain {space}: only boxes of numbers can be observed")


class _PixelReader:
    """The last few images, oldest first, channels first."""

    def __init__(self, frames: int, side: int) -> None:
        self.shape: tuple[int, ...] = (3 * frames, side, side)
        self.names: tuple[str, ...] = ()
        self._frames = frames
        self._side = side
        self._stack = np.empty(self.shape, np.uint8)

    def first(self, raw: Any, simulator: _Simulator) -> NDArray[np.uint8]:
        """The first image, repeated."""
        self._stack = np.tile(self._image(raw, simulator), (self._frames, 1, 1))
        return self._stack.copy()

    def next(self, raw: Any, simulator: _Simulator) -> NDArray[np.uint8]:
        """The images before and the present one."""
        self._stack = np.concatenate([self._stack[3:], self._image(raw, simulator)])
        return self._stack.copy()

    def _image(self, raw: Any, simulator: _Simulator) -> NDArray[np.uint8]:
        return np.moveaxis(resize(simulator.frame(raw), self._side), 2, 0)


def resize(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image as `side` x `side` by area averaging.

    Args:
        image: `(height, width, channels)` uint8.
        side: height and width of the result in pixels.

    Returns:
        `(side, side, channels)` uint8: every pixel is the average of the area it covers, rounded.
    """
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    rows, columns = _averaging(height, side), _averaging(width, side)
    averaged = np.einsum("ah,hwc,bw->abc", rows, image.astype(np.float64), columns, optimize=True)
    resized: NDArray[np.uint8] = np.rint(averaged).astype(np.uint8)  # averages cannot leave 0 to 255
    return resized


@functools.lru_cache(maxsize=16)
def _averaging(before: int, after: int) -> NDArray[np.float64]:
    """`(after, before)`: the share of every old pixel in every new one; rows sum to 1."""
    edges = np.arange(after + 1) * (before / after)
    pixels = np.arange(before)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(overlap, 0.0)
    averaging: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return averaging


class _DmControlSimulator:
    """An environment of dm_control through shimmy, stepped without the wrappers around it."""

    def __init__(self, env: Any) -> None:
        from dm_control.rl.control import PhysicsError

        self._env = env
        self._dm = env.unwrapped._env
        self._diverged: type[Exception] = PhysicsError
        self._raw: Any = None
        # `Environment` counts the steps. dm_control's own limit would end an episode before a longer
        # `step_limit`.
        for name in ("_step_limit", "_time_limit"):
            if hasattr(self._dm, name):
                setattr(self._dm, name, math.inf)

    def reset(self, seed: int) -> Any:
        """Through shimmy, which seeds the task."""
        raw, _ = self._env.reset(seed=seed)
        return raw

    def step(self, action: NDArray[Any]) -> tuple[Any, bool, bool]:
        """The same numbers as through gymnasium and shimmy."""
        try:
            after = self._dm.step(action)
        except self._diverged as error:
            raise _DivergedError from error
        self._raw, over = after.observation, after.last()
        return after.reward or 0.0, over and not after.discount > 0, over and after.discount > 0

    def observe(self) -> Any:
        """What the last step returned."""
        return self._raw

    def frame(self, raw: Any) -> NDArray[np.uint8]:
        """The camera's image."""
        image: NDArray[np.uint8] = self._env.unwrapped.render()
        return image

    def close(self) -> None:
        """Frees the physics."""
        self._env.close()


class _SuiteSimulator(_DmControlSimulator):
    """One of dm_control's suite: what its task observes is computed only when it is asked for.

    Under action repeat, nobody looks at most of what dm_control's own `step` computes.
    """

    def __init__(self, env: Any) -> None:
        from dm_control.rl.control import compute_n_steps

        super().__init__(env)
        self._substeps = compute_n_steps(self._dm.control_timestep(), self._dm.physics.timestep())

    def step(self, action: NDArray[Any]) -> tuple[Any, bool, bool]:
        """As dm_control's own, but for the observation."""
        task, physics = self._dm.task, self._dm.physics
        try:
            task.before_step(action, physics)
            physics.step(self._substeps)
            task.after_step(physics)
            reward, discount = task.get_reward(physics), task.get_termination(physics)
        except self._diverged as error:
            raise _DivergedError from error
        over = discount is not None
        return reward or 0.0, over and not discount > 0, over and discount > 0

    def observe(self) -> Any:
        """By the task, from the physics."""
        return self._dm.task.get_observation(self._dm.physics)


class _GymnasiumSimulator:
    """Any environment of gymnasium."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._is_image = _is_image(env.observation_space)
        self._raw: Any = None

    def reset(self, seed: int) -> Any:
        """With a seed, gymnasium makes a new generator."""
        with _quiet_gymnasium():
            raw, _ = self._env.reset(seed=seed)
        return raw

    def step(self, action: NDArray[Any]) -> tuple[Any, bool, bool]:
        """One step."""
        self._raw, reward, terminated, truncated, _ = self._env.step(action)
        return reward, bool(terminated), bool(truncated)

    def observe(self) -> Any:
        """What the last step returned."""
        return self._raw

    def frame(self, raw: Any) -> NDArray[np.uint8]:
        """The observation where it is an image, else what the environment renders."""
        image: NDArray[np.uint8] = np.asarray(raw if self._is_image else self._env.render())
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"rendering gave {image.dtype} of shape {image.shape}, not an image")
        return image

    def close(self) -> None:
        """Closes the environment."""
        self._env.close()


def _is_image(space: Any) -> bool:
    shape: tuple[int, ...] = getattr(space, "shape", None) or ()
    return len(shape) == 3 and shape[-1] == 3 and bool(space.dtype == np.uint8)


def _domain(task: str) -> str:
    return task.partition("-")[0]


@contextmanager
def _quiet_gymnasium() -> Iterator[None]:
    """Without what gymnasium's logger warns of: old versions, and render modes it cannot check."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(\x1b\[\d+(;\d+)*m)*WARN: ")
        warnings.filterwarnings("ignore", message=r"\(6\d{4}\) ")  # GLFW, of a missing display
        yield


@contextmanager
def _renderer_choice(backend: str) -> Iterator[None]:
    """MUJOCO_GL as the user set it, else as `backend` for as long as this lasts.

    Unset, dm_control takes GLFW wherever it is installed, which cannot render without a display.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        yield
        return
    os.environ["MUJOCO_GL"] = backend
    try:
        yield
    finally:
        os.environ.pop("MUJOCO_GL", None)


def _no_display() -> bool:
    return sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _import_shimmy(task: str, pixels: bool) -> None:
    """Registers dm_control's environments; states need no renderer, so that none is looked for."""
    with _renderer_choice("egl" if pixels else "disable"):
        try:
            import shimmy  # noqa: F401
            from dm_control import _render

            off = _render.constants.NO_RENDERER
            if pixels and _render.BACKEND in off and os.environ.get("MUJOCO_GL", "") not in off:
                # An environment of states came first in this process and turned rendering off.
                importlib.reload(_render)
            if pixels and _render.BACKEND == "glfw" and _no_display():
                # Its failure at the first image would print tracebacks from destructors.
                raise RuntimeError("GLFW needs a display")
        except Exception as error:  # whatever a damaged installation or a missing library raises
            if isinstance(error, ModuleNotFoundError) and error.name in ("shimmy", "dm_control", "mujoco"):
                raise UserError(
                    f"{task} needs the package {error.name}: install shimmy[dm-control] and dm-control"
                ) from error
            raise _no_renderer(task, error) from error


def _registered(task: str, pixels: bool) -> Any:
    """Gymnasium's entry for a task; UserError if there is none."""
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f"{task} needs the package gymnasium ({_reason(error)})") from error

    if not task.startswith(GYMNASIUM):
        _import_shimmy(task, pixels)
        ids = {
            name.removeprefix("dm_control/").removesuffix("-v0"): name
            for name in gymnasium.registry
            if name.startswith("dm_control/") and name != "dm_control/compatibility-env-v0"
        }
        if task not in ids:
            raise UserError(
                f"unknown task {task!r} (gymnasium's are written {GYMNASIUM}Id): {nearest(task, ids)}"
            )
        return gymnasium.registry[ids[task]]
    name = task.removeprefix(GYMNASIUM)
    module, colon, name_in_module = name.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except Exception as error:  # anything may happen in the user's module
            raise UserError(f"{task}: the module {module!r} cannot be imported ({_reason(error)})") from error
    try:
        return gymnasium.spec(name_in_module)
    except gymnasium.error.Error as error:
        known = [name for name in gymnasium.registry if not name.startswith("dm_control/")]
        beginning = task.removesuffix(name_in_module)
        wish = nearest(name_in_module, known)
        raise UserError(f"unknown task {task!r}: after {beginning!r}, {wish}") from error


def _make(task: str, pixels: bool, side: int) -> tuple[Any, int | None]:
    """What gymnasium makes, without a time limit, and the limit that it would have had."""
    import gymnasium

    options: dict[str, Any] = {}
    with _quiet_gymnasium():
        entry = _registered(task, pixels)
        if not task.startswith(GYMNASIUM):
            if "domain_name" in getattr(entry.entry_point, "keywords", {}):
                # Some of the suite draw their bodies when they are made: all objects shall be the same.
                options["task_kwargs"] = {"random": 0}
            if pixels:
                camera = CAMERAS.get(_domain(task), 0)
                options["render_kwargs"] = {"height": side, "width": side, "camera_id": camera}
        if pixels:
            options["render_mode"] = "rgb_array"
        try:
            with _renderer_choice("egl" if pixels else "disable"):
                env: Any = gymnasium.make(entry, max_episode_steps=-1, disable_env_checker=True, **options)
        except Exception as error:  # missing packages, files, licences; constructors of users
            raise UserError(f"{task} cannot be made ({_reason(error)})") from error
    if task.startswith(GYMNASIUM):
        return env, entry.max_episode_steps
    return env, _dm_control_limit(env.unwrapped._env)


def _dm_control_limit(dm: Any) -> int | None:
    """Steps until dm_control truncates; None for never."""
    steps = getattr(dm, "_step_limit", None)
    limit = float(getattr(dm, "_time_limit", math.inf) / dm.control_timestep() if steps is None else steps)
    if math.isinf(limit):
        return None
    return math.ceil(limit - 1e-6)  # seconds over seconds: 1000.0000000000001 means 1000


def _trial_reset(task: str, simulator: _Simulator) -> None:
    """One reset, so that what cannot run shows before anything else is done."""
    try:
        simulator.reset(0)
    except Exception as error:  # of users' environments, anything
        if "OpenGL" in str(error):  # dm_control's quadruped-escape sends its terrain to a renderer
            raise _no_renderer(task, error) from error
        raise UserError(f"{task} cannot be reset ({_reason(error)})") from error


def _trial_render(task: str, simulator: _Simulator) -> None:
    """One image, so that a missing renderer shows before anything else is done."""
    try:
        with _quiet_gymnasium(), _renderer_choice("egl"):
            simulator.frame(simulator.reset(0))
    except Exception as error:  # every library has its own; mujoco's even derives from Exception alone
        raise _no_renderer(task, error) from error


def _no_renderer(task: str, error: Exception) -> UserError:
    reason = _reason(error)
    if task.startswith(GYMNASIUM) and not re.search("mujoco|gl|mesa", reason, re.IGNORECASE):
        return UserError(f"{task} cannot be rendered ({reason})")  # by a renderer of its own
    value = os.environ.get("MUJOCO_GL")
    now = "it is not set" if value is None else f"it is {value!r}"
    return UserError(
        f"{task} cannot be rendered ({reason}): set MUJOCO_GL to egl or osmesa ({now}) before Python "
        "starts and install the library it needs (libegl1 or libosmesa6 on Debian and Ubuntu)"
    )


def _reason(error: BaseException) -> str:
    """An exception in a few words on one line."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
