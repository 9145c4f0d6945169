"""The autoencoder agent: its two shapes, its options, its training and its states."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from agent_contract import AgentContract
from torch import nn

import components
from agents import datasets
from agents.autoencoder import Autoencoder, AutoencoderOptions, _batches, dense_widths
from components import UserError
from components.size import parameter_count

SMALL = {"hidden": [24, 12], "latent": 6, "updates": 150, "fine_tune_batch_size": 64}
SMALL_CONV = {"shape": "conv", "hidden": [6, 8], "latent": 6, "updates": 100, "fine_tune_batch_size": 32}


def silent(*_):
    pass


def make(options):
    return staticmethod(lambda widths=None, data=None: Autoencoder(options, widths, data))


class TestMlp(AgentContract):
    make_agent = make(SMALL)


class TestMlpWithBatchNorm(AgentContract):
    make_agent = make({**SMALL, "normalization": "batch", "activation": "relu"})


class TestConv(AgentContract):
    make_agent = make(SMALL_CONV)


class TestConvWithLayerNorm(AgentContract):
    make_agent = make({**SMALL_CONV, "normalization": "layer", "activation": "gelu"})


def trace(agent):
    side = datasets.IMAGE_SIDES[agent.options["dataset"]]
    assert agent.image_shape in ((side * side,), (1, side, side))
    images = torch.rand(2, *agent.image_shape, generator=torch.Generator().manual_seed(0))
    return components.trace(
        agent.model,
        lambda model: agent.program(model, {"images": images}),
        components=agent.components,
        ties=agent.ties,
    )


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
@pytest.mark.parametrize("normalization", ["none", "layer", "batch"])
@pytest.mark.parametrize(
    ("shape", "hidden"), [("mlp", [9]), ("mlp", [9, 8, 7]), ("conv", [5]), ("conv", [5, 6, 7, 8])]
)
def test_groups_are_the_hidden_layers_and_the_latent(dataset, normalization, shape, hidden):
    agent = Autoencoder(
        {
            "dataset": dataset,
            "normalization": normalization,
            "shape": shape,
            "hidden": hidden,
            "latent": 4,
        }
    )
    graph = trace(agent)
    assert graph.widths == agent.widths
    assert list(agent.widths.values()) == [*hidden, 4, *reversed(hidden)]
    assert {name for name, group in graph.by_name.items() if group.is_coupling} == {"latent"}
    images = torch.rand(3, *agent.image_shape)
    assert agent.act(images).shape == images.shape


def test_default_shapes_and_sizes():
    dense = Autoencoder({})
    assert dense.widths == {
        "encoder.0": 256,
        "encoder.2": 128,
        "latent": 16,
        "decoder.0": 128,
        "decoder.2": 256,
    }
    sizes = [64, 256, 128, 16, 128, 256, 64]
    by_hand = sum((a + 1) * b for a, b in pairwise(sizes))
    assert parameter_count(dense.model) == by_hand == 103_248
    conv = Autoencoder({"shape": "conv"})
    assert conv.options["hidden"] == [16, 32]
    assert set(conv.widths) == {"encoder.0", "encoder.2", "latent", "decoder.0", "decoder.3"}


def test_a_channel_of_the_conv_decoders_linear_owns_one_position_each():
    agent = Autoencoder({"shape": "conv", "hidden": [4, 6]})
    members = {(m.parameter, m.axis): m.indices for m in trace(agent).by_name["decoder.0"].members}
    # 8 x 8 halved twice: 2 x 2 positions per feature map, laid out (map, height, width).
    assert torch.equal(members["decoder.0.weight", 0], torch.arange(24).reshape(6, 4))
    assert torch.equal(members["decoder.0.bias", 0], torch.arange(24).reshape(6, 4))


def test_no_activation_module_is_shared():
    for shape in ("mlp", "conv"):
        model = Autoencoder({"shape": shape}).model
        activations = [module for module in model.modules() if isinstance(module, nn.ELU)]
        assert len(activations) == 4
        assert len({id(module) for module in activations}) == 4


def test_evaluation_is_the_mean_squared_error():
    agent = Autoencoder(SMALL)
    for split, images in (("validation", agent.data()["validation"]), ("test", agent.data()["test"])):
        reconstruction = agent.act(images.reshape(len(images), -1)).numpy().astype("float64")
        error = ((reconstruction - images.reshape(len(images), -1).numpy()) ** 2).mean()
        assert agent.evaluate(split)["reconstruction_error"] == pytest.approx(error, rel=1e-12)


def test_trivial_is_the_variance_around_the_training_mean():
    data = Autoencoder(SMALL).data()
    for shape in ("mlp", "conv"):
        agent = Autoencoder({"shape": shape}, data=data)
        test = data["test"].numpy().astype("float64")
        expected = ((test - data["train"].numpy().astype("float64").mean(axis=0)) ** 2).mean()
        assert agent.trivial("test") == pytest.approx(expected, rel=1e-12)


def test_nothing_is_loaded_before_it_is_needed(monkeypatch):
    def refuse(name):
        raise AssertionError(f"{name} was loaded")

    data = Autoencoder({}).data()
    monkeypatch.setattr(datasets, "load", refuse)
    with pytest.raises(AssertionError, match="digits was loaded"):
        Autoencoder({}).data()
    Autoencoder({}).act(torch.zeros(1, 64))
    Autoencoder({}, data=data).evaluate("validation")


def test_global_generators_are_left_alone():
    agent = Autoencoder({**SMALL, "updates": 3})
    before = torch.get_rng_state()
    Autoencoder(SMALL)
    agent.train(0, None, silent)
    agent.fine_tune("supervised", 2, 0, silent)
    assert torch.equal(torch.get_rng_state(), before)


def test_different_seeds_train_differently():
    first, second = (Autoencoder({**SMALL, "updates": 2}) for _ in range(2))
    first.train(0, None, silent)
    second.train(1, None, silent)
    assert not torch.equal(first.model.encoder[0].weight, second.model.encoder[0].weight)


def test_progress_counts_to_the_end():
    seen = []
    agent = Autoencoder({**SMALL, "updates": 130})
    agent.train(0, None, lambda *progress: seen.append(progress))
    done = [progress[0] for progress in seen]
    assert done == list(range(1, 131))
    assert {total for _, total, _ in seen} == {130}
    assert len({note for _, _, note in seen}) <= 100, "reading every loss would make the device wait"


def test_the_tracker_sees_every_step_before_the_optimizer():
    agent = Autoencoder({**SMALL, "updates": 4})
    events = []

    class Spy:
        def is_due(self, loss="model"):
            return True

        def capture(self, loss="model"):
            events.append(("capture", loss, all(p.grad is None for p in agent.model.parameters())))
            return torch.enable_grad()

        def update(self, loss="model"):
            events.append(("update", loss, all(p.grad is not None for p in agent.model.parameters())))

    agent.train(0, Spy(), silent)
    assert events == [("capture", "model", True), ("update", "model", True)] * 4


def test_moments_are_adams():
    """Against torch's own optimizer, one step at a time on the same batches."""
    agent = Autoencoder({**SMALL, "updates": 5})
    agent.train(7, None, silent)
    other = Autoencoder({**SMALL, "updates": 5})
    other.model.load_state_dict(other._new_model(7).state_dict())
    optimizer = torch.optim.Adam(other.model.parameters(), lr=0.0, betas=(0.9, 0.95))
    images = other.data()["train"].flatten(1)
    for step, rows in enumerate(_batches(len(images), 5, agent.options["batch_size"], 7)):
        optimizer.param_groups[0]["lr"] = (
            agent.options["learning_rate"] * (1 + math.cos(math.pi * step / 5)) / 2
        )
        optimizer.zero_grad()
        ((other.model(images[rows]) - images[rows]) ** 2).mean().backward()
        optimizer.step()
    states = agent.states()
    for name, parameter in other.model.named_parameters():
        torch.testing.assert_close(states["model"][name], parameter.detach())
        torch.testing.assert_close(states["adam_mean"][name], optimizer.state[parameter]["exp_avg"])
        torch.testing.assert_close(states["adam_square"][name], optimizer.state[parameter]["exp_avg_sq"])


