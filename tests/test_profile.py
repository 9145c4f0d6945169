"""`profile`: what it lists, what it measures, that it writes nothing, and what it says where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serial_search import EXPERIMENT, search_serially
from toy_agents import INPUTS

from agents.agent import agent_class
from search.checked_experiment import CheckedExperiment, check
from search.cli import main
from search.config import load_experiment, parse_experiment, shipped_experiments
from search.measurement import decision_macs
from search.outline import Outline, outline
from search.profile import proposal_seconds

SIZES = ("smallest", "middle", "largest", "mean")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("search.profile._thread_counts", lambda own, cpus, device: [])
    Path("toy.yaml").write_text(EXPERIMENT)


def checked(*overrides: str) -> CheckedExperiment:
    return check(parse_experiment(EXPERIMENT, name="toy", overrides=overrides), Path("nowhere"))


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["profile", *arguments])
    output, error = capsys.readouterr()
    return code, output, error


def profiled(capsys, *arguments: str) -> dict:
    before = everything()
    code, output, error = call(capsys, "toy.yaml", "--json", *arguments)
    assert (code, error) == (0, "")
    assert everything() == before
    return json.loads(output)


def everything() -> dict[Path, tuple[int, int]]:
    """Every file here, its size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*")}


# --- what would be searched ----------------------------------------------------------------------------


def test_components_and_groups_of_the_toy() -> None:
    plan = outline(checked())
    by_name = {component.name: component for component in plan.components}
    assert by_name["encoder"].parameters == INPUTS * 12 + 12 + 12 * 5 + 5
    assert by_name["encoder"].macs == INPUTS * 12 + 12 * 5
    assert by_name["decoder"].parameters == 5 * 12 + 12 + 12 * INPUTS + INPUTS
    assert set(by_name) == {"encoder", "decoder"}
    groups = {group.name: group for group in plan.groups}
    assert groups["latent"].components == ("encoder", "decoder")
    assert groups["encoder.0"].components == ("encoder",)
    assert [groups[name].channels for name in ("encoder.0", "latent", "decoder.0")] == [12, 5, 12]
    assert all(group.least == 1 and group.shares_with == () and group.searched for group in plan.groups)


def test_groups_that_share_a_ratio_name_one_another() -> None:
    plan = outline(checked("agent.kind=toy_agents:Repeating"))
    shared = {group.name: group.shares_with for group in plan.groups}
    assert shared == {"encoder.0": ("decoder.0",), "decoder.0": ("encoder.0",), "latent": ()}


def test_groups_are_as_the_search_has_them() -> None:
    alike = {g.name: g.shares_with for g in outline(checked("pruning.ranking=isomorphic")).groups}
    assert alike == {"encoder.0": ("decoder.0",), "decoder.0": ("encoder.0",), "latent": ()}
    searched = {g.name: g.searched for g in outline(checked("pruning.round_to=5")).groups}
    assert searched == {"encoder.0": True, "decoder.0": True, "latent": False}


@pytest.mark.parametrize(
    "name", [name for name in shipped_experiments() if name.startswith("auto")] + ["cartpole"]
)
def test_shipped_experiments_add_up(name: str) -> None:
    config = load_experiment(name)
    plan: Outline = outline(check(config, Path("nowhere")))
    agent = agent_class(config.agent.kind)(config.agent.options)
    assert sum(c.parameters for c in plan.components) == sum(p.numel() for p in agent.model.parameters())
    assert sum(c.macs for c in plan.components) == decision_macs(agent)
    largest = plan.models[-1]
    assert (largest.size_ratio, largest.widths) == (1.0, dict(agent.widths))
    assert [m.parameters for m in plan.models] == sorted(m.parameters for m in plan.models)
    twins = {group.name: group.shares_with for group in plan.groups if group.name.startswith("q")}
    assert all(len(others) == 1 for others in twins.values())


# --- what it would cost --------------------------------------------------------------------------------


def test_a_profile_measures_stages_and_adds_them_up_and_writes_nothing(capsys) -> None:
    content = profiled(capsys, "--trials", "10")
    prediction = content["prediction"]
    assert not prediction["trained_base"]
    assert prediction["training"]["basis"] == "trained in full"
    measured = prediction["measured"]
    for size in SIZES:
        assert list(measured[size]) == ["score", "mix", "slice", "reconstruct", "fine_tune", "evaluate"]
        assert all(seconds >= 0 for seconds in measured[size].values())
        assert measured[size]["fine_tune"] > 0
    first = prediction["costs"][0]
    mean = sum(measured["mean"].values())
    assert first["trials"] >= 10 * mean / first["setting"]["at_once"] - 1e-9
    for cost in prediction["costs"]:
        parts = [cost["start"], cost["train"], cost["trials"], cost["test"]]
        assert cost["total"] == pytest.approx(sum(parts))
        assert cost["setting"]["at_once"] <= 10
    assert any("barely trained" in note for note in prediction["notes"])


