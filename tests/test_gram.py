"""Gram matrices against NumPy, and consumers as matrices against the operators themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional

from components.dependency import Consumer, Member
from components.errors import UserError
from components.gram import Gram, Grams, SplitGram, columns_of, from_weight_matrix, weight_matrix


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_gram_is_the_covariance() -> None:
    rows = rand(30, 4)
    gram = Gram.of(rows.float())
    assert gram.gram.dtype == torch.float64
    np.testing.assert_allclose(gram.gram[0], np.cov(rows.float().double().numpy().T, bias=True), rtol=1e-12)
    np.testing.assert_allclose(gram.mean[0], rows.float().double().mean(0), rtol=1e-12)
    assert gram.rows == 30


def test_stack_has_a_gram_for_each() -> None:
    rows = rand(3, 20, 4)
    gram = Gram.of(rows)
    for e in range(3):
        np.testing.assert_allclose(gram.gram[e], np.cov(rows[e].numpy().T, bias=True), rtol=1e-12)


def test_pooled_gram_is_that_of_all_rows() -> None:
    first, second = rand(2, 7, 3), 5 + 2 * rand(2, 12, 3)
    pooled = SplitGram(Gram.of(first), Gram.of(second)).pooled()
    whole = Gram.of(torch.cat([first, second], dim=1))
    torch.testing.assert_close(pooled.gram, whole.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled.mean, whole.mean, rtol=1e-12, atol=1e-12)
    assert pooled.rows == whole.rows == 19


def test_grams_survive_storage() -> None:
    grams = Grams({"encoder.0.weight": SplitGram(Gram.of(rand(9, 3)), Gram.of(rand(4, 3)))})
    again = Grams.from_tensors(load(save(grams.to_tensors())))
    assert list(again) == ["encoder.0.weight"]
    assert len(again) == 1
    for before, after in ((grams, again),):
        old, new = before["encoder.0.weight"].held_out, after["encoder.0.weight"].held_out
        assert torch.equal(old.gram, new.gram)
        assert torch.equal(old.mean, new.mean)
        assert old.rows == new.rows == 4


def test_damaged_grams_are_refused() -> None:
    tensors = Grams({"w": SplitGram(Gram.of(rand(9, 3)), Gram.of(rand(4, 3)))}).to_tensors()
    del tensors["w/held_out/mean"]
    with pytest.raises(UserError, match="lack 'w/held_out/mean'"):
        Grams.from_tensors(tensors)


def test_gram_checks_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"not \(1, 3, 4\) and \(1, 4\)"):
        Gram(torch.zeros(1, 3, 4), torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match="at least one row"):
        Gram(torch.zeros(1, 3, 3), torch.zeros(1, 3), 0)


def test_matrix_of_a_linear_layer_in_both_layouts() -> None:
    x, weight = rand(6, 4), rand(3, 4)
    expected = functional.linear(x, weight)
    for w, axes in ((weight, (1, 0)), (weight.t().contiguous(), (0, 1))):
        consumer = Consumer("w", "linear", *axes, None)
        torch.testing.assert_close(x @ weight_matrix(consumer, w)[0].t(), expected)
        assert torch.equal(from_weight_matrix(consumer, weight_matrix(consumer, w), w.shape), w)


def test_matrix_of_a_stack_in_both_layouts() -> None:
    x, weight = rand(2, 6, 4), rand(2, 4, 3)
    expected = torch.bmm(x, weight)
    for w, axes in ((weight, (1, 2)), (weight.mT.contiguous(), (2, 1))):
        consumer = Consumer("w", "batched", *axes, None)
        torch.testing.assert_close(x @ weight_matrix(consumer, w).mT, expected)
        assert torch.equal(from_weight_matrix(consumer, weight_matrix(consumer, w), w.shape), w)


@pytest.mark.parametrize("groups", [1, 2])
def test_matrix_of_a_convolution_reads_unfolded_patches(groups: int) -> None:
    x, weight = rand(3, 4, 5, 6), rand(6, 4 // groups, 3, 2)
    consumer = Consumer("w", "convolution", 1, 0, None, groups)
    patches = functional.unfold(x, (3, 2)).reshape(3, groups, -1, 15)  # (batch, groups, columns, positions)
    found = torch.einsum("goc,bgcp->bgop", weight_matrix(consumer, weight), patches)
    expected = functional.conv2d(x, weight, groups=groups)
    torch.testing.assert_close(found.reshape(expected.shape), expected)
    assert torch.equal(from_weight_matrix(consumer, weight_matrix(consumer, weight), weight.shape), weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_matrix_of_a_transposed_convolution_maps_single_pixels(groups: int) -> None:
    """With the kernel as the stride, every output belongs to one pixel."""
    x, weight = rand(2, 4, 3, 3), rand(4, 3, 2, 2)
    consumer = Consumer("w", "transposed_convolution", 0, 1, None, groups)
    matrix = weight_matrix(consumer, weight)  # (groups, 3, 4 / groups * 4)
    by_position = matrix.reshape(groups, 3, 4 // groups, 2, 2)
    pixels = x.reshape(2, groups, 4 // groups, 3, 3)
    found = torch.einsum("goikl,bgiyx->bgoykxl", by_position, pixels).reshape(2, groups * 3, 6, 6)
    torch.testing.assert_close(found, functional.conv_transpose2d(x, weight, stride=2, groups=groups))
    assert torch.equal(from_weight_matrix(consumer, matrix, weight.shape), weight)


def test_columns_are_those_that_change_with_the_channel() -> None:
    cases = [
        (Consumer("w", "linear", 1, 0, None), (3, 8), torch.arange(8).reshape(4, 2)),
        (Consumer("w", "linear", 0, 1, None), (4, 3), torch.arange(4).unsqueeze(1)),
        (Consumer("w", "batched", 1, 2, None), (2, 4, 3), torch.arange(4).unsqueeze(1)),
        (Consumer("w", "convolution", 1, 0, None), (5, 4, 3, 2), torch.arange(4).reshape(2, 2)),
        (Consumer("w", "convolution", 1, 0, None, 2), (6, 2, 3), torch.arange(2).unsqueeze(1)),
        (Consumer("w", "transposed_convolution", 0, 1, None), (4, 5, 3, 2), torch.arange(4).unsqueeze(1)),
        (Consumer("w", "transposed_convolution", 0, 1, None, 2), (4, 5, 3), torch.tensor([[0, 2], [1, 3]])),
    ]
    for consumer, shape, indices in cases:
        member = Member("w", consumer.input_axis, indices, True)
        columns = columns_of(consumer, member, torch.Size(shape))
        for channel, positions in enumerate(indices):
            marked = torch.zeros(shape)
            marked.index_fill_(consumer.input_axis, positions, 1.0)
            touched = weight_matrix(consumer, marked).sum((0, 1)).nonzero().flatten()
            assert sorted(columns[channel].tolist()) == touched.tolist()


def test_columns_of_something_else_are_refused() -> None:
    consumer = Consumer("w", "transposed_convolution", 0, 1, None, 2)
    shape = torch.Size((4, 5, 3))
    with pytest.raises(ValueError, match="not the input axis"):
        columns_of(consumer, Member("w", 1, torch.arange(5).unsqueeze(1), True), shape)
    with pytest.raises(ValueError, match="same position in each of its groups"):
        columns_of(consumer, Member("w", 0, torch.arange(4).unsqueeze(1), True), shape)
