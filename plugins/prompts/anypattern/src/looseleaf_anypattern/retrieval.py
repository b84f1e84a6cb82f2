"""What descriptors are searched in, and what the result is worth."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from looseleaf import Example
from looseleaf.files import load_tensors, save_tensors
from looseleaf_anypattern.encoder import encode

FORMAT = "looseleaf.anypattern-index/1"


class Match(NamedTuple):
    """A reference and how well it fits."""

    key: Any
    score: float


def normalized(scores: Tensor, queries: Tensor, backgrounds: Tensor | None, factor: float = 2.0,
               top: int = 10) -> Tensor:
    """Scores minus ``factor`` times the mean of the ``top`` largest scores of each query with background pictures.

    Args:
        scores: (Q, n), n references of any kind.
        queries: (Q, d) descriptors.
        backgrounds: (T, d) descriptors of pictures that are no reference; None, or T = 0: scores as they are. Where
            there are fewer than ``top``, all are taken, with a warning.
    """
    if backgrounds is None or not len(backgrounds) or not factor:
        return scores
    if len(backgrounds) < top:
        warnings.warn(f"background pictures: expected {top} or more for the normalisation of scores, got "
                      f"{len(backgrounds)}: the mean is over all of them", stacklevel=3)
    like = (queries @ backgrounds.T).topk(min(top, len(backgrounds)), 1).values.mean(1, keepdim=True)
    return scores - factor * like


class CopyIndex:
    """Descriptors of references, each stacked on itself: made once, whatever edits come later.

    Args:
        descriptors: (R, d) of length 1.
        keys: one for each: text or numbers.
        backgrounds: (T, d) descriptors of pictures that are no reference, for the normalisation of scores.
        backend: ``faiss`` (exact inner products), ``matmul``, or ``auto``: faiss where it is installed.

    Raises:
        ValueError: not one key for each descriptor, no references, or faiss asked for and not installed.
    """

    def __init__(self, descriptors: Tensor, keys: Sequence[Any], backgrounds: Tensor | None = None, *,
                 backend: Literal["auto", "faiss", "matmul"] = "auto") -> None:
        if not len(descriptors) or len(descriptors) != len(keys):
            raise ValueError(f"CopyIndex: expected references and one key for each, got {len(descriptors)} and "
                             f"{len(keys)}")
        there = importlib.util.find_spec("faiss") is not None
        if backend == "faiss" and not there:
            raise ValueError("backend: expected faiss to be installed, got no such module: pip install "
                             "'looseleaf-anypattern[faiss]', or give backend='matmul'")
        self.descriptors, self.keys = descriptors.float().cpu(), list(keys)
        self.backgrounds = None if backgrounds is None else backgrounds.float().cpu()
        self.backend = "faiss" if there and backend != "matmul" else "matmul"
        if self.backend == "faiss":
            import faiss

            self._faiss = faiss.IndexFlatIP(self.descriptors.shape[1])
            self._faiss.add(self.descriptors.numpy())

    @classmethod
    def of(cls, encoder: Any, references: Mapping[Any, Any], backgrounds: Sequence[Any] = (),
           **options: Any) -> CopyIndex:
        """The index of pictures by key, by what an encoder says of them.

        Args:
            encoder: a :class:`StackedEncoder`, metered or not.
            references: key -> picture.
            backgrounds: other pictures.
            options: ``backend``.
        """
        found = encode(encoder, list(references.values())).descriptor
        behind = encode(encoder, backgrounds).descriptor if len(backgrounds) else None
        return cls(found, list(references), behind, **options)

    def search(self, descriptors: Tensor, k: int = 10, normalize_factor: float = 2.0,
               normalize_top: int = 10) -> list[list[Match]]:
        """The best references of each query, best first.

        Args:
            descriptors: (Q, d).
            k: how many.
            normalize_factor, normalize_top: see :func:`normalized`.
        """
        queries, k = descriptors.float().cpu(), min(k, len(self.keys))
        if self.backend == "faiss":
            scores, rows = (torch.from_numpy(x) for x in self._faiss.search(queries.numpy(), k))
        else:
            scores, rows = (queries @ self.descriptors.T).topk(k, 1)
        scores = normalized(scores, queries, self.backgrounds, normalize_factor, normalize_top)
        return [[Match(self.keys[r], s) for r, s in zip(*both, strict=True)]
                for both in zip(rows.tolist(), scores.tolist(), strict=True)]

    def save(self, path: str | Path) -> None:
        """Write descriptors and keys as safetensors."""
        behind = {} if self.backgrounds is None else {"backgrounds": self.backgrounds}
        save_tensors(path, {"descriptors": self.descriptors, **behind}, {"keys": self.keys}, format=FORMAT)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> CopyIndex:
        """Read what :meth:`save` wrote."""
        tensors, info = load_tensors(path, format=FORMAT)
        return cls(tensors["descriptors"], info["keys"], tensors.get("backgrounds"), **options)


# ---------------------------------------------------------------------------------------------------------- metrics
def precision_recall(scores: np.ndarray, correct: np.ndarray, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each prediction of all queries together, by falling score.

    Of equal scores the wrong ones come first: the worst case, as in the ISC-2021 evaluation that the authors use.

    Args:
        scores: of predictions, any shape.
        correct: of the same shape, bool.
        positives: how many right predictions there could be.
    """
    scores, correct = np.asarray(scores, float).ravel(), np.asarray(correct, bool).ravel()
    hits = correct[np.lexsort((correct, -scores))].cumsum()
    return hits / np.arange(1, len(hits) + 1), hits / max(1, positives)


