"""How an agent is found by its name, and a complete agent of a user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import toy_agents
from agent_contract import AgentContract, check_agent
from example_agent import ROWS, DigitClassifier
from torch import nn

from agents.agent import (
    BUILT_IN,
    UNTRACKED,
    Objective,
    PlainAgent,
    Student,
    agent_class,
    calibration_program,
    searchable_options,
    shared_ratios,
)
from agents.autoencoder import Autoencoder
from components import UserError


def test_built_in_agents():
    assert agent_class("autoencoder") is Autoencoder
    for kind in BUILT_IN:
        assert agent_class(kind).fine_tune_methods


def test_own_agent_on_the_path():
    assert agent_class("example_agent:DigitClassifier") is DigitClassifier


def test_own_agent_in_the_current_directory(tmp_path, monkeypatch):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "my_module.py").write_text(Path(DigitClassifier.__init__.__code__.co_filename).read_text())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    try:
        found = agent_class("my_package.my_module:DigitClassifier")
        assert found({"hidden": 5}).widths == {"0": 5, "2": 5}
        assert sys.path[-1] == str(tmp_path)  # last: it hides nothing that is installed
    finally:
        for name in ("my_package", "my_package.my_module"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("autoencodr", "unknown agent 'autoencodr': did you mean 'autoencoder'? allowed: autoencoder"),
        ("", "unknown agent ''"),
        ("example_agent:", "unknown agent"),
        (":DigitClassifier", "unknown agent"),
        ("example_agnt:DigitClassifier", "there is no module 'example_agnt'"),
        ("example_agent.deep:DigitClassifier", "there is no module 'example_agent.deep'"),
        ("example_agent:DigitClasifier", "no class 'DigitClasifier'; did you mean 'DigitClassifier'"),
        ("example_agent:ROWS", "no class 'ROWS'"),
        ("agent_contract:AgentContract", "lacks data, program,"),
        ("..:Agent", "agent '..:Agent'"),
    ],
)
def test_unknown_agents_are_one_sentence(kind, message):
    with pytest.raises(UserError) as caught:
        agent_class(kind)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_library", "needs 'no_such_library', which is not installed"),
        ("1 / 0", "importing broken_agent failed with ZeroDivisionError: division by zero"),
        ("def f(:\n  pass", "importing broken_agent failed with SyntaxError"),
    ],
)
def test_modules_that_fail_on_import(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_agent.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        agent_class("broken_agent:Agent")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_members_are_named(monkeypatch):
    class Halfway(DigitClassifier):
        performance = "accuracy"
        fine_tune_methods = ()
        trivial = None

    monkeypatch.setattr(sys.modules[__name__], "Halfway", Halfway, raising=False)
    with pytest.raises(UserError) as caught:
        agent_class(f"{__name__}:Halfway")
    assert "lacks trivial, performance (an Objective), fine_tune_methods" in str(caught.value)


def test_what_an_agent_may_have_besides():
    plain, rolling, repeating = (
        kind({}) for kind in (toy_agents.Toy, toy_agents.Rolling, toy_agents.Repeating)
    )
    inputs = {"observations": torch.ones(3, toy_agents.INPUTS)}
    assert set(calibration_program(plain)(plain.model, inputs)) == {"latent", "reconstruction"}
    assert calibration_program(plain) == plain.program
    assert calibration_program(rolling) == rolling.calibration_program
    assert (shared_ratios(plain), searchable_options(plain)) == ({}, ())
    assert shared_ratios(repeating) == {"decoder.0": "encoder.0"}
    assert searchable_options(repeating) == ("passes",)
    assert isinstance(toy_agents.Taught({}), Student)
    assert not isinstance(plain, Student)


@pytest.mark.parametrize(("name", "direction"), [("", "minimize"), ("error", "min")])
def test_objectives_are_checked(name, direction):
    with pytest.raises(UserError):
        Objective(name, direction, "")


class TestExampleAgent(AgentContract):
    @staticmethod
    def make_agent(widths=None, data=None):
        return DigitClassifier({"hidden": 24, "updates": 80}, widths, data)


class Copying(DigitClassifier):
    """A student that starts its fine-tuning from its teacher's kept weights, and acts with a memory."""

    searchable_options = ("updates",)

    def learn_from(self, base, kept):
        self.base, self.kept = base, kept

    def act(self, inputs, memory=None):
        return super().act(inputs) if memory is None else super().act(inputs) + memory["bias"]

    def evaluate(self, split):
        images, labels = (self.rows[name][ROWS[split]] for name in ("images", "labels"))
        choices = self.act(images, memory={"bias": torch.zeros(10)}).argmax(dim=1)
        return {"accuracy": (choices == labels).double().mean().item()}

    def fine_tune(self, method, updates, seed, progress):
        rows = self.kept["0"]
        with torch.no_grad():
            self.model[0].weight.copy_(self.base.model[0].weight[rows])
        super().fine_tune(method, updates, seed, progress)
        return {"copied": float(len(rows))}

    def train(self, seed, tracker, progress):
        self.reset(seed)
        DigitClassifier.fine_tune(
            self, "supervised", self.options["updates"], seed, progress, tracker or UNTRACKED
        )


