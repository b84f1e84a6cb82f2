"""The reproduction on stand-ins, and the README as it stands."""

import re
from pathlib import Path

import pytest

from looseleaf import Report
from looseleaf.resume import as_plain
from looseleaf.testing.models import tiny_llama, tiny_tokenizer
from looseleaf_lab.study import Results
from looseleaf_word_class import example_texts, reproduction
from looseleaf_word_class.reproduction import Scale, measure, once, study

SMALL = Scale(words=80, hidden=16, steps=32, grammar_steps=2, per_class=40, smollm2=6, per_word=30, permutations=4)


@pytest.fixture
def stand_ins(monkeypatch):
    texts = example_texts(50)
    monkeypatch.setattr(reproduction, "brown", lambda: (texts[:30], texts[30:]))
    monkeypatch.setattr(reproduction.models, "load", lambda name: (tiny_llama(vocabulary=128), tiny_tokenizer()))


def test_every_claim_is_measured_and_decided_by_its_rule(stand_ins):
    rows = [as_plain(measure(seed, SMALL)) for seed in range(2)]
    assert rows[0]["end"]["layers.1"]["next"] < rows[0]["start"]["layers.1"]["next"]
    assert list(rows[0]["steps"]) == ["0", "1", "4", "16", "32"]
    results = Results(rows, as_plain(once(SMALL)), [0, 1], SMALL, quick=False)
    report = study.report(results)
    assert len(report.claims) >= 13
    assert report.claims[0].verdict == "holds"
    assert "not shown at this scale" not in [c.verdict for c in report.claims[:2]]
    assert [t.title for t in report.tables] == [
        "GDV of the next word's class, networks trained on Brown", "More than copying?",
        "Linear probe of the last layer", "Grammars, last layer", "SmolLM2-135M on Brown"]
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()
    quick = study.report(Results(rows[:1], results.once, [0], SMALL, quick=True))
    assert quick.claims[0].verdict == "holds"
    assert {c.verdict for c in quick.claims[1:]} == {"not shown at this scale"}


def test_the_readme_runs_as_it_stands():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    names = {"model": tiny_llama(vocabulary=128), "tokenizer": tiny_tokenizer()}
    blocks = re.findall(r"(<!-- not run.*?-->\n)?```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) > 2
    for skipped, block in blocks:
        if not skipped:
            exec(block, names)
