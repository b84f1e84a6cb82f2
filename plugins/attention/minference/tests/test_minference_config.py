"""Configuration files: ours, those of the authors' code, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from looseleaf import attach
from looseleaf.testing.attention import tensors
from looseleaf.testing.models import tiny_llama
from looseleaf_minference import MInference, Pattern
from looseleaf_minference.config import read, write

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
    made = [[Pattern("a_shape", 7, 90, 0.25), Pattern("block_sparse", 12, 0, 0.5)],
            [Pattern("vertical_slash", 31, 57, 0.125), Pattern("vertical_slash", 33, 51, 3.0)]]
    plugin = MInference()
    with pytest.raises(ValueError, match="there is no pattern to save: run calibrate"):
        plugin.save(tmp_path / "no.json")
    plugin.assignment = made
    plugin.save(tmp_path / "mine.json")
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["1"]["0"] == ["vertical_slash", 31, 57, 0.125]
    other = MInference(config=tmp_path / "mine.json")
    assert other.assignment == made
    write(made, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "mine.json").read_text()


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
                ValueError, match="the configuration has 32 layers and the model 2: allowed is equally many"):
            model(ids)
        with attach(model, MInference(config=published[:2])) as attached:
            logits = model(ids).logits
    assert bool(torch.isfinite(logits).all())
    assert all(0 < r["density"] <= 1 and "fallback" not in r for r in attached.records) and len(attached.records) == 2
    assert min(min(r["density_by_head"]) for r in attached.records) < 0.99


GOOD = ["vertical_and_slash", 30, 800, 1.0]


@pytest.mark.parametrize(("config", "message"), [
    ([{"0": GOOD, "1": ["vertical_slsh", 30, 800, 1]}], r"layer 0, head 1 has the unknown pattern 'vertical_slsh': "
     r"allowed is stream_llm, .* Did you mean 'vertical_slash'"),
    ([{"0": GOOD}, {"0": [3, 30, 800, 1]}], "layer 1, head 0 has the unknown pattern 3"),
    ([{"0": GOOD, "2": GOOD}], "layer 0 has 2 heads but no head 1"),
    ({"0": {"0": GOOD}, "2": {"0": GOOD}}, "config has 2 layers but no layer 1"),
    ({"first": {"0": GOOD}}, "config names layer 'first': allowed is a number"),
    ([{"0": ["vertical_and_slash", 30]}], r"layer 0, head 0 is \['vertical_and_slash', 30\]: allowed is \[pattern"),
    ([{"0": ["vertical_and_slash", 30.5, 800, 1]}], "layer 0, head 0: pattern vertical_slash with 30.5 and 800"),
    ([{"0": ["vertical_and_slash", -1, 800, 1]}], "layer 0, head 0: pattern vertical_slash with -1 and 800"),
    ([{"0": ["stream_llm", 4, 0, 1]}], "layer 0, head 0: pattern a_shape with 4 and 0: allowed is whole numbers"),
    ([{"0": ["vertical_and_slash", 30, 800, "x"]}], "layer 0, head 0: could not convert"),
    ([["vertical_and_slash"]], "layer 0, head 0 is 'vertical_and_slash': allowed is"),
    ([4], "layer 0 is 4: allowed is"),
    ([], "config is list, empty"),
    ("no_such_file.json", "config='no_such_file.json': there is no such file. Make one with calibrate"),
])
def test_configurations_that_cannot_be_read(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(config=config)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: is not JSON"):
        MInference().load(tmp_path / "x.json")


def test_a_configuration_for_another_model() -> None:
    model = tiny_llama()  # 2 layers of 4 heads
    ids = torch.zeros(1, 100, dtype=torch.long)
    four = {str(h): GOOD for h in range(4)}
    for config, message in (
            ([four], "the configuration has 1 layers and the model 2"),
            ([four] * 3, "the configuration has 3 layers and the model 2"),
            ([{"0": GOOD}] * 2, "layer 0 of the configuration has 1 heads and that of the model 4"),
            ([four, {**four, "4": GOOD}], "layer 1 of the configuration has 5 heads and that of the model 4")):
        with torch.no_grad(), attach(model, MInference(config=config, **SMALL)), \
                pytest.raises(ValueError, match=message):
            model(ids)
    q, k, v = tensors(100)
    from looseleaf import AttentionCall
    with pytest.raises(ValueError, match="has 1 layers and the model calls layer 3: allowed is 0 to 0"):
        MInference(config=[four], **SMALL).attend(AttentionCall(q, k, v, 0.2, layer=3))


@pytest.mark.parametrize(("field", "value"), [
    ("last_q", 0), ("last_q", 1.5), ("starting_layer", -1), ("min_length", 0), ("block_size", 48),
    ("forced_columns", -1), ("forced_offsets", 0), ("config", 7)])
def test_bad_parameters(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"MInference\.{field}={value}: allowed is"):
        MInference(**{field: value})