class TestStudent(AgentContract):
    @staticmethod
    def make_agent(widths=None, data=None):
        return Copying({"hidden": 24, "updates": 80}, widths, data)


def test_the_example_is_short():
    assert len(Path(DigitClassifier.__init__.__code__.co_filename).read_text().splitlines()) <= 60


def test_the_contract_in_one_call():
    check_agent(TestExampleAgent.make_agent)


def broken(**members):
    class Broken(DigitClassifier):
        pass

    for name, member in members.items():
        setattr(Broken, name, member)
    return lambda widths=None, data=None: Broken({"hidden": 12, "updates": 40}, widths, data)


BROKEN = {
    "its training ignores the seed": {
        "reset": lambda self, seed: PlainAgent.reset(self, torch.seed() % 1000)
    },
    "its widths are not the trace's": {
        "program": lambda self, model, inputs: {"x": model[:2](inputs["images"])}
    },
    "its states are not copies": {"states": lambda self: {"model": dict(self.model.state_dict())}},
    "its evaluation is random": {"evaluate": lambda self, split: {"accuracy": torch.rand(()).item()}},
    "its evaluation is not its performance": {"evaluate": lambda self, split: {"loss": 0.0}},
    "its evaluation goes round act": {
        "evaluate": lambda self, split: {
            "accuracy": float(self.model(self.example_inputs(9)).detach().mean())
        }
    },
    "its trivial agent is better": {"trivial": lambda self, split: 1.0},
    "its fine-tuning does nothing": {"fine_tune": lambda self, *_: None},
    "what it tells of its fine-tuning is no number": {
        "fine_tune": lambda self, *rest: DigitClassifier.fine_tune(self, *rest) or {"loss": float("nan")}
    },
    "it shares the ratio of no group": {"shared_ratios": {"1": "0"}},
    "its searchable option shapes the model": {"searchable_options": ("hidden",)},
    "it does not report what it names": {"measurements": {"calm": "1"}},
    "what it names is measured anyhow": {"measurements": {"retention": "1"}},
    "its contract is of another shape": {
        "contract": lambda self: {
            "inputs": [{"name": "x", "shape": [3], "dtype": "float32", "range": None}],
            "outputs": [{"name": "y", "shape": [10], "dtype": "float32", "range": None}],
            "control_step_s": None,
        }
    },
    "it does not act on batches": {"act": lambda self, inputs: PlainAgent.act(self, inputs)[0]},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_contract_finds(fault):
    make_agent = broken(**BROKEN[fault])
    with pytest.raises(AssertionError):
        check_agent(make_agent)


def test_plain_agent_resets_from_the_seed_alone():
    first, second = DigitClassifier({}), DigitClassifier({})
    before = torch.get_rng_state()
    first.reset(1)
    second.reset(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model[0].weight, second.model[0].weight)
    second.reset(2)
    assert not torch.equal(first.model[0].weight, second.model[0].weight)


def test_plain_agent_acts_in_evaluation_mode():
    class Dropping(PlainAgent):
        model = nn.Dropout(0.9)

    assert torch.equal(Dropping().act(torch.ones(100)), torch.ones(100))


def test_untracked_takes_no_notice():
    with UNTRACKED.capture("policy"):
        pass
    UNTRACKED.update("policy")
