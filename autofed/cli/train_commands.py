"""Learning together: train, run, site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    AgreedArgument,
    AlgorithmOption,
    ConfigurationName,
    ConfigurationOption,
    Connection,
    Delta,
    DeviceName,
    DeviceOption,
    Epsilon,
    EvenIfHopeless,
    Folds,
    Hours,
    Init,
    Memory,
    OtherAlgorithm,
    PlanArgument,
    PreparedArgument,
    PresetOption,
    Processes,
    PublicOption,
    Resume,
    Rounds,
    RunOutput,
    RunWork,
    Settings,
    Simulation,
    SitePlans,
    SitesArgument,
    WorkArgument,
    WorkersOption,
    assignments,
    count,
    is_given,
)

if TYPE_CHECKING:
    from autofed.federation.run_folder import Run


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
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Train over all sites, round by round."""
    own_plans = _by_site(site_plan or [])
    from autofed import api

    with terminal.progress() as progress:
        run = api.train(
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
    show_end(run, work)


def show_end(run: Run, work: Path | None) -> None:
    """What a training came to and cost, and what to do next."""
    from autofed import report
    from autofed.api import ledgers, outcomes
    from autofed.federation import communication

    typer.echo(f"{run.folder}: finished; models: {', '.join(run.models())}")
    for line in (
        *outcomes.training_summary(run, work),
        *communication.communication_summary(run),
        *ledgers.of_run(run, work),
    ):
        typer.echo(line)
    for path in report.draw_pseudo_labels(run):
        typer.echo(f"{path}: what is taught of some public images")
    chosen = "" if "global" in run.models() else " --model MODEL"
    typer.echo(f"next: autofed predict {run.folder} -i IMAGES -o OUT{chosen}")
    typer.echo("then: autofed evaluate OUT LABELS")


def run(
    ctx: typer.Context,
    sites: SitesArgument,
    output: RunOutput,
    hours: Hours = None,
    memory: Memory = None,
    device: DeviceOption = DeviceName.auto,
    algorithm: AlgorithmOption = None,
    configuration: ConfigurationOption = ConfigurationName.auto,
    preset: PresetOption = None,
    set_: Settings = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    even_if_hopeless: EvenIfHopeless = False,
    work: RunWork = None,
    public: PublicOption = None,
    fold: Folds = None,
    simulation: Simulation = False,
    processes: Processes = 0,
) -> None:
    """Plan, preprocess and train in one go; again, it goes on where it was interrupted."""
    values = {
        "hours": hours, "memory_gb": memory, "device": device.value, "algorithm": algorithm,
        "configuration": configuration.value, "preset": preset and preset.value, "epsilon": epsilon, "delta": delta,
        "even_if_hopeless": even_if_hopeless, "work": work, "public": public, "simulation": simulation,
    }  # fmt: skip
    given: dict[str, Any] = {name: values[name] for name in values if is_given(ctx, name.removesuffix("_gb"))}
    given |= {"settings": assignments(set_)} if set_ else {}
    given |= {"folds": fold} if fold else {}
    from autofed import api

    with terminal.progress() as progress:
        trained = api.run(sites, output, **given, processes=count(processes), progress=progress, say=typer.echo)
    show_end(trained, work or output.resolve().parent / "work")


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
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Take part, as one hospital, in trainings that are led elsewhere; serves until stopped."""
    if insecure == bool(key and ca) or (insecure and (key or ca)):
        raise typer.BadParameter("give both --key and --ca, or --insecure alone")
    from autofed.api import over_flower
    from autofed.federation.node import SiteNode

    premises = SiteNode(site=name, plan=plan, work=work, memory=memory, device=device.value, public=public)
    over_flower.serve_site(premises, superlink, key=key, authority=ca, say=lambda line: typer.echo(line, err=True))
