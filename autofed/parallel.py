"""One function over many items, in spawned processes, with every item's problems gathered."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from autofed.problems import Problems

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
    twice as many items under way, so that memory is bounded. Raises one `Problems` with the problems of all items.
    """
    work = list(items)
    progress(stage, 0, len(work))
    results, problems = (
        _here(function, work, stage, progress)
        if processes <= 1 or len(work) < 2
        else _spread(function, work, stage, min(processes, len(work)), progress)
    )
    if problems:
        raise Problems(stage, problems)
    return [results[i] for i in range(len(work))]


def _here(
    function: Callable[[Item], Result], work: Sequence[Item], stage: str, progress: Progress
) -> tuple[dict[int, Result], list[str]]:
    results: dict[int, Result] = {}
    problems: list[str] = []
    for i, item in enumerate(work):
        try:
            results[i] = function(item)
        except Problems as error:
            problems += _named(error)
        progress(stage, i + 1, len(work))
    return results, problems


def _spread(
    function: Callable[[Item], Result], work: Sequence[Item], stage: str, processes: int, progress: Progress
) -> tuple[dict[int, Result], list[str]]:
    results: dict[int, Result] = {}
    problems: dict[int, list[str]] = {}
    waiting = iter(enumerate(work))
    running: dict[Future, int] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            while len(results) + len(problems) < len(work):
                for i, item in waiting:
                    running[pool.submit(function, item)] = i
                    if len(running) >= 2 * processes:
                        break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    i = running.pop(future)
                    try:
                        results[i] = future.result()
                    except Problems as error:
                        problems[i] = _named(error)
                    progress(stage, len(results) + len(problems), len(work))
        except BrokenProcessPool:
            raise Problems(stage, [_killed(processes)]) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return results, [p for i in sorted(problems) for p in problems[i]]


def _named(error: Problems) -> list[str]:
    return [f"{error.about}: {problem}" for problem in error.problems]


def _killed(processes: int) -> str:
    return (
        f"a worker process was killed from outside, most often because memory ran out with {processes} processes; "
        "try again with --processes 1, or run a script that calls autofed under `if __name__ == '__main__':`"
    )
