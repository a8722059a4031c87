"""The plan: what every site vets and follows. Records, their checks, and what a network costs, without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from autofed.case import labels_problems, site_name_problem
from autofed.files import Record, read_json
from autofed.problems import Problems, refuse

VERSION: Literal[1] = 1

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]
Configuration = Literal["2d", "3d_fullres", "3d_lowres"]
PresetName = Literal["plain", "resenc-m", "resenc-l", "resenc-xl", "dcfed"]

SPATIAL_KERNEL = 7
"""Edge of the kernel that weighs places in the attention blocks of a "dcfed" network."""

_SQUEEZE = 16
_PYRAMID = (1, 3, 3, 3)


def squeezed(channels: int) -> int:
    """Hidden units of the attention blocks' perceptron: a sixteenth of the channels, four at least."""
    return max(4, channels // _SQUEEZE)


Positive = Annotated[int, Field(ge=1)]
Shape = tuple[Positive, ...]
Millimetres = Annotated[float, Field(gt=0)]


class Speed(Record):
    """How fast a device trains: what a step costs by itself and for each unit of its work, and in which precision.

    Measured (`autofed.speed`), and recorded so that the same plan can be made again on another machine. Elements are
    those of all convolutions' outputs, operations those of forward and backward pass, voxels those of the patches that
    are augmented, all channels counted.
    """

    device: Device = "cpu"
    precision: Precision = "float32"
    seconds_per_step: float = Field(ge=0)
    seconds_per_gigaelement: float = Field(ge=0)
    seconds_per_teraflop: float = Field(ge=0)
    seconds_per_megavoxel: float = Field(ge=0)

    @model_validator(mode="after")
    def _not_free(self) -> Self:
        if self.seconds_per_step + self.seconds_per_gigaelement + self.seconds_per_teraflop <= 0:
            raise ValueError("a step costs nothing at this speed; expected one of its costs to be above 0")
        return self

    def seconds(self, network: Network, patch: Shape, batch: int) -> float:
        """Seconds of one training step. Feeding is added although it overlaps: a CPU's cores have to do it too."""
        gigaelements, teraflops = network.work(patch, batch)
        megavoxels = batch * network.in_channels * math.prod(patch) / 1e6
        return (
            self.seconds_per_step
            + self.seconds_per_gigaelement * gigaelements
            + self.seconds_per_teraflop * teraflops
            + self.seconds_per_megavoxel * megavoxels
        )


class Budget(Record):
    """What the plan may cost (memory, hours, privacy) and what was asked for: preset and configuration.

    `speed` is that of this machine, `site_speeds` those that sites measured on their own. `hours` is the time that the
    training takes from start to end: sites with a speed of their own work at the same time, all others one after the
    other on this machine. All speeds are recorded, so that the same plan can be made again anywhere.
    """

    memory_gb: float = Field(8.0, gt=0, le=1e6)
    hours: float | None = Field(None, gt=0, le=1e6)
    device: Device = "cpu"
    speed: Speed | None = None
    site_speeds: dict[str, Speed] = Field(default_factory=dict)
    preset: PresetName = "plain"
    configuration: Configuration | Literal["auto"] = "auto"
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=1)

    @property
    def precision(self) -> Precision:
        """The precision that was faster on every machine."""
        speeds = [*self.site_speeds.values(), *([self.speed] if self.speed else [])]
        return "bfloat16" if speeds and all(s.precision == "bfloat16" for s in speeds) else "float32"

    @property
    def devices(self) -> tuple[Device, ...]:
        """What trains: the kinds of device of all machines whose speed is known, or the one asked for."""
        speeds = [*self.site_speeds.values(), *([self.speed] if self.speed else [])]
        return tuple(sorted({s.device for s in speeds})) or (self.device,)

    def is_measured(self, sites: Collection[str]) -> bool:
        """Whether the speed is known of every machine that trains one of the sites."""
        return self.speed is not None or set(sites) <= set(self.site_speeds)

    def seconds_per_step(self, network: Network, patch: Shape, batch: int, sites: Collection[str]) -> float:
        """Seconds until every site has taken one step: the slowest site counts."""
        remote = [self.site_speeds[s].seconds(network, patch, batch) for s in sites if s in self.site_speeds]
        here = len(sites) - len(remote)
        return max([*remote, *([here * self.speed.seconds(network, patch, batch)] if here and self.speed else [])])


