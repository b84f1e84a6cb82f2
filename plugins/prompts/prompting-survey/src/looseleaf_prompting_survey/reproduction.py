"""The survey's claims about ensembles, demonstrations and calibration, measured on SmolLM2-135M and real texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from looseleaf import Claim, Report
from looseleaf.statistics import bootstrap, paired
from looseleaf.testing.models import seeded
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, add_table, curve, resampled
from looseleaf_prompting_survey import concepts
from looseleaf_prompting_survey.augment import PromptAugmenter
from looseleaf_prompting_survey.ensemble import accuracy_weights, likelihood_weights, score_rows, target_places
from looseleaf_prompting_survey.templates import default_pool
from looseleaf_text import LanguageModel, LocalModel, MaskedModel, TextTask
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_text.ensemble import combine

TASKS = {"sentiment": {"train": 24, "dev": 32, "test": 60}, "question-topics": {"train": 24, "dev": 33, "test": 60}}
SHOTS, SOURCE = 4, "this project's rule, fixed before measuring"
METHODS = ("manual template", "mean single template", "uniform ensemble", "majority vote", "ensemble by accuracy",
           "ensemble by likelihood", "demonstrations")
VARIANTS = ("plain", "calibrated")
CLOZE = ["answer search", "answer mapping", "cloze prompt", "ensembling", "calibration"]  # on the masked model


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: the divisor of the numbers of texts."""

    divisor: int = 1


@functools.cache
def _model() -> LocalModel:
    return LocalModel(*models.load("smollm2", dtype=models.fast_dtype()))


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Task -> what :func:`compare` gives, on one split of its texts."""
    return {name: compare(data.classification_task(name, seed, **{k: n // scale.divisor for k, n in sizes.items()}),
                          _model(), seed) for name, sizes in TASKS.items()}


def compare(task: TextTask, model: LanguageModel, seed: int) -> dict[str, Any]:
    """Test accuracies; every template is asked once, and what the methods make of the answers is arithmetic.

    Returns:
        ``plain`` and ``calibrated``: method (see :data:`METHODS`) -> accuracy; ``singles``: accuracy of each template,
        plain and calibrated; ``weights``: by likelihood, without calibration.
    """
    pool = [t.to_prompt(task.labels) for t in default_pool(task)]
    prompts = [*pool, PromptAugmenter(shots=SHOTS).augment(pool[0], task, seed=seed)]
    targets, empty = target_places(task, task.dev), content_free(task.test[0].inputs)
    dev = [task.class_scores(p.on(model), task.dev) for p in pool]
    test = [task.class_scores(p.on(model), task.test) for p in prompts]
    leaning = [offsets(task.class_scores(p.on(model), empty)) for p in prompts]
    out: dict[str, Any] = {"singles": []}
    for way in VARIANTS:
        on_dev, (*members, shown) = ([subtract(rows, o) if way == "calibrated" else rows
                                      for rows, o in zip(part, leaning, strict=False)] for part in (dev, test))
        single = [score_rows(task, rows, task.test) for rows in members]
        by_likelihood = likelihood_weights(on_dev, targets)
        others = (combine(members), combine(members, vote=True), combine(members, accuracy_weights(on_dev, targets)),
                  combine(members, by_likelihood), shown)
        out[way] = dict(zip(METHODS, [single[0], sum(single) / len(single), *(
            score_rows(task, rows, task.test) for rows in others)], strict=True))
        out["singles"].append(single)
        out.setdefault("weights", by_likelihood)
    return out


def examples(scale: Scale) -> dict[str, Any]:
    """The text of every concept's example on SmolLM2 in float32, and of some on a masked model."""
    model, dtype = _model(), str(_model().model.dtype).split(".")[-1]
    model.model.float()  # the training example takes gradients
    shown = {"SmolLM2": concepts.run(model),
             "BERT with random weights, for the mechanics": concepts.run(random_bert(), CLOZE)}
    _model.cache_clear()
    return {"examples": [[f"{name} ({who})", text] for who, texts in shown.items() for name, text in texts.items()],
            "dtype": dtype, "threads": torch.get_num_threads()}


