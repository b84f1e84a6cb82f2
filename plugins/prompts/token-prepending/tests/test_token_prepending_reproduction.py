"""Judging by a teacher, and the reproduction from end to end on tiny stand-ins for the real models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Report
from looseleaf.testing.models import tiny_tokenizer
from looseleaf_token_prepending.quality import (
    EmbeddingComparison,
    Sentences,
    SentenceSplit,
    square,
    stratified_pairs,
    weighted_spearman,
)

torch.set_num_threads(1)


def some(seed: int = 0, count: int = 40) -> tuple[Sentences, np.ndarray]:
    """Made-up sentences, and embeddings that are the teacher's with noise."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 8))
    teacher = Sentences([f"{seed} {n}" for n in range(count)], ["ab"[n % 2] for n in range(count)], square(vectors))
    return teacher, np.stack([square(vectors + k * rng.normal(size=vectors.shape)) for k in (1.0, 0.2)])


def comparison() -> EmbeddingComparison:
    sets, like = {}, {}
    for n, name in enumerate(("one", "two")):
        sets[name], like[name] = some(n)
    return EmbeddingComparison(sets, [1, 2], {"noisy": like}, [
        {k: SentenceSplit.draw(s, seed) for k, s in sets.items()} for seed in (0, 1)])


def test_pairs_spread_over_the_grades() -> None:
    sentences, _ = some(count=60)
    members = np.arange(5, 60)
    pairs = stratified_pairs(sentences.teacher, members, 300, np.random.default_rng(0))
    assert len(pairs) == len({tuple(p) for p in pairs}) == 300 and set(pairs.ravel()) <= set(members)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    grades = sentences.teacher[pairs[:, 0], pairs[:, 1]]
    plain = sentences.teacher[np.triu_indices(60, 1)]
    assert grades.std() > 1.15 * plain.std()
    counts = np.histogram(grades, 10, (grades.min(), grades.max()))[0]
    assert sorted(counts)[3] > 20, "seven of ten strata have their share"
    every = stratified_pairs(sentences.teacher, members[:6], 300, np.random.default_rng(0))
    assert len(every) == 15


def test_choosing_and_measuring_share_no_sentence() -> None:
    sentences, _ = some()
    one, again, other = (SentenceSplit.draw(sentences, seed) for seed in (3, 3, 4))
    assert set(one.test_pairs.ravel()) <= set(one.test) and not set(one.dev_pairs.ravel()) & set(one.test)
    assert np.array_equal(one.test_pairs, again.test_pairs) and not np.array_equal(one.test, other.test)


def test_resampling_repeats_pairs() -> None:
    made = comparison()
    split = made.splits[0]
    count, statistic = made.resampled(split, ("noisy", 0), ("noisy", 1))
    rng = np.random.default_rng(0)
    rows = np.vstack([np.arange(count), rng.integers(0, count, (3, count))]).astype(float)
    expected = []
    for row in rows:
        values = []
        for n, (name, part) in enumerate(split.items()):
            mine = row[(row >= n * len(part.test)) & (row < (n + 1) * len(part.test))] - n * len(part.test)
            drawn = part.test[mine.astype(int)].tolist()
            pairs = [p for p in part.test_pairs for _ in range(drawn.count(p[0]) * drawn.count(p[1]))]
            i, j = np.array(pairs).T
            values.append([float(weighted_spearman(made.ways["noisy"][name][k][i, j], made.sets[name].teacher[i, j]))
                           for k in (0, 1)])
        one, other = np.mean(values, axis=0)
        expected.append(one - other)
    np.testing.assert_allclose(statistic(rows), expected)
    assert statistic(rows)[0] == pytest.approx(made.correlation(("noisy", 0), split)
                                               - made.correlation(("noisy", 1), split))


def test_the_better_is_chosen_and_has_more_hits() -> None:
    made = comparison()
    assert made.chosen("noisy") == [("noisy", 1)] * 2
    near, far = (made.neighbour_matches(("noisy", k), made.splits[0], teacher=True) for k in (1, 0))
    assert near.shape == (52,) and near.mean() > far.mean()
    assert set(made.neighbour_matches(("noisy", 1), made.splits[0], teacher=False)) <= {0.0, 1.0}


class Letters:
    """A tokeniser for the stand-in of the teacher."""

    def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        rows = [[ord(c) % 61 for c in t][:64] for t in texts]
        width = max(map(len, rows))
        return {"input_ids": torch.tensor([r + [0] * (width - len(r)) for r in rows]),
                "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])}


def stand_in(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "minilm":
        return transformers.BertModel(transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).eval(
        ), Letters()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512)).eval(), tiny_tokenizer()


@pytest.mark.parametrize("quick", [True, False])
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    pytest.importorskip("chatterbot_corpus")
    from looseleaf_token_prepending import reproduction

    monkeypatch.setattr(models, "load", stand_in)
    # the sentences of the documentation take seconds to be gathered, those of conversation none
    monkeypatch.setattr(reproduction, "SETS", {task: (task, 125 if quick else 27) for task in
                                               ("question-topics", "topics")})
    reproduction.embeddings.cache_clear()
    report = reproduction.study(seeds=2, quick=quick, progress=False)
    reproduction.embeddings.cache_clear()
    assert len(report.claims) == 12 and report.facts["seeds"] == (1 if quick else 2)
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert sum("[memory]" in c.paper for c in report.claims) == 3
    assert {c.verdict for c in report.claims} >= ({"not shown at this scale"} if quick else {"does not hold"})
    scores, near = report.tables[:2]
    assert len(scores.rows) == len(near.rows) == (8 if quick else 15)
    for row in scores.rows:
        assert row[4] <= row[3] <= row[5]  # type: ignore[operator]
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    pytest.importorskip("looseleaf_lab")
    from looseleaf_token_prepending.reproduction import study

    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)
