"""Learning together: train, site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autofed.cli import terminal
from autofed.cli.options import Device, DeviceOption

if TYPE_CHECKING:
    from autofed.runs import Run


def train(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="RUN: where the run is kept.")],
    work: Annotated[Path | None, typer.Argument(help="WORK, with the prepared data of every site of the plan.")] = None,
    connection: Annotated[
        str | None,
        typer.Option(help="Instead of WORK: the SuperLink, by its name in Flower's config, with the sites behind it."),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(help="Instead of the plan's: fedavg, fedprox, fednova, scaffold, fedbn, dcfed, local, pooled."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="With dcfed: a folder of public images, the same at every site.")
    ] = None,
    site_plan: Annotated[
        list[str] | None,
        typer.Option(help="With dcfed: SITE=plan.json, a plan with another network or grid; once for each such site."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Instead of the plan's.")] = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(help="all (default): hold nobody out; 0 to 4: a fifth of each site's patients; cv: all five."),
    ] = None,
    init: Annotated[Path | None, typer.Option(help="A RUN or a file of weights to start from.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished round; with more --rounds, for longer.")
    ] = False,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="Charge ledgers of this run instead of the sites' own.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that make patches; 0: none. Default: a thread on a CPU.", min=0)
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train over all sites, round by round."""
    from autofed import report, verbs
    from autofed.verbs import exchanges, ledgers

    with terminal.progress() as progress:
        run = verbs.train(
            plan,
            work,
            output,
            algorithm=algorithm,
            public=public,
            site_plans=_by_site(site_plan or []),
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
    plan: Annotated[Path, typer.Argument(help="The site's own copy of the plan, which it agreed to.")],
    work: Annotated[Path, typer.Argument(help="WORK, with the prepared data of this site.")],
    name: Annotated[str, typer.Option(help="Which site of the plan this is.")],
    memory: Annotated[Path, typer.Option("-o", "--output", help="MEMORY: what the site keeps of runs.")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the coordinator's SuperLink.")],
    key: Annotated[Path | None, typer.Option(help="This site's private key, which the coordinator registered.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The certificate that the SuperLink's is signed with.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without --key and --ca, to try it out.")] = False,
    public: Annotated[Path | None, typer.Option(help="The public images, if the plan agrees on any.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Take part, as one hospital, in trainings that are led elsewhere; runs until it is ended."""
    from autofed.verbs import hospitals

    if insecure == bool(key and ca) or (insecure and (key or ca)):
        raise typer.BadParameter("give both --key and --ca, or --insecure alone")
    hospitals.attend(
        name, plan, work, memory, superlink, key=key, authority=ca, public=public, device=device.value,
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
