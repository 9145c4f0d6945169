"""Environments: the numbers of dm_control and gymnasium, reproducible, and what is said without them."""

from __future__ import annotations

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from toy_environments import actions_of, play

from agents.environments import (
    EnvironmentFaultError,
    check_task,
    default_action_repeat,
    fold_seed,
    make_environment,
    resize,
)
from components import UserError

SUITE = ["cartpole-swingup", "reacher-hard", "ball_in_cup-catch", "finger-turn_hard", "point_mass-hard"]
RENDER = "from agents.environments import make_environment as m; "


def in_a_new_process(code, **variables):
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    }
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def renderer():
    """The working value of MUJOCO_GL; skips where none works."""
    for backend in ("egl", "osmesa"):
        ran = in_a_new_process(RENDER + "m('cartpole-swingup', observation='pixels')", MUJOCO_GL=backend)
        if ran.returncode == 0:
            return backend
    pytest.skip("no renderer works here")


def by_hand(env, seed, actions, repeat, limit):
    """The same through gymnasium alone."""
    space, (low, high) = env.observation_space, (env.action_space.low, env.action_space.high)
    raw, _ = env.reset(seed=seed)
    observations, rest, steps = [gymnasium.spaces.flatten(space, raw).astype(np.float32)], [], 0
    for action in np.clip(actions, -1, 1):
        total, truncated = 0.0, False
        scaled = ((low + high) / 2 + (high - low) / 2 * action.reshape(low.shape)).astype(low.dtype)
        for _ in range(repeat):
            raw, reward, terminated, truncated, _ = env.step(scaled)
            total, steps = total + float(reward), steps + 1
            truncated = truncated or steps == limit
            if terminated or truncated:
                break
        observations.append(gymnasium.spaces.flatten(space, raw).astype(np.float32))
        rest.append((total, terminated, truncated))
        if terminated or truncated:
            break
    return np.stack(observations), rest


def assert_same(ours, theirs):
    assert ours[0].dtype == theirs[0].dtype
    assert np.array_equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("task", SUITE)
def test_episodes_of_dm_control_are_those_of_gymnasium(task):
    ours = make_environment(task)
    repeat = default_action_repeat(task)
    actions = actions_of(0, 2000, ours.spec.action_size)
    theirs = gymnasium.make(f"dm_control/{task}-v0", task_kwargs={"random": 0}, disable_env_checker=True)
    played = play(ours, 7, actions)
    assert_same(played, by_hand(theirs, 7, actions, repeat, None))
    assert len(played[1]) == ours.spec.decisions == 1000 // repeat
    assert played[1][-1][1:] == (False, True)  # time is up, nothing has ended
    assert played[0][0].shape == ours.spec.observation_shape == (len(ours.spec.observation_names),)


@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run", "humanoid-stand", "reach_site_features"])
def test_other_bodies_and_what_is_not_of_the_suite_begin_as_those_of_gymnasium(task):
    ours = make_environment(task, action_repeat=3)
    actions = actions_of(0, 6, ours.spec.action_size)
    options = {} if "_" in task else {"task_kwargs": {"random": 0}}
    theirs = gymnasium.make(f"dm_control/{task}-v0", disable_env_checker=True, **options)
    assert_same(play(ours, 7, actions), by_hand(theirs, 7, actions, 3, None))


