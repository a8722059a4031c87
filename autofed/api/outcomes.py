"""The results of a training, as far as they are known, in sentences for the person who started it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from autofed.data.splits import ALL
from autofed.federation import metrics
from autofed.federation.run_folder import GLOBAL, Run

WORTH_MENTIONING = 0.1
"""Rounds that the planned hours still allow are mentioned if they are at least this share of those trained."""


def training_summary(run: Run, work: Path | None = None) -> list[str]:
    """Loss and Dice of each fold, missing sites, the weights that predict, and rounds that the hours still allow."""
    lines = [line for fold in run.folds() for line in _fold_summary(run, fold)]
    return [*lines, *_weights(run), *_hours_left(run, work)]


def _fold_summary(run: Run, fold: str) -> Iterator[str]:
    lines = metrics.read(run.fold_folder(fold))
    for site, rounds in run.left_out(fold).items():
        yield (f"fold {fold}: {len(rounds)} of {run.finished(fold)} rounds without {site}; "
               f"why is in {run.fold_folder(fold) / 'metrics.jsonl'}")  # fmt: skip
    losses = [(line["round"], loss) for line in lines if (loss := metrics.loss(line)) is not None]
    if losses:
        (first, high), (last, low) = losses[0], losses[-1]
        before = f" (after round {first} it was {high:.4f})" if last > first else ""
        yield f"fold {fold}: training loss {low:.4f} after round {last}{before}"
    dice = run.held_out(fold)
    if dice:
        yield f"fold {fold}: Dice of the held-out cases: {_numbers(dice)}"
        dice_by_site = {site: run.held_out(fold, site) for site in run.identity().sites}
        yield from (f"fold {fold}: at {site}: {_numbers(dice)}" for site, dice in dice_by_site.items() if dice)
    elif fold == ALL and run.folds() == [ALL]:
        yield ("how good it is on patients it has not seen is not known, since nobody was held out: evaluate it on "
               "scans of others, or train with --fold 0")  # fmt: skip


def _numbers(dice: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in dice.items())


def _weights(run: Run) -> Iterator[str]:
    """The weights that `autofed predict` uses by default."""
    models = run.models()
    if not models:
        return
    model = GLOBAL if GLOBAL in models else models[0]
    names = [member.name for member in run.members(model)]
    moving_average = ", each a moving average over rounds" if run.plan().agreement.training.ema else ""
    ensemble = f", whose {len(names)} predictions are averaged" if len(names) > 1 else ""
    option = "" if model == GLOBAL else f" with --model {model}"
    yield f"what predicts{option}: {', '.join(names)}{moving_average}{ensemble}"


def _hours_left(run: Run, work: Path | None) -> Iterator[str]:
    """How many more rounds the hours of the plan allow. Nothing for a private plan: its noise is for its rounds."""
    plan = run.plan()
    hours, rounds = plan.budget.hours, plan.agreement.training.rounds
    if hours is None or plan.agreement.privacy.is_private or any(run.finished(f) < rounds for f in run.folds()):
        return
    seconds = max((_seconds(run, fold) for fold in run.folds()), default=0.0)
    more_rounds = int((hours * 3600 - seconds) / seconds * rounds) if seconds else 0
    if more_rounds >= max(1, WORTH_MENTIONING * rounds):
        duration = f"{metrics.duration(seconds)} of the {metrics.duration(hours * 3600)} planned"
        arguments = [run.folder / "plan.json", *([work] if work else []), "-o", run.folder, "--resume --rounds"]
        command = f"autofed train {' '.join(map(str, arguments))} {rounds + more_rounds}"
        yield f"it took {duration}; the rest would be enough for about {more_rounds} more rounds: {command}"


def _seconds(run: Run, fold: str) -> float:
    return float(sum(line["seconds"] for line in metrics.read(run.fold_folder(fold))))
