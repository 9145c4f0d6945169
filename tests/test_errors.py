"""Messages that name what would have worked."""

from __future__ import annotations

from components.errors import LONGEST_LIST, nearest

MANY = [f"task-{i:03d}" for i in range(LONGEST_LIST + 1)]


def test_the_nearest_of_a_few_is_named_before_all() -> None:
    assert nearest("samplez", ["horizon", "samples"]) == "did you mean 'samples'? allowed: horizon, samples"


def test_a_few_are_listed_where_none_is_near() -> None:
    assert nearest("x", ["horizon", "samples"]) == "allowed: horizon, samples"


def test_of_very_many_only_the_nearest_are_listed() -> None:
    message = nearest("task-7", MANY)
    assert message.startswith("did you mean one of 'task-0")
    assert message.count("'task-") == 5


def test_of_very_many_without_a_near_one_some_are_listed_and_counted() -> None:
    message = nearest("x", MANY)
    assert message == ("allowed: 'task-000', 'task-001', 'task-002', 'task-003', 'task-004' and 46 others")
