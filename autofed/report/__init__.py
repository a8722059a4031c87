"""Pictures of predictions, training curves, and one HTML page about an evaluation.

Figures are drawn without pyplot, so that nothing here has a state or needs a screen.
"""

from autofed.report.inversions import draw_inversion
from autofed.report.overlays import overlay
from autofed.report.pages import page
from autofed.report.prediction_pictures import draw_predictions
from autofed.report.pseudo_label_pictures import draw_pseudo_labels
from autofed.report.tables import ranked
from autofed.report.training_curves import curves

__all__ = ["curves", "draw_inversion", "draw_predictions", "draw_pseudo_labels", "overlay", "page", "ranked"]