class Algorithm(Record):
    """How the sites learn together: the name of a file in autofed/algorithms and its hyper-parameters."""

    name: str = "fedavg"
    settings: dict[str, float | int | bool | str] = Field(default_factory=dict)


class Privacy(Record):
    """The mechanism that everything leaving a site passes, and its parameters (unit: one patient).

    `sampling_rate` q of patients per step, `patches_per_patient` K, `noise_multiplier` z, `clip` C; `epsilon` and
    `delta` are the promise. With the mechanism "none" nothing is promised and the parameters are None.
    """

    mechanism: str = "none"
    sampling_rate: float | None = Field(None, gt=0, le=1)
    patches_per_patient: int | None = Field(None, ge=1)
    noise_multiplier: float | None = Field(None, ge=0)
    clip: float | None = Field(None, gt=0)
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _nothing_promised_by_none(self) -> Self:
        given = [f"{name} {value:g}" for name, value in self if name != "mechanism" and value is not None]
        if self.mechanism == "none" and given:
            raise ValueError(
                f'the mechanism "none" protects nothing, but {", ".join(given)} promises something; '
                "name a private mechanism, or leave these out"
            )
        return self


class Rounds(Record):
    """How often the sites meet; `snapshots` are the rounds whose weights make the ensemble, fixed beforehand."""

    rounds: int = Field(ge=1)
    snapshots: tuple[int, ...]

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not self.snapshots or any(not 1 <= s <= self.rounds for s in self.snapshots):
            raise ValueError(f"snapshots must be rounds between 1 and {self.rounds}, found {list(self.snapshots)}")
        return self


class Agreement(Record):
    """The part of the plan that all sites share and vet; its digest names the federation's contract."""

    channels: tuple[str, ...]
    labels: dict[str, int]
    dimension: Literal[2, 3]
    patients: dict[str, Positive] = Field(min_length=1)
    algorithm: Algorithm
    training: Rounds
    privacy: Privacy
    public_images: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_and_labels(self) -> Self:
        problems = [problem for site in self.patients if (problem := site_name_problem(site))]
        problems += labels_problems(self.labels)
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Geometry(Record):
    """The grid of the prepared data. Axes are in the plan's order, which is `transpose` of the file's (z, y, x)."""

    configuration: Configuration
    transpose: tuple[int, int, int]
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    median_shape: tuple[Positive, Positive, Positive]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose must hold 0, 1 and 2 once each, found {list(self.transpose)}")
        return self


class Channel(Record):
    """How one channel's intensities are normalised; the numbers are of the federation's foreground, for "ct"."""

    scheme: Literal["zscore", "ct", "rescale_to_0_1", "rgb_to_0_1", "nonorm"]
    mean: float | None = None
    std: float | None = None
    percentile_00_5: float | None = None
    percentile_99_5: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = ("mean", "std", "percentile_00_5", "percentile_99_5") if self.scheme == "ct" else ()
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f'the scheme "ct" needs {", ".join(missing)}')
        return self


class Intensity(Record):
    """Normalisation of each channel; `inside_mask` restricts z-scores to the voxels that are not zero."""

    channels: tuple[Channel, ...]
    inside_mask: bool = False


