"""Distillation of a pruned world model: what is taught, how it is measured, and that it is learnt."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import components
from agents.tdmpc import distillation
from agents.tdmpc.config import TDMPCOptions
from agents.tdmpc.distillation import (
    BETAS,
    Distillation,
    Lessons,
    Sequences,
    draw_sequences,
    joined,
    label,
    outputs,
)
from agents.tdmpc.replay_buffer import ReplayBuffer
from agents.tdmpc.world_model import WorldModel, dense_widths

OPTIONS = TDMPCOptions(task="none", encoder_width=14, mlp_width=16, latent=6)
WIDTHS = dense_widths(OPTIONS)
OBSERVATION, ACTIONS, HORIZON = (3,), 2, 4
UPDATES = {"updates": 60, "batch_size": 16, "learning_rate": 1e-2}


def random_model(seed, widths=WIDTHS):
    generator = torch.Generator().manual_seed(seed)
    model = WorldModel(widths, OBSERVATION, ACTIONS).double()
    for parameter in model.parameters():
        scale = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() > 1 else 0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(scale * values)
    return model


def sequences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Sequences(
        torch.randn(count, *OBSERVATION, generator=generator, dtype=torch.float64),
        2 * torch.rand(HORIZON, count, ACTIONS, generator=generator, dtype=torch.float64) - 1,
    )


def lessons_of(base, count=64, seed=0):
    return label(base, sequences(count, seed))


def pruned(base, seed=0, share=0.6):
    """A student sliced from the base, and the latent coordinates it kept."""
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(2, *OBSERVATION).double(), torch.randn(2, ACTIONS).double()

    def program(model):
        z = model.encode(x)
        after = model.next_latent(z, a)
        q1, q2 = model.q_values(z, a)
        heads = {"reward": model.reward_of(z, a), "q1": q1, "q2": q2, "policy": model.policy_mean(z)}
        return {"latent": z, "after": after, **heads}

    graph = components.trace(base, program, components={"all": ("",)}, ties=(("after", "latent"),))
    keep = {}
    for name, size in graph.widths.items():
        keep[name] = torch.zeros(size, dtype=torch.bool)
        keep[name][torch.randperm(size, generator=generator)[: round(share * size)]] = True
    student = random_model(1, {name: int(mask.sum()) for name, mask in keep.items()})
    student.load_state_dict(components.prune(graph, base.state_dict(), keep))
    return student, keep["latent"].nonzero().flatten()


def distillation_of(student, lessons, kept, seed=0, **changes):
    return Distillation(student, lessons, kept, seed=seed, **{**UPDATES, **changes})


# --- what is taught --------------------------------------------------------------------------------------


def test_targets_are_a_roll_out_of_every_sequence_on_its_own():
    base = random_model(0)
    given = sequences(5)
    targets = label(base, given).targets
    for n in range(5):
        z = base.encode(given.observations[n : n + 1])
        for t in range(HORIZON + 1):
            torch.testing.assert_close(targets.latents[t, n], z[0])
            torch.testing.assert_close(targets.policy[t, n], base.policy_mean(z)[0])
            if t == HORIZON:
                break
            action = given.actions[t, n : n + 1]
            torch.testing.assert_close(targets.rewards[t, n], base.reward_of(z, action)[0, 0])
            q1, q2 = base.q_values(z, action)
            torch.testing.assert_close(targets.q1[t, n], q1[0, 0])
            torch.testing.assert_close(targets.q2[t, n], q2[0, 0])
            z = base.next_latent(z, action)
    assert targets.latents.shape == (HORIZON + 1, 5, 6)
    assert targets.rewards.shape == targets.q1.shape == targets.q2.shape == (HORIZON, 5)
    assert not any(tensor.requires_grad for tensor in vars(targets).values())


@pytest.mark.parametrize("at_once", [1, 3, 7, 8])
def test_sequences_labelled_in_parts_are_labelled_the_same(monkeypatch, at_once):
    base, given = random_model(0), sequences(7)
    whole = label(base, given)
    monkeypatch.setattr(distillation, "LABELLED_AT_ONCE", at_once)
    parts = label(base, given)
    assert torch.equal(parts.sequences.observations, given.observations)
    assert torch.equal(parts.sequences.actions, given.actions)
    for name, made in vars(parts.targets).items():
        torch.testing.assert_close(made, getattr(whole.targets, name))


def test_joined_lessons_are_those_of_all_sequences():
    base = random_model(0)
    first, second = lessons_of(base, 3, 0), lessons_of(base, 4, 1)
    both = joined([first, second])
    again = label(base, both.sequences)
    for name, made in vars(both.targets).items():
        torch.testing.assert_close(made, getattr(again.targets, name))
    assert torch.equal(both.sequences.observations[3:], second.sequences.observations)


def filled(lengths):
    """Every action is a different number, so that sequences can be found again."""
    buffer, start = ReplayBuffer(OBSERVATION, ACTIONS), 0
    for length in lengths:
        actions = (start + np.arange(length * ACTIONS, dtype=np.float32).reshape(length, ACTIONS)) / 1000
        observations = np.pad(actions, ((0, 1), (0, 1)), constant_values=start)
        buffer.add(observations, actions, np.zeros(length, np.float32), terminated=False)
        start += length * ACTIONS
    return buffer


def test_every_other_sequence_is_random():
    buffer = filled((20, 3, 30))
    begins = buffer.places(HORIZON)
    drawn = draw_sequences(buffer, 600, HORIZON, torch.Generator().manual_seed(0))
    observations = buffer.observations(begins)
    # (600, begins): which beginning each observation is
    found = (drawn.observations[:, None] == observations[None]).all(dim=2)
    assert bool((found.sum(1) == 1).all())
    place = begins[found.long().argmax(1)]
    assert set(place.tolist()) == set(begins.tolist())  # from all over the buffer
    played = buffer.actions(torch.arange(HORIZON)[:, None] + place)
    same = (drawn.actions == played).all(dim=2).all(dim=0)
    assert same.tolist() == [True, False] * 300
    uniform = drawn.actions[:, 1::2].flatten().numpy()
    assert uniform.min() < -0.99
    assert uniform.max() > 0.99
    counts = np.histogram(uniform, bins=10, range=(-1, 1))[0]
    expected = len(uniform) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-square of 9 degrees: 0.1 %
    assert np.abs(uniform).max() <= 1


def test_drawing_follows_its_generator():
    buffer = filled((20, 9))
    first, second, other = (
        draw_sequences(buffer, 10, HORIZON, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.observations, second.observations)
    assert torch.equal(first.actions, second.actions)
    assert not torch.equal(first.actions, other.actions)


# --- the loss --------------------------------------------------------------------------------------------


def test_an_unpruned_student_has_nothing_to_learn():
    base = random_model(0)
    student = copy.deepcopy(base)
    distillation = distillation_of(student, lessons_of(base), torch.arange(6))
    assert distillation.held_out_loss() < 1e-24
    assert float(distillation.step()) < 1e-24
    assert distillation_of(random_model(5), lessons_of(base), torch.arange(6)).held_out_loss() > 0.5


def loss_by_hand(student, lessons, kept, rows):
    """Mean squared distances over variances of the targets, of all lessons, in float64 numpy."""
    with torch.no_grad():
        made = outputs(student, lessons.sequences)
    total = 0.0
    for name in ("latents", "rewards", "q1", "q2", "policy"):
        targets = getattr(lessons.targets, name).numpy()
        values = getattr(made, name).numpy()
        if name == "latents":
            targets = targets[..., kept.numpy()]
        scale = lessons.targets.q1.numpy() if name == "q2" else targets  # twins by the same scale
        if targets.ndim == 2:
            targets, values, scale = targets[..., None], values[..., None], scale[..., None]
        variance = scale.reshape(-1, scale.shape[-1]).var(axis=0).sum()
        distance = ((values - targets) ** 2).sum(-1)[:, rows].mean()
        total += distance / variance * (0.5 if name in ("q1", "q2") else 1.0)
    return total


def held_out(count):
    """Of every sixteen, the last pair: one played, one random."""
    return [i for i in range(count) if i % 16 in (14, 15)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_loss_is_normalised_by_the_variance_of_the_targets(seed):
    base = random_model(seed)
    student, kept = pruned(base, seed)
    lessons = lessons_of(base, 100, seed)
    made = distillation_of(student, lessons, kept).held_out_loss()
    assert made == pytest.approx(loss_by_hand(student, lessons, kept, held_out(100)), rel=1e-9)


def test_the_scale_of_rewards_and_values_does_not_matter():
    losses = []
    for scale in (1.0, 1e3):
        base = random_model(0)
        for name in ("reward", "q1", "q2"):
            for parameter in getattr(base, name)[-1].parameters():
                parameter.data.mul_(scale)
        student, kept = pruned(base)
        losses.append(distillation_of(student, lessons_of(base), kept).held_out_loss())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_coordinates_that_were_pruned_do_not_count():
    base = random_model(0)
    student, kept = pruned(base)
    lessons = lessons_of(base)
    wanted = distillation_of(student, lessons, kept).held_out_loss()
    gone = [i for i in range(6) if i not in kept.tolist()]
    assert gone
    lessons.targets.latents[..., gone] = math.nan
    assert distillation_of(student, lessons, kept).held_out_loss() == wanted
    lessons.targets.latents[..., kept[0]] += 1
    assert distillation_of(student, lessons, kept).held_out_loss() != wanted


def test_targets_that_never_vary_do_not_divide_by_zero():
    base = random_model(0)
    for parameter in base.q1.parameters():
        parameter.data.zero_()
    student, kept = pruned(base)
    assert math.isfinite(distillation_of(student, lessons_of(base), kept).held_out_loss())


# --- learning --------------------------------------------------------------------------------------------


def test_held_out_sequences_are_never_learnt_from():
    """They are made to be no numbers after everything was prepared; only the held-out loss sees it."""
    base = random_model(0)
    student, kept = pruned(base)
    lessons = lessons_of(base, 96)
    distillation = distillation_of(student, lessons, kept, updates=80, batch_size=32)
    lessons.sequences.observations[held_out(96)] = math.nan
    assert all(math.isfinite(float(distillation.step())) for _ in range(80))
    assert math.isnan(distillation.held_out_loss())


def test_every_other_sequence_is_learnt_from():
    base = random_model(0)
    student, kept = pruned(base)
    taught = set(range(96)) - set(held_out(96))
    for i in (min(taught), 13, 16, max(taught)):
        lessons = lessons_of(base, 96)
        distillation = distillation_of(copy.deepcopy(student), lessons, kept, batch_size=64)
        lessons.sequences.observations[i] = math.nan
        assert any(math.isnan(float(distillation.step())) for _ in range(20))


@pytest.mark.parametrize("count", [1, 2, 3, 15])
def test_few_sequences_are_enough(count):
    base = random_model(0)
    student, kept = pruned(base)
    lessons = lessons_of(base, count)
    distillation = distillation_of(student, lessons, kept)
    if count > 1:
        assert math.isfinite(float(distillation.step()))
    assert math.isfinite(distillation.held_out_loss())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pruned_student_learns(seed):
    base = random_model(seed)
    student, kept = pruned(base, seed)
    distillation = distillation_of(student, lessons_of(base, 256, seed), kept, updates=120, batch_size=64)
    before = distillation.held_out_loss()
    for _ in range(120):
        distillation.step()
    assert distillation.held_out_loss() < 0.5 * before


def test_updates_are_adams_along_a_half_cosine():
    """Against torch's own optimizer and the plain sum of squares, on the same rows."""
    base = random_model(0)
    student, kept = pruned(base)
    other, lessons = copy.deepcopy(student), lessons_of(base)
    distillation = distillation_of(student, lessons, kept, updates=6)
    picks = distillation_of(student, lessons, kept, updates=6)
    optimizer = torch.optim.Adam(other.parameters(), betas=BETAS)
    targets = lessons.targets

    def variance(target):
        return target.reshape(-1, target.shape[-1]).var(0, correction=0).sum()

    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 6)) / 2
        rows = picks._pick()
        made = outputs(
            other, Sequences(lessons.sequences.observations[rows], lessons.sequences.actions[:, rows])
        )
        loss = ((made.latents - targets.latents[:, rows][..., kept]) ** 2).sum(-1).mean() / variance(
            targets.latents[..., kept]
        )
        loss = loss + ((made.rewards - targets.rewards[:, rows]) ** 2).mean() / targets.rewards.var(
            correction=0
        )
        for name in ("q1", "q2"):
            wrong = getattr(made, name) - getattr(targets, name)[:, rows]
            loss = loss + (wrong**2).mean() / targets.q1.var(correction=0) / 2
        loss = loss + ((made.policy - targets.policy[:, rows]) ** 2).sum(-1).mean() / variance(targets.policy)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 10.0)
        optimizer.step()
        assert float(distillation.step()) == pytest.approx(float(loss.detach()), rel=1e-9)
    for (name, made), wanted in zip(student.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-8, atol=1e-10, msg=name)


