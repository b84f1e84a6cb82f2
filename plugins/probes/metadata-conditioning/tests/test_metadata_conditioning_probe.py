"""Measures against known answers, and the probe on models of several families."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from looseleaf.testing.models import tiny_gemma3, tiny_llama, tiny_text_llama, tiny_tokenizer
from looseleaf_metadata_conditioning import (
    Documents,
    LevelledPCFG,
    MetadataCollator,
    MetadataProbe,
    enumerate_texts,
    excess_loss,
    grammar_collator,
    grammar_rows,
    small_llama,
    train,
    vocabulary_size,
)
from looseleaf_metadata_conditioning.measures import continuations, fit_probe, hidden_states, token_losses

GRAMMAR = LevelledPCFG.random(3, rule_lengths=(2,), seed=2)
END = GRAMMAR.terminals


class Exact(nn.Module):
    """A "model" that predicts as exact Bayes does, of as many levels as its prefix tells."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.full((*input_ids.shape, vocabulary_size(GRAMMAR)), -torch.inf)
        told = [[(token - END - 3) % 2 for token in row[:3] if token >= END + 3] for row in input_ids.tolist()]
        texts = [[token for token in row[3:] if token < END] for row in input_ids.tolist()]
        following = GRAMMAR.scan(texts).predict(told).log().float()
        for n, text in enumerate(texts):
            logits[n, 2:3 + len(text), :END + 1] = following[n, :len(text) + 1]
        return SimpleNamespace(logits=logits.clamp_min(-1e4))


def test_exact_bayes_has_no_excess_loss_and_metadata_take_off_the_information() -> None:
    documents = GRAMMAR.sample(20, seed=1)
    for depth in (0, 2, 3):
        kl = excess_loss(Exact(), GRAMMAR, documents, depth)
        lengths = torch.tensor([len(text) for text, _ in documents])
        assert torch.equal(kl.isnan(), torch.arange(kl.shape[1]) > lengths[:, None])
        assert float(kl.nan_to_num().abs().max()) < 1e-5
    untrained = excess_loss(small_llama(vocabulary_size(GRAMMAR)), GRAMMAR, documents, 0)
    assert float(untrained.nanmean()) > 0.5
    texts = [enumerate_texts(GRAMMAR, j) for j in GRAMMAR.metadata.tolist()]
    every = [(text, j, p / len(texts)) for j, own in zip(GRAMMAR.metadata.tolist(), texts, strict=True)
             for text, p in own.items()]
    rows = grammar_rows(GRAMMAR, [(text, tuple(j)) for text, j, _ in every])  # type: ignore[misc]
    collator = grammar_collator(GRAMMAR, 3)
    loss = {shown: sum(p * own.sum() for (*_, p), own in zip(
        every, token_losses(Exact(), rows, collator, shown, batch=512, progress=False), strict=True))
        for shown in (False, True)}
    mixed: dict[Any, float] = {}
    for text, _, p in every:
        mixed[text] = mixed.get(text, 0.0) + p
    entropy = -sum(p * math.log(p) for p in mixed.values())
    given = -sum(p * math.log(p * len(texts)) for *_, p in every)
    assert loss[False] == pytest.approx(entropy, abs=1e-4) and loss[True] == pytest.approx(given, abs=1e-4)


def families() -> dict[str, Any]:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"llama": lambda: tiny_llama(), "gemma3": tiny_gemma3,
            "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval(),
            "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=128, n_embd=32, n_layer=2, n_head=4)).eval(),
            "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(
                vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2", "mamba"])
@torch.no_grad()
def test_measures_of_several_families_in_batches_of_mixed_lengths(family: str) -> None:
    model = families()[family]()
    rows = grammar_rows(GRAMMAR, GRAMMAR.sample(5, seed=0))
    for n, row in enumerate(rows):
        row["input_ids"] = row["input_ids"][:9 - n]
    collator = grammar_collator(GRAMMAR, 3)
    states, names = hidden_states(model, rows, collator, (1, 3, 7), progress=False)
    losses = token_losses(model, rows, collator, True, batch=3, progress=False)
    assert states.shape[:3] == (2, 3, 5) and len(names) == 2
    for n, row in enumerate(rows):
        length = len(row["input_ids"])
        ids = torch.tensor([[END + 2] * 3 + row["input_ids"]])
        output = model(ids, output_hidden_states=True)
        after = 0 if family == "mamba" else 1  # Mamba keeps what comes out of layers, others what goes in
        for place, t in enumerate((1, 3, 7)):
            if t > length:
                assert states[:, place, n].isnan().all()
            else:
                torch.testing.assert_close(states[0, place, n], output.hidden_states[after][0, 2 + t], atol=2e-5,
                                           rtol=1e-4)
        told = torch.tensor([collator.prefix(row) + row["input_ids"]])
        own = nn.functional.cross_entropy(model(told).logits[0, 2:-1], told[0, 3:], reduction="none")
        np.testing.assert_allclose(losses[n], own.numpy(), atol=1e-4)
    texts = continuations(model, rows, collator, 6, END, 4, seed=1, progress=False)
    assert [text is None for text in texts] == [len(row["input_ids"]) - (row["input_ids"][-1] == END) < 6
                                                for row in rows]
    for text, row in zip(texts, rows, strict=True):
        if text is not None:
            assert text[:6] == row["input_ids"][:6] and len(text) <= 10 and END not in text
    assert texts == continuations(model, rows, collator, 6, END, 4, seed=1, progress=False)


