"""A patch beside what an attacker reconstructs from one update, without and with a mechanism."""

from __future__ import annotations

import numpy as np

from autofed.auditing.inversion import Inversion, ReconstructionMetrics, fit_intensities
from autofed.report import drawing
from autofed.report.drawing import INK, QUIET


def draw_inversion(inversion: Inversion) -> bytes:
    """A PNG with one row a channel: the patch, and both reconstructions in the patch's brightness and contrast.

    Of a volume the middle slice is shown.
    """
    columns = [
        ("the patient's patch", "", inversion.truth),
        ("from a bare update", _figures(inversion.without.likeness), inversion.without.image),
        (f"from one with {inversion.mechanism}", _figures(inversion.protected.likeness), inversion.protected.image),
    ]
    rows = len(inversion.truth)
    figure = drawing.figure(8.4, 0.9 + 2.8 * rows, layout="constrained")
    baselines = f"a blank image {_figures(inversion.blank)}; the label map alone {_figures(inversion.label)}"
    figure.suptitle(f"one local step on one patient; {baselines}", fontsize=8, color=QUIET)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, figures, image) in enumerate(columns):
        fitted = fit_intensities(image, inversion.truth)
        for row, ax in enumerate(axes[:, column]):
            low, high = np.percentile(inversion.truth[row], (0.5, 99.5))
            ax.imshow(_slice(fitted[row]), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0, column].set_title(f"{name}\n{figures}", fontsize=10, color=INK)
    return drawing.png(figure)


def _slice(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else image[len(image) // 2]


def _figures(likeness: ReconstructionMetrics) -> str:
    return f"PSNR {likeness.psnr:.1f} dB, SSIM {likeness.ssim:.2f}"