def test_fine_tuning_goes_on_from_the_moments():
    """The first update of warm moments is their direction, without the correction for a start at zero."""
    agent = Autoencoder({**SMALL, "fine_tune_learning_rate": 1e-3})
    states = agent.states()
    for name in states["adam_mean"]:
        states["adam_mean"][name] = torch.full_like(states["adam_mean"][name], 1e4)
        states["adam_square"][name] = torch.full_like(states["adam_square"][name], 1e8)
    agent.load_states(states)
    agent.fine_tune("supervised", 1, 0, silent)
    for name, before in states["model"].items():
        moved = agent.states()["model"][name] - before
        expected = -1e-3 * 0.9 / math.sqrt(0.95)
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-6)
    agent.load_states({"model": states["model"]})
    assert not any(moment.any() for moment in agent.states()["adam_square"].values())


def test_no_updates_change_nothing():
    agent = Autoencoder(SMALL)
    before = agent.states()
    agent.fine_tune("supervised", 0, 0, silent)
    for section, state in agent.states().items():
        assert all(torch.equal(tensor, before[section][name]) for name, tensor in state.items())


def test_every_image_is_seen_equally_often():
    rows = _batches(10, updates=7, batch_size=4, seed=0)
    assert rows.shape == (7, 4)
    counts = torch.bincount(rows.flatten(), minlength=10)
    assert counts.min() >= 2
    assert counts.max() <= 3
    assert torch.equal(rows, _batches(10, updates=7, batch_size=4, seed=0))
    assert not torch.equal(rows, _batches(10, updates=7, batch_size=4, seed=1))