def test_continuations_follow_the_models_distribution() -> None:
    rows = grammar_rows(GRAMMAR, GRAMMAR.sample(60, seed=3))
    names = [f"level {d}" for d in range(3)]
    told = continuations(Exact(), rows, grammar_collator(GRAMMAR, 3), 2, END, 9, shown=True, progress=False)
    assert all(text and GRAMMAR.derives(text, [row[n] for n in names]) for text, row in zip(told, rows, strict=True))
    untold = continuations(Exact(), rows, grammar_collator(GRAMMAR, 3), 2, END, 9, progress=False)
    right = [bool(text and GRAMMAR.derives(text, [row[n] for n in names]))
             for text, row in zip(untold, rows, strict=True)]
    assert all(text and GRAMMAR.derives(text) for text in untold) and 0.05 < np.mean(right) < 0.95


def test_linear_probes() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(400, 12, generator=draw)
    two = (states[:, 0] + 0.3 * torch.randn(400, generator=draw) > 0).long()
    three = (states[:, 1:4] + 0.2 * torch.randn(400, 3, generator=draw)).argmax(-1)
    labels = torch.stack([two, three], 1)
    probe = fit_probe(states[:200], labels[:200], (2, 3), steps=500)
    right = (probe.predict(states[200:]) == labels[200:]).double().mean(0)
    assert float(right.min()) > 0.8
    scaled = ((states[:200].double() - probe.mean) / probe.scale).numpy()
    theirs = linear.LogisticRegression(C=1 / (2 * 200 * 1e-2), max_iter=2000, tol=1e-8).fit(scaled, three[:200])
    ours = probe.predict(states[200:])[:, 1].numpy()
    assert (ours == theirs.predict(((states[200:].double() - probe.mean) / probe.scale).numpy())).mean() > 0.995
    shuffled = labels[torch.randperm(400, generator=draw)]
    chance = (fit_probe(states[:200], shuffled[:200], (2, 3)).predict(states[200:]) == shuffled[200:]).double().mean(0)
    assert abs(float(chance[0]) - 1 / 2) < 0.11 and abs(float(chance[1]) - 1 / 3) < 0.11
    with pytest.raises(ValueError, match="field 1: expected documents of two classes or more"):
        fit_probe(states, torch.stack([two, torch.zeros_like(two)], 1), (2, 1))


def planted(tokens_told: int, seed: int = 0) -> tuple[Any, Documents]:
    """A model of random weights, and documents whose genre is written in the token number ``tokens_told``."""
    draw = np.random.default_rng(seed)
    rows = []
    for n in range(160):
        ids = draw.integers(3, 8, 12)
        ids[tokens_told - 1] = 40 + n % 2
        rows.append({"input_ids": ids.tolist(), "genre": "ab"[n % 2]})
    collator = MetadataCollator("genre", mask_token=60, tokens={"genre": {"a": 61, "b": 62}})
    return tiny_llama(), Documents(rows, collator)


def test_the_probe_finds_where_the_metadata_were_planted() -> None:
    model, documents = planted(4)
    report = MetadataProbe(prompt_lengths=(3, 4, 12, 13)).run(model, documents, progress=False)
    table = next(t for t in report.tables if t.title.startswith("Probes"))
    accuracy = {row[1]: row[4] for row in table.rows}
    assert accuracy[4] > 0.95 and accuracy[3] < 0.75 and 13 not in accuracy
    assert report.facts["documents shorter than a prompt length (skipped)"] == "160 at 13"
    shuffled = dataclasses.replace(documents, rows=[{**row, "genre": other["genre"]} for row, other in zip(
        documents.rows, np.random.default_rng(1).permutation(documents.rows), strict=True)])  # type: ignore[arg-type]
    table = next(t for t in MetadataProbe(prompt_lengths=(12,)).run(model, shuffled, progress=False).tables
                 if t.title.startswith("Probes"))
    assert abs(table.rows[0][4] - 0.5) < 0.25  # type: ignore[operator]


