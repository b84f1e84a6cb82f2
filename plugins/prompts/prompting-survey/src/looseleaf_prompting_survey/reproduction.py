"""What the survey says of ensembles, demonstrations and calibration, measured on SmolLM2-135M and real texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report, Series
from looseleaf_text import LanguageModel, LocalModel, MaskedModel, Task
from looseleaf.progress import track
from looseleaf_text.answers import combine
from looseleaf_text.calibration import content_free, offsets, subtract
from looseleaf_prompting_survey import concepts
from looseleaf_prompting_survey.augment import PromptAugmenter
from looseleaf_prompting_survey.ensemble import accuracy, accuracy_weights, gold_places, likelihood_weights
from looseleaf_prompting_survey.pool import default_pool

TASKS = {  # name -> examples in (train, dev, test)
    "sentiment": (24, 32, 60),
    "question-topics": (24, 33, 60),
}
SHOTS = 4
SOURCE = "this project's rule, fixed before measuring"
METHODS = ("manual template", "mean single template", "uniform ensemble", "majority vote", "ensemble by accuracy",
           "ensemble by likelihood", "demonstrations")


@dataclasses.dataclass
class Run:
    """One task with one split of its texts.

    Attributes:
        task: name.
        seed: of the split and of the demonstrations.
        plain, calibrated: method (see :data:`METHODS`) -> test accuracy, without and with calibration.
        singles: test accuracy of each template, without and with calibration.
        weights: by likelihood, without calibration.
    """

    task: str
    seed: int
    plain: dict[str, float]
    calibrated: dict[str, float]
    singles: tuple[list[float], list[float]]
    weights: list[float]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure ensembles, demonstrations and calibration, and run the example of every concept.

    Args:
        seeds: splits of the texts, for each of two tasks.
        quick: one seed and a third of the texts; the claims are not decided.
        progress: show a progress bar; None: only on a terminal.
    """
    import torch

    from looseleaf_lab import data, models

    if seeds < 1:
        raise ValueError(f"seeds={seeds!r}: allowed is a whole number from 1")
    seeds = 1 if quick else seeds
    # On processors with matrix units bfloat16 is several times as fast; elsewhere it would be slower.
    fast = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    network, tokenizer = models.load("smollm2", dtype=torch.bfloat16 if fast else torch.float32)
    model = LocalModel(network, tokenizer)
    began = time.perf_counter()
    runs = []
    for name, seed in track([(n, s) for n in TASKS for s in range(seeds)], "runs", show=progress):
        train, dev, test = (n // 3 if quick else n for n in TASKS[name])
        task = data.classification_task(name, seed=seed, train=train, dev=dev, test=test)
        runs.append(measure(task, model, seed))
    report = summarise(runs, quick)
    report.facts = {"model": "SmolLM2-135M-Instruct", "dtype": str(network.dtype).split(".")[-1],
                    "threads": torch.get_num_threads(), "seeds": seeds, "quick": quick,
                    "seconds": round(time.perf_counter() - began, 1), **report.facts}
    if fast:
        network.float()  # the training example takes gradients
    report.examples += [(f"{name} (SmolLM2)", text) for name, text in concepts.run(model).items()]
    report.examples += [(f"{name} (BERT with random weights, for the mechanics)", text) for name, text in concepts.run(
        random_bert(), ["answer search", "answer mapping", "cloze prompt", "ensembling", "calibration"]).items()]
    return report


def measure(task: Task, model: LanguageModel, seed: int) -> Run:
    """One run: every template is asked once, and what the methods make of the answers is arithmetic."""
    pool = [t.to_prompt(task.labels) for t in default_pool(task)]
    shown = PromptAugmenter(shots=SHOTS).augment(pool[0], task, seed=seed)
    dev_gold, test_gold = gold_places(task, task.dev), gold_places(task, task.test)
    empty = content_free(task.test[0].fields)
    dev = [task.log_probs(p, model, task.dev) for p in pool]
    test = [task.log_probs(p, model, task.test) for p in [*pool, shown]]
    leaning = [offsets(task.log_probs(p, model, empty)) for p in [*pool, shown]]
    found, singles, weights = [], [], []
    for calibrated in (False, True):
        on_dev = [subtract(rows, o) if calibrated else rows for rows, o in zip(dev, leaning, strict=False)]
        on_test = [subtract(rows, o) if calibrated else rows for rows, o in zip(test, leaning, strict=True)]
        members, with_shots = on_test[:-1], on_test[-1]
        single = [accuracy(rows, test_gold) for rows in members]
        by_likelihood = likelihood_weights(on_dev, dev_gold)
        by_accuracy = accuracy_weights(on_dev, dev_gold)
        ensembles = (combine(members), combine(members, vote=True), combine(members, by_accuracy),
                     combine(members, by_likelihood))
        found.append(dict(zip(METHODS, [single[0], sum(single) / len(single), *(
            accuracy(rows, test_gold) for rows in ensembles), accuracy(with_shots, test_gold)], strict=True)))
        singles.append(single)
        weights.append(by_likelihood)
    return Run(task.name, seed, found[0], found[1], (singles[0], singles[1]), weights[0])


def summarise(runs: Sequence[Run], quick: bool = False) -> Report:
    """The report on what :func:`measure` gave."""
    from looseleaf.statistics import bootstrap

    report = Report("Prompting in parts: ensembles, demonstrations, calibration", {
        "templates": len(runs[0].singles[0]), "demonstrations": SHOTS, "runs": len(runs)})
    table = report.table("Test accuracy: mean over runs and 95 % bootstrap interval", [
        "task", "method", "plain", "low", "high", "calibrated", "low ", "high "])
    names = list(dict.fromkeys(r.task for r in runs))
    for name in [*names, "all"] if len(names) > 1 else names:
        mine = [r for r in runs if name in ("all", r.task)]
        for method in METHODS:
            table.add(name, method, *bootstrap([r.plain[method] for r in mine]),
                      *bootstrap([r.calibrated[method] for r in mine]))
        report.figure(f"Accuracy of each template, {name}", x_label="template", y_label="test accuracy", series=[
            Series(label, [float(n) for n in range(len(mine[0].singles[0]))],
                   np.mean([r.singles[k] for r in mine], axis=0).tolist())
            for k, label in enumerate(("plain", "calibrated"))])
    report.arrays.update({f"weights {r.task} {r.seed}": r.weights for r in runs})
    _ensemble_claims(report, runs, quick)
    _calibration_claim(report, runs, quick)
    for statement, paper, need in (
            ("An ensemble of mined and paraphrased prompts finds far more facts than single manual ones",
             "LAMA from 31.1 % to 39.6 % (Jiang et al. 2020) [memory]", "BERT-large and the LAMA facts"),
            ("The larger the model, the nearer prompt tuning comes to tuning the whole model",
             "equal at some 10 billion parameters (Lester et al. 2021) [memory]", "models of billions of parameters")):
        report.claims.append(Claim.decide(
            None, statement=statement, source="survey, sections 3 and 5, of the work named", paper=paper,
            measured=f"not measured: needs {need}", rule="none set"))
    return report


def _ensemble_claims(report: Report, runs: Sequence[Run], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    for method, statement in (
            ("ensemble by likelihood", "A weighted ensemble is at least as good as the mean of its templates"),
            ("uniform ensemble", "A uniform ensemble is at least as good as the mean of its templates")):
        mean, low, high = bootstrap([r.plain[method] - r.plain["mean single template"] for r in runs])
        report.claims.append(Claim.decide(
            None if quick else mean >= 0, statement=statement, source=f"survey, section 5.1; {SOURCE}", paper="-",
            measured=f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) test accuracy over {len(runs)} runs",
            rule="mean paired difference over runs is 0 or more"))


def _calibration_claim(report: Report, runs: Sequence[Run], quick: bool) -> None:
    from looseleaf.statistics import bootstrap

    before, after = (np.array([np.var(r.singles[k]) for r in runs]) for k in (0, 1))

    def ratio(drawn: Any) -> Any:
        places = drawn.astype(int)
        return after[places].mean(-1) / np.maximum(before[places].mean(-1), 1e-12)

    value, low, high = bootstrap([float(n) for n in range(len(runs))], statistic=ratio)
    table = report.table("Spread over templates", ["task", "seed", "variance plain", "variance calibrated"])
    for run, one, other in zip(runs, before, after, strict=True):
        table.add(run.task, run.seed, float(one), float(other))
    report.claims.append(Claim.decide(
        None if quick else value < 1, statement="Calibration brings the accuracies of different templates together",
        source=f"Zhao et al. 2021, section 5; {SOURCE}", paper="-",
        measured=f"variance of test accuracy over templates {value:.2f} ({low:.2f} to {high:.2f}) times that without "
                 f"calibration; {len(runs)} runs",
        rule="mean variance with calibration, over that without, is below 1"))


def random_bert() -> MaskedModel:
    """A BERT with random weights and a tokenizer of single letters: cloze prompts without a real masked model."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(32, 127)]
    made = Tokenizer(models.WordLevel({t: n for n, t in enumerate(special + letters)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                        sep_token="[SEP]", mask_token="[MASK]")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BertForMaskedLM(BertConfig(
            vocab_size=len(special) + len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=512)).eval()
    return MaskedModel(network, tokenizer)
