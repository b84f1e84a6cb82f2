"""The reproduction runs from end to end, here on tiny random stand-ins for the real models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("looseleaf_lab.study")

from looseleaf import Masks, Report, prunable_parameters
from looseleaf_essential_sparsity import Curve
from looseleaf_essential_sparsity.reproduction import BODY, iterative, passages, study, train
from looseleaf_lab.study import Results

torch.set_num_threads(1)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: Any, **_: Any) -> Any:
        if isinstance(text, str):
            return {"input_ids": [ord(c) % 61 for c in text]}
        rows = [[ord(c) % 61 for c in t][:128] for t in text]
        longest = max(map(len, rows))
        return {"input_ids": torch.tensor([r + [0] * (longest - len(r)) for r in rows]),
                "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])}


def stand_in(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "minilm":
        small = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=64)
        return transformers.BertModel(small).eval(), Letters()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=512, tie_word_embeddings=True)).eval(), Letters()


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("looseleaf_lab.models")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(models, "load", stand_in)
    report = study(seeds=1, quick=True, progress=False)
    assert len(report.claims) == 9 and report.facts["seeds"] == 1
    assert all(c.rule and c.paper and c.source and c.measured for c in report.claims)
    assert sum("[memory]" in c.paper for c in report.claims) >= 4
    similar = next(c for c in report.claims if "lottery-ticket" in c.statement)
    assert similar.verdict == "holds", "digits and seeds are the real ones here"
    assert Report.from_dict(report.to_dict()).to_text() == report.to_text()


@pytest.mark.parametrize("seeds", [0, -1, 1.5])
def test_bad_seeds(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds"):
        study(seeds=seeds)


def curve(losses: list[float]) -> Curve:
    return Curve([i / 10 for i in range(len(losses))], [[x, x + 0.1, x - 0.1] for x in losses], "perplexity", False,
                 "exp-mean")


def test_a_cliff_and_its_absence() -> None:
    steep, gentle, flat = curve([2, 2, 2, 2.1, 4, 6]), curve([2, 2, 2, 2.05, 2.1, 2.2]), curve([2] * 6)
    found = [next(each for each in study.report(planted(c)).claims if "sharp turn" in each.statement)
             for c in (steep, gentle, flat)]
    assert [claim.verdict for claim in found] == ["holds", "does not hold", "not shown at this scale"]


def planted(measured: Curve) -> Results:
    """Results with this curve everywhere."""
    sweep = {"curves": {"global": dataclasses.asdict(measured)},
             "points": {p: (0.5, [9.0] * 3) for p in ("2:4", "4:8")}}
    row = {"random": [0.5] * 6, "pre-trained": [0.95] * 6, "overlap": [0.5] * 6, "hamming": [0.1] * 6,
           "accuracy": [0.9] * 7, "moved": 0.1}
    once = {"language": sweep, "accuracy": sweep, "encoder": sweep, "text": "", "cost": {
        "seconds": 1.0, "slowest": 1.0, "busy": 1.0, "bytes": None, "weights": 10, "size": 40},
        "counted": {"prunable": 10, "parameters": 12}}
    return Results([row], once, [0], study.quick, True)


def test_falls_beyond_noise_are_found() -> None:
    for losses, words, verdict in (([2, 2.1, 1.5, 2.2], "1 of 3 steps fall beyond noise (at 20%)", "does not hold"),
                                   ([2, 2.1, 2.2], "0 of 2 steps fall beyond noise;", "holds")):
        grows = next(c for c in study.report(planted(curve(losses))).claims if "grows" in c.statement)
        assert words in grows.measured and grows.verdict == verdict


def test_iterative_masks_are_those_of_the_loop_written_out() -> None:
    """Tune, cut what is smallest, put the start weights back; a removed weight keeps the score -1."""
    g = torch.Generator().manual_seed(0)
    data, levels = (torch.rand(80, 64, generator=g), torch.arange(80) % 10), [0.2, 0.36, 0.488]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    start, kept, expected = {k: v.clone() for k, v in model.state_dict().items()}, None, []
    for level in levels:
        if kept is not None:
            kept.apply(model)
        train(model, data, 3)
        if kept is not None:
            kept.remove(model)
        scores = {n: p.detach().abs() for n, p in prunable_parameters(model, BODY).items()}
        flat = torch.cat([(s if kept is None else s.masked_fill(~kept[n], -1.0)).flatten() for n, s in scores.items()])
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[flat.sort(stable=True).indices[:round(level * len(flat))]] = False
        parts = keep.split([s.numel() for s in scores.values()])
        kept = Masks({n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts)})
        expected.append(kept)
        model.load_state_dict(start)
    assert iterative(model, data, levels, 3) == expected
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_too_little_text() -> None:
    with pytest.raises(ValueError, match="passages"):
        passages("a few words", 64)