def test_visited_sequences_are_a_quarter_of_every_batch():
    base = random_model(0)
    student, kept = pruned(base)
    distillation = distillation_of(student, lessons_of(base, 64), kept, batch_size=32, updates=20)
    assert all(int(distillation._pick().max()) < 64 for _ in range(20))
    before = distillation.held_out_loss()
    distillation.add_visited(lessons_of(base, 10, seed=9))
    seen = set()
    for _ in range(20):
        rows = distillation._pick()
        assert len(rows) == 32
        assert int((rows >= 64).sum()) == 8
        assert not set(rows.tolist()) & set(held_out(64))
        seen |= set(rows[rows >= 64].tolist())
    assert seen == set(range(64, 74))
    assert distillation.held_out_loss() == before  # measured on the same sequences
    assert math.isfinite(float(distillation.step()))


def test_visited_sequences_are_learnt_from():
    base = random_model(0)
    student, kept = pruned(base)
    distillation = distillation_of(student, lessons_of(base, 64), kept)
    visited = lessons_of(base, 10, seed=9)
    visited.targets.rewards.fill_(math.nan)
    assert math.isfinite(float(distillation.step()))
    distillation.add_visited(visited)
    assert math.isnan(float(distillation.step()))


def test_what_is_learnt_follows_the_seed():
    base = random_model(0)
    states = []
    for seed in (3, 3, 4):
        student, kept = pruned(base)
        distillation = distillation_of(student, lessons_of(base), kept, seed=seed)
        torch.manual_seed(len(states))  # what happened before does not matter
        for _ in range(5):
            distillation.step()
        states.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_lessons_serve_many_students():
    """Nothing of the base or of its lessons is written to."""
    base = random_model(0)
    lessons = lessons_of(base)
    kept_lessons: Lessons = copy.deepcopy(lessons)
    before = copy.deepcopy(base.state_dict())
    student, kept = pruned(base)
    distillation = distillation_of(student, lessons, kept)
    distillation.add_visited(lessons_of(base, 10, seed=9))
    for _ in range(5):
        distillation.step()
    for name, tensor in vars(kept_lessons.targets).items():
        assert torch.equal(tensor, getattr(lessons.targets, name))
    assert torch.equal(kept_lessons.sequences.observations, lessons.sequences.observations)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())