def micro_average_precision(scores: np.ndarray, correct: np.ndarray, positives: int) -> float:
    """muAP: the area under precision over recall of all predictions together; see :func:`precision_recall`."""
    precision, recall = precision_recall(scores, correct, positives)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def recall_at_precision(scores: np.ndarray, correct: np.ndarray, positives: int, wanted: float = 0.9) -> float:
    """The highest recall at a precision of at least ``wanted``; 0 where that is never reached."""
    precision, recall = precision_recall(scores, correct, positives)
    return float(recall[precision >= wanted].max(initial=0.0))


def recall_at_1(scores: np.ndarray, correct: np.ndarray) -> float:
    """Fraction of queries that have an original whose best reference, alone at that score, is it; scores (Q, R)."""
    scores, correct = np.asarray(scores, float), np.asarray(correct, bool)
    asked = correct.any(1)
    wrong = np.where(correct, -np.inf, scores).max(1)
    return float((np.where(correct, scores, -np.inf).max(1) > wrong)[asked].mean()) if asked.any() else 0.0


@dataclasses.dataclass(frozen=True)
class CopyMetric:
    """A figure of descriptors of queries, references and background pictures; for :class:`looseleaf.SetMetric`.

    Attributes:
        name: ``muAP``, ``recall@1`` or ``recall@p90``.
        normalize_factor, normalize_top: see :func:`normalized`.
        k: predictions of each query that count for muAP and recall@p90.
    """

    name: Literal["muAP", "recall@1", "recall@p90"] = "muAP"
    normalize_factor: float = 2.0
    normalize_top: int = 10
    k: int = 10

    def __call__(self, predictions: Sequence[Any], examples: Sequence[Example]) -> float:
        """From 0 to 1; 0 where no query has an original among the references."""
        roles = [role_of(e) for e in examples]
        found = {role: [n for n, r in enumerate(roles) if r == role] for role in ("query", "reference", "background")}
        if not found["query"] or not found["reference"]:
            raise ValueError(f"{self.name}: expected examples of queries and references, got the roles "
                             f"{sorted(set(roles))}")
        rows = {role: torch.as_tensor(np.array([np.asarray(predictions[n], np.float32) for n in at]))
                for role, at in found.items() if at}
        correct = np.array([[examples[q].target is not None and examples[q].target == examples[r].target
                             for r in found["reference"]] for q in found["query"]])
        return self.of(rows["query"], rows["reference"], rows.get("background"), correct)

    def of(self, queries: Tensor, references: Tensor, backgrounds: Tensor | None, correct: np.ndarray) -> float:
        """The same of descriptors (Q, d), (R, d), (T, d) or None, and which pairs are right, (Q, R) bool."""
        scores = normalized(queries @ references.T, queries, backgrounds, self.normalize_factor, self.normalize_top)
        if self.name == "recall@1":
            return recall_at_1(scores.numpy(), correct)
        best = scores.topk(min(self.k, scores.shape[1]), 1)
        right = np.take_along_axis(correct, best.indices.numpy(), 1)
        measure = micro_average_precision if self.name == "muAP" else recall_at_precision
        return measure(best.values.numpy(), right, int(correct.sum()))


def role_of(example: Example) -> str:
    """``support``, ``query``, ``reference`` or ``background``: what an example of copy detection is for."""
    if "original" in example.inputs:
        return "support"
    role = example.inputs.get("role", "query")
    if role not in ("query", "reference", "background"):
        raise ValueError(f"role: expected 'query', 'reference' or 'background', got {role!r}")
    return str(role)


__all__ = ["CopyIndex", "CopyMetric", "Match", "micro_average_precision", "normalized", "precision_recall",
           "recall_at_1", "recall_at_precision", "role_of"]
