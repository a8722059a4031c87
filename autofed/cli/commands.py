"""One thin command per verb: it parses, calls and prints. Heavy imports are inside the commands."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from autofed.cli import terminal

app = typer.Typer(
    name="autofed",
    help="Plan, train and ship a segmentation model over several hospitals, none of which shares a scan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Configuration(StrEnum):
    """On which grid to learn."""

    auto = "auto"
    flat = "2d"
    full = "3d_fullres"
    low = "3d_lowres"


class Preset(StrEnum):
    """nnU-Net's networks, and that of DCFed."""

    plain = "plain"
    medium = "resenc-m"
    large = "resenc-l"
    largest = "resenc-xl"
    dcfed = "dcfed"


class Canary(StrEnum):
    """What an audit plants."""

    gradient = "gradient"
    image = "image"
    labels = "labels"


class Task(StrEnum):
    """Which of the two shipped federations the demo runs on."""

    volumes = "3d"
    pictures = "2d"


Processes = Annotated[int, typer.Option(help="Processes for reading and preparing; 0: one per processor.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes the fastest there is.")]
CensusOption = Annotated[
    bool,
    typer.Option("--private-census", help="Counts with noise, charged to the site's ledger; needs --epsilon, --work."),
]
WorkOption = Annotated[
    Path | None, typer.Option(help="With --private-census: WORK, where the prepared data will be and ledgers are.")
]
SimulatedCensus = Annotated[
    bool, typer.Option("--simulation", help="With --private-census: ledgers that count for nobody.")
]


@app.command()
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

    options: dict[str, Any] = {"speed": speed, "device": device.value, "processes": _count(processes)}
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


@app.command()
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
                sources, output, **wanted, **promised, settings=settings, processes=_count(processes), progress=progress
            )
    if json:
        typer.echo(made.model_dump_json(indent=2))
        return
    terminal.show_plan(made, explain)
    following = f"written to {output}; next: autofed preprocess {output} SITE... -o WORK"
    typer.echo("\n" + (following if output else "no file was written; -o plan.json writes one"))


