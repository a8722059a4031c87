"""Training: train, run, site."""

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
    site_plans = _by_site(site_plan or [])
    from autofed import api

    with terminal.progress() as progress:
        run = api.train(
            plan,
            work,
            output,
            algorithm=algorithm,
            public=public,
            site_plans=site_plans,
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
    """Print the results and the privacy cost of a training, and what to do next."""
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
    option = "" if "global" in run.models() else " --model MODEL"
    typer.echo(f"next: autofed predict {run.folder} -i IMAGES -o OUT{option}")
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
    """Plan, preprocess and train in one go. Called again, it continues where it was interrupted."""
    values = {
        "hours": hours, "memory_gb": memory, "device": device.value, "algorithm": algorithm,
        "configuration": configuration.value, "preset": preset and preset.value, "epsilon": epsilon, "delta": delta,
        "even_if_hopeless": even_if_hopeless, "work": work, "public": public, "simulation": simulation,
    }  # fmt: skip
    options: dict[str, Any] = {name: values[name] for name in values if is_given(ctx, name.removesuffix("_gb"))}
    options |= {"settings": assignments(set_)} if set_ else {}
    options |= {"folds": fold} if fold else {}
    from autofed import api

    with terminal.progress() as progress:
        trained = api.run(sites, output, **options, processes=count(processes), progress=progress, say=typer.echo)
    show_end(trained, work or output.resolve().parent / "work")


def _by_site(assignments: list[str]) -> dict[str, Path]:
    paths = {}
    for assignment in assignments:
        site, equals, path = assignment.partition("=")
        if not (site and equals and path):
            raise typer.BadParameter(f"{assignment!r} is not of the form SITE=plan.json", param_hint="--site-plan")
        paths[site] = Path(path)
    return paths


def site(
    plan: AgreedArgument,
    work: WorkArgument,
    name: Annotated[str, typer.Option(help="Which site of the plan this is.")],
    memory: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="MEMORY", help="The folder for what the site keeps between rounds."),
    ],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's SuperLink.")],
    key: Annotated[Path | None, typer.Option(help="This site's private key, which the coordinator registered.")] = None,
    ca: Annotated[Path | None, typer.Option(help="The certificate that the SuperLink's is signed with.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Instead of --key and --ca, for trials.")] = False,
    public: Annotated[Path | None, typer.Option(help="The public images, if the plan agrees on any.")] = None,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Serve as one site in trainings that are coordinated on another machine, until stopped."""
    if insecure == bool(key and ca) or (insecure and (key or ca)):
        raise typer.BadParameter("give both --key and --ca, or --insecure alone")
    from autofed.api import over_flower
    from autofed.federation.node import SiteNode

    site_node = SiteNode(site=name, plan=plan, work=work, memory=memory, device=device.value, public=public)
    over_flower.serve_site(site_node, superlink, key=key, authority=ca, say=lambda line: typer.echo(line, err=True))
