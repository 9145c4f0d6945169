"""The replay buffer of TD-MPC against lists of episodes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from agents.tdmpc.replay_buffer import PRIORITY_FLOOR, Batch, ReplayBuffer
from components import UserError

STATE, STACK = (3,), (9, 4, 4)
ACTIONS = 2
LENGTHS = ((7,), (1, 2, 9, 4, 3), (5, 5, 5), (2, 12, 1, 1, 6, 8))


@dataclass
class Episode:
    """As an environment gave it: observations are whole, stacked where they are pixels."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


def episode(length, seed, shape=STATE):
    """Random numbers; the stack of pixels begins with the first image repeated, as environments have it."""
    random = np.random.default_rng(seed)
    if len(shape) == 3:
        images = random.integers(0, 256, (length + 1, 3, *shape[1:]), dtype=np.uint8)
        shown = [images[0]] * (shape[0] // 3 - 1) + list(images)
        observations = np.stack([np.concatenate(shown[t : t + shape[0] // 3]) for t in range(length + 1)])
    else:
        observations = random.normal(size=(length + 1, *shape)).astype(np.float32)
    actions = random.uniform(-1, 1, (length, ACTIONS)).astype(np.float32)
    return Episode(observations, actions, random.normal(size=length).astype(np.float32), bool(seed % 2))


def episodes_of(lengths, shape=STATE):
    return [episode(length, seed, shape) for seed, length in enumerate(lengths)]


def filled(episodes, shape=STATE):
    buffer = ReplayBuffer(shape, ACTIONS, frames=frames_of(shape))
    for each in episodes:
        buffer.add(each.observations, each.actions, each.rewards, terminated=each.terminated)
    return buffer


def frames_of(shape):
    return shape[0] // 3 if len(shape) == 3 else 1


def where(episodes, index):
    """The episode and decision of a row: an episode of T decisions takes T + 1 rows."""
    for each in episodes:
        if index <= len(each.actions):
            return each, index
        index -= len(each.actions) + 1
    raise IndexError


def begins(episodes, horizon):
    """The rows at which subtrajectories of so many decisions begin."""
    rows, row = [], 0
    for each in episodes:
        rows += range(row, row + max(0, len(each.actions) - horizon + 1))
        row += len(each.actions) + 1
    return rows


def sample(buffer, batch_size, horizon, seed=0, alpha=0.6, beta=0.4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return buffer.sample(batch_size, horizon, generator, priority_exponent=alpha, importance_exponent=beta)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


def check_content(batch, episodes, horizon):
    for b, index in enumerate(batch.indices.tolist()):
        each, t = where(episodes, index)
        assert t + horizon <= len(each.actions)  # all in one episode
        np.testing.assert_array_equal(batch.observations[:, b], each.observations[t : t + horizon + 1])
        np.testing.assert_array_equal(batch.actions[:, b], each.actions[t : t + horizon])
        np.testing.assert_array_equal(batch.rewards[:, b], each.rewards[t : t + horizon])
        ended = [each.terminated and t + i + 1 == len(each.actions) for i in range(horizon)]
        assert batch.terminated[:, b].tolist() == [float(end) for end in ended]


# --- content ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", [STATE, STACK, (3, 4, 4), (12, 2, 2)], ids=str)
def test_subtrajectories_are_those_of_the_episodes(lengths, shape):
    episodes = episodes_of(lengths, shape)
    buffer = filled(episodes, shape)
    assert len(buffer) == sum(lengths)
    assert buffer.episodes == len(lengths)
    for horizon in range(1, max(lengths) + 1):
        rows = begins(episodes, horizon)
        assert buffer.places(horizon).tolist() == rows
        batch = sample(buffer, len(rows), horizon)
        assert sorted(batch.indices.tolist()) == rows  # without putting back: every one of them
        assert batch.observations.shape == (horizon + 1, len(rows), *shape)
        assert batch.observations.dtype == (torch.uint8 if len(shape) == 3 else torch.float32)
        check_content(batch, episodes, horizon)


@pytest.mark.parametrize("shape", [STATE, STACK], ids=["state", "pixels"])
def test_growth_keeps_the_content(shape):
    lengths = np.random.default_rng(0).integers(1, 120, 60).tolist()  # beyond 1024 rows, several times
    episodes = episodes_of(lengths, shape)
    buffer = filled(episodes, shape)
    assert len(buffer) == sum(lengths) > 2500
    places = torch.tensor(begins(episodes, 1))
    for row, observation, action in zip(
        places.tolist(), buffer.observations(places), buffer.actions(places), strict=True
    ):
        each, t = where(episodes, row)
        assert np.array_equal(observation, each.observations[t])
        assert np.array_equal(action, each.actions[t])
    check_content(sample(buffer, 500, 3), episodes, 3)


def test_what_was_passed_in_may_change_afterwards():
    episodes = episodes_of((6,))
    kept = episodes_of((6,))
    buffer = filled(episodes)
    for array in (episodes[0].observations, episodes[0].actions, episodes[0].rewards):
        array.fill(7)
    check_content(sample(buffer, 5, 2), kept, 2)


def test_observations_of_any_shape_of_places():
    episodes = episodes_of((4, 6), STACK)
    buffer = filled(episodes, STACK)
    places = torch.tensor([[0, 1, 5], [6, 10, 11]])
    observations = buffer.observations(places)
    assert observations.shape == (2, 3, *STACK)
    for row, observation in zip(places.flatten().tolist(), observations.flatten(0, 1), strict=True):
        each, t = where(episodes, row)
        assert np.array_equal(observation, each.observations[t])


# --- sampling --------------------------------------------------------------------------------------------


def with_priorities(priorities):
    """One episode whose subtrajectories of one decision have these priorities."""
    buffer = filled([episode(len(priorities), 0)])
    buffer.set_priorities(torch.arange(len(priorities)), torch.tensor(priorities))
    return buffer


PRIORITIES = (0.1, 4.0, 1.0, 0.5, 9.0, 2.0)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_drawn_by_priority_without_putting_back(alpha, count):
    """Against the probability of every sequence of draws, each from what is left."""
    buffer = with_priorities(PRIORITIES)
    mass = np.array(PRIORITIES) ** alpha
    expected = np.zeros(len(mass))
    for drawn in itertools.permutations(range(len(mass)), count):
        probability, left = 1.0, mass.sum()
        for i in drawn:
            probability *= mass[i] / left
            left -= mass[i]
        expected[list(drawn)] += probability
    generator, draws = torch.Generator().manual_seed(0), 3000
    counts = np.zeros(len(mass))
    for _ in range(draws):
        indices = buffer.sample(
            count, 1, generator, priority_exponent=alpha, importance_exponent=0.4
        ).indices.tolist()
        assert len(set(indices)) == count
        counts[indices] += 1
    deviation = np.sqrt(draws * expected * (1 - expected)) + 1e-9
    assert (np.abs(counts - draws * expected) < 4.5 * deviation).all()


def test_repeated_by_priority_where_there_are_too_few():
    buffer = with_priorities(PRIORITIES)
    drawn = sample(buffer, 6000, 1).indices
    counts = torch.bincount(drawn, minlength=len(PRIORITIES) + 1).numpy()
    assert counts[-1] == 0
    shares = np.array(PRIORITIES) ** 0.6
    shares /= shares.sum()
    deviation = np.sqrt(6000 * shares * (1 - shares))
    assert (np.abs(counts[:-1] - 6000 * shares) < 4.5 * deviation).all()


@pytest.mark.parametrize("batch_size", [1, 4, 6, 20])
@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.4), (1.0, 1.0), (0.0, 0.4), (0.6, 0.0)])
def test_importance_weights_are_those_of_the_paper(batch_size, alpha, beta):
    """(N P(i)) ** -beta over its largest (Schaul et al., section 3.4)."""
    batch = sample(with_priorities(PRIORITIES), batch_size, 1, seed=3, alpha=alpha, beta=beta)
    mass = (np.array(PRIORITIES) + PRIORITY_FLOOR) ** alpha
    by_hand = (len(mass) * mass / mass.sum()) ** -beta
    drawn = by_hand[batch.indices]
    np.testing.assert_allclose(batch.weights, drawn / drawn.max(), rtol=1e-5)


def test_importance_weights_know_only_what_can_be_drawn():
    """The rows near the end of an episode have priorities too, which must not count."""
    buffer = filled(episodes_of((6, 4)))
    buffer.set_priorities(torch.arange(12), torch.linspace(0.5, 20, 12))
    rows = begins(episodes_of((6, 4)), 3)
    mass = np.linspace(0.5, 20, 12)[rows] ** 0.6
    by_hand = dict(zip(rows, (len(rows) * mass / mass.sum()) ** -0.4, strict=True))
    batch = sample(buffer, 3, 3)
    drawn = np.array([by_hand[index] for index in batch.indices.tolist()])
    np.testing.assert_allclose(batch.weights, drawn / drawn.max(), rtol=1e-5)


def test_a_new_episode_has_the_highest_priority():
    buffer = filled(episodes_of((5,)))
    buffer.set_priorities(torch.arange(5), torch.tensor([0.1, 0.2, 50.0, 0.3, 0.1]))
    for each in episodes_of((4, 3)):
        buffer.add(each.observations, each.actions, each.rewards, terminated=False)
    priorities = buffer.to_tensors()["priorities"]
    np.testing.assert_allclose(priorities[[0, 1, 2, 3, 4]], [0.1, 0.2, 50.0, 0.3, 0.1], rtol=1e-4)
    assert set(priorities[6:].tolist()) == {float(priorities[2])}


def test_nothing_is_forgotten_for_ever():
    buffer = with_priorities([0.0] * 6)
    assert sorted(sample(buffer, 6, 1).indices.tolist()) == list(range(6))
    assert bool((buffer.to_tensors()["priorities"][:6] > 0).all())


def test_sampling_follows_its_generator():
    buffer = filled(episodes_of((30, 20)))
    assert equal(sample(buffer, 8, 3, seed=1), sample(buffer, 8, 3, seed=1))
    assert not equal(sample(buffer, 8, 3, seed=1), sample(buffer, 8, 3, seed=2))


@pytest.mark.parametrize(("lengths", "longest"), [((), 0), ((3, 4, 1), 4)])
def test_a_horizon_longer_than_every_episode_is_one_sentence(lengths, longest):
    with pytest.raises(UserError) as caught:
        sample(filled(episodes_of(lengths)), 2, 5)
    message = str(caught.value)
    assert f"longest episode has {longest} decisions, fewer than the horizon of 5" in message
    assert "\n" not in message


# --- copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [STATE, STACK], ids=["state", "pixels"])
def test_tensors_round_trip_bit_for_bit(shape):
    episodes = episodes_of((7, 2, 9), shape)
    buffer = filled(episodes, shape)
    buffer.set_priorities(torch.tensor([1, 4, 12]), torch.tensor([3.0, 0.01, 7.0]))
    tensors = buffer.to_tensors()
    again = ReplayBuffer.from_tensors(tensors, shape, frames=frames_of(shape))
    assert len(again) == len(buffer)
    assert again.episodes == 3
    more = episode(5, 11, shape)
    for each in (buffer, again):  # what follows is the same too
        each.set_priorities(torch.tensor([2]), torch.tensor([5.0]))
        each.add(more.observations, more.actions, more.rewards, terminated=True)
    assert equal(sample(buffer, 6, 3), sample(again, 6, 3))
    assert equal(sample(buffer, 60, 3), sample(again, 60, 3))
    check_content(sample(again, 9, 2), [*episodes, more], 2)
    left, right = buffer.to_tensors(), again.to_tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_tensors_are_copies_both_ways():
    episodes = episodes_of((7, 3))
    buffer = filled(episodes)
    tensors = buffer.to_tensors()
    again = ReplayBuffer.from_tensors(tensors, STATE)
    for tensor in tensors.values():
        tensor.zero_()
    for each in (buffer, again):
        check_content(sample(each, 6, 2), episodes, 2)


def stored(buffer, shape):
    """The episodes in a buffer, as their first observations: these tell them apart."""
    tensors = buffer.to_tensors()
    ends = (tensors["remaining"] == 0).nonzero().flatten().tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [tensors["observations"][start, -3:].numpy() for start in starts if len(shape) == 3] or [
        tensors["observations"][start].numpy() for start in starts
    ]


@pytest.mark.parametrize("shape", [STATE, STACK], ids=["state", "pixels"])
@pytest.mark.parametrize("seed", range(6))
def test_thinned_keeps_whole_episodes_and_the_last(shape, seed):
    lengths = np.random.default_rng(seed).integers(1, 40, 30).tolist()
    episodes = episodes_of(lengths, shape)
    buffer = filled(episodes, shape)
    buffer.set_priorities(torch.arange(10), torch.arange(10.0))
    firsts = [each.observations[0][-3:] for each in episodes]
    for most in (lengths[-1], 50, 100, 300, sum(lengths) - 1, sum(lengths), 10**6):
        thin = buffer.thinned(most)
        chosen = [
            next(i for i, first in enumerate(firsts) if np.array_equal(first, kept))
            for kept in stored(thin, shape)
        ]
        assert chosen == sorted(set(chosen))
        assert chosen[-1] == len(episodes) - 1
        assert len(thin) == sum(lengths[i] for i in chosen)  # whole
        assert len(thin) <= max(most, lengths[-1])
        assert thin.episodes == len(chosen)
        gaps = np.diff([-1, *chosen])
        assert gaps.max() - gaps[1:].min(initial=gaps.max()) <= 1  # evenly spread
        check_content(sample(thin, 5, 1), [episodes[i] for i in chosen], 1)
        if most >= sum(lengths):
            assert torch.equal(thin.to_tensors()["priorities"], buffer.to_tensors()["priorities"])
    assert len(buffer) == sum(lengths)


def test_thinned_uses_its_room():
    """Episodes of one length: as many as fit."""
    buffer = filled(episodes_of([10] * 20))
    for most, count in ((10, 1), (19, 1), (20, 2), (95, 9), (199, 19), (200, 20)):
        assert buffer.thinned(most).episodes == count
    assert buffer.thinned(3).episodes == 1  # the last, though it does not fit
    assert filled([]).thinned(5).episodes == 0


def test_what_is_never_drawn_does_not_raise_the_priority_of_new_episodes():
    buffer = ReplayBuffer((2,), 1, horizon=3)
    episode = np.zeros((7, 2), np.float32), np.zeros((6, 1), np.float32), np.zeros(6, np.float32)
    buffer.add(*episode, terminated=False)
    buffer.set_priorities(torch.arange(4), torch.full((4,), 500.0))
    buffer.add(*episode, terminated=False)  # begins at 500, those that are never drawn too
    drawable = buffer.places(3)
    buffer.set_priorities(drawable, torch.full((len(drawable),), 0.25))
    buffer.add(*episode, terminated=False)
    newest = buffer.to_tensors()["priorities"][-7:]
    torch.testing.assert_close(newest, torch.full((7,), 0.25), atol=1e-5, rtol=0)
