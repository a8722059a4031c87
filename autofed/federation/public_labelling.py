"""The predictions of a site's ensemble for public images. Those of each member are cached."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autofed.files import digest, whole_folder
from autofed.inference.predictor import combine_members, mean_probabilities
from autofed.inference.pseudo_labels import encode_prediction
from autofed.messages import Arrays
from autofed.plans import Plan
from autofed.preprocessing import PublicImages
from autofed.training.network import build, load_weights


@dataclass(frozen=True)
class Labeller:
    """Public images, the plan of the site that labels them, and the folder that caches each member's predictions.

    Each member makes so many `passes` more over every image, with channels dropping out. Its probabilities, in float16
    on the plan's grid, are in a folder named by its weights and by these settings. `on_image` is called with how many
    images are done, of how many.
    """

    public: PublicImages
    plan: Plan
    folder: Path
    device: str = "cpu"
    passes: int = 0
    on_image: Callable[[int, int], None] = lambda done, total: None

    def label(self, members: Sequence[Arrays]) -> dict[str, np.ndarray]:
        """What an ensemble and its mirrored views say of every image, as `pseudo.encode_prediction` has it.

        `ArithmeticError` if a member says what is no number.
        """
        folders = [self._predict(weights, nth, len(members)) for nth, weights in enumerate(members)]
        self._remove_others(folders)
        return {name: self._combine(name, folders) for name in sorted(self.public.folders)}

    def _predict(self, weights: Arrays, nth: int, members: int) -> Path:
        """The folder of a member's predictions, made unless they are there."""
        member = _digest(weights)
        dropping = f"_{self.passes}_{self.plan.local.network.dropout:g}" if self.passes else ""
        target = self.folder / f"{member}{dropping}"
        if target.is_dir():
            return target
        network = build(self.plan.local.network).to(self.device).eval()
        load_weights(network, weights)
        with whole_folder(target) as part:
            for done, (name, place) in enumerate(self.public.folders.items(), nth * len(self.public.folders) + 1):
                image, seed = self.public.image(name), int(digest([member, name])[:16], 16)
                probabilities = mean_probabilities(
                    network, image, self.plan, self.device, passes=self.passes, seed=seed
                )
                if not np.isfinite(probabilities).all():
                    raise ArithmeticError(f"what the model says of {name} holds NaN or infinite values")
                np.save(part / f"{place.name}.npy", probabilities.astype(np.float16))
                self.on_image(done, members * len(self.public.folders))
        return target

    def _combine(self, name: str, folders: Sequence[Path]) -> np.ndarray:
        place = self.public.folders[name].name
        means = [np.load(folder / f"{place}.npy") for folder in folders]
        return encode_prediction(
            *combine_members(means, self.public.inverse(name), self.plan), is_regions=self.public.labels.is_regions
        )

    def _remove_others(self, folders: Sequence[Path]) -> None:
        for folder in self.folder.iterdir():
            if folder not in folders:
                shutil.rmtree(folder)


def _digest(weights: Arrays) -> str:
    content = hashlib.sha256()
    for name, array in sorted(weights.items()):
        content.update(name.encode() + b"\0" + np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]
