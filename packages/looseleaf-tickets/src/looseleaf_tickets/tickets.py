"""Tickets: sub-networks together with the weights that their training begins from, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf import Masks
from looseleaf.files import load_tensors, save_tensors, write_text
from looseleaf.resume import as_plain, compare

FORMAT = "looseleaf.ticket/2"
SCHEMA = "looseleaf.tickets/2"


@dataclass
class Ticket:
    """A sub-network and where its training begins.

    Attributes:
        masks: which weights are there (True = kept).
        start: the state of the whole model at ``step``, before masking: name in ``state_dict`` -> tensor on the CPU.
            Tickets of one search share it.
        round: how often weights were removed; 0 is the whole network.
        step: the step of the first training that ``start`` was taken at; 0: the initial weights.
        metrics: what training this ticket gave, by name; empty where it was not trained.
    """

    masks: Masks
    start: dict[str, Tensor]
    round: int = 0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Fraction of the covered weights that is kept, in [0, 1]."""
        return 1.0 - self.masks.sparsity()

    def __repr__(self) -> str:
        found = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items())
        return f"Ticket(round {self.round}, density {self.density:.4f}, from step {self.step}{found})"

    def apply(self, model: nn.Module) -> Masks:
        """Make ``model`` this ticket, ready to be trained, and return the masks that are on it now.

        All weights and buffers take the values of ``start``; removed weights become 0, behind the mask too, so that
        weight decay, momentum and norms of parameters see zeros as well. ``make_permanent`` of the masks ends it.

        Raises:
            ValueError: the ticket is for another model (names or shapes), or the model carries masks.
        """
        self.masks.places(model)
        if Masks.of(model):
            raise ValueError(f"expected a {type(model).__name__} without masks, but it carries masks: take them off "
                             "first (remove or make_permanent)")
        load_state(model, self.start)
        return self.masks.make_permanent(model).apply(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ticket to one safetensors file, atomically; round, step and metrics are JSON in its head.

        Raises:
            ValueError: metadata of the masks that are not JSON.
            OSError: the file cannot be written.
        """
        masks, info = self.masks.pack()
        tensors = {**{f"start/{n}": t for n, t in self.start.items()}, **{f"mask/{n}": t for n, t in masks.items()}}
        facts = {"round": self.round, "step": self.step, "metrics": self.metrics, "masks": info}
        save_tensors(path, tensors, facts, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ticket:
        """Read what :meth:`save` wrote, to the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, cut short, or holds no ticket.
        """
        tensors, facts = load_tensors(path, format=FORMAT)
        try:
            masks = Masks.unpack(_below(tensors, "mask/"), facts["masks"])
            return cls(masks, _below(tensors, "start/"), facts["round"], facts["step"], facts["metrics"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): write it again with Ticket.save"
                             ) from error


class TicketFolder:
    """What a search for tickets has finished, in a folder of its own; without a folder nothing is kept.

    ``search.json`` says which search it is, ``start.safetensors`` holds the weights that tickets begin from,
    ``masks-01.safetensors`` the masks of round 1, ``trained-01.json`` what training that ticket gave. Each is written
    atomically, and ``trained`` of a round after everything else that its training gave: a search that is
    killed at any moment goes on with the first round that has no such file.

    Args:
        folder: where, created when needed; None: keep nothing.
        identity: plain data that tell this search from others; a folder of another search is rejected.

    Raises:
        ValueError: the folder belongs to another search, or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        ours, former = as_plain(identity), self._json("search.json")
        if former is None:
            write_text(self.folder / "search.json", json.dumps({"schema": SCHEMA, "identity": ours}, indent=1) + "\n")
            return
        differences = compare(former["identity"], ours)
        if differences:
            raise ValueError(f"{self.folder} belongs to another search for tickets ({differences}): give another "
                             "folder, or remove it to begin again")

    def trained(self, round: int) -> dict[str, Any] | None:
        """Metrics and number of steps of a finished round, or None."""
        found = self._json(f"trained-{round:02d}.json")
        return None if found is None else {"metrics": found["metrics"], "steps": found["steps"]}

    def keep_trained(self, round: int, metrics: Mapping[str, float], steps: int) -> None:
        """Mark a round as finished."""
        if self.folder is not None:
            text = json.dumps({"schema": SCHEMA, "metrics": dict(metrics), "steps": steps})
            write_text(self.folder / f"trained-{round:02d}.json", text + "\n")

    def masks(self, round: int) -> Masks | None:
        """The masks of a round, or None."""
        if self.folder is None or not self._masks(round).exists():
            return None
        return Masks.load(self._masks(round))

    def keep_masks(self, round: int, masks: Masks) -> None:
        """Keep the masks of a round."""
        if self.folder is not None:
            masks.save(self._masks(round))

    def start(self) -> tuple[dict[str, Tensor], int]:
        """The weights that tickets begin from, and the step that they are from.

        Raises:
            FileNotFoundError, ValueError: the file is gone or damaged.
        """
        assert self.folder is not None
        tensors, info = load_tensors(self.folder / "start.safetensors", format=SCHEMA)
        return tensors, int(info["step"])

    def keep_start(self, state: Mapping[str, Tensor], step: int) -> None:
        """Keep the weights that tickets begin from."""
        if self.folder is not None:
            save_tensors(self.folder / "start.safetensors", state, {"step": step}, format=SCHEMA)

    def _masks(self, round: int) -> Path:
        assert self.folder is not None
        return self.folder / f"masks-{round:02d}.safetensors"

    def _json(self, name: str) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / name).exists():
            return None
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise ValueError(f"expected the schema {SCHEMA!r}, got {found['schema']!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): remove the folder to begin "
                             "again, or give another one") from error
        return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state on the CPU: name in ``state_dict`` -> tensor."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach())
            for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give all weights and buffers the values of ``state``; the parameters stay the same objects.

    Raises:
        ValueError: names or shapes differ; nothing was changed then.
    """
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    odd = sorted(set(own) ^ set(state)) or [n for n, t in own.items() if t.shape != state[n].shape]
    if odd:
        shapes = [tuple(where[odd[0]].shape) if odd[0] in where else "no such tensor" for where in (state, own)]
        raise ValueError(f"this ticket is for another model: {odd[0]!r} is {shapes[0]} in the ticket and {shapes[1]} "
                         f"in this {type(model).__name__}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
