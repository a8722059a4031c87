"""How good the labels are that sites agree on, where the truth is known: on the test images.

    OMP_NUM_THREADS=1 python tests/benchmarks/dcfed_labels.py DATA -o OUT [--federation dermoscopy] [--picture PNG]

Reads the trainings of dcfed.py (OUT, arm dcfed, first seed). Labels of the public images are nowhere, so each site's
ensemble, as that training left it, labels the test images, which nobody was taught; they are put together and gated as
public ones are. Dice of what is fused is told for images that pass and that do not, and beside it that of what the
voxel gates leave; the calibration is of voxels that are a structure or not clearly background.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _federations import Bench, bench, markdown, parser, test_set
from dcfed import SEEDS, runs

from autofed import plans
from autofed.algorithms.dcfed import DCFed
from autofed.api.public_images import with_public_images
from autofed.data import Case
from autofed.data.labels import Labels
from autofed.federation.client import ClientMemory
from autofed.federation.public_labelling import Labeller
from autofed.federation.run_folder import Run
from autofed.inference import pseudo_labels
from autofed.inference.scores import score_case
from autofed.preprocessing import UNKNOWN, open_public
from autofed.report import pseudo_label_pictures

BINS = (0.0, 0.5, 0.65, 0.75, 0.85, 0.95, 1.0)
CLEAR = 0.95
"""Background that is as sure as that and right counts for nothing."""


@dataclass(frozen=True)
class Labelled:
    """The test images of a federation, as the sites of a training label them."""

    work: Bench
    federation: str
    run: Run

    @cached_property
    def plan(self) -> plans.Plan:
        """The run's plan, agreed on the test images as if they were the public ones."""
        made = self.run.plan()
        made = made.model_copy(update={"agreement": made.agreement.model_copy(update={"public_images": ()})})
        return with_public_images(made, (), self._images)

    @property
    def _images(self) -> Path:
        return self.work.data / self.federation / "test" / "imagesTs"

    @cached_property
    def answers(self) -> dict[str, dict[str, np.ndarray]]:
        """What each site's ensemble says."""
        public = open_public(self._images, self.plan, self.work.out / self.federation / "work")
        said = self.run.folder.parent / "said"
        return {site: Labeller(public, self.plan, said / site).label(self._members(site))
                for site in self.run.identity().sites}  # fmt: skip

    def _members(self, site: str) -> list[Mapping[str, np.ndarray]]:
        memory = ClientMemory(self.run.site_folder(site, self.work.fold(self.federation)) / "memory")
        known = memory.recall(self.plan.agreement.training.rounds) or {}
        return [known.get("mean", known["weights"]), *(known[name] for name in sorted(known) if "past" in name)]

    @cached_property
    def algorithm(self) -> DCFed:
        """With the settings of the run."""
        return DCFed(**self.run.plan().agreement.algorithm.settings)

    @cached_property
    def _agreement(self) -> tuple[Mapping[str, np.ndarray], dict[str, float]]:
        return self.algorithm._agree(self.answers, self.plan.agreement.regions_class_order)

    @property
    def agreed(self) -> Mapping[str, np.ndarray]:
        """What passes the gates, by image."""
        return self._agreement[0]

    @cached_property
    def fused(self) -> dict[str, np.ndarray]:
        """Probabilities of all sites together, by image."""
        trust = {site: self._agreement[1][f"trust/{site}"] for site in self.answers}
        return {
            name: pseudo_labels.fuse({site: said[name] for site, said in self.answers.items()}, trust,
                              self.algorithm.temperature, is_regions=False)
            for name in self.agreed
        }  # fmt: skip

    @cached_property
    def truth(self) -> dict[str, Case]:
        """The test cases, by image."""
        cases = test_set(self._images.parent, self.plan)
        return {name: cases.read(name) for name in self.agreed}

    def dice(self, maps: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of label maps by image, over what is not `UNKNOWN` there."""
        found = {name: self._dice(maps[name], case) for name, case in self.truth.items()}
        return {name: dice for name, dice in found.items() if dice is not None}

    def _dice(self, found: np.ndarray, case: Case) -> float | None:
        known = found != UNKNOWN
        labels = self.plan.agreement.labels
        return score_case(found * known, case.label * known, labels, case.spacing_mm, case.id).mean.dice


def main() -> None:
    """Print the tables; draw a picture."""
    told = parser(__doc__, SEEDS)
    told.add_argument("--picture", type=Path, help="where to draw some images, with outlines of the truth")
    args = told.parse_args()
    work = bench(args)
    for federation in args.federation or list(SEEDS):
        first = runs(federation, "dcfed")[0]
        if work.result(first):
            found = Labelled(work, federation, Run(work.folder(first) / "run"))
            print(f"### {federation}\n\n{of_images(found)}\n{of_voxels(found)}", flush=True)
            if args.picture:
                args.picture.write_bytes(picture(found))


def of_images(found: Labelled) -> str:
    """Dice of what is said of images that pass and that do not."""
    said = {"all sites": {name: p.argmax(0) for name, p in found.fused.items()}} | {
        site: {
            name: pseudo_labels.decode_prediction(one, is_regions=False)[0].argmax(0) for name, one in by_image.items()
        }
        for site, by_image in found.answers.items()
    }
    dice = {who: found.dice({name: m.astype(np.uint8) for name, m in maps.items()}) for who, maps in said.items()}
    dice["all sites, voxels that pass"] = found.dice(found.agreed)
    kept = {name for name, one in found.agreed.items() if (one != UNKNOWN).any()}
    groups = {"taught": kept, "refused": set(found.agreed) - kept}
    rows = [(which, str(len(names)), *(average(by_name, names) for by_name in dice.values()))
            for which, names in groups.items()]  # fmt: skip
    return markdown(("images", "number", *(f"Dice, {who}" for who in dice)), rows)


def average(dice: Mapping[str, float], names: Iterable[str]) -> str:
    """Over the images that have a value."""
    found = [dice[name] for name in names if name in dice]
    return f"{np.mean(found):.4f}" if found else "-"


def of_voxels(found: Labelled) -> str:
    """How often voxels are right that are said with some probability; those aside that are background for sure."""
    confidence, right, taught = (np.concatenate(part) for part in zip(*_voxels(found), strict=True))
    inside = {f"{low:g} to {high:g}": (confidence > low) & (confidence <= high)
              for low, high in pairwise(BINS)}  # fmt: skip
    groups = {**inside, "taught": taught, "not taught": ~taught}
    rows = [(which, f"{100 * some.mean():.0f} %", f"{confidence[some].mean():.3f}", f"{right[some].mean():.3f}")
            for which, some in groups.items() if some.any()]  # fmt: skip
    return markdown(("largest probability", "share of voxels", "mean of it", "share that is right"), rows)


def _voxels(found: Labelled) -> Iterator[tuple[np.ndarray, ...]]:
    for name, p in found.fused.items():
        truth = found.truth[name].label
        counts = (p[0] < CLEAR) | (truth > 0)
        yield p.max(0)[counts], (p.argmax(0) == truth)[counts], (found.agreed[name] != UNKNOWN)[counts]


def picture(found: Labelled) -> bytes:
    """Some images beside what passes the gates."""
    shown: list[Any] = []
    for name in pseudo_label_pictures.choose_images(found.agreed):
        case = found.truth[name]
        shown.append(
            pseudo_label_pictures.PseudoLabelledImage(name, case.image, found.agreed[name], case.geometry, case.label)
        )
    return pseudo_label_pictures.draw(shown, Labels.of(found.plan.agreement))


if __name__ == "__main__":
    main()