def random_bert() -> MaskedModel:
    """A BERT with random weights and a tokenizer of single letters: cloze prompts without a real masked model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(c) for c in range(32, 127))]
    made = Tokenizer(models.WordLevel({t: n for n, t in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **{
        f"{piece[1:-1].lower()}_token": piece for piece in pieces[:5]})
    return MaskedModel(seeded(lambda: BertForMaskedLM(BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512))).eval(), tokenizer)


def _runs(results: Results, *tasks: str) -> list[dict[str, Any]]:
    """What each seed gave on each of the tasks; none named: on all."""
    return [row[task] for task in tasks or results.rows[0] for row in results.rows]


def show(report: Report, results: Results) -> None:
    """Accuracies of methods and templates, their spread, the weights, and the concepts' examples."""
    runs = _runs(results)
    report.facts |= {"model": "SmolLM2-135M-Instruct", **{k: results.once[k] for k in ("dtype", "threads")},
                     "templates": len(runs[0]["singles"][0]), "demonstrations": SHOTS, "runs": len(runs)}
    tasks = list(results.rows[0])
    of = {**{name: _runs(results, name) for name in tasks}, "all": _runs(results)}
    add_table(report, "Test accuracy: mean over runs and 95 % bootstrap interval", (
        {"task": name, "method": method, **{way: bootstrap([r[way][method] for r in runs]) for way in VARIANTS}}
        for name, runs in of.items() for method in METHODS))
    add_table(report, "Spread over templates", (
        {"task": name, "seed": seed, **{f"variance {way}": float(np.var(single))
                                        for way, single in zip(VARIANTS, run["singles"], strict=True)}}
        for name in tasks for seed, run in zip(results.seeds, of[name], strict=True)))
    for name, runs in of.items():
        lines = np.mean([r["singles"] for r in runs], axis=0)
        report.figure(f"Accuracy of each template, {name}", x_label="template", y_label="test accuracy", series=[
            curve(way, range(len(line)), line) for way, line in zip(VARIANTS, lines, strict=True)])
    report.arrays |= {f"weights {name} {seed}": run["weights"]
                      for name in tasks for seed, run in zip(results.seeds, of[name], strict=True)}
    report.examples += map(tuple, results.once["examples"])


def claims(results: Results) -> Iterator[Claim]:
    """The survey's claims, and those of the work it names."""
    runs = _runs(results)
    for kind, method in (("weighted", "ensemble by likelihood"), ("uniform", "uniform ensemble")):
        gap = paired([r["plain"][method] for r in runs], [r["plain"]["mean single template"] for r in runs])
        yield results.claim(f"A {kind} ensemble is at least as good as the mean of its templates",
                            f"survey, section 5.1; {SOURCE}", "-", "mean paired difference over runs is 0 or more",
                            gap.value >= 0, f"{gap:+.3f} test accuracy over {len(runs)} runs")
    before, after = (np.array([np.var(r["singles"][k]) for r in runs]) for k in (0, 1))
    ratio = resampled(len(runs), lambda i: after[i].mean(-1) / np.maximum(before[i].mean(-1), 1e-12))
    yield results.claim("Calibration brings the accuracies of different templates together",
                        f"Zhao et al. 2021, section 5; {SOURCE}", "-",
                        "mean variance with calibration, over that without, is below 1", ratio.value < 1,
                        f"variance of test accuracy over templates {ratio:.2f} times that without calibration; "
                        f"{len(runs)} runs")
    for statement, paper, needs in (
            ("An ensemble of mined and paraphrased prompts finds far more facts than single manual ones",
             "LAMA from 31.1 % to 39.6 % (Jiang et al. 2020) [memory]", "BERT-large and the LAMA facts"),
            ("The larger the model, the nearer prompt tuning comes to tuning the whole model",
             "equal at some 10 billion parameters (Lester et al. 2021) [memory]", "models of billions of parameters")):
        yield results.claim(statement, "survey, sections 3 and 5, of the work named", paper, "none set", None,
                            f"not measured: needs {needs}")


study = Study("Prompting in parts: ensembles, demonstrations, calibration", measure, claims, show, once=examples,
              full=Scale(), quick=Scale(divisor=3), quick_seeds=1)
