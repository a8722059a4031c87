"""Which weights are the model: the moving average over rounds, and the best round."""

import numpy as np
import pytest

from autofed.federation.model_selection import best_round, moving_average


def test_the_smoothed_score_decides_and_not_a_lucky_one():
    scores = {1: 0.5, 2: 0.9, 3: 0.5, 4: 0.75, 5: 0.8, 6: 0.81}
    found = best_round(scores)
    assert found.round == 6 and found.score == 0.81
    by_hand = 0.5
    for score in (0.9, 0.5, 0.75, 0.8, 0.81):
        by_hand = (by_hand + score) / 2
    assert found.smoothed == pytest.approx(by_hand)


def test_the_first_of_equals_and_none_of_none():
    assert best_round({4: 0.5, 2: 0.5}).round == 2
    assert best_round({}) is None


def test_a_moving_average_begins_as_a_mean_and_then_forgets():
    average, rounds = None, [1.0, 3.0, 5.0, 9.0, 9.0, 9.0]
    found = []
    for round, value in enumerate(rounds, start=1):
        average = moving_average(average, {"w": np.full(2, value, np.float32)}, 0.7, round)
        found.append(float(average["w"][0]))
    assert found[:3] == pytest.approx([1, 2, 3])  # 1 - 1/3 < .7
    assert found[3] == pytest.approx(0.7 * 3 + 0.3 * 9)
    assert average["w"].dtype == np.float32
