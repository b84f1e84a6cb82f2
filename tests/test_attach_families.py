"""Which way into its attention each decoder family of transformers offers, and whether the result stays the model's."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from looseleaf import AttentionBackend, AttentionCall, Paper, SlidingWindow, UnsupportedModelError, attach

pytest.importorskip("transformers")
from decoder_families import FAMILIES, at_most, small_model
from recording_backends import Takes

ROOT = Path(__file__).parents[1]

TABLE = ROOT / "docs" / "how-to" / "attention-families.md"
SAMPLE = ["llama", "gpt2", "gemma3_text", "deepseek_v2", "gpt_bigcode", "bamba", "gpt_oss", "falcon", "bloom"]
LENGTH, KEPT = 24, 15


@dataclasses.dataclass
class Prefill(AttentionBackend):
    """A method for plain causal prefill, as the plugins have it; what it gives is another result."""

    paper: ClassVar[Paper] = SlidingWindow.paper

    def attend(self, call: AttentionCall) -> torch.Tensor:
        if call.mask is not None:
            return call.fall_back("a mask of the model's own")
        call.record(at_work=1)
        return call.dense() / 2


@dataclasses.dataclass
class Found:
    """What the sweep says of a family."""

    way: str
    layers: str = ""
    prefill: str = ""
    agrees: bool | None = None

    def row(self, family: str) -> str:
        agrees = "" if self.agrees is None else "yes" if self.agrees else "NO"
        return f"| {family} | {self.way} | {self.layers} | {self.prefill} | {agrees} |"


def fused(model: Any) -> list[str]:
    """Names of the modules that call scaled_dot_product_attention themselves."""
    found = []
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "scaled_dot_product_attention" in code.co_names:
            found.append(name)
    return found


def looked_at(model: Any) -> Found:
    """Forwards, generation in every way and queries after a cache, plain and attached."""
    layers = None
    try:
        attach(model, Takes()).detach()
        way = "attention interface"
    except UnsupportedModelError:
        if not (layers := fused(model)):
            attends = any("ttention" in type(m).__name__ and "Rwkv" not in type(m).__name__ for m in model.modules())
            return Found("refused: attention in its own code" if attends else "refused: no attention")
        way = "`layers=...`"
    ids = torch.randint(10, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :7], right[1, -7:] = 0, 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: model(ids).logits, lambda: model(ids, attention_mask=left).logits[left.bool()],
        lambda: model(ids, attention_mask=right).logits[right.bool()]]
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        runs.append(lambda more=more: model.generate(ids, attention_mask=left, **options, **more))
    runs.append(lambda: model.generate(ids[:1].repeat(1, 2), prompt_lookup_num_tokens=3, **options))
    agrees = True
    for run in runs:
        try:
            expected = run()
        except Exception:  # not every model can do everything by itself
            continue
        with attach(model, Takes(), layers):
            agrees &= close(run(), expected)
    with attach(model, Prefill(), layers) as attached:
        runs[0]()
    records = attached.records
    reasons = sorted({record["fallback"] for record in records if "fallback" in record})
    prefill = ", ".join((["yes"] if any("at_work" in r for r in records) else []) + [f"exact: {r}" for r in reasons])
    for count in (1, 5):  # one token, and several, after a cache that the plain model filled
        try:
            expected = model(ids[:, KEPT:KEPT + count], past_key_values=cache(model, ids)).logits
        except Exception:  # a model without a cache
            break
        past = cache(model, ids)
        with attach(model, Prefill(), layers):
            agrees &= close(model(ids[:, KEPT:KEPT + count], past_key_values=past).logits, expected)
    called = len({record["layer"] for record in records})
    windows = any(getattr(m, "sliding_window", None) or getattr(m, "attention_window_size", None)
                  for m in model.modules())
    prefill = prefill or f"exact: {'windows of its layers' if windows else 'attention in its own code'}"
    return Found(way, f"{called} of {len(attached.layers)}", prefill, agrees)


def cache(model: Any, ids: torch.Tensor) -> Any:
    """What the plain model keeps of the first tokens; ValueError: nothing."""
    past = model(ids[:, :KEPT], use_cache=True).past_key_values
    if past is None:
        raise ValueError("no cache")
    return past


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether tokens are the same, or logits nearly."""
    if got.shape != expected.shape:
        return False
    return bool((got.double() - expected.double()).abs().max() <= 1e-4 * (1e-3 + expected.abs().max()))


@torch.no_grad()
def test_the_result_is_the_model_s_own() -> None:
    """A sample of families; the others are in the slow sweep."""
    ways = {}
    for family in SAMPLE:
        found = looked_at(small_model(family))
        assert found.agrees in (None, True), (family, found)
        ways[family] = found.way
    assert ways.pop("falcon") == "`layers=...`" and ways.pop("bloom") == "refused: attention in its own code"
    assert set(ways.values()) == {"attention interface"}


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@torch.no_grad()
def test_every_family() -> None:
    rows, wrong = [], []
    for family in FAMILIES:
        try:
            with at_most(120):
                model = small_model(family)
                model(torch.tensor([list(range(20, 44))]))
        except Exception as error:  # whatever keeps transformers from building it from numbers alone
            rows.append(Found(f"not built: {type(error).__name__}").row(family))
            continue
        found = looked_at(model)
        rows.append(found.row(family))
        if found.agrees is False:
            wrong.append((family, found))
    if os.environ.get("LOOSELEAF_WRITE_TABLES"):
        TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    assert not wrong
    assert sum("attention interface" in row for row in rows) > 120


HEAD = """# Decoder families and the ways into their attention

`looseleaf.attach` reaches the attention of a transformers model through `AttentionInterface`, or, where modules are
named by `layers=...`, through the calls of `scaled_dot_product_attention` inside them. This table has every decoder
family of transformers that can be built from its configuration with two small layers and windows of 16 tokens;
`LOOSELEAF_WRITE_TABLES=1 python -m pytest -m sweep tests/test_attach_families.py` writes it.

- *Way in*. "attention in its own code": the family multiplies queries and keys itself, which nobody can take over;
  attach refuses it. "no attention": states are all that it has. Parts of a refused model that do use the interface,
  such as the language model of GOT-OCR2, can be attached to by themselves.
- *Layers*: attention layers that the text went through, of all that the model has. The others have a sliding window
  of their own, and stay exact, or belong to another kind of input.
- *Sparse prefill*: whether a method for plain causal prefill (FlexPrefill, MInference) is at work on a prompt, and
  why calls fall back to exact attention where they do.
- *Agrees*: with a backend that computes exact attention, logits with padding on either side, greedy and beam search,
  static caches and prompt lookup decoding are those of the plain model; with a method for prefill alone, so is what
  comes after a cache.

| family | way in | layers | sparse prefill | agrees |
|---|---|---|---|---|
"""
