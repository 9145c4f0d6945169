"""Pruning plans: stored and read again, and what they refuse."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import UserError
from components.plan import PruningPlan

names = st.text('ab.\\u00e9"', min_size=1, max_size=4)


@given(
    st.one_of(
        st.dictionaries(names, st.floats(0.001, 1e6), min_size=1, max_size=5),
        st.dictionaries(
            st.text(min_size=1),
            st.dictionaries(st.text(min_size=1), st.floats(0.001, 1.0), min_size=1),
            min_size=1,
        ),
    ),
    st.dictionaries(names, st.floats(0.0, 1.0, exclude_max=True), max_size=5),
)
def test_plan_survives_json_and_pickle(coefficients: dict[str, float], ratios: dict[str, float]) -> None:
    plan = PruningPlan(coefficients, ratios)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert json.loads(plan.to_json()) == {"coefficients": coefficients, "ratios": ratios}


@pytest.mark.parametrize(
    ("coefficients", "ratios", "message"),
    [
        ({}, {}, "no mixing coefficients"),
        ({"l2": 0.0}, {}, "all zero"),
        ({"l2": -1.0}, {}, "metric 'l2' has to be finite and >= 0, not -1.0"),
        ({"l2": float("nan")}, {}, "metric 'l2' has to be finite and >= 0, not nan"),
        ({"l2": float("inf")}, {}, "not inf"),
        ({"l2": "1"}, {}, "not '1'"),
        ({"l2": True}, {}, "not True"),
        ({"encoder": {"l2": -1.0}}, {}, "metric 'l2' of 'encoder'"),
        ({"encoder": {}}, {}, "of 'encoder' are all zero"),
        ({"encoder": {"l2": 1.0}, "l1": 1.0}, {}, "either shared or separate, not both: 'l1'"),
        ({"l2": 1.0}, {"latent": 1.0}, r"group 'latent' has to be in \[0, 1\), not 1.0"),
        ({"l2": 1.0}, {"latent": -0.1}, "not -0.1"),
        ({"l2": 1.0}, {"latent": float("nan")}, "not nan"),
        ({"l2": 1.0}, {"latent": None}, "not None"),
    ],
)
def test_plan_refuses_what_makes_no_sense(coefficients: dict, ratios: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruningPlan(coefficients, ratios)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"coefficients": {}}', '{"coefficients": 1, "ratios": 2}', "3"]
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="pruning plan"):
        PruningPlan.from_json(text)
