"""nnU-Net's own trainer with fewer iterations, which notes when each of them ended.

nnU-Net finds it through `nnUNet_extTrainer` and imports every module that lies in this folder: keep it by itself.
SHORT_TRAINING holds a JSON object of epochs, iterations (in an epoch), seed and clock, the file to write.
"""

import json
import os
import time
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


class ShortTrainer(nnUNetTrainer):
    """The recipe is nnU-Net's; the seed is that of the first weights, for its workers draw patches without one."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.asked = json.loads(os.environ["SHORT_TRAINING"])
        self.num_epochs = self.asked["epochs"]
        self.num_iterations_per_epoch = self.asked["iterations"]
        self.num_val_iterations_per_epoch = 1
        self.ends = []

    def initialize(self):
        torch.manual_seed(self.asked["seed"])
        super().initialize()

    def train_step(self, batch: dict) -> dict:
        result = super().train_step(batch)
        self.ends.append(time.monotonic())
        return result

    def run_training(self):
        super().run_training()
        found = {"ends": self.ends, "threads": torch.get_num_threads(), "workers": get_allowed_n_proc_DA()}
        Path(self.asked["clock"]).write_text(json.dumps(found))

    def perform_actual_validation(self, save_probabilities: bool = False):
        """Left out: the test set is what counts."""
