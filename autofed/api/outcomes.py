"""What a training came to, as far as that is known, in sentences for whoever started it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from autofed.data.splits import ALL
from autofed.federation import metrics
from autofed.federation.run_folder import GLOBAL, Run

WORTH_MENTIONING = 0.1
"""Rounds that would still fit the hours are told of if they are at least this share of those trained."""


def training_summary(run: Run, work: Path | None = None) -> list[str]:
    """How long and how good each fold was, who was left out, which weights predict, and what the hours still allow."""
    found = [line for fold in run.folds() for line in _of_fold(run, fold)]
    return [*found, *_weights(run), *_hours_left(run, work)]


def _of_fold(run: Run, fold: str) -> Iterator[str]:
    lines = metrics.read(run.fold_folder(fold))
    for site, missed in run.left_out(fold).items():
        yield (f"fold {fold}: {len(missed)} of {run.finished(fold)} rounds without {site}; "
               f"why is in {run.fold_folder(fold) / 'metrics.jsonl'}")  # fmt: skip
    losses = [(line["round"], loss) for line in lines if (loss := metrics.loss(line)) is not None]
    if losses:
        (first, high), (last, low) = losses[0], losses[-1]
        began = f" (after round {first} it was {high:.4f})" if last > first else ""
        yield f"fold {fold}: training loss {low:.4f} after round {last}{began}"
    together = run.held_out(fold)
    if together:
        yield f"fold {fold}: Dice of the held-out cases: {_numbers(together)}"
        sites = {site: run.held_out(fold, site) for site in run.identity().sites}
        yield from (f"fold {fold}: at {site}: {_numbers(dice)}" for site, dice in sites.items() if dice)
    elif fold == ALL and run.folds() == [ALL]:
        yield ("how good it is on patients it has not seen is not known, since nobody was held out: evaluate it on "
               "scans of others, or train with --fold 0")  # fmt: skip


def _numbers(dice: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in dice.items())


def _weights(run: Run) -> Iterator[str]:
    """Which weights `autofed predict` takes, if nobody names others."""
    models = run.models()
    if not models:
        return
    model = GLOBAL if GLOBAL in models else models[0]
    names = [member.name for member in run.members(model)]
    averaged = ", each a moving average over rounds" if run.plan().agreement.training.ema else ""
    together = f", whose {len(names)} predictions are averaged" if len(names) > 1 else ""
    yield f"what predicts{'' if model == GLOBAL else f' with --model {model}'}: {', '.join(names)}{averaged}{together}"


def _hours_left(run: Run, work: Path | None) -> Iterator[str]:
    """How many more rounds the hours of the plan would allow: never of a private one, whose noise is for its rounds."""
    plan = run.plan()
    hours, rounds = plan.budget.hours, plan.agreement.training.rounds
    if hours is None or plan.agreement.privacy.is_private or any(run.finished(f) < rounds for f in run.folds()):
        return
    seconds = max((_seconds(run, fold) for fold in run.folds()), default=0.0)
    more = int((hours * 3600 - seconds) / seconds * rounds) if seconds else 0
    if more >= max(1, WORTH_MENTIONING * rounds):
        took = f"{metrics.duration(seconds)} of the {metrics.duration(hours * 3600)} planned"
        words = [run.folder / "plan.json", *([work] if work else []), "-o", run.folder, "--resume --rounds"]
        again = f"autofed train {' '.join(map(str, words))} {rounds + more}"
        yield f"it took {took}; the rest would be enough for about {more} more rounds: {again}"


def _seconds(run: Run, fold: str) -> float:
    return sum(line["seconds"] for line in metrics.read(run.fold_folder(fold)))