def test_the_probe_of_wrapped_models_and_of_text() -> None:
    peft = pytest.importorskip("peft")
    rows = [{"text": "the cat sat" if n % 2 else "a dog ran", "genre": ("news", "poem")[n % 2]} for n in range(24)]
    probe = MetadataProbe(prompt_lengths=(1, 5), layers=(-1,))
    plain = probe.run((tiny_text_llama(), tiny_tokenizer()), rows, progress=False)
    adapted = peft.get_peft_model(tiny_text_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    compiled = torch.compile(tiny_text_llama(), backend="eager")
    for model in (adapted, compiled):
        report = probe.run((model, tiny_tokenizer()), rows, progress=False)
        for ours, theirs in zip(report.tables, plain.tables, strict=True):
            for a, b in zip(ours.rows, theirs.rows, strict=True):
                assert a == pytest.approx(b, abs=1e-4) if not isinstance(a[0], str) else a[:2] == b[:2]
    table = next(t for t in plain.tables if t.title.startswith("Probes"))
    assert [row[4] for row in table.rows] == [1.0, 1.0]  # the first letter tells the genre
    losses = plain.tables[0]
    assert losses.rows[0][0] == "2"  # nothing precedes the first token without a prefix


def test_small_models_are_trained_and_measured() -> None:
    probe = MetadataProbe(levels=2, rule_lengths=(2,), depths=(0, 2), steps=3, batch=8, documents=24, hidden=16,
                          hidden_layers=1, prompt_lengths=(1, 3))
    before = torch.random.get_rng_state()
    report = probe.run(None, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [row[0] for row in report.tables[0].rows] == ["no metadata", "2 of 2 levels", "2 of 2 levels, cooldown"]
    assert len(report.tables) == 1 + 3 * 3 and all(row[1] > 0 for row in report.tables[0].rows)
    again = probe.run(None, progress=False)
    assert report.to_dict() == again.to_dict()


def test_training_learns_and_the_cooldown_hides_metadata() -> None:
    rows = grammar_rows(GRAMMAR, GRAMMAR.sample(16 * 60, seed=0))
    model = small_llama(vocabulary_size(GRAMMAR), hidden=32, layers=1)
    losses = train(model, rows, grammar_collator(GRAMMAR, 3), batch=16, lr=1e-2, progress=False)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3 and not model.training
    seen: list[bool] = []

    class Watched(MetadataCollator):
        def __call__(self, rows: Any) -> dict[str, Tensor]:
            batch = super().__call__(rows)
            seen.append(bool((batch["input_ids"][:, 0] >= END + 3).any()))
            return batch

    plain = grammar_collator(GRAMMAR, 3)
    collator = Watched(plain.fields, 3, mask_token=plain.mask_token, tokens=plain.tokens)
    train(model, rows[:160], collator, batch=16, cooldown=0.3, progress=False)
    assert seen == [True] * 7 + [False] * 3 and collator.share == 0.5
    with pytest.raises(ValueError, match="rows: expected 16 or more"):
        train(model, rows[:3], plain, batch=16)
    with pytest.raises(ValueError, match=r"cooldown: expected a number in \[0, 1\)"):
        train(model, rows, plain, cooldown=1.0)


def test_bad_input() -> None:
    model, documents = planted(4)
    subject, rows = (tiny_text_llama(), tiny_tokenizer()), [{"text": "abc", "genre": "ab"[n % 2]} for n in range(40)]
    probe = MetadataProbe(prompt_lengths=(2,))
    alike = [{**row, "genre": "a"} for row in rows]
    for data, message in (([{"text": "a"}], "rows with metadata beside the text"), ("text", "rows such as"),
                          ([], "rows such as"), (alike, "genre: expected documents of two values or more"),
                          (rows[:6], "documents: expected 16 or more")):
        with pytest.raises(ValueError, match=message):
            probe.run(subject, data, progress=False)
    with pytest.raises(ValueError, match="documents: expected 16 or more with 9 tokens"):
        MetadataProbe(prompt_lengths=(9,)).run(subject, rows, progress=False)
    with pytest.raises(ValueError, match=r"layers: expected integers in \[-2, 1\]"):
        MetadataProbe(layers=(2,)).run(model, documents, progress=False)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        probe.run(tiny_text_llama(), rows)
    with pytest.raises(ValueError, match="data: expected None without a subject"):
        probe.run(None, rows)
    for options, message in (({"depths": (6,)}, r"depths: expected integers in \[0, 5\]"),
                             ({"share": 2.0}, r"share: expected a number in \[0, 1\]"),
                             ({"prompt_lengths": ()}, "one length or more"), ({"fields": "genre"}, "a tuple of names"),
                             ({"layers": 3}, "a tuple of indices")):
        with pytest.raises(ValueError, match=message):
            MetadataProbe(**options)
