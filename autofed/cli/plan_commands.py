"""From raw data to a plan and prepared data: fingerprint, plan, preprocess."""

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
"""What goes with a finished plan; anything else would mean planning anew."""


def fingerprint(
    site: SiteArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The fingerprint to hand over, a JSON file.")],
    speed: Annotated[bool, typer.Option("--speed", help="Also how fast this machine trains.")] = False,
    private_census: CensusOption = False,
    epsilon: CensusEpsilon = None,
    delta: CensusDelta = None,
    work: WorkOption = None,
    simulation: SimulatedCensus = False,
    device: DeviceOption = DeviceName.auto,
    processes: Processes = 0,
) -> None:
    """What a hospital can compute alone and hand over: counts and sums, never a case."""
    promised: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "work": work, "simulation": simulation}
    _refuse_without_census(private_census, promised)
    from autofed import api

    options: dict[str, Any] = {"speed": speed, "device": device.value, "processes": count(processes)}
    if private_census:
        with terminal.progress() as progress:
            noised = api.private_fingerprint(site, output, progress=progress, **promised, **options)
        typer.echo(
            f"{output}: {noised.patients} patients, counted with noise of multiplier {noised.noise_multiplier:g}"
        )
        typer.echo(f"what that cost: autofed ledger {work}/{site.resolve().name}")
        return
    with terminal.progress() as progress:
        found = api.fingerprint(site, output, progress=progress, **options)
    counts = found.sites[site.resolve().name]
    typer.echo(f"{output}: {counts.cases} cases, {counts.labelled} with labels, of {counts.patients} patients")


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
    """Network, patch size, rounds and all the rest, from the data of all sites; every decision has its reason."""
    settings = assignments(set_ or []) | ({"privacy.score_noise": SCORE_NOISE} if share_scores else {})
    _refuse_without_census(private_census, {"work": work, "simulation": simulation})
    from autofed import api, plans

    promised: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "even_if_hopeless": even_if_hopeless}
    if len(sources) == 1 and plans.is_plan(sources[0]):
        _refuse_planning_anew(ctx)
        made = api.change(sources[0], output, settings, **promised)
        explain = explain or not output
    else:
        with terminal.progress() as progress:
            made = api.plan(
                sources, output, **promised, hours=hours, memory_gb=memory, device=device.value, speed=speed,
                algorithm=algorithm, configuration=configuration.value, preset=preset and preset.value, like=like,
                settings=settings, private_census=private_census, work=work, simulation=simulation, prior=prior,
                processes=count(processes), progress=progress,
            )  # fmt: skip
    if json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        terminal.show_plan(made, explain)
        following = f"written to {output}; next: autofed preprocess {output} SITE... -o WORK"
        typer.echo("\n" + (following if output else "no file was written; -o plan.json writes one"))
    terminal.warn_of_few_steps(made)


def preprocess(
    plan: PlanArgument,
    sites: SitesArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="WORK", help="Where the prepared data goes, by site.")
    ],
    processes: Processes = 0,
) -> None:
    """Bring the sites' data onto the plan's grid. A second run does nothing; an interrupted one goes on."""
    from autofed import api

    with terminal.progress() as progress:
        new = api.preprocess(plan, sites, output, processes=count(processes), progress=progress)
    for site, cases in new.items():
        typer.echo(f"{site}: {f'{cases} cases prepared' if cases else 'everything was prepared before'}")
    typer.echo(f"next: autofed train {plan} {output} -o RUN")


def _refuse_without_census(private_census: bool, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if given and not private_census:
        raise typer.BadParameter(f"{' and '.join(f'--{name}' for name in given)} goes with --private-census")


def _refuse_planning_anew(ctx: typer.Context) -> None:
    """A finished plan can be shown and changed field by field; anything else means planning anew."""
    from autofed.errors import raise_if_any

    given = [name for name in ctx.params if is_given(ctx, name)]
    raise_if_any(
        "plan",
        [
            f"--{name.replace('_', '-')} was asked for, but a plan is changed by --set alone; plan again from "
            "the fingerprints"
            for name in given
            if name not in _CHANGES_A_PLAN
        ],
    )
