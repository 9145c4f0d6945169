"""Widths that an agent is to be built from: completed, ordered, and refused in one sentence."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from agents.widths import complete
from components import UserError

DENSE = {"encoder.0": 12, "latent": 5, "head.0": 7}


def test_none_is_the_dense_shape():
    widths = complete(None, DENSE, "agent")
    assert widths == DENSE
    widths["latent"] = 1
    assert DENSE["latent"] == 5  # a copy


def test_the_order_is_the_dense_ones():
    given = {"head.0": 7, "latent": 1, "encoder.0": 3}
    before = copy.deepcopy(given)
    widths = complete(given, DENSE, "agent")
    assert list(widths.items()) == [("encoder.0", 3), ("latent", 1), ("head.0", 7)]
    assert given == before


@pytest.mark.parametrize("size", [1, 3, 5])
def test_every_size_up_to_the_dense_one_is_taken(size):
    assert complete({**DENSE, "latent": size}, DENSE, "agent")["latent"] == size


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({**DENSE, "latnet": 3}, "the small agent has no group 'latnet': did you mean 'latent'"),
        ({}, "the widths lack the small agent's group 'encoder.0', which has up to 12 channels"),
        ({"encoder.0": 1, "head.0": 1}, "lack the small agent's group 'latent', which has up to 5"),
        ({**DENSE, "latent": None}, "lack the small agent's group 'latent'"),
        ({**DENSE, "latent": 0}, "the width of group 'latent' is 0: it must be a whole number from 1 to 5"),
        ({**DENSE, "latent": -1}, "is -1"),
        ({**DENSE, "latent": 6}, "is 6: it must be a whole number from 1 to 5"),
        ({**DENSE, "latent": 2.0}, "is 2.0"),
        ({**DENSE, "latent": "2"}, "is '2'"),
        ({**DENSE, "latent": True}, "is True"),
        ({**DENSE, "latent": np.float64(2)}, "from 1 to 5"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(widths, message):
    with pytest.raises(UserError) as caught:
        complete(widths, DENSE, "small agent")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_group_is_named_before_the_one_that_it_leaves_out():
    with pytest.raises(UserError, match="no group 'latnet'"):
        complete({"encoder.0": 1, "latnet": 1, "head.0": 1}, DENSE, "agent")
