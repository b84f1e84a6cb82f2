"""A score never depends on the batch: every decoder family of transformers that can be built small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf import UnsupportedModelError
from looseleaf_text import LocalModel

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from decoder_families import FAMILIES, Letters, alone, at_most, deviation, rows, small_model  # noqa: E402

TABLE = Path(__file__).parents[3] / "docs" / "how-to" / "decoder-families.md"
SAMPLE = ["llama4_text", "gpt_neo", "opt", "roberta", "mpt", "jamba", "recurrent_gemma", "xlm", "rwkv", "bart"]
TEXTS = ["ab", "abcdefgh", "xyz and more", "qq"]


def checked(model: Any) -> dict[str, Any]:
    """How far scores, texts and vectors of a batch are from those of each row alone, and how the model was run."""
    local = LocalModel(model, Letters())
    heads, tails = rows()
    found: dict[str, Any] = {}
    found["long"] = deviation(local.score_ids(heads, tails), alone(model, heads, tails))
    short, few = [h[:8] for h in heads], [[c[:2] for c in row] for row in tails]
    found["short"] = deviation(local.score_ids(short, few), alone(model, short, few))
    found["texts"] = local.generate(TEXTS, 6) == [local.generate([t], 6)[0] for t in TEXTS]
    found["vectors"] = float(np.abs(local.embed(TEXTS) - np.concatenate([local.embed([t]) for t in TEXTS])).max())
    short_rows, long_rows = local._check(14), local._check(60)
    found["batches"] = [("padded anywhere" if b.left else "padded at the end" if b.right else "one row at a time")
                        for b in (short_rows, long_rows)]
    found["shares"] = [b.shares for b in (short_rows, long_rows)]
    found["limit"] = min((n for n in (local._limit, short_rows.longest) if n), default=None)
    return found


def fine(found: dict[str, Any]) -> bool:
    return found["long"] < 1e-4 and found["short"] < 1e-4 and found["vectors"] < 1e-4 and found["texts"]


@pytest.mark.parametrize("family", SAMPLE)
def test_what_a_row_gives_does_not_depend_on_the_batch(family: str) -> None:
    model = small_model(family)
    found = checked(model)
    assert fine(found), found
    limit = found["limit"]
    if limit is not None:  # the model's own, to the token
        local = LocalModel(model, Letters())
        ids = [20 + n % 60 for n in range(limit)]
        assert np.isfinite(local.score_ids([ids], [[[30]]])).all()
        assert np.isfinite(local.score_ids([ids[:-1]], [[[30, 31]]])).all()
        assert len(local.generate(["a" * (limit - 2)], 3)) == 1
        for refused in (lambda: local.score_ids([[*ids, 30]], [[[30]]]), lambda: local.generate(["a" * limit], 2)):
            with pytest.raises(ValueError, match=f"at most {limit} positions"):
                refused()


@pytest.mark.parametrize("family", ["xlnet", "bert", "roberta"])
def test_what_is_not_causal_is_refused(family: str) -> None:
    """A masked model goes through AutoModelForCausalLM, with a warning at most, and would see its answers."""
    model = small_model(family, **({} if family == "xlnet" else {"is_decoder": False}))
    with pytest.raises(UnsupportedModelError, match="not causal"):
        LocalModel(model, Letters()).score_ids([[30, 31]], [[[32]]])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_with_a_decoder_is_refused(family: str) -> None:
    model = small_model(family, transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(UnsupportedModelError, match="an encoder with a decoder"):
        LocalModel(model, Letters())


@pytest.mark.sweep
@pytest.mark.timeout(1800)
def test_every_family() -> None:
    lines, wrong = [], []
    for family in FAMILIES:
        try:
            with at_most(60):
                model = small_model(family)
                model(torch.tensor([list(range(20, 55))]))
        except Exception as error:  # whatever keeps transformers from building it from numbers alone
            lines.append(f"| {family} | not built: {type(error).__name__} | | | |")
            continue
        try:
            found = checked(model)
        except UnsupportedModelError as error:
            lines.append(f"| {family} | refused: {str(error).partition(': ')[2].partition(' (')[0]} | | | |")
            continue
        if not fine(found):
            wrong.append((family, found))
        ways = list(dict.fromkeys(found["batches"]))
        kept = "yes" if all(found["shares"]) else "no" if not any(found["shares"]) else "up to the window"
        lines.append(f"| {family} | {ways[0]}{f', longer than a window: {ways[1]}' if ways[1:] else ''} | {kept} | "
                     f"{'yes' if max(found['long'], found['short']) < 1e-4 else 'NO'} | {found['limit'] or '-'} |")
    if os.environ.get("LOOSELEAF_WRITE_TABLES"):
        TABLE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    assert not wrong
    assert sum("| yes |" in line for line in lines) > 160


HEAD = """# Decoder families and what a batch means to them

`LocalModel` measures, once for each model, which kinds of padding and sharing it undoes, and goes without the others.
This table is what it finds for every decoder family of transformers that can be built from its configuration with
two small layers, windows of 16 tokens and 96 positions; `LOOSELEAF_WRITE_TABLES=1 python -m pytest -m sweep
packages/looseleaf-text/tests/test_text_families.py` writes it.

- *Padded anywhere*: rows that share a beginning are padded on the left, after the shared part. *Padded at the end*:
  nothing lies between the tokens of a row. *One row at a time*: no batch at all.
- *Shared*: keys, values and states of a common beginning are forwarded once.
- *Agrees*: scores of a batch are within 1e-4 of those of each row alone.
- *Positions*: the longest row, of the 96 in the configuration.

| family | rows are | shared | agrees | positions |
|---|---|---|---|---|
"""
