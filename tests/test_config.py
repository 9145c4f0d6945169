"""Experiments: what may be written, what is refused, and how that is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agents.agent import BUILT_IN, Objective, agent_class, measurements
from components import importance
from components.errors import UserError
from components.tracker import USUAL, Tracking
from search import experiment_yaml
from search.config import (
    PERFORMANCES,
    REPORTED,
    EarlyStoppingConfig,
    ExperimentConfig,
    Metric,
    OptionBounds,
    ScheduleConfig,
    changes,
    load_experiment,
    parse_experiment,
    resolve_objectives,
    shipped_experiments,
)
from search.constraints import Constraint, limits, parse_all, written

AGENT = "agent: {kind: autoencoder}\n"
ERROR = Objective("reconstruction_error", "minimize", "mean squared error")


def load(*overrides: str, text: str = AGENT) -> ExperimentConfig:
    return parse_experiment(text, source="mine.yaml", overrides=overrides)


def refusal(*overrides: str, text: str = AGENT) -> str:
    """What the user reads; always one line."""
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_only_the_kind_of_agent_is_required() -> None:
    config = load()
    assert config.agent.kind == "autoencoder"
    assert config.agent.options == {}
    assert config.pruning.metrics == ("l2", "fisher", "reconstruction")
    assert (config.search.trials, config.search.sampler, config.search.objectives) == (64, "auto", None)
    assert (config.base.mode, config.pruning.coefficients, config.resources.gpus) == (
        "shared",
        "shared",
        "auto",
    )


def test_importance_is_tracked_as_usual_unless_something_else_is_said() -> None:
    assert load().base.importance.tracking == USUAL == Tracking(24, 0.99, 20, None)
    chosen = load("base.importance={every: 1, decay: 0.9, snapshots: 7, interval: 50}")
    assert chosen.base.importance.tracking == Tracking(1, 0.9, 7, 50)
    assert parse_experiment(chosen.to_yaml()) == chosen


def test_every_key_can_be_set() -> None:
    text = """
name: mine
agent:
  kind: my_package.my_module:MyAgent
  hidden: [8, 4]
  learning_rate: 1e-3
  nested: {deep: [1, {a: null}]}
base: {mode: per_trial, seed: 3, importance: {every: 2, decay: 0.9, snapshots: 5, interval: 7}}
pruning:
  metrics: [l1, random]
  coefficients: per_component
  coefficients_force: true
  max_ratio: 0.5
  ranking: isomorphic
  round_to: 8
  schedule: {kind: cubic, start: 4, end: 30, interval: 5, smoothing: 0.9, reconstruction: false}
  reconstruction: gram
  fine_tune: {method: distill, updates: 40}
search:
  trials: 7
  sampler: grid
  grid: {coefficients: 2, ratios: 5}
  objectives: [parameters, macs, my_score]
  constraints: {retention: ">= 0.5", parameters: "<= 2e3"}
  seed: 4
  concurrency: 2
  anchors: false
  ratios_first: 9
  hours: 1.5
  trial_timeout: 600
  retries: 0
  warm_start: runs/other
  options: {samples: [32, 256], iterations: [1, 6]}
  early_stopping: {rungs: 2, reduction: 4, first: 0.3}
