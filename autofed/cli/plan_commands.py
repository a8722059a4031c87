"""From raw data to a plan and preprocessed data: fingerprint, plan, preprocess."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    AlgorithmOption,
    CensusDelta,
    CensusEpsilon,
    CensusOption,
    ConfigurationName,
    ConfigurationOption,
    Delta,
    DeviceName,
    DeviceOption,
    Epsilon,
    EvenIfHopeless,
    Explain,
    Hours,
    JsonOption,
    Like,
    Memory,
    PlanArgument,
    PlannedDevice,
    PlanOutput,
    PresetOption,
    Prior,
    Processes,
    Settings,
    ShareScores,
    SimulatedCensus,
    SiteArgument,
    SitesArgument,
    SourcesArgument,
    SpeedOption,
    WorkOption,
    assignments,
    count,
    is_given,
)

SCORE_NOISE = 5.0
"""What --share-scores sets: a small part of an epsilon of 8; the score of 50 patients is then off by about .1."""

_CHANGES_A_PLAN = (
    "sources", "output", "set_", "share_scores", "epsilon", "delta", "even_if_hopeless", "explain", "json", "processes",
)  # fmt: skip
"""Options that change a finished plan; any other would need a new plan."""


def fingerprint(
    site: SiteArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The fingerprint to hand over, a JSON file.")],
    speed: Annotated[bool, typer.Option("--speed", help="Measure the speed of this machine too.")] = False,
    private_census: CensusOption = False,
    epsilon: CensusEpsilon = None,
    delta: CensusDelta = None,
    work: WorkOption = None,
    simulation: SimulatedCensus = False,
    device: DeviceOption = DeviceName.auto,
    processes: Processes = 0,
) -> None:
    """The fingerprint of a site, which it computes alone and can hand over: counts and sums, never a case."""
    guarantee: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "work": work, "simulation": simulation}
    _refuse_without_census(private_census, guarantee)
    from autofed import api

    options: dict[str, Any] = {"speed": speed, "device": device.value, "processes": count(processes)}
    if private_census:
        with terminal.progress() as progress:
            noisy = api.private_fingerprint(site, output, progress=progress, **guarantee, **options)
        typer.echo(f"{output}: {noisy.patients} patients (noisy), noise multiplier {noisy.noise_multiplier:g}")
        typer.echo(f"what that cost: autofed ledger {work}/{site.resolve().name}")
        return
    with terminal.progress() as progress:
        counts = api.fingerprint(site, output, progress=progress, **options)
    site_counts = counts.sites[site.resolve().name]
    typer.echo(
        f"{output}: {site_counts.cases} cases, {site_counts.labelled} with labels, of {site_counts.patients} patients"
    )


def plan(
    ctx: typer.Context,
    sources: SourcesArgument,
    output: PlanOutput = None,
    hours: Hours = None,
    memory: Memory = None,
    device: PlannedDevice = DeviceName.auto,
    speed: SpeedOption = None,
    algorithm: AlgorithmOption = None,
    configuration: ConfigurationOption = ConfigurationName.auto,
    preset: PresetOption = None,
    like: Like = None,
    set_: Settings = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    even_if_hopeless: EvenIfHopeless = False,
    share_scores: ShareScores = False,
    private_census: CensusOption = False,
    work: WorkOption = None,
    simulation: SimulatedCensus = False,
    prior: Prior = None,
    explain: Explain = False,
    json: JsonOption = False,
    processes: Processes = 0,
) -> None:
    """Choose network, patch size, rounds and all the rest by the data of all sites, each with a reason."""
    settings = assignments(set_ or []) | ({"privacy.score_noise": SCORE_NOISE} if share_scores else {})
    _refuse_without_census(private_census, {"work": work, "simulation": simulation})
    from autofed import api, plans

    guarantee: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "even_if_hopeless": even_if_hopeless}
    if len(sources) == 1 and plans.is_plan(sources[0]):
        _refuse_planning_anew(ctx)
        result = api.change(sources[0], output, settings, **guarantee)
        explain = explain or not output
    else:
        with terminal.progress() as progress:
            result = api.plan(
                sources, output, **guarantee, hours=hours, memory_gb=memory, device=device.value, speed=speed,
                algorithm=algorithm, configuration=configuration.value, preset=preset and preset.value, like=like,
                settings=settings, private_census=private_census, work=work, simulation=simulation, prior=prior,
                processes=count(processes), progress=progress,
            )  # fmt: skip
    if json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        terminal.show_plan(result, explain)
        following = f"written to {output}; next: autofed preprocess {output} SITE... -o WORK"
        typer.echo("\n" + (following if output else "no file was written; -o plan.json writes one"))
    terminal.warn_of_few_steps(result)


def preprocess(
    plan: PlanArgument,
    sites: SitesArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="WORK", help="The folder for preprocessed data, by site.")
    ],
    processes: Processes = 0,
) -> None:
    """Resample and normalise the sites' data for the plan. Called again, it continues where it was interrupted."""
    from autofed import api

    with terminal.progress() as progress:
        new = api.preprocess(plan, sites, output, processes=count(processes), progress=progress)
    for site, cases in new.items():
        typer.echo(f"{site}: {f'{cases} cases preprocessed' if cases else 'everything was preprocessed before'}")
    typer.echo(f"next: autofed train {plan} {output} -o RUN")


def _refuse_without_census(private_census: bool, options: dict[str, Any]) -> None:
    names = [name for name, value in options.items() if value not in (None, False)]
    if names and not private_census:
        raise typer.BadParameter(f"{' and '.join(f'--{name}' for name in names)} goes with --private-census")


def _refuse_planning_anew(ctx: typer.Context) -> None:
    """`ValidationErrors` for options that a finished plan cannot be changed by."""
    from autofed.errors import raise_if_any

    names = [name for name in ctx.params if is_given(ctx, name)]
    raise_if_any(
        "plan",
        [
            f"--{name.replace('_', '-')} was given, but a finished plan is changed by --set and --epsilon; plan again "
            "from the fingerprints"
            for name in names
            if name not in _CHANGES_A_PLAN
        ],
    )