@pytest.mark.parametrize(
    ("task", "limit"),
    [("Pendulum-v1", 200), ("toy_environments:Point-v0", 20), ("toy_environments:Falls-v0", 20)],
)
@pytest.mark.parametrize("repeat", [1, 3])
def test_episodes_of_gymnasium_are_the_same(task, limit, repeat):
    ours = make_environment(f"gymnasium:{task}", action_repeat=repeat)
    theirs = gymnasium.make(task, disable_env_checker=True)
    actions = actions_of(1, 300, ours.spec.action_size)
    for seed in (0, 1):
        assert_same(play(ours, seed, actions), by_hand(theirs, seed, actions, repeat, None))
    assert ours.spec.decisions == -(-limit // repeat)


def test_what_is_known_of_an_environment():
    spec = make_environment("cartpole-swingup").spec
    assert (spec.task, spec.action_repeat, spec.decisions, spec.control_step_s) == (
        "cartpole-swingup",
        8,
        125,
        pytest.approx(0.08),
    )
    assert spec.observation_names == (*(f"position.{i}" for i in range(3)), "velocity.0", "velocity.1")
    assert (spec.action_size, spec.action_low, spec.action_high) == (1, (-1.0,), (1.0,))
    pendulum = make_environment("gymnasium:Pendulum-v1").spec
    assert (pendulum.action_low, pendulum.action_high, pendulum.decisions) == ((-2.0,), (2.0,), 200)
    assert pendulum.observation_names == ("observation.0", "observation.1", "observation.2")
    assert make_environment("gymnasium:toy_environments:Endless-v0").spec.decisions == 1000


def test_nested_observations_are_flattened_in_the_order_of_the_space():
    environment = make_environment("gymnasium:toy_environments:Nested-v0")
    names = ("a.0.0", "a.0.1", "a.0.2", "a.0.3", "a.1.0", "m.flag.0", "z.0")
    assert environment.spec.observation_names == names
    x, y = np.random.default_rng(3).uniform(-1, 1, 2)
    expected = np.array([x, y, 2 * x, 2 * y, 7, 1, y], np.float32)
    assert np.array_equal(environment.reset(3), expected)
    assert np.array_equal(environment.step(np.zeros(2)).observation, expected)


def test_actions_are_clipped_and_rescaled():
    environment = make_environment("gymnasium:toy_environments:Nested-v0", action_repeat=2)
    assert (environment.spec.action_low, environment.spec.action_high) == ((0.0, -3.0), (4.0, -1.0))
    environment.reset(0)
    for action in ([-1, 1], [0, 0], [0.5, -0.5], [-7, 9]):
        environment.step(np.array(action, np.float32))
    seen = environment._simulator._env.unwrapped.seen
    expected = [[0, -1], [2, -2], [3, -2.5], [0, -1]]
    assert np.array_equal(seen, np.repeat(expected, 2, axis=0)[:, None])
    with pytest.raises(ValueError, match="shape"):
        environment.step(np.zeros(1))


@pytest.mark.parametrize("task", ["gymnasium:toy_environments:Point-v0", "cartpole-swingup"])
def test_step_limit_truncates_within_a_decision_and_beyond_the_own_limit(task):
    own = 20 if "Point" in task else 1000
    for limit in (10, own + 30):
        environment = make_environment(task, action_repeat=4, step_limit=limit)
        actions = actions_of(0, 400, environment.spec.action_size)
        _, rest = play(environment, 0, actions)
        assert len(rest) == environment.spec.decisions == -(-limit // 4)
        assert rest[-1][1:] == (False, True)
        with pytest.raises(RuntimeError, match="reset"):
            environment.step(actions[0])


@pytest.mark.parametrize(
    "task", [*SUITE, "lqr-lqr_2_1", "gymnasium:Pendulum-v1", "gymnasium:toy_environments:Falls-v0"]
)
def test_episodes_depend_on_seed_and_actions_alone(task):
    first, second = make_environment(task), make_environment(task)
    actions = actions_of(2, 12, first.spec.action_size)
    expected = play(first, 5, actions)
    assert not np.array_equal(expected[0], play(first, 6, actions)[0])
    np.random.seed(1)
    play(first, 6, actions[:2])  # a partial episode
    assert_same(play(first, 5, actions), expected)
    play(second, 8, actions)
    assert_same(play(second, 5, actions), expected)


def test_seeds_of_any_size():
    assert [fold_seed(seed) for seed in (0, 5, 2**32 - 1)] == [0, 5, 2**32 - 1]
    large = [2**32, 2**32 + 1, 2**63, 2**64 + 1, 3 << 32]
    folded = [fold_seed(seed) for seed in large]
    assert len(set(folded)) == len(large)
    assert all(0 <= seed < 2**32 for seed in folded)
    with pytest.raises(ValueError, match="at least 0"):
        fold_seed(-1)
    environment = make_environment("cartpole-swingup")
    assert np.array_equal(environment.reset(2**40), environment.reset(2**40))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cartpol-swingup", r"unknown task 'cartpol-swingup'.*did you mean one of 'cartpole-swingup'"),
        ("gymnasium:Pendulm-v1", r"unknown task .*after 'gymnasium:', did you mean one of 'Pendulum-v1'"),
        ("gymnasium:nowhere:X-v0", "module 'nowhere' cannot be imported"),
        (
            "gymnasium:toy_environments:Pont-v0",
            "after 'gymnasium:toy_environments:', did you mean one of 'Point-v0'",
        ),
        (
            "gymnasium:CartPole-v1",
            r"gymnasium:CartPole-v1 are Discrete\(2\).*bounded continuous Box is needed",
        ),
        ("gymnasium:toy_environments:Discrete-v0", r"Discrete\(3\)"),
        ("gymnasium:toy_environments:Unbounded-v0", "unbounded: Box.*bounded continuous Box"),
        ("gymnasium:toy_environments:Unmakeable-v0", "cannot be made .*no box2d here"),
    ],
)
def test_tasks_that_cannot_be_had_are_refused_in_one_sentence(task, message):
    with pytest.raises(UserError, match=message) as caught:
        make_environment(task)
    assert "\n" not in str(caught.value)


