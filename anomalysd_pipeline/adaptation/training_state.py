"""Save the learning rate schedule and the averaged weights of a training, as files that run no code when read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

_NUMBERS, _AVERAGE = "training_state.json", "average.safetensors"
_SHADOW = "shadow_params"


class TrainingState:
    """Saves and loads the schedule and the average of one stage.

    Args:
        schedule: a PyTorch learning rate scheduler.
        average: diffusers' `EMAModel`, or None.
    """

    def __init__(self, schedule, average=None):
        self.schedule, self.average = schedule, average

    def save(self, folder) -> None:
        """Writes both into a checkpoint's folder."""
        numbers = {"schedule": self.schedule.state_dict()}
        if self.average is not None:
            state = self.average.state_dict()
            save_file(
                {str(index): value.contiguous() for index, value in enumerate(state[_SHADOW])}, Path(folder, _AVERAGE)
            )
            numbers["average"] = {key: value for key, value in state.items() if key != _SHADOW}
        Path(folder, _NUMBERS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    def load(self, folder) -> None:
        """Reads the files that `save` wrote."""
        numbers = json.loads(Path(folder, _NUMBERS).read_text(encoding="utf-8"))
        self.schedule.load_state_dict(numbers["schedule"])
        if self.average is not None:
            tensors = load_file(Path(folder, _AVERAGE))
            shadow = [tensors[str(index)] for index in range(len(tensors))]
            self.average.load_state_dict({**numbers["average"], _SHADOW: shadow})
