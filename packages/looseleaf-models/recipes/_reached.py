"""What a training has reached, kept in one file, so that a killed run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from looseleaf.files import replacing


class Reached:
    """Modules, optimisers and schedules with ``state_dict``, and the number of steps they have had.

    Args:
        path: of the file; None: nothing is kept.
        device: where what is read goes.
        parts: by name.
    """

    def __init__(self, path: Path | None, device: str, **parts: Any) -> None:
        self.path, self.device, self.parts = path, device, parts

    def load(self) -> int:
        """Put back what is kept; the step to go on from, 0 where nothing is."""
        if self.path is None or not self.path.is_file():
            return 0
        saved = torch.load(self.path, weights_only=True, map_location=self.device)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return int(saved["step"])

    def save(self, step: int) -> None:
        """Keep the parts as they are after ``step`` steps."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as part:
                torch.save({**{name: p.state_dict() for name, p in self.parts.items()}, "step": step}, part)