def test_numbers_are_checked_without_making_the_environment():
    check_task("cartpole-swingup")
    check_task("gymnasium:Pendulum-v1", action_repeat=2, step_limit=5)
    for name in ("action_repeat", "frame_stack", "image_side", "step_limit"):
        with pytest.raises(UserError, match=f"{name} is 0"):
            check_task("cartpole-swingup", **{name: 0})
    with pytest.raises(UserError, match="did you mean 'pixels'"):
        check_task("cartpole-swingup", observation="pixel")


@pytest.mark.parametrize(
    ("task", "what"),
    [("Broken-v0", "the reward"), ("BrokenObservation-v0", r"the observation \(observation.1\)")],
)
def test_faults_name_task_and_decision(task, what):
    environment = make_environment(f"gymnasium:toy_environments:{task}", action_repeat=2)
    environment.reset(0)
    for _ in range(2):
        environment.step(np.zeros(2))
    with pytest.raises(EnvironmentFaultError, match=rf"{task}: {what} is not finite at decision 3$"):
        environment.step(np.zeros(2))
    environment.reset(0)
    with pytest.raises(EnvironmentFaultError, match="the action is not finite at decision 1"):
        environment.step(np.array([0, np.nan]))


def test_diverged_physics_is_a_fault():
    environment = make_environment("cartpole-swingup")
    environment.reset(0)
    environment._simulator._dm.physics.data.qpos[0] = np.nan
    with pytest.raises(EnvironmentFaultError, match="at decision 1"):
        environment.step(np.zeros(1))
    assert np.array_equal(environment.reset(1), make_environment("cartpole-swingup").reset(1))


def test_resizing_averages_areas():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    blocks = image.astype(float).reshape(6, 2, 6, 3, 3).mean((1, 3))
    assert np.abs(resize(image, 6) - blocks).max() <= 0.5 + 1e-9
    assert resize(image[:, :12], 12) is not None
    assert np.array_equal(resize(image[:, :12], 12), image[:, :12])
    assert np.array_equal(resize(image[:6, :6], 12), image[:6, :6].repeat(2, 0).repeat(2, 1))
    for side in (1, 5, 7, 31):
        flat = np.full((13, 9, 3), 201, np.uint8)
        assert np.array_equal(resize(flat, side), np.full((side, side, 3), 201, np.uint8))
    three = np.array([[0, 90, 30]], np.uint8)[..., None].repeat(3, 2)
    # Each half covers one and a half pixels.
    assert resize(three, 2)[0, :, 0].tolist() == [30, 50]


