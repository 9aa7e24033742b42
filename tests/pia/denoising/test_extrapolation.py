"""A polynomial through the predictions that were computed continues them, for each evaluation of a step on its own."""

from __future__ import annotations

import pytest
import torch

from pia_ray.pia.denoising.extrapolation import Extrapolation


def of(value: float) -> torch.Tensor:
    return torch.full((4, 2, 3, 3), value)


def test_the_first_step_and_the_full_ones_are_to_be_computed() -> None:
    extrapolation = Extrapolation({2})
    assert extrapolation.at(0) is None
    extrapolation.add(0, of(1.0))
    assert extrapolation.at(1) is not None
    assert extrapolation.at(2) is None


@pytest.mark.parametrize("full", [(0, 1), (0, 3), (2, 7)])
def test_two_predictions_are_continued_by_a_line(full: tuple[int, ...]) -> None:
    extrapolation = Extrapolation(full)
    extrapolation.add(-1, of(99.0))  # older ones do not count
    for step in full:
        extrapolation.add(step, of(2.0 - 0.3 * step))
    for step in (8, 9, 12):
        torch.testing.assert_close(extrapolation.at(step), of(2.0 - 0.3 * step))


@pytest.mark.parametrize("full", [(0, 1, 4), (0, 3, 4), (0, 5, 7)])
def test_three_predictions_are_continued_by_a_parabola(full: tuple[int, ...]) -> None:
    def curve(step: int) -> float:
        return 2.0 - 0.3 * step + 0.05 * step**2

    extrapolation = Extrapolation(full, points=3)
    for step in full:
        extrapolation.add(step, of(curve(step)))
    for step in (8, 9, 12):
        torch.testing.assert_close(extrapolation.at(step), of(curve(step)))


def test_one_prediction_is_repeated() -> None:
    extrapolation = Extrapolation({0})
    extrapolation.add(0, of(1.0))
    torch.testing.assert_close(extrapolation.at(1), of(1.0))


def test_the_evaluations_of_a_step_have_a_curve_each() -> None:
    extrapolation = Extrapolation({0}, order=2)
    extrapolation.add(0, of(1.0))
    extrapolation.add(1, of(5.0))
    torch.testing.assert_close(extrapolation.at(2), of(1.0))
    torch.testing.assert_close(extrapolation.at(3), of(5.0))


def test_kept_predictions_stay_as_they_were() -> None:
    extrapolation, first = Extrapolation({0, 1}), of(1.0)
    extrapolation.add(0, first)
    extrapolation.add(1, of(3.0))
    extrapolation.at(2)
    torch.testing.assert_close(first, of(1.0))


def test_after_clear_the_next_step_is_to_be_computed() -> None:
    extrapolation = Extrapolation({0})
    extrapolation.add(0, of(1.0))
    extrapolation.clear()
    assert extrapolation.at(1) is None
