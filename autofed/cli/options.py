"""Arguments and options that commands share, and how they are parsed."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from click.core import ParameterSource


class DeviceName(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class ConfigurationName(StrEnum):
    """On which grid to learn."""

    auto = "auto"
    flat = "2d"
    full = "3d_fullres"
    low = "3d_lowres"


class PresetChoice(StrEnum):
    """nnU-Net's networks, and that of DCFed."""

    plain = "plain"
    medium = "resenc-m"
    large = "resenc-l"
    largest = "resenc-xl"
    dcfed = "dcfed"


class AuditKind(StrEnum):
    """The kind of canaries of an audit."""

    gradient = "gradient"
    image = "image"
    labels = "labels"


class DemoTask(StrEnum):
    """Which of the two shipped federations the demo runs on."""

    volumes = "3d"
    pictures = "2d"


# --- arguments

SiteArgument = Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder, in nnU-Net's raw layout.")]
SitesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SITE...", help="The sites' folders in nnU-Net's raw layout, or a folder that holds sites/*."
    ),
]
SourcesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SITE...",
        help="The sites' folders or their fingerprints, or a folder that holds sites/*; or a finished plan, to show or "
        "change it.",
    ),
]
PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="The plan, a JSON file.")]
AgreedArgument = Annotated[
    Path, typer.Argument(metavar="PLAN", help="The site's own copy of the plan, which it agreed to.")
]
WorkArgument = Annotated[
    Path, typer.Argument(metavar="WORK", help="The folder with the preprocessed data of this site.")
]
PreparedArgument = Annotated[
    Path | None,
    typer.Argument(metavar="WORK", help="The folder with the preprocessed data of every site; none with --connection."),
]
RunsArgument = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="The folder of a run; or of several, whose predictions are averaged."),
]
PredictionsArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="The folder that `autofed predict` wrote, or any with label maps.")
]
LabelsArgument = Annotated[
    Path, typer.Argument(metavar="LABELS", help="A folder of reference labels, or of sites in raw layout.")
]
LedgerArgument = Annotated[
    Path,
    typer.Argument(metavar="WORK/SITE", help="The folder of a site's preprocessed data, or its ledger.jsonl."),
]
CanarySite = Annotated[
    Path | None,
    typer.Argument(
        metavar="WORK/SITE", help="The preprocessed data of a site, from whose patients the canaries are made."
    ),
]

# --- options of several commands

Processes = Annotated[int, typer.Option(help="How many processes read and process cases; 0: one per processor.")]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to compute; auto takes the fastest there is.")]
CensusOption = Annotated[
    bool,
    typer.Option("--private-census", help="Noisy counts, charged to the site's ledger; needs --epsilon, --work."),
]
WorkOption = Annotated[
    Path | None, typer.Option(help="With --private-census: WORK, the folder for preprocessed data and ledgers.")
]
SimulatedCensus = Annotated[
    bool,
    typer.Option(
        "--simulation", help="With --private-census: use ledgers for simulations, which protect no real patient."
    ),
]
PlanOutput = Annotated[Path | None, typer.Option("-o", "--output", help="The plan, a JSON file.")]
PublicOption = Annotated[
    Path | None, typer.Option(help="With dcfed: a folder of public images, the same at every site.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print it as JSON and nothing else.")]

# --- budget and guarantee of a plan

Hours = Annotated[
    float | None,
    typer.Option(help="Training time from start to end; default 1 on a CPU, nnU-Net's full training elsewhere."),
]
Memory = Annotated[float | None, typer.Option(help="Memory of the device in GB; default 8, more for larger presets.")]
PlannedDevice = Annotated[
    DeviceName, typer.Option(help="What will train, here or elsewhere; auto takes the fastest there is here.")
]
SpeedOption = Annotated[
    Path | None, typer.Option(help="With --hours for a device that is not here: a JSON file with its speed.")
]
AlgorithmOption = Annotated[
    str | None,
    typer.Option(
        help="How the sites learn together: fedavg (what plans choose), fedprox, fednova, scaffold, fedbn, dcfed, "
        "local, pooled."
    ),
]
ConfigurationOption = Annotated[ConfigurationName, typer.Option(help="On which grid to learn.")]
PresetOption = Annotated[
    PresetChoice | None, typer.Option(help="Which network; by default nnU-Net's plain one, and DCFed's own for dcfed.")
]
Like = Annotated[
    Path | None, typer.Option(help="A RUN or its plan, whose weights will be trained further at these sites.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE: set a field of the plan by hand; may be repeated.")
]
Epsilon = Annotated[float | None, typer.Option(help="Make a private plan: the guarantee for every patient, such as 8.")]
Delta = Annotated[float | None, typer.Option(help="The delta of the guarantee; default 1e-5 or less.")]
CensusEpsilon = Annotated[
    float | None, typer.Option(help="With --private-census: the epsilon of the plan that will be made.")
]
CensusDelta = Annotated[
    float | None, typer.Option(help="With --private-census: the delta of that plan; default 1e-5 or less.")
]
EvenIfHopeless = Annotated[
    bool, typer.Option("--even-if-hopeless", help="Make a private plan even if hardly anything would be learned.")
]
ShareScores = Annotated[
    bool,
    typer.Option(
        "--share-scores", help="Sites release scores of held-out patients, with noise, charged to their ledgers."
    ),
]
Prior = Annotated[
    Path | None,
    typer.Option(help="For private fingerprints: a plan for data of the same kind, which completes them."),
]
Explain = Annotated[bool, typer.Option("--explain", help="Show every decision with its reason.")]

# --- how to train

RunOutput = Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="The folder of the run.")]
Connection = Annotated[
    str | None,
    typer.Option(help="Instead of WORK: the SuperLink, by its name in Flower's config, with the sites behind it."),
]
OtherAlgorithm = Annotated[
    str | None,
    typer.Option(help="Instead of the plan's: fedavg, fedprox, fednova, scaffold, fedbn, dcfed, local, pooled."),
]
SitePlans = Annotated[
    list[str] | None,
    typer.Option(help="With dcfed: SITE=plan.json, a plan with another network or grid; once for each such site."),
]
Rounds = Annotated[int | None, typer.Option(help="The number of rounds, instead of the plan's.")]
Folds = Annotated[
    list[str] | None,
    typer.Option(help="all (default): hold nobody out; 0 to 4: a fifth of each site's patients; cv: all five."),
]
Init = Annotated[Path | None, typer.Option(help="A RUN or a file of weights to start from.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue after the last finished round; with more --rounds, extend the run.")
]
Simulation = Annotated[bool, typer.Option("--simulation", help="Charge ledgers of this run instead of the sites' own.")]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes that make patches; 0: none. Default: a thread on a CPU.", min=0)
]

RunWork = Annotated[
    Path | None, typer.Option(metavar="WORK", help="For preprocessed data and ledgers; default: `work` beside RUN.")
]

# --- what predicts, and what is audited

Model = Annotated[str | None, typer.Option(help="global (the default), a SITE with a model of its own, or student.")]
TheseFolds = Annotated[
    list[str] | None, typer.Option(help="The folds that predict; default: that of all patients, or else every one.")
]
Mirroring = Annotated[bool, typer.Option("--mirroring/--no-mirroring", help="Average predictions of mirrored views.")]
PostprocessingOption = Annotated[
    bool, typer.Option("--postprocessing/--no-postprocessing", help="Apply what improved held-out cases.")
]
SaveProbabilities = Annotated[bool, typer.Option("--save-probabilities", help="Also write the probabilities, as .npz.")]
Kind = Annotated[
    AuditKind,
    typer.Option(
        help="gradient: canaries with large gradients, seconds to minutes; image: a whole training of one site; "
        "labels: the same, attacked by labels of public images alone."
    ),
]
Alpha = Annotated[float, typer.Option(help="The probability that the lower bound is wrong.", min=1e-9, max=0.5)]
InversionOption = Annotated[
    Path | None,
    typer.Option(help="Instead: reconstruct a patch from one update, with and without the mechanism, into this PNG."),
]


def assignments(texts: list[str]) -> dict[str, Any]:
    """Texts FIELD=VALUE as a mapping; a value is JSON if it can be parsed as such, or else text."""
    import json

    settings: dict[str, Any] = {}
    for assignment in texts:
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


def is_given(ctx: typer.Context, parameter: str) -> bool:
    """Whether the option was typed, and is not its default."""
    return ctx.get_parameter_source(parameter) is not ParameterSource.DEFAULT


def count(processes: int) -> int:
    """The number of processes; 0 stands for one per processor."""
    return processes if processes > 0 else os.cpu_count() or 1