resources: {cpus: 0.5, gpus: 0.25}
wandb: {mode: offline, project: mine, entity: us, trial_runs: 10}
storage: postgresql://me@host/studies
"""
    config = load(text=text)
    assert config.agent.options == {
        "hidden": [8, 4],
        "learning_rate": 0.001,
        "nested": {"deep": [1, {"a": None}]},
    }
    assert config.search.constraints == (
        Constraint("retention", ">=", 0.5),
        Constraint("parameters", "<=", 2000.0),
    )
    assert config.search.options == (OptionBounds("samples", 32, 256), OptionBounds("iterations", 1, 6))
    assert config.model_dump(mode="json")["search"]["options"] == {"samples": [32, 256], "iterations": [1, 6]}
    assert config.pruning.fine_tune.method == "distill"
    assert config.search.early_stopping == EarlyStoppingConfig(rungs=2, reduction=4, first=0.3)
    assert config.resources.gpus == 0.25
    # Nothing was left at its default: every key that there is was set.
    given, default = config.model_dump(), load().model_dump()
    for section, values in given.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            before = default[section].get(key) if isinstance(default[section], dict) else default[section]
            assert value != before, f"{section}.{key}"
    assert parse_experiment(config.to_yaml()) == config


def test_coefficients_of_groups_may_be_given() -> None:
    text = AGENT + "pruning: {coefficients: {encoder.0: {l2: 1, fisher: 2}, coupling: {l2: 0.5}}}\n"
    config = load(text=text)
    given = {"encoder.0": {"l2": 1.0, "fisher": 2.0}, "coupling": {"l2": 0.5}}
    assert config.pruning.mixtures == given
    assert config.model_dump(mode="json")["pruning"]["coefficients"] == given
    assert parse_experiment(config.to_yaml()) == config
    assert changes(load(), config)["pruning.coefficients.coupling.l2"] == (None, 0.5)
    assert load("pruning.coefficients=per_group").pruning.mixtures == "per_group"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pruning.coefficients=per_grup", "'per_grup': did you mean 'per_group'? allowed: equal, per_comp"),
        ("pruning.coefficients=3", "is 3: allowed: equal, shared, per_component, per_group, or a mapping"),
        ("pruning.coefficients={}", "is {}: it must name a group or component, such as {latent: {l2: 1}}"),
        ("pruning.coefficients={latent: l2}", "pruning.coefficients.latent is 'l2': it must be a mapping of"),
        ("pruning.coefficients={latent: {l2: many}}", "coefficients.latent is {'l2': 'many'}: it must be a"),
        ("search.grid={ratios: 3}", "search.grid is for the sampler 'grid', and the sampler is 'auto'"),
        (
            "search.grid={ratios: 1}",
            "search.grid.ratios is 1: it must be a whole number, at least 2, or null",
        ),
    ],
)
def test_refusals_of_coefficients_and_grids(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_experiments_are_immutable() -> None:
    config = load("agent.hidden=[1]")
    with pytest.raises(ValidationError, match="frozen"):
        config.search.trials = 3
    config.agent.options["hidden"].append(2)
    assert config.agent.options == {"hidden": [1]}


def test_a_section_without_keys_keeps_its_defaults() -> None:
    assert load(text=AGENT + "search:\n  # trials: 3\npruning: {fine_tune: }\n") == load()


# --- overrides


def test_overrides_reach_every_key() -> None:
    config = load(
        "search.trials=200",
        "pruning.fine_tune.updates=5",
        "pruning.metrics=[l1, taylor]",
        "search.constraints.retention=>= 0.5",
        "search.constraints.macs=<=100",
        "agent.learning_rate=1e-3",
        "agent.deep.er=on",
        "name=other",
        "wandb.entity=null",
    )
    assert config.search.trials == 200
    assert config.pruning.fine_tune.updates == 5
    assert config.pruning.metrics == ("l1", "taylor")
    assert [str(constraint) for constraint in config.search.constraints] == [">= 0.5", "<= 100.0"]
    assert config.agent.options == {"learning_rate": 0.001, "deep": {"er": "on"}}
    assert config.name == "other"


def test_the_last_override_wins() -> None:
    assert load("search.trials=3", "search.trials=4", text=AGENT + "search: {trials: 2}").search.trials == 4
    assert load("search={trials: 5}", "search.seed=1").search.trials == 5


@pytest.mark.parametrize("override", ["search.trials", "=3", "search..trials=3", ".=3"])
def test_overrides_need_a_key_and_a_value(override: str) -> None:
    assert refusal(override) == f"--set {override}: it must be key=value, such as search.trials=200"


def test_overrides_below_a_value_are_refused() -> None:
    message = refusal("search.trials.more=3", text=AGENT + "search: {trials: 2}")
    assert message == "--set search.trials.more=3: search.trials is 2, which has no keys of its own"


def test_faults_of_an_override_name_the_override() -> None:
    assert refusal("search.trials=x", text=AGENT + "search: {seed: 0}").startswith("--set search.trials=x: ")
    assert refusal("search.trials=2", text=AGENT + "search: {seed: x}").startswith(
        "mine.yaml: search.seed is 'x'"
    )
    assert refusal("search.trials=[").startswith("--set search.trials=[, line 1, column 2 is not valid YAML")


# --- refusals


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "search.trails=3",
            "unknown key search.trails: did you mean 'trials'? allowed: anchors, concurrency, constraints, "
            "early_stopping, grid, hours, objectives, options, ratios_first, retries, sampler, seed, "
            "trial_timeout, trials, warm_start",
        ),
        (
            "trials=3",
            "unknown key trials: did you mean 'search.trials'? allowed here: agent, base, name, pruning, "
            "resources, search, storage, wandb",
        ),
        (
            "pruning.fine_tune.methods=x",
            "unknown key pruning.fine_tune.methods: did you mean 'method'? allowed: method, updates",
        ),
        ("search.trials=0", "search.trials is 0: it must be a whole number, at least 1"),
        ("search.trials=1.5", "search.trials is 1.5: it must be a whole number, at least 1"),
        ("search.trials='3'", "search.trials is '3': it must be a whole number, at least 1"),
        ("search.trials=true", "search.trials is true: it must be a whole number, at least 1"),
        ("search.trials=", "search.trials is null: it must be a whole number, at least 1"),
        ("search.seed=-1", "search.seed is -1: it must be a whole number, at least 0"),
        ("search.concurrency=0", "search.concurrency is 0: it must be a whole number, at least 1, or null"),
        ("search.options=3", "search.options is 3: it must be a mapping"),
        *(
            (
                f"search.options.samples={text}",
                f"search.options.samples is {shown}: it must be two whole numbers, [low, high] with "
                "1 <= low < high, such as [32, 256]",
            )
            for text, shown in (
                ("[0, 4]", "[0, 4]"),
                ("[4, 4]", "[4, 4]"),
                ("[4, 2]", "[4, 2]"),
                ("[1, 2.0]", "[1, 2.0]"),
                ("[true, 4]", "[True, 4]"),
                ("[1]", "[1]"),
                ("[1, 2, 3]", "[1, 2, 3]"),
                ("12", "12"),
                ("'12'", "'12'"),
                ("", "null"),
            )
        ),
        ("search.anchors=1", "search.anchors is 1: it must be true or false"),
        (
            "search.sampler=tp",
            "search.sampler is 'tp': did you mean 'tpe'? allowed: auto, gp, gradient, grid, nsga2, qmc, "
            "random, tpe",
        ),
        (
            "search.sampler=3",
            "search.sampler is 3: allowed: auto, gp, gradient, grid, nsga2, qmc, random, tpe",
        ),
        (
            "search.objectives=parameters",
            "search.objectives is 'parameters': it must be a list, not empty, or null",
        ),
        ("search.objectives=[]", "search.objectives is []: it must be a list, not empty, or null"),
        ("search.objectives=[macs, 3]", "search.objectives.1 is 3: it must be text"),
        (
            "search.objectives=[macs, macs]",
            "search.objectives is ['macs', 'macs']: it lists 'macs' twice",
        ),
        (
            "search.objectives=[paramters]",
            "search.objectives has the unknown objective 'paramters': did you mean 'parameters'? allowed: "
            "latency_median_ms, latency_p99_ms, macs, parameters, reconstruction_error",
        ),
        (
            "search.constraints.retenton=>= 1",
            "search.constraints.retenton is not measured: did you mean 'retention'? allowed: "
            "latency_median_ms, latency_p99_ms, macs, parameters, reconstruction_error, retention, "
            "size_ratio",
        ),
        ("search.constraints=3", "search.constraints is 3: it must be a mapping"),
        (
            "search.constraints.retention=0.5",
            "search.constraints.retention is 0.5: it must be '>=' or '<=' and a number, such as '>= 0.5', "
            "or two such as '>= 0.5, <= 0.9'",
        ),
        ("pruning.max_ratio=0", "pruning.max_ratio is 0: it must be a number, above 0, below 1"),
        ("pruning.max_ratio=1.0", "pruning.max_ratio is 1.0: it must be a number, above 0, below 1"),
        ("pruning.max_ratio=.nan", "pruning.max_ratio is nan: it must be a number, above 0, below 1"),
        ("pruning.max_ratio=half", "pruning.max_ratio is 'half': it must be a number, above 0, below 1"),
        ("pruning.metrics=l2", "pruning.metrics is 'l2': it must be a list, not empty"),
        ("pruning.metrics=[l2, l2]", "pruning.metrics is ['l2', 'l2']: it lists 'l2' twice"),
        (
            "pruning.metrics=[l2, fischer]",
            "pruning.metrics.1 is 'fischer': did you mean 'fisher'? allowed: bayesian, fisher, gate_fisher, "
            "gradient, l1, l2, random, reconstruction, taylor",
        ),
        (
            "pruning.reconstruction=sequentiel",
            "pruning.reconstruction is 'sequentiel': did you mean 'sequential'? allowed: gram, none, "
            "sequential",
        ),
        (
            "pruning.fine_tune.updates=-1",
            "pruning.fine_tune.updates is -1: it must be a whole number, at least 0",
        ),
        ("pruning.fine_tune.method=3", "pruning.fine_tune.method is 3: it must be text, or null"),
        ("pruning.fine_tune=3", "pruning.fine_tune is 3: it must be a mapping"),
        ("base.mode=share", "base.mode is 'share': did you mean 'shared'? allowed: per_trial, shared"),
        ("base.importance.every=0", "base.importance.every is 0: it must be a whole number, at least 1"),
        (
            "base.importance.decay=1",
            "base.importance.decay is 1: it must be a number, at least 0, below 1",
        ),
        (
            "base.importance={every: 8, interval: 7}",
            "base.importance.interval is 7: a snapshot is of a tracked step, and every 8th is: make every no "
            "larger",
        ),
        *(
            (
                f"pruning.schedule={{{key}: {value}}}",
                f"pruning.schedule.{key} is {value}: is for the kinds 'cosine' and 'cubic', and the kind is "
                "'one_shot'",
            )
            for key, value in {
                "start": 3,
                "end": 0,
                "interval": 1,
                "smoothing": 0.9,
                "reconstruction": "false",
            }.items()
        ),
        (
            "base.importance.interval=0",
            "base.importance.interval is 0: it must be a whole number, at least 1, or null",
        ),
        ("resources.cpus=0", "resources.cpus is 0: it must be a number, above 0"),
        ("resources.cpus=.inf", "resources.cpus is inf: it must be a number, above 0"),
        ("resources.gpus=-1", "resources.gpus is -1: it must be 'auto' or a number, at least 0"),
        ("resources.gpus=all", "resources.gpus is 'all': it must be 'auto' or a number, at least 0"),
        ("resources.gpus=true", "resources.gpus is true: it must be 'auto' or a number, at least 0"),
        (
            "wandb.mode=on",
            "wandb.mode is 'on': allowed: auto, disabled, offline, online",
        ),
        (
            "name=a/b",
            "name is 'a/b': it must be text, of letters, digits, dots, dashes and underscores, beginning "
            "with a letter or digit",
        ),
        ("agent.rate=.inf", "agent.rate is inf: it must be a finite number"),
        ("agent.deep=[{rate: .nan}]", "agent.deep.0.rate is nan: it must be a finite number"),
        ("agent.kind=3", "agent.kind is 3: it must be text, not empty"),
        ("search.hours=0", "search.hours is 0: it must be a number, above 0, or null"),
        ("search.trial_timeout=-1", "search.trial_timeout is -1: it must be a number, above 0, or null"),
        ("search.retries=-1", "search.retries is -1: it must be a whole number, at least 0"),
        (
            "storage=mysql://here/x",
            "storage is 'mysql:…': it must be the URL of a PostgreSQL database, such as "
            "'postgresql://user@host/database'",
        ),
    ],
)
def test_refusals_say_key_value_and_what_is_allowed(override: str, expected: str) -> None:
    shown = "storage" if override.startswith("storage=") else override
    assert refusal(override) == f"--set {shown}: {expected}"


def test_no_copy_of_a_password_is_kept() -> None:
    for url, kept in [
        ("me:p%2Fss:w@host:5432/studies?sslmode=require", "me@host:5432/studies?sslmode=require"),
        ("me:se/cret@host/studies", "me@host/studies"),
        ("host/studies?user=me&password=secret&sslpassword=secret", "host/studies?user=me"),
        ("me@host/studies", "me@host/studies"),
    ]:
        config = load(f"storage=postgresql://{url}")
        assert config.without_secrets().storage == f"postgresql://{kept}"
        assert changes(config.without_secrets(), config) == {}
    assert "secret" not in refusal("storage=mysql://me:secret@here/x")


def test_changes_are_named_by_their_keys() -> None:
    before = load("search.trials=3", "agent.hidden=[8, 4]", "search.constraints={retention: '>= 0.5'}")
    after = load("search.trials=4", "agent.hidden=[8, 5, 2]", "pruning.max_ratio=0.5")
    assert changes(before, before) == {}
    assert changes(before, after) == {
        "agent.hidden": ([8, 4], [8, 5, 2]),
        "pruning.max_ratio": (0.98, 0.5),
        "search.constraints.retention": (">= 0.5", None),
        "search.trials": (3, 4),
    }


def test_the_same_fault_in_a_file_names_the_file() -> None:
    message = refusal(text=AGENT + "search: {trails: 3, seed: x}")
    assert message.startswith("mine.yaml: unknown key search.trails: did you mean 'trials'?")


@pytest.mark.parametrize("text", ["name: x", "agent: {}", "agent: autoencoder", "agent: {hidden: [1]}"])
def test_the_kind_of_agent_must_be_there(text: str) -> None:
    assert refusal(text=text).startswith("mine.yaml: agent.kind is missing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "mine.yaml, line 3, column 1 is not valid YAML: key 'a' is given twice"),
        (
            "agent:\n  kind: x\n  kind: y\n",
            "mine.yaml, line 3, column 3 is not valid YAML: key 'kind' is given twice",
        ),
        (
            "agent: {kind: [x}\n",
            "mine.yaml, line 1, column 17 is not valid YAML: expected ',' or ']', but got '}'",
        ),
        ("1: 2\n", "mine.yaml, line 1, column 1 is not valid YAML: key 1 is not text"),
        ("", "mine.yaml is empty: "),
        ("# nothing\n", "mine.yaml is empty: "),
        ("- a\n", "mine.yaml is ['a']: it must be a mapping"),
        ("text", "mine.yaml is 'text': it must be a mapping"),
        ("a: \0", "mine.yaml is not valid YAML: unacceptable character #x0000"),
        (
            "agent: {kind: x, a: &a [*a]}",
            "mine.yaml, line 1, column 21 is not valid YAML: found unconstructable",
        ),
        ("agent: !!python/object:os.system x", "mine.yaml, line 1, column 8 is not valid YAML: could not"),
        ("agent: {kind: x, n: " + "9" * 5000 + "}", "mine.yaml is not valid YAML: Exceeds the limit"),
    ],
)
def test_texts_that_are_no_experiment(text: str, expected: str) -> None:
    assert refusal(text=text).startswith(expected)


# --- files and shipped experiments


def test_files_are_given_by_path(tmp_path: Path) -> None:
    path = tmp_path / "my search.yaml"
    path.write_text(AGENT)
    config = load_experiment(str(path), ["search.trials=3"])
    assert (config.name, config.search.trials) == ("my-search", 3)
    path.write_text(AGENT + "name: given")
    assert load_experiment(str(path)).name == "given"
    path.write_text("agent: {kind: autoencoder}\nsearch: {trials: none}")
    with pytest.raises(UserError, match=r"my search\.yaml: search\.trials is 'none'"):
        load_experiment(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in (
        (tmp_path / "absent.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (binary, "not UTF-8"),
        ("a\0b.yaml", "null byte"),
    ):
        with pytest.raises(UserError, match=reason):
            load_experiment(str(path))


@pytest.mark.parametrize("name", shipped_experiments())
def test_shipped_experiments_are_valid(name: str) -> None:
    config = load_experiment(name)
    assert config.name == name
    kind = agent_class(config.agent.kind)
    kind(config.agent.options)
    resolve_objectives(config.search.objectives, config.search.constraints, kind.performance)
    assert config.pruning.fine_tune.method in (None, *kind.fine_tune_methods)


def test_unknown_experiments_name_the_nearest() -> None:
    assert {"autoencoder", "autoencoder_conv"} <= set(shipped_experiments())
    with pytest.raises(UserError, match=r"unknown experiment 'autoencodr': did you mean 'autoencoder'\?"):
        load_experiment("autoencodr")


def test_metrics_are_those_that_there_are() -> None:
    assert set(Metric.__args__) == set(importance.METRICS)  # type: ignore[attr-defined]


# --- round trips

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
# What a YAML stream may hold at all: everything but surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TRICKY = st.sampled_from(
    [
        "1e-3",
        "010",
        "1_000",
        "12:30",
        "2026-01-31",
        "yes",
        "~",
        "null",
        ".nan",
        "0x1f",
        "-",
        ":",
        "#",
        "=",
        "<<",
    ]
)
VALUES = st.recursive(
    SCALARS | TEXTS | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | TRICKY, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS.filter(lambda key: key != "kind"), VALUES, max_size=4))
def test_resolved_experiments_read_back_equal(options: dict[str, object]) -> None:
    config = ExperimentConfig.model_validate({"agent": {"kind": "autoencoder", **options}})
    assert parse_experiment(config.to_yaml()) == config
    assert parse_experiment(config.to_yaml()).agent.options == options


@given(VALUES)
def test_other_yaml_readers_agree_on_texts(value: object) -> None:
    def texts(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [text for pair in entry.items() for part in pair for text in texts(part)]
        if isinstance(entry, list):
            return [text for part in entry for text in texts(part)]
        return [entry] if isinstance(entry, str) else []

    assert texts(yaml.safe_load(experiment_yaml.dump(value))) == texts(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("+3", 3),
        ("on", "on"),
        ("No", "No"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("True", True),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    parsed = experiment_yaml.parse(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


# --- constraints and objectives


@given(st.sampled_from([">=", "<="]), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_constraints_read_back_and_measure_their_violation(operator: str, bound: float, value: float) -> None:
    [constraint] = Constraint.parse("macs", f" {operator}{bound!r} ")
    assert Constraint.parse("macs", str(constraint)) == (constraint,)
    met = value >= bound if operator == ">=" else value <= bound
    assert (constraint.violation(value) <= 0) == met
    assert not constraint.violation(math.nan) <= 0


@pytest.mark.parametrize(
    "text", ["> 0.5", "== 1", ">=", ">= x", ">= nan", "<= inf", ">= 1 2", "0.5", "", None, 3]
)
def test_other_constraints_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="it must be '>=' or '<=' and a number"):
        Constraint.parse("retention", text)


def test_objectives_get_direction_and_unit() -> None:
    score = Objective("my_score", "maximize", "points")
    assert [o.name for o in resolve_objectives(None, (), score)] == ["parameters", "my_score"]
    chosen = resolve_objectives(("my_score", "macs", "latency_p99_ms"), (), score)
    assert chosen[0] is score
    assert [(o.direction, o.unit) for o in chosen[1:]] == [
        ("minimize", "multiply-accumulates"),
        ("minimize", "ms"),
    ]


def test_objectives_of_another_agent_are_refused() -> None:
    with pytest.raises(UserError, match=r"search\.objectives has the unknown objective 'return'"):
        resolve_objectives(("parameters", "return"), (), ERROR)
    with pytest.raises(UserError, match=r"search\.constraints\.return is not measured"):
        resolve_objectives(None, (Constraint("return", ">=", 1.0),), ERROR)


def test_constraints_bound_whatever_a_trial_can_measure() -> None:
    for name in ("latency_p99_ms", "latency_median_ms", "macs", "size_ratio", "retention", ERROR.name):
        resolve_objectives(None, (Constraint(name, "<=", 1.0),), ERROR)
    smooth = (Constraint("smoothness", ">=", 0.5),)
    resolve_objectives(None, smooth, ERROR, {"smoothness": "1"})
    with pytest.raises(UserError, match=r"search\.constraints\.smoothness is not measured"):
        resolve_objectives(None, smooth, ERROR)


def test_what_the_shipped_agents_report_is_known_before_they_are_imported() -> None:
    options = {"tdmpc": {"task": "cartpole-swingup"}}
    for kind in BUILT_IN:
        agent = agent_class(kind)(options.get(kind, {}))
        assert set(REPORTED.get(kind, ())) == set(measurements(agent)), kind
        assert agent.performance.name == PERFORMANCES[kind]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.booleans())
def test_two_bounds_on_one_measurement_read_back(first: float, second: float, upper_first: bool) -> None:
    low, high = sorted((first, second))
    bounds = [f">= {low!r}", f"<= {high!r}"][:: -1 if upper_first else 1]
    texts = {"retention": ", ".join(bounds), "macs": "<= 5.0"}
    constraints = parse_all(texts)
    assert len(constraints) == 3
    assert parse_all(written(constraints)) == constraints
    assert limits(constraints[:2]) == (low, high)
    for value in (low, high, (low + high) / 2):
        assert all(constraint.violation(value) <= 0 for constraint in constraints[:2])
    assert any(constraint.violation(low - 1.0) > 0 for constraint in constraints[:2])


def test_an_experiment_with_two_bounds_is_what_its_yaml_reads_back_as() -> None:
    config = load("search.constraints.retention=>= 0.5, <= 0.9")
    assert config.search.constraints == (
        Constraint("retention", ">=", 0.5),
        Constraint("retention", "<=", 0.9),
    )
    assert parse_experiment(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (">= 0.9, <= 0.5", "is '>= 0.9, <= 0.5': nothing is at least 0.9 and at most 0.5"),
        ("<= 0.5, >= 0.9", "nothing is at least 0.9 and at most 0.5"),
        (">= 0.5, >= 0.6", "it has more than one lower bound, of which one says all"),
        ("<= 0.5, <= 0.6, >= 0", "it has more than one upper bound"),
        (">= 0.5,", "it must be '>=' or '<=' and a number"),
        (">= 0.5 <= 0.6", "it must be '>=' or '<=' and a number"),
    ],
)
def test_bounds_that_contradict_one_another_are_refused(text: str, reason: str) -> None:
    said = refusal(f"search.constraints.retention={text}")
    assert reason in said
    assert "search.constraints.retention" in said
    assert "\n" not in said


def test_what_a_users_agent_measures_is_left_to_it() -> None:
    agent = "agent: {kind: my_module:MyAgent}\n"
    config = load("search.objectives=[my_score]", "search.constraints.my_rate=>= 1", text=agent)
    assert config.search.objectives == ("my_score",)


def test_early_stopping_is_off_unless_asked_for() -> None:
    assert load().search.early_stopping is None
    assert load(text=AGENT + "search: {early_stopping: null}").search.early_stopping is None
    for asked in ("{}", "{reduction: 3}"):
        config = load(text=AGENT + f"search: {{early_stopping: {asked}}}")
        assert config.search.early_stopping == EarlyStoppingConfig(rungs=3, reduction=3, first=0.2)


@pytest.mark.parametrize(
    ("chosen", "updates", "rungs"),
    [
        ({}, 1000, (200, 342, 585)),
        ({}, 150, (30, 52, 88)),
        ({"rungs": 1, "first": 0.5}, 11, (6,)),
        ({"rungs": 2, "first": 0.25}, 100, (25, 50)),
    ],
)
def test_rungs_grow_by_equal_factors_towards_the_end(chosen, updates, rungs) -> None:
    assert EarlyStoppingConfig(**chosen).rungs_of(updates) == rungs


@given(st.integers(1, 20), st.floats(0.2, 0.99), st.integers(1, 10_000))
def test_no_rung_comes_before_its_share(rungs: int, first: float, updates: int) -> None:
    found = EarlyStoppingConfig(rungs=rungs, first=first).rungs_of(updates)
    assert len(found) == rungs
    assert found == tuple(sorted(found))
    assert first * updates - 1e-6 <= found[0] < first * updates + 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{rungs: 0}", "search.early_stopping.rungs is 0: it must be a whole number, at least 1, at most 20"),
        ("{reduction: 1}", "search.early_stopping.reduction is 1: it must be a number, above 1"),
        ("{first: 0.1}", "search.early_stopping.first is 0.1: it must be a number, at least 0.2, below 1"),
        ("{first: 1}", "search.early_stopping.first is 1: it must be a number, at least 0.2, below 1"),
        ("{eta: 3}", "unknown key search.early_stopping.eta: allowed: first, reduction, rungs"),
        ("true", "search.early_stopping is true: it must be a mapping, or null"),
    ],
)
def test_impossible_early_stopping_is_refused(given: str, said: str) -> None:
    assert said in refusal(text=AGENT + f"search: {{early_stopping: {given}}}")


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_rungs_need_updates_of_their_own(updates: int) -> None:
    fine_tune = f"pruning: {{fine_tune: {{updates: {updates}}}}}\n"
    assert refusal(text=AGENT + fine_tune + "search: {early_stopping: {}}") == (
        "mine.yaml: search.early_stopping has 3 rungs, "
        f"for which {updates} updates of fine-tuning are too few"
    )


@pytest.mark.parametrize("kind", ["one_shot", "cosine", "cubic"])
def test_a_schedule_may_be_its_kind_alone(kind: str) -> None:
    short = load(text=f"agent: {{kind: autoencoder}}\npruning: {{schedule: {kind}}}")
    long = load(text=f"agent: {{kind: autoencoder}}\npruning: {{schedule: {{kind: {kind}}}}}")
    assert short == long
    assert parse_experiment(short.to_yaml()) == short
    assert short.pruning.schedule.kind == kind


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, (0, 100, 10)),
        ({"start": 120}, (120, 120, 1)),
        ({"end": 45, "start": 5, "interval": 7}, (5, 45, 7)),
    ],
)
def test_what_a_schedule_leaves_open_goes_by_the_training(chosen: dict[str, int], expected: tuple) -> None:
    schedule = ScheduleConfig(kind="cosine", **chosen).over(150, "updates")
    assert schedule is not None
    assert (schedule.start, schedule.end, schedule.interval) == expected
    assert ScheduleConfig().over(150, "updates") is None
