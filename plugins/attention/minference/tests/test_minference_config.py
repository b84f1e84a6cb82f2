"""Configuration files: ours, those of the authors' code, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import AttentionCall, attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.models import tiny_llama
from looseleaf_minference import MInference, Pattern
from looseleaf_minference.backend import read

SMALL = {"min_length": 16, "block_size": 16, "last_q": 16}
TWO = [{"0": ["vertical_and_slash", 1000, 6096, 0.96], "1": ["stream_llm", 100, 800, 0.9]},
       {"1": ["block_sparse", 10, 1, 0.5], "0": ["vertical_and_slash", 30, 800, 1.0]}]


def test_the_format_of_the_authors_code(tmp_path: Path) -> None:
    path = tmp_path / "best_pattern.json"
    path.write_text(json.dumps(TWO))
    wanted = [[Pattern("vertical_slash", 1000, 6096, 0.96), Pattern("a_shape", 100, 800, 0.9)],
              [Pattern("vertical_slash", 30, 800, 1.0), Pattern("block_sparse", 100, 0, 0.5)]]
    assert read(path) == read(str(path)) == read(TWO) == wanted
    plugin = MInference()
    plugin.load(path)
    assert plugin.assignment == wanted == MInference(config=path).assignment == MInference(config=TWO).assignment


def test_block_sparse_sizes_count_but_in_the_authors_format() -> None:
    row = ["block_sparse", 30, 0, 0.5]
    ours = [[Pattern("block_sparse", 30, 0, 0.5)]]
    assert read({"0": {"0": row}}) == read([[row]]) == read(ours) == ours
    assert read([{"0": row}])[0][0].first == 100


def test_save_and_load(tmp_path: Path) -> None:
    patterns = [[Pattern("a_shape", 7, 90, 0.25), Pattern("block_sparse", 12, 0, 0.5)],
                [Pattern("vertical_slash", 31, 57, 0.125), Pattern("vertical_slash", 33, 51, 3.0)]]
    plugin = MInference()
    with pytest.raises(ValueError, match="there is no pattern to save: run calibrate"):
        plugin.save(tmp_path / "no.json")
    plugin.assignment = patterns
    plugin.save(tmp_path / "tiny.json")
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert content["1"]["0"] == ["vertical_slash", 31, 57, 0.125]
    other = MInference(config=tmp_path / "tiny.json")
    assert other.assignment == patterns
    other.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "tiny.json").read_text()


def test_a_configuration_of_a_published_shape_runs() -> None:
    """32 layers of 32 heads, as for Llama-3.1-8B, on random weights of that shape cut to two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = [(1000, 6096), (30, 800), (100, 800), (500, 700), (3500, 100)]
    published = [{str(h): ["vertical_and_slash", *sizes[(7 * layer + h) % 5], 0.9] for h in range(32)}
                 for layer in range(32)]
    assert len(read(published)) == 32 and {len(heads) for heads in read(published)} == {32}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=16)).eval()
    ids = torch.randint(0, 64, (1, 1100))
    with torch.no_grad():
        with attach(model, MInference(config=published)), pytest.raises(
                ValueError, match="config: expected 2 layers, as the model has, got 32"):
            model(ids)
        with attach(model, MInference(config=published[:2])) as attached:
            logits = model(ids).logits
    assert bool(torch.isfinite(logits).all())
    assert all(0 < r["density"] <= 1 and "fallback" not in r for r in attached.records) and len(attached.records) == 2
    assert min(min(r["density_by_head"]) for r in attached.records) < 0.99


GOOD = ["vertical_and_slash", 30, 800, 1.0]


@pytest.mark.parametrize(("config", "message"), [
    ([{"0": GOOD, "1": ["vertical_slsh", 30, 800, 1]}], r"layer 0, head 1: expected the pattern stream_llm, .*"
     r"got 'vertical_slsh'.* Did you mean 'vertical_slash'"),
    ([{"0": GOOD}, {"0": [3, 30, 800, 1]}], "layer 1, head 0: expected the pattern stream_llm, .* got 3"),
    ([{"0": GOOD, "2": GOOD}], "layer 0: expected heads 0 to 1, got no head 1"),
    ({"0": {"0": GOOD}, "2": {"0": GOOD}}, "config: expected layers 0 to 1, got no layer 1"),
    ({"first": {"0": GOOD}}, "config: expected integers >= 0 as the names of its layers, got 'first'"),
    ([{"0": ["vertical_and_slash", 30]}],
     r"layer 0, head 0: expected \[pattern, n_v, n_s, score\], got \['vertical_and_slash', 30\]"),
    ([{"0": ["vertical_and_slash", 30.5, 800, 1]}],
     "layer 0, head 0: pattern vertical_slash: expected integers .* got 30.5 and 800"),
    ([{"0": ["vertical_and_slash", -1, 800, 1]}],
     "layer 0, head 0: pattern vertical_slash: expected integers .* got -1 and 800"),
    ([{"0": ["stream_llm", 4, 0, 1]}],
     "layer 0, head 0: pattern a_shape: expected integers >= 0 and >= 1, got 4 and 0"),
    ([{"0": ["vertical_and_slash", 30, 800, "x"]}], "layer 0, head 0: could not convert"),
    ([["vertical_and_slash"]], r"layer 0, head 0: expected \[pattern, .* got 'vertical_and_slash'"),
    ([4], "layer 0: expected .* got 4"),
    ([], r"config: expected .* got \[\]"),
    ("no_such_file.json", "config: expected an existing file, got 'no_such_file.json'. Make one with calibrate"),
])
def test_configurations_that_cannot_be_read(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(config=config)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: expected JSON, got"):
        MInference().load(tmp_path / "x.json")


def test_a_configuration_for_another_model() -> None:
    model = tiny_llama()  # 2 layers of 4 heads
    ids = torch.zeros(1, 100, dtype=torch.long)
    four = {str(h): GOOD for h in range(4)}
    for config, message in (
            ([four], "config: expected 2 layers, as the model has, got 1"),
            ([four] * 3, "config: expected 2 layers, as the model has, got 3"),
            ([{"0": GOOD}] * 2, "config: expected 4 heads in layer 0, as the model has, got 1"),
            ([four, {**four, "4": GOOD}], "config: expected 4 heads in layer 1, as the model has, got 5")):
        with torch.no_grad(), attach(model, MInference(config=config, **SMALL)), \
                pytest.raises(ValueError, match=message):
            model(ids)
    q, k, v = tensors(100)
    with pytest.raises(ValueError, match=r"config: expected layer 3, which the model calls, .* got 1 layers"):
        MInference(config=[four], **SMALL).attend(AttentionCall(q, k, v, 0.2, layer=3))


@pytest.mark.parametrize(("field", "value"), [
    ("last_q", 0), ("last_q", 1.5), ("starting_layer", -1), ("min_length", 0), ("block_size", 48),
    ("forced_columns", -1), ("forced_offsets", 0), ("config", 7)])
def test_bad_parameters(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"MInference\.{field}: expected .*, got {value}$"):
        MInference(**{field: value})