@app.command()
def preprocess(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    sites: Annotated[list[Path], typer.Argument(help="The sites' folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="WORK: where the prepared data goes, by site.")],
    processes: Processes = 0,
) -> None:
    """Bring the sites' data onto the plan's grid. A second run does nothing; an interrupted one goes on."""
    from autofed import verbs

    with terminal.progress() as progress:
        new = verbs.preprocess(plan, sites, output, processes=_count(processes), progress=progress)
    for site, count in new.items():
        typer.echo(f"{site}: {f'{count} cases prepared' if count else 'everything was prepared before'}")
    typer.echo(f"next: autofed train {plan} {output} -o RUN")


@app.command()
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
    for trained in run.folds():
        for site, missed in run.left_out(trained).items():
            typer.echo(f"fold {trained}: {len(missed)} of {run.finished(trained)} rounds without {site}; "
                       f"why is in {run.fold_folder(trained) / 'metrics.jsonl'}")  # fmt: skip
        scores = [f"{name} {terminal.number(dice)}" for name, dice in run.held_out(trained).items()]
        if scores:
            typer.echo(f"fold {trained}: Dice of the held-out cases: {', '.join(scores)}")
    for line in (*exchanges.of_run(run), *ledgers.of_run(run, work)):
        typer.echo(line)
    for path in report.draw_run(run):
        typer.echo(f"{path}: what is taught of some public images")
    chosen = "" if "global" in run.models() else " --model MODEL"
    typer.echo(f"next: autofed predict {output} -i IMAGES -o OUT{chosen}")


def _by_site(assignments: list[str]) -> dict[str, Path]:
    found = {}
    for assignment in assignments:
        site, equals, path = assignment.partition("=")
        if not (site and equals and path):
            raise typer.BadParameter(f"{assignment!r} is not of the form SITE=plan.json", param_hint="--site-plan")
        found[site] = Path(path)
    return found


@app.command()
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


@app.command()
def predict(
    runs: Annotated[list[Path], typer.Argument(help="One or more RUNs, whose models vote together.")],
    images: Annotated[Path, typer.Option("-i", "--images", help="A folder of scans, or one file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="OUT: labels, uncertainty maps, pictures.")],
    model: Annotated[
        str | None, typer.Option(help="global (the default), a SITE with a model of its own, or student.")
    ] = None,
    fold: Annotated[
        list[str] | None, typer.Option(help="Only these folds; by default that of all patients, or else every one.")
    ] = None,
    mirroring: Annotated[bool, typer.Option("--mirroring/--no-mirroring", help="Average mirrored views.")] = True,
    postprocessing: Annotated[
        bool, typer.Option("--postprocessing/--no-postprocessing", help="As held-out cases showed to help.")
    ] = True,
    save_probabilities: Annotated[bool, typer.Option("--save-probabilities", help="Also as .npz.")] = False,
    device: DeviceOption = Device.auto,
) -> None:
    """Labels with maps of uncertainty for new scans, on the scans' own grid."""
    from autofed import report, verbs

    with terminal.progress() as progress:
        written = verbs.predict(
            runs,
            images,
            output,
            model=model,
            folds=fold or [],
            mirroring=mirroring,
            postprocessing=postprocessing,
            device=device.value,
            save_probabilities=save_probabilities,
            progress=progress,
        )
        pictures = report.draw_predictions(output, progress)
    typer.echo(f"{output}: {len(written)} cases")  # type: ignore[arg-type]
    if pictures:
        typer.echo(f"look at the pictures in {pictures[0].parent}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="OUT: a folder of predictions.")],
    labels: Annotated[Path, typer.Argument(help="A folder of reference labels, or of sites in raw layout.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="report.json; a page goes beside it.")] = None,
    processes: Processes = 0,
) -> None:
    """Dice, Jaccard and HD95 per case, class and site, and a page to look at."""
    from autofed import verbs

    target = output or predictions / "report.json"
    with terminal.progress() as progress:
        found = verbs.evaluate(predictions, labels, target, processes=_count(processes), progress=progress)
        page = _write_page(found, predictions, labels, target)
    for name, scores in [*found.classes.items(), ("mean", found.mean)]:
        typer.echo(
            f"{name:<20} Dice {terminal.number(scores.dice)}  Jaccard {terminal.number(scores.jaccard)}  "
            f"HD95 {terminal.number(scores.hd95_mm, 2)}"
        )
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written to {target}; look at {page}")


@app.command()
def ledger(
    site: Annotated[Path, typer.Argument(help="WORK/SITE, the folder of a site's prepared data, or its ledger.")],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open it, with a ceiling over all trainings to come.")] = False,
    epsilon: Annotated[float | None, typer.Option(help="The ceiling, with --open.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta of the ceiling, with --open.")] = None,
    simulation: Annotated[
        bool, typer.Option("--simulation", help="With --open: nobody's privacy rests on it, so seeds are allowed.")
    ] = False,
) -> None:
    """What trainings cost a hospital's patients in privacy, what is left, and what that promises them."""
    from autofed.verbs import ledgers

    if not open_ and (epsilon is not None or delta is not None or simulation):
        raise typer.BadParameter("--epsilon, --delta and --simulation go with --open")
    found = ledgers.state(ledgers.begin(site, epsilon, delta, simulation) if open_ else ledgers.find(site))
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_ledger(found)


@app.command()
def audit(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    site: Annotated[Path | None, typer.Argument(help="WORK/SITE, whose patients make the canaries' images.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="What was found, a JSON file.")] = None,
    kind: Annotated[
        Canary,
        typer.Option(
            help="gradient: loud gradients, seconds to minutes; image: a whole training of one site; "
            "labels: the same, seen through labels of public images alone."
        ),
    ] = Canary.gradient,
    public: Annotated[Path | None, typer.Option(help="With --kind labels: a folder of public images.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Default 1000, of images 100.")] = None,
    alpha: Annotated[float, typer.Option(help="How often the bound may be wrong.", min=1e-9, max=0.5)] = 0.05,
    inversion: Annotated[
        Path | None,
        typer.Option(help="Instead: reconstruct a patch from one update, with and without the mechanism; a PNG."),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Of the reconstruction.", min=1)] = 600,
    device: DeviceOption = Device.auto,
) -> None:
    """What an attacker can tell of planted patients, beside what the plan promises. Nothing leaves this machine."""
    from autofed import verbs

    if inversion is not None:
        if public is not None:
            raise typer.BadParameter("--public goes with --kind labels, not with --inversion")
        _invert(plan, site, inversion, iterations)
        return
    wanted: dict[str, Any] = {
        "kind": kind.value, "public": public, "canaries": canaries, "alpha": alpha, "device": device.value,
    }  # fmt: skip
    with terminal.progress() as progress:
        found = verbs.audit(plan, site, output, **wanted, progress=progress)
    typer.echo(found.text())
    typer.echo("Nothing left this machine, and no ledger was charged.")
    if output is not None:
        typer.echo(f"written to {output}")
    if found.refuted:
        raise typer.Exit(1)


def _invert(plan: Path, site: Path | None, picture: Path, iterations: int) -> None:
    from autofed import report, verbs
    from autofed.files import write_bytes

    with terminal.progress() as progress:
        found = verbs.inversion(plan, site, iterations=iterations, progress=progress)
    write_bytes(picture, report.draw_inversion(found))
    for name, likeness in (
        ("without the mechanism", found.without.likeness),
        (f"with {found.mechanism}", found.protected.likeness),
        ("a blank image", found.blank),
        ("the label map alone", found.label),
    ):
        typer.echo(f"{name:<22} PSNR {likeness.psnr:5.1f} dB  SSIM {likeness.ssim:.3f}")
    typer.echo(f"look at {picture}; it shows the patient's patch, so it stays on this machine")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where everything goes.")] = Path("demo-autofed"),
    task: Annotated[Task, typer.Option(help="3d: hippocampus in MRI; 2d: nuclei in microscopy.")] = Task.volumes,
    minutes: Annotated[float, typer.Option(help="Training time to plan for.")] = 2.5,
) -> None:
    """The whole way on real scans that come with autofed: plan, preprocess, train, predict, evaluate."""
    from autofed import demo as shipped

    with terminal.progress() as progress:
        result = shipped.run(output, task.value, minutes=minutes, progress=progress)
    typer.echo(f"mean Dice on {result.cases} scans that no site has seen: {terminal.number(result.dice)}")
    typer.echo(f"pictures: {result.pictures}")
    typer.echo(f"page:     {result.page}")


def _count(processes: int) -> int:
    return processes if processes > 0 else os.cpu_count() or 1


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


SCORE_NOISE = 5.0
"""What --share-scores sets: a small part of an epsilon of 8; the score of 50 patients is then off by about .1."""


_DEFAULTS = {
    "device": "auto",
    "configuration": "auto",
    "simulation": False,
    "private_census": False,
}


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


def _write_page(found: Any, predictions: Path, labels: Path, target: Path) -> Path:
    from autofed import report
    from autofed.files import read_json

    about = predictions / "prediction.json"
    runs = [Path(run) for run in read_json(about)["runs"]] if about.is_file() else []
    page = target.with_suffix(".html")
    report.page(found, predictions, labels, runs, page)
    return page
