"""The part of a plan by which a site preprocesses its data, trains and predicts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from autofed.files import Record
from autofed.plans.kinds import Configuration, Millimetres, Positive, Precision, Shape
from autofed.plans.network import ENCODER, Network, Trained


class TargetGrid(Record):
    """The grid of the preprocessed data. Axes are in the plan's order, which is `transpose` of the file's (z, y, x)."""

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


class Training(Record):
    """How a site trains: patches, batches and the optimiser. Free to differ between sites where only labels travel."""

    patch_size: Shape
    batch_size: int = Field(ge=1)
    steps_per_round: int = Field(ge=1)
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(3e-5, ge=0)
    keep_momentum: bool = False
    """Whether a site's momentum outlives a round, where the algorithm does not reset it (`resets_momentum`).

    Else the optimiser starts anew from the weights that the site is sent.
    """
    trained: Trained = "all"
    """Which weights learn: with "decoder" the encoder stays as it was initialised, which should then be from a trained
    model (`--init`), and neither a private mechanism's clip nor its noise applies to it."""
    gradient_clip: float = Field(12.0, gt=0)
    foreground_share: float = Field(0.33, ge=0, le=1)
    batch_dice: bool = False
    mirror_axes: tuple[int, ...] = ()
    rotate_in_plane_only: bool = False
    precision: Precision = "float32"
    compile: bool = False
    """Whether torch compiles the network: minutes at every site and round, which only long rounds on CUDA repay.

    Elsewhere nothing is compiled, as nnU-Net does it: not on a CPU or MPS, nor on Windows, which Triton leaves out.
    """
    seed: int = 12345

    @property
    def frozen(self) -> tuple[str, ...]:
        """How the names of the weights begin that do not learn."""
        return (ENCODER,) if self.trained == "decoder" else ()

    def learns(self, name: str) -> bool:
        """Whether the weights of this name learn."""
        return not name.startswith(self.frozen)


class LocalPlan(Record):
    """What a site needs to preprocess and train: the same at all sites where weights travel."""

    geometry: TargetGrid
    intensity: Intensity
    network: Network
    training: Training

    @property
    def axes(self) -> int:
        """Of how many axes patches have an edge: two where learning goes slice by slice."""
        return 2 if self.geometry.configuration == "2d" else 3

    def preprocessing_digest(self) -> str:
        """Identifies the preprocessed data: it changes with the grid and the normalisation, and with nothing else."""
        return PreprocessingPlan(geometry=self.geometry, intensity=self.intensity).digest()


class PreprocessingPlan(Record):
    """The two sections that the preprocessed data depend on."""

    geometry: TargetGrid
    intensity: Intensity


class Inference(Record):
    """Sliding window and ensemble: `overlap` of neighbouring windows as a share of the patch, mirrored axes."""

    overlap: float = Field(0.5, ge=0, lt=1)
    mirror_axes: tuple[int, ...] = ()
