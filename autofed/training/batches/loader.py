"""Who makes the patches: the calling thread, a thread of its own, or spawned processes, always some steps ahead.

Whoever makes them, they are the same to the bit and come in the order of the draws; an error comes out where they are
taken. A thread does on a CPU, which the training itself keeps busy; a GPU wants processes.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import numpy as np

from autofed.errors import ValidationErrors, raise_if_any
from autofed.plans import Training
from autofed.preprocessing import Store
from autofed.training.batches.patches import BatchSample, PatchBatch, make_step_batches
from autofed.training.batches.spatial_transforms import widest_box

Workers = int | Literal["thread"]
"""0: the calling thread; "thread": a thread of its own; 1 and more: so many processes."""

AHEAD = 2
"""Each thread or process makes so many steps ahead of the one being trained on: it bounds the memory of feeding."""

_LIBRARIES = 300 << 20
"""Bytes that a process takes before it makes anything."""


class WorkerKilled(ValidationErrors):
    """A process that makes patches was killed from outside."""


Source = tuple[Store, Training]


class PatchLoader:
    """Makes patches for one training after the other; processes start with the first and end with the feeder.

        with Feeder(4) as feeder:
            fit(..., feeder=feeder)

    To start processes takes seconds, so a feeder is meant to last for all rounds. It feeds one training at a time.
    Without `with`, threads and processes end when it is closed or collected.
    """

    def __init__(self, workers: Workers = "thread"):
        known = workers == "thread" or (isinstance(workers, int) and not isinstance(workers, bool) and workers >= 0)
        raise_if_any("workers", [] if known else [f"found {workers!r}; write 0, 'thread' or a number of processes"])
        self.workers = workers
        self._threads: ThreadPoolExecutor | None = None
        self._make: Callable[[Source, BatchSample, Sequence[int]], list[PatchBatch]] = _make
        self.close: Callable[[], object] = lambda: None

    def __enter__(self) -> PatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(
        self, store: Store, draws: Iterator[BatchSample], training: Training, seed: Sequence[int]
    ) -> Iterator[list[PatchBatch]]:
        """The patches of each draw, in order. `memory_bytes` says how much of it is held at most.

        An error is raised as it was, with the process's traceback in its notes; `ValidationErrors` if a process was
        killed.
        """
        source = (store, training)
        if self.workers == 0:
            yield from (_make(source, draw, [*seed, step]) for step, draw in enumerate(draws))
            return
        self._start()
        ahead: deque[Future[list[PatchBatch]]] = deque()
        try:
            for step, draw in enumerate(draws):
                ahead.append(self._submit(source, draw, [*seed, step]))
                if len(ahead) > _steps_ahead(self.workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
            wait(ahead)

    def _submit(self, source: Source, draw: BatchSample, seed: Sequence[int]) -> Future[list[PatchBatch]]:
        assert self._threads is not None  # started above; for the type checker
        return self._threads.submit(self._make, source, draw, seed)

    def _start(self) -> None:
        """One thread for each process, which asks it and waits; or the one thread that makes the patches itself."""
        if self._threads is not None:
            return
        processes = 0 if self.workers == "thread" else int(self.workers)
        self._threads = ThreadPoolExecutor(max(1, processes), thread_name_prefix="patches")
        staff = [_Process() for _ in range(processes)]
        if staff:
            idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
            for process in staff:
                idle.put(process)
            self._make = partial(_ask, idle)
        self.close = weakref.finalize(self, _end, self._threads, staff)


def stream(
    store: Store,
    draws: Iterator[BatchSample],
    training: Training,
    seed: Sequence[int],
    workers: Workers = "thread",
) -> Iterator[list[PatchBatch]]:
    """The patches of each draw, made by a feeder that lives as long as the iterator and no longer."""
    with PatchLoader(workers) as loader:
        yield from loader.stream(store, draws, training, seed)


def memory_bytes(training: Training, channels: int, workers: Workers = "thread") -> int:
    """What feeding holds at most: the steps ahead, the one being trained on, and for each maker one at work.

    A process also holds its libraries.
    """
    makers = 1 if workers == "thread" else max(1, workers)
    step = training.batch_size * int(np.prod(training.patch_size)) * (4 * channels + 2)
    # at work: image and label of the widest box, its spline coefficients, and the label's codes and one indicator
    work = step + int(np.prod(widest_box(training))) * (4 * channels + 8 + 2 + 2 * 4)
    return (_steps_ahead(workers) + 1) * step + makers * work + (0 if workers == "thread" else workers * _LIBRARIES)


def _steps_ahead(workers: Workers) -> int:
    return AHEAD * (1 if workers == "thread" else workers)


def _make(source: Source, draw: BatchSample, seed: Sequence[int]) -> list[PatchBatch]:
    store, training = source
    return make_step_batches(store, draw, training, seed)


def _end(threads: ThreadPoolExecutor, staff: Sequence[_Process]) -> None:
    """The processes first: a thread that waits for one would wait on."""
    for process in staff:
        process.end()
    threads.shutdown(cancel_futures=True)


# --- processes -------------------------------------------------------------------------------------------------------


def _ask(idle: queue.SimpleQueue[_Process], source: Source, draw: BatchSample, seed: Sequence[int]) -> list[PatchBatch]:
    process = idle.get()
    try:
        return process.ask(source, draw, seed)
    finally:
        idle.put(process)


class _Process:
    """A spawned process and this side's end of the pipe to it. When the pipe breaks, either side knows."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True, name="patches")
        self._process.start()
        theirs.close()
        self._source: Source | None = None

    def ask(self, source: Source, draw: BatchSample, seed: Sequence[int]) -> list[PatchBatch]:
        """The patches of a step. The source is sent along when it is another than last time."""
        try:
            self._pipe.send((None if source is self._source else source, draw, seed))
            self._source = source
            made, error, where = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerKilled("making patches", [_KILLED]) from None
        if error is not None:
            error.add_note(f"In the process that makes patches:\n{where}")
            raise error
        return made

    def end(self) -> None:
        """At once, whatever it is doing: nothing that it makes is missed."""
        self._process.terminate()
        self._process.join()
        # the pipe is left to the thread that may be reading from it: it finds the end, and then nobody holds it


_KILLED = (
    "a process was killed from outside, most often because memory ran out; try again with fewer workers, or run a "
    "script that calls autofed under `if __name__ == '__main__':`"
)


def _serve(pipe: Connection) -> None:
    """Make what is asked for until the other side is gone. Ctrl-C is for the other side to act on."""
    import blosc2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    blosc2.set_nthreads(1)
    source: Any = None
    try:
        while True:
            sent, draw, seed = pipe.recv()
            source = sent or source
            pipe.send(_answer(source, draw, seed))
    except (EOFError, OSError):
        return


def _answer(
    source: Source, draw: BatchSample, seed: Sequence[int]
) -> tuple[list[PatchBatch] | None, Exception | None, str]:
    """The patches, or the error and where it was; an error that cannot cross the border is told in words."""
    try:
        return _make(source, draw, seed), None, ""
    except Exception as error:
        where = traceback.format_exc()
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}"), where
        return None, error, where
