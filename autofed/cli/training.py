"""Learning together: train, site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    AgreedArgument,
    Connection,
    Device,
    DeviceOption,
    Folds,
    Init,
    OtherAlgorithm,
    PlanArgument,
    PreparedArgument,
    PublicOption,
    Resume,
    Rounds,
    RunOutput,
    Simulation,
    SitePlans,
    WorkArgument,
    WorkersOption,
)

if TYPE_CHECKING:
    from autofed.runs import Run


def train(
    plan: PlanArgument,
    output: RunOutput,
    work: PreparedArgument = None,
    connection: Connection = None,
    algorithm: OtherAlgorithm = None,
    public: PublicOption = None,
    site_plan: SitePlans = None,
    rounds: Rounds = None,
    fold: Folds = None,
    init: Init = None,
    resume: Resume = False,
    simulation: Simulation = False,
    workers: WorkersOption = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train over all sites, round by round."""
    own_plans = _by_site(site_plan or [])
    from autofed import report, verbs
    from autofed.verbs import exchanges, ledgers

    with terminal.progress() as progress:
        run = verbs.train(
            plan,
            work,
            output,
            algorithm=algorithm,
            public=public,
            site_plans=own_plans,
            rounds=rounds,
            folds=fold or ["all"],
            workers=workers,
            init=init,
            resume=resume,
            simulation=simulation,
            device=device.value,
            connection=connection,
            progress=progress,
            say=lambda line: typer.echo(line, err=True),
        )
    typer.echo(f"{output}: finished; models: {', '.join(run.models())}")
    for line in (*_of_folds(run), *exchanges.of_run(run), *ledgers.of_run(run, work)):
        typer.echo(line)
    for path in report.draw_run(run):
        typer.echo(f"{path}: what is taught of some public images")
    chosen = "" if "global" in run.models() else " --model MODEL"
    typer.echo(f"next: autofed predict {output} -i IMAGES -o OUT{chosen}")


def _of_folds(run: Run) -> Iterator[str]:
    for trained in run.folds():
        for site, missed in run.left_out(trained).items():
            yield (f"fold {trained}: {len(missed)} of {run.finished(trained)} rounds without {site}; "
                   f"why is in {run.fold_folder(trained) / 'metrics.jsonl'}")  # fmt: skip
        scores = [f"{name} {terminal.number(dice)}" for name, dice in run.held_out(trained).items()]
        if scores:
            yield f"fold {trained}: Dice of the held-out cases: {', '.join(scores)}"


def _by_site(assignments: list[str]) -> dict[str, Path]:
    found = {}
    for assignment in assignments:
        site, equals, path = assignment.partition("=")
        if not (site and equals and path):
            raise typer.BadParameter(f"{assignment!r} is not of the form SITE=plan.json", param_hint="--site-plan")
        found[site] = Path(path)
    return found


def site(
    plan: AgreedArgument,
    work: WorkArgument,
    name: Annotated[str, typer.Option(help="Which site of the plan this is.")],
    memory: Annotated[
        Path, typer.Option("-o", "--output", metavar="MEMORY", help="Where the site keeps what it needs of runs.")
    ],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's SuperLink.")],
    key: Annotated[Path | None, typer.Option(help="This site's private key, which the coordinator registered.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The certificate that the SuperLink's is signed with.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without --key and --ca, to try it out.")] = False,
    public: Annotated[Path | None, typer.Option(help="The public images, if the plan agrees on any.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Take part, as one hospital, in trainings that are led elsewhere; serves until stopped."""
    if insecure == bool(key and ca) or (insecure and (key or ca)):
        raise typer.BadParameter("give both --key and --ca, or --insecure alone")
    from autofed.federation.premises import Premises
    from autofed.verbs import hospitals

    premises = Premises(site=name, plan=plan, work=work, memory=memory, device=device.value, public=public)
    hospitals.attend(premises, superlink, key=key, authority=ca, say=lambda line: typer.echo(line, err=True))
