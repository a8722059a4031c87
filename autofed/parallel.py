"""One function over many items, in spawned processes, with every item's problems gathered."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from autofed.errors import ValidationErrors, prefixed_problems

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how many are done, how many there are)."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """The progress of those who do not want to see any."""


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    stage: str,
    processes: int = 1,
    progress: Progress = silent,
) -> list[Result]:
    """`function` of every item, in the order of the items.

    With `processes` 1 the work is done here; otherwise in that many spawned processes, never holding more than
    twice as many items under way, so that memory is bounded. Raises one `ValidationErrors` with the problems of all
    items.
    """
    work = list(items)
    results: dict[int, Result] = {}
    _run(function, work, results.__setitem__, stage=stage, processes=processes, progress=progress)
    return [results[i] for i in range(len(work))]


def total(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    add: Callable[[Result, Result], Result],
    *,
    stage: str,
    processes: int = 1,
    progress: Progress = silent,
) -> Result:
    """The sum of `function` over one item or more, added up as they come, so that no list of results is held.

    The order is that in which the items are finished: `add` must be exact. Otherwise like `each`.

    Args:
        function: Is called with each item; importable by name where there are processes.
        items: One or more.
        add: The sum of two results; exact, in any order.
        stage: What is being done, for `progress`.
        processes: How many work; 1 for this one.
        progress: Is called with the stage, how many are done, and how many there are.
    """
    sums: list[Result] = []

    def take(_: int, result: Result) -> None:
        sums[:] = [add(sums[0], result) if sums else result]

    _run(function, list(items), take, stage=stage, processes=processes, progress=progress)
    return sums[0]


def _run(
    function: Callable[[Item], Result],
    work: Sequence[Item],
    take: Callable[[int, Result], None],
    *,
    stage: str,
    processes: int,
    progress: Progress,
) -> None:
    """Hand every result with the number of its item to `take`; `ValidationErrors` of all items in the end."""
    progress(stage, 0, len(work))
    problems = (
        _run_in_process(function, work, take, stage, progress)
        if processes <= 1 or len(work) < 2
        else _run_in_workers(function, work, take, stage, min(processes, len(work)), progress)
    )
    if problems:
        raise ValidationErrors(stage, problems)


def _run_in_process(
    function: Callable[[Item], Result],
    work: Sequence[Item],
    take: Callable[[int, Result], None],
    stage: str,
    progress: Progress,
) -> list[str]:
    problems: list[str] = []
    for i, item in enumerate(work):
        try:
            take(i, function(item))
        except ValidationErrors as error:
            problems += prefixed_problems(error)
        progress(stage, i + 1, len(work))
    return problems


def _run_in_workers(
    function: Callable[[Item], Result],
    work: Sequence[Item],
    take: Callable[[int, Result], None],
    stage: str,
    processes: int,
    progress: Progress,
) -> list[str]:
    problems: dict[int, list[str]] = {}
    waiting = iter(enumerate(work))
    running: dict[Future[Result], int] = {}
    finished = 0
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            while finished < len(work):
                for i, item in waiting:
                    running[pool.submit(function, item)] = i
                    if len(running) >= 2 * processes:
                        break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    i = running.pop(future)
                    try:
                        take(i, future.result())
                    except ValidationErrors as error:
                        problems[i] = prefixed_problems(error)
                    finished += 1
                    progress(stage, finished, len(work))
        except BrokenProcessPool:
            raise ValidationErrors(stage, [_killed_worker_problem(processes)]) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [p for i in sorted(problems) for p in problems[i]]


def _killed_worker_problem(processes: int) -> str:
    return (
        f"a worker process was killed from outside, most often because memory ran out with {processes} processes; "
        "try again with --processes 1, or run a script that calls autofed under `if __name__ == '__main__':`"
    )
