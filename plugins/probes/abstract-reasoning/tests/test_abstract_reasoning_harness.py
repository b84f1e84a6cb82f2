"""Exported tasks, and the real lm-evaluation-harness on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from looseleaf.testing.models import tiny_text_llama, tiny_tokenizer
from looseleaf_abstract_reasoning import AbstractReasoningProbe, Item, export_harness, from_json_lines
from looseleaf_text import LocalModel

PROBE = AbstractReasoningProbe(shots=4, per_category=4)


def test_plain_files(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    items = PROBE.items()
    tasks = export_harness(items, tmp_path / "tasks and data")
    folder = tmp_path / "tasks and data"
    assert len(tasks) == 5 + 4 * 3 + 1
    group = yaml.safe_load((folder / "looseleaf_abstract_reasoning.yaml").read_text())
    assert group["task"] == tasks
    read: list[Item] = []
    for name in tasks:
        task = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert task["task"] == name and task["output_type"] == "multiple_choice" and task["target_delimiter"] == ""
        data = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert data == (folder / f"{name}.jsonl").resolve()
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        assert {task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]} <= set(lines[0])
        assert all(f"_{line['kind']}" in name and line["category"].replace("-", "_") in name for line in lines)
        read += from_json_lines(data.read_text())
    assert sorted(read, key=str) == sorted(items, key=str)


def test_bad_exports(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group: expected letters, digits and underscores, got 'my tasks'"):
        export_harness(PROBE.items(), tmp_path, group="my tasks")
    with pytest.raises(ValueError, match="expected one item or more, got none"):
        export_harness([], tmp_path)
    assert not list(tmp_path.iterdir())


def compare_with_harness(model: Any, tokenizer: Any, items: list[Item], folder: Path) -> None:
    """Same prompts, same continuations, same tokens, same log-probabilities; the same items right, one by one."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = export_harness(items, folder)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found: Any = lm_eval.simple_evaluate(
        model=harness, tasks=["looseleaf_abstract_reasoning"], log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False))
    local = LocalModel(model, tokenizer)
    rows = local.score([i.prompt for i in items], [i.continuations for i in items])
    ours = {(i.problem, i.kind): (i, row, float(row[i.gold] == max(row))) for i, row in zip(items, rows, strict=True)}
    compared = 0
    for name in tasks:
        right = []
        for sample in found["samples"][name]:
            item, row, correct = ours[sample["doc"]["problem"], sample["doc"]["kind"]]
            requests = [tuple(request[:2]) for request in sample["arguments"]]
            assert requests == [(item.prompt, text) for text in item.continuations]
            heads, tails = local.encode_pairs([item.prompt], [item.continuations])
            assert [harness._encode_pair(*request) for request in requests] == [(heads[0], tail) for tail in tails[0]]
            assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(row, abs=2e-3)
            assert sample["acc"] == correct, item
            right.append(correct)
        assert found["results"][name]["acc,none"] == sum(right) / len(right)
        compared += len(right)
    assert compared == len(items)
    scores = AbstractReasoningProbe().score(local, items, progress=False)
    expected = [correct for _, _, correct in ours.values()]
    assert [score.correct for score in scores] == expected, "without ties both rules are one"


@pytest.fixture
def harness_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_real_harness_on_a_small_model(harness_is_here: None, tmp_path: Path) -> None:
    compare_with_harness(tiny_text_llama(), tiny_tokenizer(), PROBE.items(), tmp_path / "tasks")


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_real_harness_on_smollm2(harness_is_here: None, tmp_path: Path) -> None:
    models = pytest.importorskip("looseleaf_lab.models", reason="looseleaf-lab is not installed")
    items = AbstractReasoningProbe(shots=4, per_category=1).items(seed=7)
    compare_with_harness(*models.load("smollm2"), items, tmp_path / "tasks")
