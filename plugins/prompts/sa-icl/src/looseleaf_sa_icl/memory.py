"""The memory of solved problems with their schemas, searched by cosine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from looseleaf.files import load_tensors, save_tensors
from looseleaf.prompts.prompt import storable
from looseleaf_sa_icl.schema import Schema
from looseleaf_text.encoders import Encoders, unit_vectors

FORMAT = "looseleaf.sa-icl.memory/1"
ENCODERS = Encoders("SA-ICL", "looseleaf-sa-icl", longest=256)
"""MiniLM was made to read 256 tokens."""


@storable
@dataclasses.dataclass(frozen=True)
class SolvedProblem:
    """A problem of the memory.

    Attributes:
        question: with its candidates, as it is shown.
        answer: the text of the right answer.
        explanation: a worked one; may be empty.
        schema: field -> text.
        identity: tells the problem from all others, also from those with the same question.
    """

    question: str
    answer: str
    explanation: str = ""
    schema: Schema = dataclasses.field(default_factory=dict)
    identity: str = ""


@storable
@dataclasses.dataclass
class SchemaMemory:
    """Solved problems and the embeddings of their schemas.

    Attributes:
        items: the problems.
        vectors: (problems, dimensions) float32 of length 1 (or 0).
    """

    items: list[SolvedProblem] = dataclasses.field(default_factory=list)
    vectors: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, 0))

    def __len__(self) -> int:
        return len(self.items)

    def add(self, items: Sequence[SolvedProblem], vectors: Any) -> None:
        """Put problems into the memory.

        Args:
            items: n problems.
            vectors: (n, dimensions) of any length.

        Raises:
            ValueError: not one vector for each, of another size than those in the memory, or not finite.
        """
        unit = normalised(vectors, len(items))
        if self.items and unit.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"vectors: expected {self.vectors.shape[1]} dimensions, as in the memory, got "
                             f"{unit.shape[1]}")
        self.vectors = torch.cat([self.vectors, unit]) if self.items else unit
        self.items = [*self.items, *items]

    def search(self, vectors: Any, top_k: int = 1, min_similarity: float = 0.0, max_similarity: float = 1.0,
               exclude: Sequence[str | None] | None = None) -> list[list[tuple[int, float]]]:
        """The nearest problems of each query, the nearest first, equals in the order of the memory.

        Args:
            vectors: (n, dimensions).
            top_k: how many at most.
            min_similarity, max_similarity: the range in which their cosine lies, ends included.
            exclude: for each query the identity of the problem that is never returned; None: nothing is left out.

        Returns:
            For each query (number in the memory, cosine).
        """
        queries = normalised(vectors, len(vectors))
        if not self.items:
            return [[] for _ in range(len(queries))]
        # rounding must not push equal texts out of the range
        cosines = (queries.double() @ self.vectors.double().T).clamp(-1, 1).numpy().round(7)
        found = []
        for row, left_out in zip(cosines, exclude or [None] * len(queries), strict=True):
            order = [int(n) for n in np.argsort(-row, kind="stable") if min_similarity <= row[n] <= max_similarity
                     and (left_out is None or self.items[n].identity != left_out)]
            found.append([(n, float(row[n])) for n in order[:top_k]])
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to one safetensors file, the problems as JSON in its metadata."""
        items = [dataclasses.asdict(item) for item in self.items]
        save_tensors(path, {"vectors": self.vectors}, {"items": items}, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SchemaMemory:
        """Read what :meth:`save` wrote; errors as of :func:`looseleaf.files.load_tensors`."""
        tensors, info = load_tensors(path, format=FORMAT)
        return cls([SolvedProblem(**item) for item in info["items"]], tensors["vectors"])


def normalised(vectors: Any, count: int) -> torch.Tensor:
    """The :func:`looseleaf_text.encoders.unit_vectors` as a tensor."""
    return torch.from_numpy(unit_vectors(vectors, count))


__all__ = ["ENCODERS", "SchemaMemory", "SolvedProblem", "normalised"]