@pytest.mark.parametrize("task", ["Picture-v0", "Camera-v0"])
def test_pixels_of_gymnasium_are_stacked_oldest_first(task):
    environment = make_environment(
        f"gymnasium:toy_environments:{task}", observation="pixels", frame_stack=2, image_side=8
    )
    position = np.random.default_rng(4).uniform(-1, 1, 1)
    observation = environment.reset(4)
    assert observation.shape == environment.spec.observation_shape == (6, 8, 8)
    assert observation.dtype == np.uint8
    assert environment.spec.observation_names == ()
    reds = [round(100 + 100 * float(position[0]))] * 2
    for action in (0.2, -0.9, 0.4):
        assert (observation[[0, 3], 3, 5] == reds).all()
        assert (observation[[1, 4], 0, 0] == 200).all()
        assert (observation[[1, 4], 7, 7] == 0).all()
        kept = observation.copy()
        later = environment.step(np.array([action])).observation
        assert np.array_equal(observation, kept)
        position = np.clip(position + 0.25 * action, -1, 1)
        reds = [reds[1], round(100 + 100 * float(position[0]))]
        observation = later


def test_pixels_need_something_that_renders():
    with pytest.raises(UserError, match=r"Point-v0 cannot be rendered \([^()]*\)$"):
        make_environment("gymnasium:toy_environments:Point-v0", observation="pixels")


@pytest.mark.parametrize("backend", ["disable", "disabled", "bogus", "glfw"])
def test_pixels_without_a_renderer_are_refused(backend):
    code = RENDER + (
        "import components\ntry: m('cartpole-swingup', observation='pixels')\n"
        "except components.UserError as error: print(error)"
    )
    ran = in_a_new_process(code, MUJOCO_GL=backend)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 1
    assert "Traceback" not in ran.stderr
    for part in ("MUJOCO_GL to egl or osmesa", f"it is {backend!r}", "libegl1", "libosmesa6"):
        assert part in ran.stdout


def test_states_need_no_renderer_and_leave_the_choice_open():
    code = RENDER + (
        "import os; e = m('cartpole-swingup'); e.reset(0); assert 'MUJOCO_GL' not in os.environ\n"
        "from dm_control import _render; assert _render.BACKEND not in ('egl', 'glfw', 'osmesa')"
    )
    ran = in_a_new_process(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_states_that_need_a_renderer_after_all_say_so():
    code = RENDER + (
        "import components\ntry: m('quadruped-escape')\nexcept components.UserError as error: print(error)"
    )
    ran = in_a_new_process(code)
    assert ran.returncode == 0, ran.stderr
    assert "quadruped-escape cannot be rendered" in ran.stdout
    assert "set MUJOCO_GL to egl or osmesa (it is not set)" in ran.stdout


def test_importing_agents_imports_no_simulator():
    code = (
        "import sys, os; before = dict(os.environ); import agents.environments; "
        "assert not {'gymnasium', 'shimmy', 'dm_control', 'mujoco', 'ray', 'optuna'} & set(sys.modules); "
        "assert 'wandb' not in sys.modules; "
        "assert before == dict(os.environ)"
    )
    ran = in_a_new_process(code)
    assert ran.returncode == 0, ran.stderr


def test_pixels_after_states_in_one_process(renderer):
    code = RENDER + (
        "import numpy as np; m('cartpole-swingup').reset(0); "
        "e = m('cartpole-swingup', observation='pixels'); "
        "a = e.reset(0); assert a.shape == (9, 84, 84) and a.std() > 5; "
        "f = e._simulator._dm.physics.render(height=84, width=84, camera_id=0).transpose(2, 0, 1); "
        "assert (a == np.tile(f, (3, 1, 1))).all(); b = e.step(np.ones(1)).observation; "
        "f2 = e._simulator._dm.physics.render(height=84, width=84, camera_id=0).transpose(2, 0, 1); "
        "assert (b == np.concatenate([f, f, f2])).all() and (f != f2).any(); e.close()"
    )
    variables = {} if renderer == "egl" else {"MUJOCO_GL": renderer}
    ran = in_a_new_process(code, **variables)
    assert ran.returncode == 0, ran.stderr
