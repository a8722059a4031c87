"""The coordinator's part of a training: the rounds of a fold to their end, over whatever brings the requests there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from filelock import FileLock, Timeout

from autofed import algorithms
from autofed.algorithms import Algorithm
from autofed.data.labels import Labels
from autofed.data.splits import ALL
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, rounds
from autofed.federation.aggregation import Aggregator
from autofed.federation.node import request_name
from autofed.federation.run_folder import FEWEST, VALIDATION, Run, RunIdentity
from autofed.federation.student import train_student
from autofed.files import digest, read_json, write_json
from autofed.inference.postprocessing import RULES, choose_postprocessing
from autofed.messages import Response, ServerState
from autofed.plans import Plan
from autofed.preprocessing import PublicImages
from autofed.training.network import build, weights_of


@dataclass(frozen=True)
class Coordinator:
    """A run as the coordinator sees it: its folder, its plan, and no patient.

    Where sites label `public` images, the coordinator has them too, and trains a student on a `device` of its own.
    """

    run: Run
    plan: Plan
    algorithm: Algorithm
    identity: RunIdentity
    public: PublicImages | None = None
    device: str = "cpu"

    def train(self, fold: str, transport: rounds.Transport, begin: Callable[[int], None] = lambda _: None) -> None:
        """Train a fold to its end, from where it is, then score its model on whole held-out cases.

        `begin` is told how many rounds are finished.
        """
        with self._lead(fold), self._logged(fold):
            self._train(fold, transport, begin)

    @contextmanager
    def _logged(self, fold: str) -> Iterator[None]:
        """A line a round into RUN/train.log as it goes, with whatever goes wrong; wherever logs go besides."""
        logger = logging.getLogger("autofed")
        handler, level = logging.FileHandler(self.run.log_path, encoding="utf-8"), logger.level
        handler.setFormatter(logging.Formatter(f"%(asctime)s fold {fold}: %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            handler.close()

    @contextmanager
    def _lead(self, fold: str) -> Iterator[None]:
        """Only one process at a time leads a fold: the states of two would not fit each other."""
        folder = self.run.fold_folder(fold)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=0):
                yield
        except Timeout:
            found = "another process is leading this training; wait for it, or end it"
            raise ValidationErrors(str(folder), [found]) from None

    def _train(self, fold: str, transport: rounds.Transport, begin: Callable[[int], None]) -> None:
        folder = self.run.fold_folder(fold)
        course = rounds.RunContext(
            self.algorithm, Aggregator.of(self.plan, self.identity.sites), self.plan, transport, folder,
            request_name(self.identity.id, fold), self.identity.sites, holds_out=fold != ALL and self._shares_scores(),
        )  # fmt: skip
        saved = checkpoints.saved_rounds(folder)
        state = checkpoints.load(folder, saved[-1]) if saved else self.algorithm.start(self._setup(fold))
        begin(state.round)
        state = rounds.run_rounds(course, state)
        if self.public is not None and self.algorithm.shares_pseudo_labels:
            train_student(self.plan, state, self.public, self.run.student_path(fold), self.device)
        if course.holds_out:
            self._verify(course, state)
            if not self.plan.agreement.privacy.is_private:  # which chooses nothing by scores
                self._decide()

    def _shares_scores(self) -> bool:
        return bool(self.plan.agreement.training.validate_every or self.plan.agreement.privacy.score_noise)

    def _verify(self, course: rounds.RunContext, state: ServerState) -> None:
        """Score whole held-out cases once, and again when a training has been given more rounds."""
        path = course.folder / VALIDATION
        if not path.is_file() or read_json(path)["rounds"] != state.round:
            write_json(path, {"rounds": state.round, "sites": _table(rounds.verify(course, state))})

    def _setup(self, fold: str) -> algorithms.RunSetup:
        """What a fold starts from: the weights given, or its own random ones."""
        given = self.run.start()
        seed = self.plan.local.training.seed
        seed = seed if fold == ALL else int(digest([seed, fold])[:8], 16)
        grids = self.public.grids if self.public else {}
        return algorithms.RunSetup(self.plan, given or weights_of(build(self.plan.local.network, seed=seed)), grids)

    def _decide(self) -> None:
        """Decide what is done to predictions from the held-out cases of all folds so far."""
        totals = {name: np.zeros((2, len(RULES))) for name in Labels.of(self.plan.agreement).names}
        for path in sorted(self.run.folder.glob(f"fold_*/{VALIDATION}")):
            for found in read_json(path)["sites"].values():
                for name, rows in found.items():
                    totals[name] += np.array([rows["sums"], rows["cases"]])
        with np.errstate(invalid="ignore"):
            self.run.save_postprocessing(
                choose_postprocessing({name: sums / cases for name, (sums, cases) in totals.items()})
            )


def _table(releases: Sequence[Response]) -> dict[str, dict[str, dict[str, object]]]:
    """By site and structure: mean Dice, and the sums of Dice and the cases for each rule of postprocessing."""
    with_scores = (r for r in releases if "sums" in r.arrays)
    return {r.site: {name: _row(found) for name, found in r.arrays["sums"].items()} for r in with_scores}


def _row(found: np.ndarray) -> dict[str, object]:
    (sums, cases) = found.astype(float).tolist()
    known = cases[0] >= FEWEST
    return {"dice": round(min(1.0, sums[0] / cases[0]), 4) if known else None, "sums": sums, "cases": cases}
