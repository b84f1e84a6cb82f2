"""The encoder as a module of sentence-transformers. Importing this file needs that package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from sentence_transformers.base.modules import InputModule
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("TokenPrependingModule needs sentence-transformers: pip install "
                              "'looseleaf-token-prepending[sentence-transformers]'") from error

from looseleaf_token_prepending.encoder import SentenceEncoder, Settings
from looseleaf_token_prepending.templates import collate


class TokenPrependingModule(InputModule):
    """The first and only module of a ``SentenceTransformer``.

    ``SentenceTransformer(modules=[TokenPrependingModule(encoder)])`` encodes, searches and saves like any other; a
    ``prompt`` of its ``encode`` goes in front of the text, inside the template. Loading a saved one needs
    ``trust_remote_code=True``, as for every module that does not come with sentence-transformers.

    Args:
        encoder: see :class:`SentenceEncoder`; its model is registered, so that ``.to(device)`` and ``.half()`` work.
    """

    config_file_name = "token_prepending.json"

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.model: Any = encoder.model
        self.tokenizer: Any = encoder.tokenizer

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Ids, mask and places of the placeholder: one row for each text and template."""
        texts = self._prepend_prompt(list(inputs), prompt) if prompt else list(inputs)
        ids, mask, at = collate(self.encoder.rows(texts))
        return {"input_ids": ids, "attention_mask": mask, "placeholder": at}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds ``sentence_embedding`` (B, hidden)."""
        made: Tensor = self.encoder.embed(features["input_ids"], features["attention_mask"], features["placeholder"])
        return {**features, "sentence_embedding": made}

    def get_embedding_dimension(self) -> int:
        """Numbers in an embedding."""
        return self.encoder.dimension

    @property
    def max_seq_length(self) -> int | None:
        """Most tokens of prompt and text together; longer texts are cut, with a warning."""
        return self.encoder.limit

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.encoder.settings = dataclasses.replace(self.encoder.settings, max_length=value)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        return {**dataclasses.asdict(self.encoder.settings), "batch_tokens": self.encoder.batch_tokens}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write model (safetensors), tokenizer and settings."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", token: bool | str | None = None,
             cache_folder: str | None = None, revision: str | None = None, local_files_only: bool = False,
             init_defaults: dict[str, Any] | None = None, **kwargs: Any) -> TokenPrependingModule:
        """Read what :meth:`save` wrote, from a folder or the hub; the model comes without its head."""
        from transformers import AutoModel, AutoTokenizer

        config = cls.load_config(model_name_or_path, subfolder=subfolder, token=token, cache_folder=cache_folder,
                                 revision=revision, local_files_only=local_files_only)
        where: dict[str, Any] = {"subfolder": subfolder, "token": token, "cache_dir": cache_folder,
                                 "revision": revision, "local_files_only": local_files_only}
        model = AutoModel.from_pretrained(model_name_or_path, **where, **(kwargs.get("model_kwargs") or {}))
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **where,
                                                  **(kwargs.get("processor_kwargs") or {}))
        batch_tokens = config.pop("batch_tokens")
        settings = Settings(**{**config, "templates": tuple(config["templates"])})
        return cls(SentenceEncoder(model.eval(), tokenizer, settings, batch_tokens))
