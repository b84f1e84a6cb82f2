"""The reproduction runs from end to end on stand-ins; its rules decide what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("looseleaf_lab.study")
pytest.importorskip("peft")
pytest.importorskip("tokenizers")

from looseleaf import Report
from looseleaf_lab.study import Results
from looseleaf_lemo import reproduction as R

torch.set_num_threads(1)
HOLDS, NOT, OPEN = "holds", "does not hold", "not shown at this scale"
SMALL = R.Scale(lengths=(256,), rounds=1, width=32, layers=4, heads=2, words=300, pretrain=2, short=64, batch=2,
                extend=1, steps=2, length=64, block=8, test=2, predictor_steps=4, calibrate=2, stand_in=True)


def test_from_end_to_end(monkeypatch):
    monkeypatch.setattr(R, "in_fresh_process", lambda function, *args: function(*args))
    report = dataclasses.replace(R.study, quick=SMALL)(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 13 and all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert {c.verdict for c in report.claims} == {OPEN}, "the quick run decides nothing"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()
    assert len(report.tables) == 5 and len(report.figures) == 1


def test_memory_by_what_is_kept():
    found = {arm: R.memory_of(arm, 512, False, True) for arm in R.ARMS}
    saved = [found[arm]["saved"] for arm in R.ARMS]
    lora, chunked, fair, blocks, columns, both = saved
    assert lora > chunked >= fair > blocks > both and fair > columns > both
    assert found[R.LEMO]["live"] < found[R.FAIR]["live"] < found[R.LORA]["live"]
    assert found[R.LEMO]["predictors"] > 0 == found["fair + columns left out"]["predictors"]
    assert not any(row["fallbacks"] for row in found.values())


def planted(memory, perplexities, recall, faster):
    """LoRA and the fair arm take ``memory`` times as much as LeMo."""
    lora, fair = memory
    live = {R.LORA: lora, R.FAIR: fair, R.LEMO: 1.0, "+ chunked loss": 5.0, "fair + blocks left out": fair - 0.1,
            "fair + columns left out": fair + 0.1}
    rows = {f"{arm} {n}{' checkpointing' * again}": {"live": 1e9 * v, "saved": 1e9 * v, "resident": 0, "predictors": 0}
            for arm, v in live.items() for again in (False, True) for n in (1024, 2048, 4096)}
    seconds = [1.0, faster, faster - 0.1, faster + 0.1]
    once = {"memory": rows, "time": dict.fromkeys((R.LORA, R.FAIR, R.LEMO), seconds)}
    seeds = [{"perplexity": dict(zip(("untuned", *R.WAYS), (v + noise for v in perplexities), strict=True)),
              "recall": {"predicted": {"4": recall, "5": recall}, "random": {"4": 0.4, "5": 0.4},
                         "most recent": {"4": 0.5, "5": 0.5}}} for noise in (-0.01, 0.0, 0.01)]
    return Results(seeds, once, [0, 1, 2], R.Scale(), False)


@pytest.mark.parametrize("values, expected", [
    (((1.6, 1.3), (30.0, 20.0, 20.2, 21.0, 22.0), 0.95, 1.2),
     [HOLDS, HOLDS, HOLDS, NOT, OPEN, HOLDS, HOLDS, HOLDS, HOLDS, HOLDS, HOLDS]),
    (((1.4, 1.1), (20.0, 21.0, 22.0, 21.5, 21.0), 0.6, 0.8),
     [NOT, NOT, HOLDS, NOT, OPEN, NOT, NOT, NOT, NOT, NOT, NOT]),
    (((1.6, 1.3), (20.0, 20.0, 20.6, 20.6, 20.6), 0.9, 1.05),
     [HOLDS, HOLDS, HOLDS, NOT, OPEN, OPEN, OPEN, OPEN, OPEN, OPEN, OPEN])])
def test_rules(values, expected):
    found = [c.verdict for c in R.study.claims(planted(*values))]
    assert found == [*expected, OPEN, OPEN]


def test_ends_of_a_text_come_first():
    x = torch.zeros(1, 56, 2)
    rows = R.Rows(56, 8)
    scores = R.ends(0, x, rows)
    assert scores[0].argsort(descending=True).tolist() == [0, 6, 1, 5, 2, 4, 3]


def test_tokens_of_mails_and_prose():
    tokenizer, prose, mails = R.corpora(SMALL)
    assert tokenizer.decode(prose[1:50].tolist()) and set(mails) == {"train", "dev", "test"}
    assert R.windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
