"""Wanda and SparseGPT as baselines, as llm-compressor has them; nothing of it is needed where it is not installed."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

METHODS = {"(Wanda)": "WandaPruningModifier", "(SparseGPT)": "SparseGPTModifier"}


def missing() -> str | None:
    """Why there are no such baselines here, or None."""
    if importlib.util.find_spec("llmcompressor") is None:
        return ("llm-compressor is not installed: pip install llmcompressor (it wants its own version of transformers, "
                "so give it an environment of its own)")
    return None


def baselines(tokenizer: Any) -> dict[str, Any]:
    """Name -> maker by sparsity; empty where the package is missing."""
    if missing():
        return {}
    return {name: partial(Published, name, tokenizer) for name in METHODS}


class Published:
    """One method at one sparsity.

    Args:
        name: one of :data:`METHODS`.
        tokenizer: the model's; llm-compressor asks for one, even though the batches are ready.
        sparsity: fraction of the weights of each Linear layer of the body that is removed.
        structure: ``0:0`` anywhere, or a pattern such as ``2:4``.
    """

    def __init__(self, name: str, tokenizer: Any, sparsity: float, structure: str = "0:0") -> None:
        self.name, self.sparsity, self.structure, self.tokenizer = name, sparsity, structure, tokenizer

    def hyperparameters(self) -> dict[str, Any]:
        """What decides the result."""
        return {"name": self.name, "sparsity": self.sparsity, "structure": self.structure}

    def pruned(self, model: Any, batches: Any) -> Any:
        """A pruned copy of ``model``; SparseGPT also changes the weights that are kept.

        Args:
            model: a transformers causal language model, not changed.
            batches: dictionaries with ``input_ids`` and ``attention_mask``, each (1, L).
        """
        import torch
        from llmcompressor import oneshot
        from llmcompressor.modifiers import pruning

        rows: Any = [{k: batch[k][0] for k in ("input_ids", "attention_mask")} for batch in batches]
        out = copy.deepcopy(model)
        if not self.sparsity:
            return out
        recipe = getattr(pruning, METHODS[self.name])(
            sparsity=self.sparsity, mask_structure=self.structure, targets=["Linear"], ignore=["re:.*lm_head"])
        with _quiet():
            oneshot(model=out, processor=self.tokenizer, recipe=[recipe],
                    dataset=torch.utils.data.DataLoader(rows, batch_size=1))
        return out.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its messages and bars, which would break ``--json``, and with the environment it changes put back."""
    from loguru import logger

    before, level = dict(os.environ), logging.root.level
    logger.disable("llmcompressor")
    logger.disable("compressed_tensors")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            logger.enable("llmcompressor")
            logger.enable("compressed_tensors")
            os.environ.clear()
            os.environ.update(before)
            logging.root.setLevel(level)
