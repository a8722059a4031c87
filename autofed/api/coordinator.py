"""The coordinator's part of a training: all rounds of a fold, over any transport."""

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
    """What the coordinator has of a run: its folder and its plan, but no patient's data.

    Where sites label `public` images, the coordinator has these images too and trains a student on its own `device`.
    """

    run: Run
    plan: Plan
    algorithm: Algorithm
    identity: RunIdentity
    public: PublicImages | None = None
    device: str = "cpu"

    def train(self, fold: str, transport: rounds.Transport, begin: Callable[[int], None] = lambda _: None) -> None:
        """Train a fold from its last finished round to its end, then score its model on whole held-out cases.

        Args:
            fold: The fold's name: a number, or "all".
            transport: Delivers requests to the sites and returns their responses.
            begin: Called once with the number of rounds that are already finished.
        """
        with self._locked(fold), self._logged(fold):
            self._train(fold, transport, begin)

    @contextmanager
    def _logged(self, fold: str) -> Iterator[None]:
        """Write autofed's log, one line a round and every warning, into RUN/train.log too."""
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
    def _locked(self, fold: str) -> Iterator[None]:
        """Let only one process at a time train a fold: two would overwrite each other's checkpoints."""
        folder = self.run.fold_folder(fold)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=0):
                yield
        except Timeout:
            problem = "another process is running this training; wait for it, or end it"
            raise ValidationErrors(str(folder), [problem]) from None

    def _train(self, fold: str, transport: rounds.Transport, begin: Callable[[int], None]) -> None:
        folder = self.run.fold_folder(fold)
        context = rounds.RunContext(
            self.algorithm, Aggregator.of(self.plan, self.identity.sites), self.plan, transport, folder,
            request_name(self.identity.id, fold), self.identity.sites, holds_out=fold != ALL and self._shares_scores(),
        )  # fmt: skip
        saved = checkpoints.saved_rounds(folder)
        state = checkpoints.load(folder, saved[-1]) if saved else self.algorithm.start(self._setup(fold))
        begin(state.round)
        state = rounds.run_rounds(context, state)
        if self.public is not None and self.algorithm.shares_pseudo_labels:
            train_student(self.plan, state, self.public, self.run.student_path(fold), self.device)
        if context.holds_out:
            self._score_held_out(context, state)
            if not self.plan.agreement.privacy.is_private:  # a private training chooses nothing by scores
                self._decide_postprocessing()

    def _shares_scores(self) -> bool:
        return bool(self.plan.agreement.training.validate_every or self.plan.agreement.privacy.score_noise)

    def _score_held_out(self, context: rounds.RunContext, state: ServerState) -> None:
        """Score whole held-out cases once, and again after a training was extended by more rounds."""
        path = context.folder / VALIDATION
        if not path.is_file() or read_json(path)["rounds"] != state.round:
            write_json(path, {"rounds": state.round, "sites": _score_table(rounds.verify(context, state))})

    def _setup(self, fold: str) -> algorithms.RunSetup:
        """The initial state of a fold: the run's initial weights, or random ones of the fold's own seed."""
        weights = self.run.start()
        seed = self.plan.local.training.seed
        seed = seed if fold == ALL else int(digest([seed, fold])[:8], 16)
        grids = self.public.grids if self.public else {}
        return algorithms.RunSetup(self.plan, weights or weights_of(build(self.plan.local.network, seed=seed)), grids)

    def _decide_postprocessing(self) -> None:
        """Choose the postprocessing by the held-out cases of all folds so far."""
        totals = {name: np.zeros((2, len(RULES))) for name in Labels.of(self.plan.agreement).names}
        for path in sorted(self.run.folder.glob(f"fold_*/{VALIDATION}")):
            for scores in read_json(path)["sites"].values():
                for name, rows in scores.items():
                    totals[name] += np.array([rows["sums"], rows["cases"]])
        with np.errstate(invalid="ignore"):
            self.run.save_postprocessing(
                choose_postprocessing({name: sums / cases for name, (sums, cases) in totals.items()})
            )


def _score_table(responses: Sequence[Response]) -> dict[str, dict[str, dict[str, object]]]:
    """By site and structure: mean Dice, and for each postprocessing rule the sum of Dice and the number of cases."""
    with_scores = (r for r in responses if "sums" in r.arrays)
    return {r.site: {name: _score_row(scores) for name, scores in r.arrays["sums"].items()} for r in with_scores}


def _score_row(scores: np.ndarray) -> dict[str, object]:
    (sums, cases) = scores.astype(float).tolist()
    enough_cases = cases[0] >= FEWEST
    return {"dice": round(min(1.0, sums[0] / cases[0]), 4) if enough_cases else None, "sums": sums, "cases": cases}