def test_tables_fit_a_terminal_and_say_everything(capsys) -> None:
    code, output, _ = call(capsys, "toy.yaml", "--trials", "10")
    assert code == 0
    assert max(len(line) for line in output.splitlines() if not line.endswith("...")) <= 100
    assert "…" not in output
    for words in (
        "Components of the base",
        "Pruning groups; 5 dimensions to search",
        "coupling: encoder, decoder",
        "Possible models",
        "299",
        "fine-tune",
        "Predicted time of the search, 10 trials",
        "as configured",
        "trained in full",
    ):
        assert words in output


def test_a_trained_base_is_used(capsys) -> None:
    assert main(["train", "toy.yaml"]) == 0
    capsys.readouterr()
    prediction = profiled(capsys)["prediction"]
    assert prediction["trained_base"]
    assert prediction["training"] == {"seconds": 0.0, "basis": "already trained"}
    assert prediction["notes"] == [note for note in prediction["notes"] if "busy" in note]


def test_the_base_of_a_finished_search_is_used_and_another_experiment_is_told_of(capsys) -> None:
    search_serially(Path("runs/toy"), "search.trials=2")
    assert profiled(capsys)["prediction"]["trained_base"]
    prediction = profiled(capsys, "--set", "agent.latent=4")["prediction"]
    assert not prediction["trained_base"]
    assert "runs/toy exists: a search needs another name, with --name." in prediction["notes"]


def test_a_base_in_every_trial_is_a_stage_of_it(capsys) -> None:
    prediction = profiled(capsys, "--set", "base.mode=per_trial")["prediction"]
    cost = prediction["costs"][0]
    assert prediction["train_each"] == prediction["training"]["seconds"] > 0
    assert not prediction["trained_first"]
    assert cost["train"] == 0.0
    one = prediction["training"]["seconds"] + sum(prediction["measured"]["mean"].values())
    assert cost["trials"] >= 12 * one / cost["setting"]["at_once"] - 1e-9


# --- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("constraints", "sentence"), [
    ("{parameters: '<= 20'}", "smallest possible model has 23 parameters, so the bound must be at least 23"),
    ("{parameters: '>= 300'}", "largest possible model has 299 parameters, so the bound must be at most 299"),
    ("{size_ratio: '>= 1.5'}", "largest possible model has size ratio 1, so the bound must be at most 1"),
    ("{macs: '<= 3'}", "the smallest possible model has 14 MACs of a decision"),
    ("{reconstruction_error: '<= -1'}", "reconstruction error is never below 0"),
    ("{size_ratio: '<= 0.2', parameters: '>= 200'}", "which no trial can meet together"),
])  # fmt: skip
def test_constraints_that_cannot_be_met_are_one_sentence(constraints: str, sentence: str, capsys) -> None:
    for json_too in ([], ["--json"]):
        code, output, error = call(
            capsys, "toy.yaml", "--set", f"search.constraints={constraints}", *json_too
        )
        assert code == 2
        assert error.startswith("prunefront: search.constraints.")
        assert error.count("\n") == 1
        assert sentence in error
        assert (output == "") == bool(json_too)
    assert [path.name for path in Path().iterdir()] == ["toy.yaml"]


def test_retention_beyond_perfection_is_refused_once_the_base_is_trained(capsys) -> None:
    arguments = ("toy.yaml", "--set", "search.constraints={retention: '>= 7'}")
    assert call(capsys, *arguments)[0] == 0
    search_serially(Path("runs/toy"), "search.trials=2")
    code, _, error = call(capsys, *arguments)
    assert code == 2
    assert "search.constraints.retention is '>= 7.0', which no trial can meet" in error


def test_a_trial_that_fails_is_told_on_an_untrained_base_and_refused_on_a_trained_one(capsys) -> None:
    fault = ("--set", "agent.fault=raise")
    prediction = profiled(capsys, *fault)["prediction"]
    assert prediction["measured"] is None
    assert prediction["costs"] == []
    assert any(
        "failed in fine_tune: RuntimeError: the toy was told to fail" in n for n in prediction["notes"]
    )
    code, output, _ = call(capsys, "toy.yaml", *fault)
    assert code == 0
    assert "No trial was measured" in output
    assert main(["train", "toy.yaml", *fault]) == 0
    capsys.readouterr()
    code, _, error = call(capsys, "toy.yaml", "--json", *fault)
    assert code == 2
    assert "a trial of the middle model failed in fine_tune" in error


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random", "qmc"])
@pytest.mark.parametrize("trials", [1, 2, 30])
def test_proposals_of_every_sampler_can_be_timed(sampler: str, trials: int) -> None:
    constraint = "search.constraints={retention: '>= 0.5'}"
    experiment = checked(f"search.sampler={sampler}", f"search.trials={trials}", constraint)
    assert proposal_seconds(experiment) >= 0.0
