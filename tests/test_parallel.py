from __future__ import annotations

import os
import signal
import time

import pytest

from autofed.errors import ValidationErrors
from autofed.parallel import each


def square(item: int) -> int:
    time.sleep(0.02 * (4 - item % 5))  # later items end first
    return item * item


def process_id(_item: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def picky(item: int) -> int:
    if item % 2:
        raise ValidationErrors(f"item {item}", [f"{item} is odd", f"{item} is not even"])
    return item


def suicidal(item: int) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def buggy(item: int) -> int:
    return 1 // item


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_items(processes):
    assert each(square, range(9), stage="squaring", processes=processes) == [i * i for i in range(9)]


def test_items_may_come_from_a_generator():
    assert each(square, (i for i in (4, 9)), stage="squaring") == [16, 81]


def test_no_items_no_results():
    assert each(square, [], stage="squaring", processes=2) == []


def test_work_is_done_here_or_elsewhere():
    assert set(each(process_id, range(3), stage="naming")) == {os.getpid()}
    assert os.getpid() not in each(process_id, range(3), stage="naming", processes=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_problems_of_all_items_are_gathered_in_order(processes):
    with pytest.raises(ValidationErrors) as caught:
        each(picky, range(6), stage="picking", processes=processes)
    assert caught.value.about == "picking"
    odd = [(i, w) for i in (1, 3, 5) for w in ("odd", "not even")]
    assert caught.value.problems == tuple(f"item {i}: {i} is {w}" for i, w in odd)


def test_a_killed_worker_is_explained():
    with pytest.raises(ValidationErrors, match=r"killed from outside.*--processes 1"):
        each(suicidal, range(4), stage="risking", processes=2)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bug_is_not_taken_for_bad_input(processes):
    with pytest.raises(ZeroDivisionError):
        each(buggy, [1, 0, 1], stage="dividing", processes=processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_counts_what_is_done(processes):
    heard = []
    each(square, range(3), stage="squaring", processes=processes, progress=lambda *told: heard.append(told))
    assert heard == [("squaring", done, 3) for done in range(4)]
