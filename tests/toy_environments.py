"""Small environments of gymnasium for tests: `gymnasium:toy_environments:Point-v0`."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple

POINT_STEPS = 20


class Point(gymnasium.Env):
    """A point in a square that actions move; the nearer to the goal, the higher the reward, 1 at most."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, size=2, render_mode=None):
        self.observation_space = Box(-2.0, 2.0, (2 * size,), np.float32)
        self.action_space = Box(-1.0, 1.0, (size,), np.float32)
        self.size = size
        self.dt = 0.1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, self.size)
        self.goal = self.np_random.uniform(-0.5, 0.5, self.size)
        return self.observe(), {}

    def step(self, action):
        self.position = np.clip(self.position + 0.25 * np.asarray(action, np.float64), -1, 1)
        reward = max(0.0, 1 - float(np.abs(self.position - self.goal).max()))
        return self.observe(), reward, False, False, {}

    def observe(self):
        return np.concatenate([self.position, self.goal - self.position]).astype(np.float32)


class DiscreteActions(Point):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = Discrete(3)


class Unbounded(Point):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = Box(-np.inf, np.inf, (2,), np.float32)


class Broken(Point):
    """Its reward, or its observation, is `value` after `good` steps."""

    def __init__(self, good=5, value=np.nan, what="reward", render_mode=None):
        super().__init__()
        self.good, self.value, self.what = good, value, what

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.steps += 1
        if self.steps > self.good and self.what == "reward":
            reward = self.value
        elif self.steps > self.good:
            observation[1] = self.value
        return observation, reward, *rest


class Falls(Point):
    """Terminates after 3 to 9 steps."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 10))
        return observation, info

    def step(self, action):
        observation, reward, _, truncated, info = super().step(action)
        self.left -= 1
        return observation, reward, self.left == 0, truncated, info


class Picture(Point):
    """Renders its position in one dimension as the brightness of a 16 x 24 image."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__(1)
        self.render_mode = render_mode

    def render(self):
        image = np.zeros((16, 24, 3), np.uint8)
        image[..., 0] = round(100 + 100 * float(self.position[0]))
        image[:8, :12, 1] = 200
        return image


class Camera(Picture):
    """Observes what `Picture` renders, and cannot render."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = Box(0, 255, (16, 24, 3), np.uint8)

    def observe(self):
        return super().render()

    def render(self):
        raise RuntimeError("there is no renderer")


class Nested(Point):
    """Observations of several kinds, and actions of shape (1, 2) within [0, 4] and [-3, -1]."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = Dict(
            {
                "z": Box(-5, 5, (), np.float64),
                "a": Tuple((Box(-5, 5, (2, 2), np.float64), Box(0, 9, (1,), np.int64))),
                "m": Dict({"flag": Box(0, 1, (), np.uint8)}),
            }
        )
        self.action_space = Box(np.array([[0, -3]]), np.array([[4, -1]]), (1, 2), np.float64)

    def reset(self, *, seed=None, options=None):
        self.seen = []
        return super().reset(seed=seed)

    def step(self, action):
        self.seen.append(np.array(action))
        _, reward, *rest = super().step(np.zeros(2))
        return self.observe(), np.array([reward]), *rest

    def observe(self):
        x, y = self.position
        grid = np.array([[x, y], [2 * x, 2 * y]])
        return {"z": np.float64(y), "a": (grid, np.array([7])), "m": {"flag": np.uint8(1)}}


class Unmakeable(gymnasium.Env):
    def __init__(self, render_mode=None):
        raise ImportError("no box2d\nhere")


for name, kind, steps in (
    ("Point-v0", Point, POINT_STEPS),
    ("Discrete-v0", DiscreteActions, POINT_STEPS),
    ("Unbounded-v0", Unbounded, POINT_STEPS),
    ("Broken-v0", Broken, POINT_STEPS),
    ("Falls-v0", Falls, POINT_STEPS),
    ("Picture-v0", Picture, POINT_STEPS),
    ("Camera-v0", Camera, POINT_STEPS),
    ("Nested-v0", Nested, POINT_STEPS),
    ("Endless-v0", Point, None),
    ("Unmakeable-v0", Unmakeable, None),
):
    if name not in gymnasium.registry:
        gymnasium.register(name, kind, max_episode_steps=steps)
if "BrokenObservation-v0" not in gymnasium.registry:
    gymnasium.register("BrokenObservation-v0", Broken, kwargs={"what": "observation", "value": np.inf})


def actions_of(seed, count, size):
    """`(count, size)` random actions, some of them beyond the bounds."""
    return np.random.default_rng(seed).uniform(-1.3, 1.3, (count, size))


def play(environment, seed, actions):
    """Observations, rewards and ends, as far as the episode goes."""
    observations, rest = [environment.reset(seed)], []
    for action in actions:
        step = environment.step(action)
        observations.append(step.observation)
        rest.append(tuple(step[1:]))
        if step.terminated or step.truncated:
            break
    return np.stack(observations), rest
