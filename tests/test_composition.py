"""Parts put together: an attention backend on a pruned model with an adapter, compiled, asked through a prompt."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import looseleaf
from looseleaf import Example, SlidingWindow
from looseleaf.testing.common import assert_unchanged, snapshot
from looseleaf.testing.models import seeded, tiny_text_llama, tiny_tokenizer
from looseleaf_text import LocalModel, TextPrompt

peft = pytest.importorskip("peft")
LABELS = {"good": "good", "bad": "bad"}
EXAMPLES = [Example({"text": text * n}, "good")
            for text, n in (("a fine day ", 30), ("no ", 5), ("rain and snow ", 12))]
BACKENDS = {"exact": lambda: SlidingWindow(window=4096), "window": lambda: SlidingWindow(sink=2, window=16),
            **{p.name: looseleaf.load(p.name, "attention").conformance()["make"]
               for p in looseleaf.plugins("attention") if p.dist.startswith("looseleaf-")}}


def adapted(model: Any) -> Any:
    """With a LoRA adapter whose matrices are not zero."""
    wrapped = seeded(lambda: peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)))
    return wrapped.eval()


def scores(model: Any) -> np.ndarray:
    prompt = TextPrompt("Is it good or bad?", labels=LABELS)
    return np.asarray(prompt.on(LocalModel(model, tiny_tokenizer())).scores(EXAMPLES))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_all_at_once_is_what_the_parts_promise(name: str, compiled: bool) -> None:
    model = tiny_text_llama()
    masks = looseleaf.get("essential-sparsity", sparsity=0.5).prune(model)
    # the promise: the same weights with zeros written into them and the adapter merged, nothing else about the model
    plain = copy.deepcopy(model)
    masks.make_permanent(plain)
    plain = adapted(plain).merge_and_unload()
    before, parts = snapshot(model), copy.deepcopy(model)

    masks.apply(parts)
    whole = adapted(parts)
    asked = torch.compile(whole, backend="eager") if compiled else whole
    with looseleaf.attach(asked, BACKENDS[name]()) as attached:
        together = scores(asked)
        report = attached.report()
    with looseleaf.attach(plain, BACKENDS[name]()):
        np.testing.assert_allclose(together, scores(plain), atol=1e-3)
    assert report.tables, "nothing was recorded"
    if name == "exact":
        np.testing.assert_allclose(together, scores(plain), atol=1e-3)
    # and apart again, in the order in which they were put on
    np.testing.assert_allclose(scores(whole), scores(plain), atol=1e-3)
    masks.remove(whole)
    bare = whole.unload()
    np.testing.assert_allclose(scores(bare), scores(model), atol=1e-5)
    assert_unchanged(before, model)