def test_calibration_inputs_are_different_training_images():
    agent = Autoencoder(SMALL)
    train = agent.data()["train"].flatten(1)
    images = agent.calibration_inputs(50, 3)["images"]
    # (50, n): each is found among the training images
    assert bool((images[:, None] == train[None]).all(dim=2).any(dim=1).all())
    assert len(agent.calibration_inputs(10**6, 0)["images"]) == len(train)
    assert not torch.equal(images, agent.calibration_inputs(50, 4)["images"])


def test_example_inputs_repeat_the_test_images():
    agent = Autoencoder(SMALL_CONV)
    count = len(agent.data()["test"])
    images = agent.example_inputs(count + 2)
    assert images.shape == (count + 2, 1, 8, 8)
    assert torch.equal(images[count:], images[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": [3]}, "no option 'hiden': did you mean 'hidden'"),
        ({"hiden": [3], "latent": -1}, "no option 'hiden'"),
        ({"shape": "conf"}, "shape is \"conf\": did you mean 'conv'? allowed: conv, mlp"),
        ({"dataset": "digit"}, "dataset is \"digit\": did you mean 'digits'"),
        ({"dataset": 3}, "dataset is 3: allowed: digits, mnist"),
        ({"activation": "ELU "}, "activation is"),
        ({"latent": 0}, "latent is 0: it must be greater than or equal to 1"),
        ({"latent": 2.5}, "latent is 2.5: it must be a valid integer"),
        ({"latent": "16"}, 'latent is "16": it must be a valid integer'),
        ({"latent": True}, "latent is true"),
        ({"hidden": []}, "hidden is []"),
        ({"hidden": 64}, "hidden is 64"),
        ({"hidden": [8, 0]}, "hidden.1 is 0"),
        ({"hidden": [8, "x"]}, 'hidden.1 is "x"'),
        ({"hidden": None}, "hidden is null"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"updates": 0}, "updates is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": math.nan}, "learning_rate is NaN"),
        ({"fine_tune_learning_rate": math.inf}, "fine_tune_learning_rate is Infinity"),
        ({1: 2}, "the autoencoder's 1 is 1: keys should be strings"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(UserError) as caught:
        Autoencoder(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_learning_rates():
    assert Autoencoder({"learning_rate": 1, "hidden": (3, 4)}).options["hidden"] == [3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latnet": 3}, "no group 'latnet': did you mean 'latent'"),
        ({"latent": 0}, "the width of group 'latent' is 0: it must be a whole number from 1 to 6"),
        ({"latent": 7}, "from 1 to 6"),
        ({"latent": 2.0}, "is 2.0"),
        ({"latent": True}, "is True"),
    ],
)
def test_bad_widths_are_one_sentence(change, message):
    widths = dense_widths(AutoencoderOptions(hidden=(24, 12), latent=6)) | change
    with pytest.raises(UserError) as caught:
        Autoencoder(SMALL, widths)
    assert message in str(caught.value)


def test_missing_widths_are_refused():
    with pytest.raises(UserError, match=r"lack the autoencoder's group 'decoder\.0'"):
        Autoencoder(SMALL, {"encoder.0": 3, "encoder.2": 3, "latent": 2, "decoder.2": 3})


def test_unknown_fine_tuning_method():
    with pytest.raises(UserError, match="no fine-tuning method 'distil': allowed: supervised"):
        Autoencoder(SMALL).fine_tune("distil", 1, 0, silent)


def test_moments_of_another_shape_are_refused():
    agent = Autoencoder(SMALL)
    states = agent.states()
    states["adam_mean"]["encoder.0.bias"] = torch.ones(1)
    with pytest.raises(UserError, match=r"adam_mean .encoder\.0\.bias."):
        agent.load_states(states)


@pytest.mark.parametrize("shape", ["mlp", "conv"])
def test_the_task_loss_is_0_for_a_perfect_copy_and_1_for_the_mean_image(shape: str) -> None:
    agent = Autoencoder({"shape": shape})
    inputs = agent.calibration_inputs(300, 0)
    images = inputs["images"]
    mean = images.mean(0).expand_as(images)
    assert float(agent.task_loss({"reconstruction": images}, inputs)) == 0.0
    assert float(agent.task_loss({"reconstruction": mean}, inputs)) == pytest.approx(1.0)
    halfway = agent.task_loss({"reconstruction": (images + mean) / 2}, inputs)
    assert float(halfway) == pytest.approx(0.25)
