"""Loading patches in the calling thread, a thread of its own, or spawned processes, always some steps ahead.

The patches are the same to the bit in all three and come in the order of the samples; an error is raised where they are
taken. A thread is enough on a CPU, which the training itself keeps busy; a GPU needs processes.
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
"""Each thread or process makes the patches of so many steps ahead, which bounds the loader's memory."""

_LIBRARIES = 300 << 20
"""Bytes that a process takes for its libraries."""


class WorkerKilled(ValidationErrors):
    """A process that makes patches was killed from outside."""


Source = tuple[Store, Training]


class PatchLoader:
    """Makes patches for one training after the other; processes start with the first and end with the loader.

        with PatchLoader(4) as loader:
            fit(..., compute=Compute(loader=loader))

    To start processes takes seconds, so a loader is meant to last for all rounds. It serves one training at a time.
    Without `with`, threads and processes end when it is closed or collected.
    """

    def __init__(self, workers: Workers = "thread"):
        is_valid = workers == "thread" or (isinstance(workers, int) and not isinstance(workers, bool) and workers >= 0)
        raise_if_any("workers", [] if is_valid else [f"found {workers!r}; write 0, 'thread' or a number of processes"])
        self.workers = workers
        self._threads: ThreadPoolExecutor | None = None
        self._make: Callable[[Source, BatchSample, Sequence[int]], list[PatchBatch]] = _make
        self.close: Callable[[], object] = lambda: None

    def __enter__(self) -> PatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(
        self, store: Store, samples: Iterator[BatchSample], training: Training, seed: Sequence[int]
    ) -> Iterator[list[PatchBatch]]:
        """The patch batches of each sample, in order. `memory_bytes` states how much memory they take at most.

        An error is raised as in the process, with the process's traceback in its notes; `ValidationErrors` if a process
        was killed.
        """
        source = (store, training)
        if self.workers == 0:
            yield from (_make(source, sample, [*seed, step]) for step, sample in enumerate(samples))
            return
        self._start()
        pending: deque[Future[list[PatchBatch]]] = deque()
        try:
            for step, sample in enumerate(samples):
                pending.append(self._submit(source, sample, [*seed, step]))
                if len(pending) > _steps_ahead(self.workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def _submit(self, source: Source, sample: BatchSample, seed: Sequence[int]) -> Future[list[PatchBatch]]:
        assert self._threads is not None  # started above; for the type checker
        return self._threads.submit(self._make, source, sample, seed)

    def _start(self) -> None:
        """Start a thread for each process, to pass requests and wait; or one thread that makes the patches itself."""
        if self._threads is not None:
            return
        process_count = 0 if self.workers == "thread" else int(self.workers)
        self._threads = ThreadPoolExecutor(max(1, process_count), thread_name_prefix="patches")
        processes = [_Process() for _ in range(process_count)]
        if processes:
            idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
            for process in processes:
                idle.put(process)
            self._make = partial(_request, idle)
        self.close = weakref.finalize(self, _end, self._threads, processes)


def stream(
    store: Store,
    samples: Iterator[BatchSample],
    training: Training,
    seed: Sequence[int],
    workers: Workers = "thread",
) -> Iterator[list[PatchBatch]]:
    """The patch batches of each sample, from a loader that is closed at the end of the iterator."""
    with PatchLoader(workers) as loader:
        yield from loader.stream(store, samples, training, seed)


def memory_bytes(training: Training, channels: int, workers: Workers = "thread") -> int:
    """The bytes that loading takes at most: the steps ahead, the one being trained on, and for each worker one in work.

    A process also takes its libraries.
    """
    workers_count = 1 if workers == "thread" else max(1, workers)
    step = training.batch_size * int(np.prod(training.patch_size)) * (4 * channels + 2)
    # in work: image and label of the widest box, its spline coefficients, and the label's codes and one indicator
    in_work = step + int(np.prod(widest_box(training))) * (4 * channels + 8 + 2 + 2 * 4)
    return (
        (_steps_ahead(workers) + 1) * step
        + workers_count * in_work
        + (0 if workers == "thread" else workers * _LIBRARIES)
    )


def _steps_ahead(workers: Workers) -> int:
    return AHEAD * (1 if workers == "thread" else workers)


def _make(source: Source, sample: BatchSample, seed: Sequence[int]) -> list[PatchBatch]:
    store, training = source
    return make_step_batches(store, sample, training, seed)


def _end(threads: ThreadPoolExecutor, processes: Sequence[_Process]) -> None:
    """End the processes first: a thread that waits for one would never end."""
    for process in processes:
        process.end()
    threads.shutdown(cancel_futures=True)


# --- processes -------------------------------------------------------------------------------------------------------


def _request(
    idle: queue.SimpleQueue[_Process], source: Source, sample: BatchSample, seed: Sequence[int]
) -> list[PatchBatch]:
    process = idle.get()
    try:
        return process.request(source, sample, seed)
    finally:
        idle.put(process)


class _Process:
    """A spawned process and our end of the pipe to it. Both sides notice when the pipe breaks."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_end,), daemon=True, name="patches")
        self._process.start()
        child_end.close()
        self._source: Source | None = None

    def request(self, source: Source, sample: BatchSample, seed: Sequence[int]) -> list[PatchBatch]:
        """The patch batches of a step. The source is sent only when it differs from the last one."""
        try:
            self._pipe.send((None if source is self._source else source, sample, seed))
            self._source = source
            patch_batches: list[PatchBatch]
            patch_batches, error, trace = self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerKilled("making patches", [_KILLED]) from None
        if error is not None:
            error.add_note(f"In the process that makes patches:\n{trace}")
            raise error
        return patch_batches

    def end(self) -> None:
        """End at once, whatever it is doing: its patches are no longer needed."""
        self._process.terminate()
        self._process.join()
        # the pipe is not closed here: the thread that may be reading from it gets EOFError, and it is collected then


_KILLED = (
    "a process was killed from outside, most often because memory ran out; try again with fewer workers, or run a "
    "script that calls autofed under `if __name__ == '__main__':`"
)


def _serve(pipe: Connection) -> None:
    """Make the requested patches until the parent process is gone. Ctrl-C is left to the parent."""
    import blosc2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    blosc2.set_nthreads(1)
    source: Any = None
    try:
        while True:
            new_source, sample, seed = pipe.recv()
            source = new_source or source
            pipe.send(_batches_or_error(source, sample, seed))
    except (EOFError, OSError):
        return


def _batches_or_error(
    source: Source, sample: BatchSample, seed: Sequence[int]
) -> tuple[list[PatchBatch] | None, Exception | None, str]:
    """The patch batches, or the error and its traceback; an error that cannot be pickled becomes a RuntimeError."""
    try:
        return _make(source, sample, seed), None, ""
    except Exception as error:
        trace = traceback.format_exc()
        try:
            ForkingPickler.loads(ForkingPickler.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}"), trace
        return None, error, trace