class Convolution(NamedTuple):
    """One convolution: the stage whose grid its output lies on, its channels, the voxels of its kernel, its role."""

    stage: int
    channels_in: int
    channels_out: int
    kernel: int
    role: Literal["normalised", "bare", "biased", "head", "pooled", "transposed"] = "normalised"

    @property
    def is_head(self) -> bool:
        """Whether its output are logits."""
        return self.role == "head"

    @property
    def taps(self) -> int:
        """Voxels of the kernel that each output voxel sees; a transposed kernel as large as its stride lends one."""
        return 1 if self.role == "transposed" else self.kernel

    @property
    def parameters(self) -> int:
        """Weights; a scale and a shift per channel where it is normalised; biases."""
        extra = {"normalised": 2, "biased": 1, "head": 1}.get(self.role, 0)
        return self.channels_out * (self.channels_in * self.kernel + extra)


class Network(Record):
    """A U-Net stage by stage: features, kernel sizes and strides, and what it costs in parameters and memory.

    "unet" has two convolutions per stage on both ways. "resenc" has residual `blocks` of two convolutions on the way
    down, behind a stem of one, and one convolution on the way up. "dcfed" is a resenc whose stages end in an attention
    block (CBAM) each, the coarsest in atrous spatial pyramid pooling (ASPP), as in DCFed (JBHI 2025).
    """

    kind: Literal["unet", "resenc", "dcfed"] = "unet"
    in_channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    features: Shape
    kernels: tuple[Shape, ...]
    strides: tuple[Shape, ...]
    blocks: tuple[Positive, ...] = ()
    deep_supervision: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stages = len(self.features)
        if stages < 2 or len(self.kernels) != stages or len(self.strides) != stages:
            raise ValueError(
                f"features, kernels and strides need one entry per stage and at least two stages, found "
                f"{stages}, {len(self.kernels)} and {len(self.strides)}"
            )
        if len(self.blocks) != (0 if self.kind == "unet" else stages):
            raise ValueError(f"blocks: a {self.kind} of {stages} stages found {list(self.blocks)}; a unet has none")
        if self.kind == "dcfed" and self.features[-1] % len(_PYRAMID):
            raise ValueError(f"the coarsest features of a dcfed must be a multiple of 4, found {self.features[-1]}")
        even = [kernel for kernel in self.kernels if any(edge % 2 == 0 for edge in kernel)]
        if even:
            raise ValueError(f"kernels must be odd, so that they have a middle, found {even}")
        if any(step != 1 for step in self.strides[0]):
            raise ValueError(
                f"the first stage lies on the patch's own grid: its strides are 1, found {self.strides[0]}"
            )
        return self

    @property
    def divisor(self) -> Shape:
        """What the patch size must be a multiple of, per axis."""
        return tuple(math.prod(s) for s in zip(*self.strides, strict=True))

    def convolutions(self) -> Iterator[Convolution]:
        """Every convolution, in the order in which a patch passes them."""
        for stage, kernel in enumerate(self.kernels):
            yield from self._encoder(stage, math.prod(kernel))
        last = len(self.features) - 1
        for stage in reversed(range(last)):
            width, volume = self.features[stage], math.prod(self.kernels[stage])
            yield Convolution(stage, self.features[stage + 1], width, math.prod(self.strides[stage + 1]), "transposed")
            yield Convolution(stage, 2 * width, width, volume)
            if self.kind == "unet":
                yield Convolution(stage, width, width, volume)
            if stage == 0 or (self.deep_supervision and stage < last - 1):
                yield Convolution(stage, width, self.classes, 1, "head")

    def _encoder(self, stage: int, volume: int) -> Iterator[Convolution]:
        width = self.features[stage]
        before = self.in_channels if stage == 0 else self.features[stage - 1]
        if self.kind == "unet":
            yield Convolution(stage, before, width, volume)
            yield Convolution(stage, width, width, volume)
            return
        if stage == 0:
            yield Convolution(0, before, width, volume)  # the stem
            before = width
        for block in range(self.blocks[stage]):
            yield Convolution(stage, before, width, volume)
            yield Convolution(stage, width, width, volume)
            if before != width or (block == 0 and math.prod(self.strides[stage]) > 1):
                yield Convolution(stage, before, width, 1)  # the shortcut
            before = width
        if self.kind == "dcfed":
            yield from self._pyramid(stage) if stage == len(self.features) - 1 else self._attention(stage)

    def _attention(self, stage: int) -> Iterator[Convolution]:
        width = self.features[stage]
        yield Convolution(stage, width, squeezed(width), 1, "pooled")
        yield Convolution(stage, squeezed(width), width, 1, "pooled")
        yield Convolution(stage, 2, 1, SPATIAL_KERNEL ** len(self.strides[0]), "bare")

    def _pyramid(self, stage: int) -> Iterator[Convolution]:
        width = self.features[stage]
        for edge in _PYRAMID:
            yield Convolution(stage, width, width // len(_PYRAMID), edge ** len(self.strides[0]), "biased")
        yield Convolution(stage, width, width, 1)

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(convolution.parameters for convolution in self.convolutions())

    def stage_voxels(self, patch: Shape) -> list[int]:
        """Voxels of one patch at each stage."""
        sizes, voxels = list(patch), []
        for stride in self.strides:
            sizes = [math.ceil(s / k) for s, k in zip(sizes, stride, strict=True)]
            voxels.append(math.prod(sizes))
        return voxels

    def work(self, patch: Shape, batch: int) -> tuple[float, float]:
        """Of one training step: 10^9 output elements of all convolutions, and 10^12 operations.

        A multiply-add is two operations; the backward pass costs twice the forward pass.
        """
        voxels = self.stage_voxels(patch)
        elements = operations = 0
        for c in (c for c in self.convolutions() if c.role != "pooled"):
            elements += c.channels_out * voxels[c.stage]
            operations += 3 * 2 * c.channels_in * c.channels_out * c.taps * voxels[c.stage]
        return batch * elements / 1e9, batch * operations / 1e12


class Training(Record):
    """How a site trains: patches, batches and the optimiser. Free to differ between sites where only labels travel."""

    patch_size: Shape
    batch_size: int = Field(ge=1)
    steps_per_round: int = Field(ge=1)
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(3e-5, ge=0)
    gradient_clip: float = Field(12.0, gt=0)
    foreground_share: float = Field(0.33, ge=0, le=1)
    batch_dice: bool = False
    mirror_axes: tuple[int, ...] = ()
    rotate_in_plane_only: bool = False
    precision: Precision = "float32"
    seed: int = 12345


class Local(Record):
    """What a site needs to prepare and train: the same at all sites where weights travel."""

    geometry: Geometry
    intensity: Intensity
    network: Network
    training: Training

    @property
    def axes(self) -> int:
        """Of how many axes patches have an edge: two where learning goes slice by slice."""
        return 2 if self.geometry.configuration == "2d" else 3

    def preparation_digest(self) -> str:
        """Names the prepared data: it changes when the grid or the normalisation does, and with nothing else."""
        return Preparation(geometry=self.geometry, intensity=self.intensity).digest()


class Preparation(Record):
    """The two sections that prepared data depends on."""

    geometry: Geometry
    intensity: Intensity


class Inference(Record):
    """Sliding window and ensemble: `overlap` of neighbouring windows as a share of the patch, mirrored axes."""

    overlap: float = Field(0.5, ge=0, lt=1)
    mirror_axes: tuple[int, ...] = ()


class Reason(Record):
    """One decision of the planner: which field, what it became, and why."""

    field: str
    value: str
    why: str


class Plan(Record):
    """Everything that the sites follow. `agreement` is what they vet; `reasons` say why each value is what it is."""

    version: Literal[1] = VERSION
    budget: Budget
    agreement: Agreement
    local: Local
    inference: Inference
    reasons: tuple[Reason, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = _problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def without_reasons(self) -> Plan:
        """The plan without its history: two plans that ask for the same thing are equal in this form."""
        return self.model_copy(update={"reasons": ()})

    def change(self, assignments: dict[str, Any]) -> Plan:
        """A plan with some fields set by hand, each recorded as a reason.

        A field is named by its path or by any ending of it that is unique: `training.rounds`, `batch_size`.
        `Problems` names every field that does not exist, is ambiguous, or takes another kind of value.
        """
        refuse("--set", unknown_fields(assignments))
        tree = self.model_dump(mode="json")
        chosen = {_resolve(name)[0]: value for name, value in assignments.items()}
        planned = {reason.field: reason.value for reason in self.reasons}
        reasons = [(path, value, _by_hand(planned.get(path))) for path, value in chosen.items()]
        reasons += [(path, value, why) for path, value, why in _followers(chosen) if path not in chosen]
        for path, value, _ in reasons:
            _assign(tree, path, value)
        changed = {path for path, _, _ in reasons}
        tree["reasons"] = [reason for reason in tree["reasons"] if reason["field"] not in changed]
        tree["reasons"] += [{"field": path, "value": str(value), "why": why} for path, value, why in reasons]
        return Plan.parse(tree, "the plan with --set")


def unknown_fields(names: Iterable[str]) -> list[str]:
    """What is wrong with names of fields that are to be set by hand: unknown, ambiguous, of the budget, or twice."""
    resolved = [_resolve(name) for name in names]
    paths = [path for path, problem in resolved if not problem]
    twice = [f"{path} is set {paths.count(path)} times; set it once" for path in dict.fromkeys(paths)
             if paths.count(path) > 1]  # fmt: skip
    return [problem for _, problem in resolved if problem] + twice


def _by_hand(planned: str | None) -> str:
    return "set by hand" if planned is None else f"set by hand, instead of {planned}"


def spaced_snapshots(rounds: Any, count: int = 3) -> list[int]:
    """The rounds whose weights make the ensemble: the last, and two before it, a tenth of the training apart.

    Snapshots of neighbouring rounds are nearly one model, and early ones are poor; so they are spaced, and late.
    """
    if not isinstance(rounds, int) or rounds < 1:
        return [rounds]
    gap = max(1, round(rounds / 10))
    return sorted({rounds - i * gap for i in range(count) if rounds - i * gap >= 1})


def _followers(chosen: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What else changes with the fields that were set by hand, unless it was set too: (field, value, why)."""
    if (rounds := "agreement.training.rounds") in chosen:
        snapshots = spaced_snapshots(chosen[rounds])
        yield "agreement.training.snapshots", snapshots, f"the ensemble of {chosen[rounds]} rounds, set by hand"
    if (mirrored := "local.training.mirror_axes") in chosen:
        yield "inference.mirror_axes", chosen[mirrored], "as in training, which was set by hand"


def _resolve(name: str) -> tuple[str, str]:
    """The full path of the field that a name or its unique ending stands for, or else what is wrong with the name."""
    paths = [path for path in _leaves(Plan) if not path.startswith("budget.")]
    matches = [path for path in paths if path == name] or [path for path in paths if path.endswith("." + name)]
    if len(matches) == 1:
        return matches[0], ""
    if matches:
        return "", f"{name} could be {' or '.join(matches)}; write the longer name"
    last = name.rsplit(".", maxsplit=1)[-1]
    if last in Budget.model_fields and name in (last, f"budget.{last}"):
        return "", f"{name} only says what the plan was made for; {_INSTEAD.get(last, 'plan again')}"
    close = [".".join(path.split(".")[-2:]) for path in paths if last[:4] in path.rsplit(".", maxsplit=1)[-1]]
    return "", f"there is no field {name} in a plan; did you mean one of: {', '.join(close or paths)}"


_INSTEAD = {
    "memory_gb": "plan again with --memory",
    "hours": "plan again with --hours",
    "device": "plan again with --device",
    "preset": "plan again with --preset",
    "speed": "it is measured when the plan is made",
    "epsilon": "set agreement.privacy.epsilon",
    "delta": "set agreement.privacy.delta",
}


def _leaves(record: type[Record], prefix: str = "") -> Iterator[str]:
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Record):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        elif name not in ("reasons", "version"):
            yield prefix + name


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        tree = tree[key]
    tree[last] = value


def _problems(plan: Plan) -> list[str]:
    """What no single section can see: that patch, network, grid and agreement fit together."""
    return [*_axes_problems(plan), *_count_problems(plan), *_mirror_problems(plan)]


def _axes_problems(plan: Plan) -> list[str]:
    network, patch, dimension = plan.local.network, plan.local.training.patch_size, plan.agreement.dimension
    problems = []
    configuration = plan.local.geometry.configuration
    axes = plan.local.axes
    if dimension == 2 and plan.local.geometry.transpose[0] != 0:
        found = list(plan.local.geometry.transpose)
        problems.append(f"local.geometry.transpose must begin with 0, the one slice of a picture, found {found}")
    if axes > dimension:
        problems.append(f"local.geometry.configuration is {configuration}, but the data are pictures; write 2d")
    if len(patch) != axes:
        problems.append(f"local.training.patch_size has {len(patch)} axes in a {configuration} plan; write {axes}")
    elif any(len(s) != axes for s in (*network.strides, *network.kernels)):
        problems.append(f"local.network.strides and kernels need {axes} axes each in a {configuration} plan")
    elif any(p % d for p, d in zip(patch, network.divisor, strict=True)):
        nearest = [max(d, round(p / d) * d) for p, d in zip(patch, network.divisor, strict=True)]
        problems.append(
            f"local.training.patch_size {list(patch)} must be a multiple of {list(network.divisor)}; write {nearest}"
        )
    return problems


def _count_problems(plan: Plan) -> list[str]:
    network, agreement = plan.local.network, plan.agreement
    problems = []
    if network.in_channels != len(agreement.channels) or network.classes != len(agreement.labels):
        problems.append(
            f"local.network takes {network.in_channels} channels and {network.classes} classes, the agreement has "
            f"{len(agreement.channels)} and {len(agreement.labels)}"
        )
    if len(plan.local.intensity.channels) != len(agreement.channels):
        problems.append("local.intensity.channels needs one entry per channel of the agreement")
    return problems


def _mirror_problems(plan: Plan) -> list[str]:
    trained, predicted = set(plan.local.training.mirror_axes), set(plan.inference.mirror_axes)
    problems = []
    if not trained <= set(range(plan.local.axes)):
        problems.append(f"mirror_axes may hold 0 to {plan.local.axes - 1}, found {sorted(trained)}")
    if not predicted <= trained:
        problems.append(
            f"inference.mirror_axes {sorted(predicted)} must be among local.training.mirror_axes {sorted(trained)}: "
            "a network knows only the mirror images that it was trained on; set training.mirror_axes, and both follow"
        )
    return problems


def is_plan(path: Path) -> bool:
    """Whether a file looks like a plan, and not like a fingerprint."""
    if path.suffix != ".json" or not path.is_file():
        return False
    value = read_json(path)
    return isinstance(value, dict) and "agreement" in value


def load(path: Path | str) -> Plan:
    """Read a plan; `Problems` names everything that is wrong with it, and a version that this autofed cannot read."""
    value = read_json(Path(path))
    if not isinstance(value, dict) or "agreement" not in value:
        raise Problems(str(path), ["this is not a plan; make one with `autofed plan SITE... -o plan.json`"])
    if value.get("version") != VERSION:
        raise Problems(str(path), [f"the plan has version {value.get('version')!r}, this autofed reads {VERSION}"])
    return Plan.parse(value, str(path))
