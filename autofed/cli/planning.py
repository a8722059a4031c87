"""From raw data to a plan and prepared data: fingerprint, plan, preprocess."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autofed.cli import terminal
from autofed.cli.options import (
    CensusOption,
    Configuration,
    Device,
    DeviceOption,
    Preset,
    Processes,
    SimulatedCensus,
    WorkOption,
    count,
)

SCORE_NOISE = 5.0
"""What --share-scores sets: a small part of an epsilon of 8; the score of 50 patients is then off by about .1."""

_DEFAULTS = {
    "device": "auto",
    "configuration": "auto",
    "simulation": False,
    "private_census": False,
}


def fingerprint(
    site: Annotated[Path, typer.Argument(help="A folder in nnU-Net's raw layout.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The fingerprint to hand over, a JSON file.")],
    speed: Annotated[bool, typer.Option("--speed", help="Also how fast this machine trains.")] = False,
    private_census: CensusOption = False,
    epsilon: Annotated[float | None, typer.Option(help="With --private-census: that of the plan to come.")] = None,
    delta: Annotated[float | None, typer.Option(help="Its delta; default 1e-5 or less.")] = None,
    work: WorkOption = None,
    simulation: SimulatedCensus = False,
    device: DeviceOption = Device.auto,
    processes: Processes = 0,
) -> None:
    """What a hospital can compute alone and hand over: counts and sums, never a case."""
    from autofed import verbs

    options: dict[str, Any] = {"speed": speed, "device": device.value, "processes": count(processes)}
    promised: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "work": work, "simulation": simulation}
    _refuse_without_census(private_census, promised)
    if private_census:
        with terminal.progress() as progress:
            noised = verbs.noised_fingerprint(site, output, progress=progress, **promised, **options)
        typer.echo(
            f"{output}: {noised.patients} patients, counted with noise of multiplier {noised.noise_multiplier:g}"
        )
        typer.echo(f"what that cost: autofed ledger {work}/{site.resolve().name}")
        return
    with terminal.progress() as progress:
        found = verbs.fingerprint(site, output, progress=progress, **options)
    counts = found.sites[site.resolve().name]
    typer.echo(f"{output}: {counts.cases} cases, {counts.labelled} with labels, of {counts.patients} patients")


def plan(
    sources: Annotated[list[Path], typer.Argument(help="Sites' folders or their fingerprints; or a plan, to show it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The plan, a JSON file.")] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="Training time from start to end; default 1 on a CPU, nnU-Net's full training elsewhere."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of the device in GB; default 8, more for larger presets.")
    ] = None,
    device: DeviceOption = Device.auto,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="How the sites learn together: fedavg (what plans choose), fedprox, fednova, scaffold, "
            "fedbn, dcfed, local, pooled."
        ),
    ] = None,
    configuration: Annotated[Configuration, typer.Option(help="On which grid to learn.")] = Configuration.auto,
    preset: Annotated[
        Preset | None, typer.Option(help="Which network; by default nnU-Net's plain one, and DCFed's own for dcfed.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A RUN or its plan, whose weights shall go on being trained at these sites.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE, set by hand; may be repeated.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="The promise to every patient: network, steps and noise are planned for it.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="How likely it may be broken; default 1e-5 or less.")] = None,
    even_if_hopeless: Annotated[
        bool, typer.Option("--even-if-hopeless", help="Write a private plan also if hardly anything would be learned.")
    ] = False,
    share_scores: Annotated[
        bool, typer.Option("--share-scores", help="Sites tell held-out patients' scores, with noise and charged.")
    ] = False,
    private_census: CensusOption = False,
    work: WorkOption = None,
    simulation: SimulatedCensus = False,
    prior: Annotated[
        Path | None, typer.Option(help="A plan for data of the same kind, for what noised fingerprints do not tell.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every decision with its reason.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
    processes: Processes = 0,
) -> None:
    """Network, patch size, rounds and all the rest, from the data of all sites; every decision has its reason."""
    from autofed import plans, verbs

    settings = _settings(set_ or []) | ({"privacy.score_noise": SCORE_NOISE} if share_scores else {})
    promised: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "even_if_hopeless": even_if_hopeless}
    wanted: dict[str, Any] = {"hours": hours, "memory_gb": memory, "device": device.value, "algorithm": algorithm}
    wanted |= {"configuration": configuration.value, "preset": preset and preset.value, "like": like, "prior": prior}
    census: dict[str, Any] = {"work": work, "simulation": simulation}
    _refuse_without_census(private_census, census)
    wanted |= census | {"private_census": private_census}
    if len(sources) == 1 and plans.is_plan(sources[0]):
        _refuse_new_wishes(wanted)
        made = verbs.change(sources[0], output, settings, **promised)
        explain = explain or not output
    else:
        with terminal.progress() as progress:
            made = verbs.plan(
                sources, output, **wanted, **promised, settings=settings, processes=count(processes), progress=progress
            )
    if json:
        typer.echo(made.model_dump_json(indent=2))
        return
    terminal.show_plan(made, explain)
    following = f"written to {output}; next: autofed preprocess {output} SITE... -o WORK"
    typer.echo("\n" + (following if output else "no file was written; -o plan.json writes one"))


def preprocess(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    sites: Annotated[list[Path], typer.Argument(help="The sites' folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="WORK: where the prepared data goes, by site.")],
    processes: Processes = 0,
) -> None:
    """Bring the sites' data onto the plan's grid. A second run does nothing; an interrupted one goes on."""
    from autofed import verbs

    with terminal.progress() as progress:
        new = verbs.preprocess(plan, sites, output, processes=count(processes), progress=progress)
    for site, cases in new.items():
        typer.echo(f"{site}: {f'{cases} cases prepared' if cases else 'everything was prepared before'}")
    typer.echo(f"next: autofed train {plan} {output} -o RUN")


def _settings(assignments: list[str]) -> dict[str, Any]:
    import json

    settings: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise typer.BadParameter(f"{assignment!r} is not of the form FIELD=VALUE", param_hint="--set")
        if name in settings:
            raise typer.BadParameter(f"{name} is set twice; set it once", param_hint="--set")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def _refuse_without_census(private_census: bool, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if given and not private_census:
        raise typer.BadParameter(f"{' and '.join(f'--{name}' for name in given)} goes with --private-census")


def _refuse_new_wishes(wanted: dict[str, Any]) -> None:
    """A finished plan can be shown and changed field by field; anything else means planning anew."""
    from autofed.problems import refuse

    asked = [name for name, value in wanted.items() if value != _DEFAULTS.get(name)]
    problems = [f"{name} was asked for, but a plan is changed by --set alone; plan again from the fingerprints"
                for name in asked]  # fmt: skip
    refuse("plan", problems)
