"""The survey's claims about ensembles, demonstrations and calibration, measured on SmolLM2-135M and real texts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch

from looseleaf import Report, Series
from looseleaf.statistics import bootstrap, paired
from looseleaf.testing.models import seeded
from looseleaf_lab import data, models
from looseleaf_lab.study import Decision, Results, Study, StudyClaim
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
CLOZE = ["answer search", "answer mapping", "cloze prompt", "ensembling", "calibration"]  # on the masked model


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: the divisor of the numbers of texts."""

    divisor: int = 1


@functools.cache
def _model() -> LocalModel:
    # bfloat16 where the processor multiplies it by itself and is several times as fast; elsewhere it would be slower
    return LocalModel(*models.load("smollm2", dtype=torch.bfloat16 if models.bfloat16_is_fast() else torch.float32))


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
    for way in ("plain", "calibrated"):
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


def facts(results: Results) -> dict[str, Any]:
    """Model, templates and runs."""
    runs = _runs(results)
    return {"model": "SmolLM2-135M-Instruct", **{k: results.once[k] for k in ("dtype", "threads")},
            "templates": len(runs[0]["singles"][0]), "demonstrations": SHOTS, "runs": len(runs)}


def show(report: Report, results: Results) -> None:
    """Accuracies of methods and templates, their spread, the weights, and the concepts' examples."""
    table = report.table("Test accuracy: mean over runs and 95 % bootstrap interval",
                         ["task", "method", "plain", "low", "high", "calibrated", "low ", "high "])
    spread = report.table("Spread over templates", ["task", "seed", "variance plain", "variance calibrated"])
    for name, tasks in [*((task, [task]) for task in results.rows[0]), ("all", [])]:
        runs = _runs(results, *tasks)
        for method in METHODS:
            table.add(name, method, *(number for way in ("plain", "calibrated")
                                      for number in bootstrap([r[way][method] for r in runs])))
        lines = [np.mean([r["singles"][k] for r in runs], axis=0).tolist() for k in (0, 1)]
        report.figure(f"Accuracy of each template, {name}", x_label="template", y_label="test accuracy", series=[
            Series(way, [float(n) for n in range(len(line))], line)
            for way, line in zip(("plain", "calibrated"), lines, strict=True)])
        for seed, run in zip(results.seeds, runs, strict=True) if tasks else ():
            spread.add(name, seed, *(float(np.var(single)) for single in run["singles"]))
            report.arrays[f"weights {name} {seed}"] = run["weights"]
    report.examples += map(tuple, results.once["examples"])


def at_least_the_mean(method: str, results: Results) -> Decision:
    """Whether an ensemble is at least as good as the mean of its templates."""
    runs = _runs(results)
    gap = paired([r["plain"][method] for r in runs], [r["plain"]["mean single template"] for r in runs])
    return None if results.quick else gap.value >= 0, f"{gap:+.3f} test accuracy over {len(runs)} runs"


def together(results: Results) -> Decision:
    """Whether calibrated templates differ less from each other than plain ones."""
    runs = _runs(results)
    before, after = (np.array([np.var(r["singles"][k]) for r in runs]) for k in (0, 1))
    interval = bootstrap(range(len(runs)), statistic=lambda drawn: (  # of places, so that both come from one run
        after[drawn.astype(int)].mean(-1) / np.maximum(before[drawn.astype(int)].mean(-1), 1e-12)))
    return None if results.quick else interval.value < 1, (
        f"variance of test accuracy over templates {interval:.2f} times that without calibration; {len(runs)} runs")


CLAIMS = [
    *(StudyClaim(f"A {kind} ensemble is at least as good as the mean of its templates",
                 f"survey, section 5.1; {SOURCE}", "-", "mean paired difference over runs is 0 or more",
                 functools.partial(at_least_the_mean, method))
      for kind, method in (("weighted", "ensemble by likelihood"), ("uniform", "uniform ensemble"))),
    StudyClaim("Calibration brings the accuracies of different templates together",
               f"Zhao et al. 2021, section 5; {SOURCE}", "-",
               "mean variance with calibration, over that without, is below 1", together),
    *(StudyClaim(statement, "survey, sections 3 and 5, of the work named", paper, "none set",
                 unmeasured=f"not measured: needs {need}") for statement, paper, need in (
        ("An ensemble of mined and paraphrased prompts finds far more facts than single manual ones",
         "LAMA from 31.1 % to 39.6 % (Jiang et al. 2020) [memory]", "BERT-large and the LAMA facts"),
        ("The larger the model, the nearer prompt tuning comes to tuning the whole model",
         "equal at some 10 billion parameters (Lester et al. 2021) [memory]", "models of billions of parameters")))]

study = Study("Prompting in parts: ensembles, demonstrations, calibration", measure, CLAIMS, show, once=examples,
              full=Scale(), quick=Scale(divisor=3), facts=facts, quick_seeds=1)
