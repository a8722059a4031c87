"""nnU-Net's own training command with fewer iterations, which notes when each of them ended; for nnU-Net's Python.

    ENV/bin/python _nnunet_train.py '{"epochs": 12, "iterations": 25, "seed": 0, "clock": "clock.json"}' DATASET ...

`iterations` are those of an epoch, `clock` is the file to write; what follows is what nnUNetv2_train takes. nnU-Net's
trainer is changed in place: one of another name would be looked for in all of its modules, each of which is imported
for that, and they would count as its memory.
"""

import json
import sys
import time
from functools import wraps
from pathlib import Path

import torch
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


def shorten(asked: dict) -> None:
    """Length and first weights as asked for, one validation patch an epoch, and no validation in the end."""
    ends = []
    initialize, train_step, run_training = (
        nnUNetTrainer.initialize,
        nnUNetTrainer.train_step,
        nnUNetTrainer.run_training,
    )

    @wraps(initialize)
    def short_initialize(self):
        self.num_epochs, self.num_iterations_per_epoch = asked["epochs"], asked["iterations"]
        self.num_val_iterations_per_epoch = 1
        torch.manual_seed(asked["seed"])
        initialize(self)

    @wraps(train_step)
    def timed_step(self, batch):
        result = train_step(self, batch)
        ends.append(time.monotonic())
        return result

    @wraps(run_training)
    def noted_training(self):
        run_training(self)
        found = {"ends": ends, "threads": torch.get_num_threads(), "workers": get_allowed_n_proc_DA()}
        Path(asked["clock"]).write_text(json.dumps(found))

    nnUNetTrainer.initialize, nnUNetTrainer.train_step = short_initialize, timed_step
    nnUNetTrainer.run_training = noted_training
    nnUNetTrainer.perform_actual_validation = lambda self, save_probabilities=False: None


if __name__ == "__main__":
    shorten(json.loads(sys.argv.pop(1)))
    run_training_entry()
