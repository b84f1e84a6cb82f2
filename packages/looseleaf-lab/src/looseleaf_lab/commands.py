"""What ``looseleaf run`` and ``looseleaf compare`` do once the plugin is made."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import looseleaf
import looseleaf_tickets
import looseleaf_text
from looseleaf import Report
from looseleaf.statistics import bootstrap
from looseleaf_lab import compare as compare_
from looseleaf_lab import data, metrics, models
from looseleaf_lab.compare import common
from looseleaf_lab.compare import pruners as pruners_


def run(kind: str, name: str, plugin: Any, *, model: str = "smollm2", dtype: str | None = None, text: str | None = None,
        context: int = 2048, task: str | None = None, calls: int | None = None,
        save: str | os.PathLike[str] | None = None, save_model: str | os.PathLike[str] | None = None,
        seed: int = 0) -> Report:
    """One plugin on one model.

    Args:
        kind: of the plugin: attention, pruners, prompts or probes.
        name: of the plugin, for people.
        plugin: the instance.
        model, dtype: as for :func:`looseleaf_lab.models.load`.
        text: a file to read instead of the prose that ships with Python.
        context: attention: tokens of text; pruners: tokens in a window.
        task: prompts: one of :func:`looseleaf_lab.data.tasks`; None: the first.
        calls: prompts: budget in model calls; None: 500.
        save: where what was found goes: masks, prompt, calibration or the probe's report.
        save_model: pruners: a new folder for the pruned model and its tokenizer, which plain transformers reads.
        seed: the only source of randomness.

    Raises:
        ValueError: an unknown kind, a file that cannot be read, or nothing to save.
    """
    if kind not in _RUN:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(_RUN)}")
    read = None if text is None else _read(text)
    if save_model is not None:
        if kind != "pruners":
            raise ValueError(f"--save-model is for pruners: {name} does not change the weights (kind {kind})")
        models.new_folder(save_model)
    if kind == "prompts" and task is not None and task not in data.tasks():
        data.pool_sizes(task)  # says which tasks there are before a model is loaded
    loaded, tokenizer = models.load(model, dtype, device=_device())
    report = _RUN[kind](Job(name, plugin, loaded, tokenizer, read, context, task, calls, save, save_model, seed))
    report.facts = {"plugin": name, **report.facts, "model": f"{model} ({common.model_name(loaded)})"}
    return report


def compare(kind: str, ready: Sequence[tuple[str, Any]], *, model: str | Sequence[str] = "smollm2",
            dtype: str | None = None, contexts: Sequence[int] = (2048,), sparsities: Sequence[float] = (0.1, 0.3, 0.5),
            tasks: Sequence[str] | None = None, calls: int = 2000, seed: int = 0,
            seeds: int = 1, passkeys: int = 5, denoising: Sequence[str] = ("text", "video"),
            state: str | os.PathLike[str] | None = None) -> Report:
    """Every plugin of a kind side by side, with its default parameters.

    Args:
        kind: of the plugins.
        ready: (name, class) of each.
        model: as for :func:`looseleaf_lab.models.load`; probes: one or several, to stand side by side.
        dtype: of their weights; None: float32.
        contexts: attention: numbers of tokens.
        sparsities: pruners: shares of weights to remove.
        tasks: names of tasks; None: prompts: sentiment and topics; pruners: topics.
        calls: prompts: budget of each search.
        seed: the only source of randomness.
        passkeys: attention: keys to find at each context, from 128 tokens on.
        denoising: attention: models on which methods for denoising are measured, trained on the first call; none of
            them: such methods are left out.
        seeds: prompts: how many searches, with ``seed`` and those after it.
        state: folder for what is finished; the same call resumes.

    Raises:
        ValueError: an unknown kind or task, several models for a kind other than probes, or a value out of range.
    """
    if kind not in _RUN:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(_RUN)}")
    chosen = list(tasks or ("sentiment", "topics"))
    if kind in ("prompts", "pruners"):
        for name in chosen:
            data.pool_sizes(name)
    names = list(dict.fromkeys([model] if isinstance(model, str) else model))
    if len(names) > 1 and kind != "probes":
        raise ValueError(f"compare {kind} takes one model, got {', '.join(names)}: only probes stand several side by "
                         "side; run the command once for each")
    all_loaded = {name: models.load(name, dtype, device=_device()) for name in names}
    loaded, tokenizer = all_loaded[names[0]]
    made, failed = dict[str, Any](), dict[str, str]()
    for name, cls in ready:
        if kind == "pruners" and cls.removes != "weights":
            failed[name] = f"removes {cls.removes}, not weights"
            continue
        if kind == "pruners" and issubclass(cls, looseleaf_tickets.IterativePruner):
            failed[name] = f"needs a training function: {cls.__name__}().find(model, train)"
            continue
        if kind == "prompts" and cls.improves != "answers":
            failed[name] = f"improves {cls.improves}, not answers"
            continue
        try:
            made[name] = cls if kind == "pruners" else cls()
        except Exception as error:  # a plugin without defaults for all its fields
            failed[name] = common.reason(error)
    if kind == "attention":
        causal = {name: b for name, b in made.items() if b.changes == "prefill"}
        if not any(isinstance(b, looseleaf.SlidingWindow) for b in causal.values()):
            causal["(window)"] = looseleaf.SlidingWindow()  # what every method must be better than
        report = compare_.compare_attention(loaded, tokenizer, causal, contexts, passkeys=passkeys, seed=seed,
                                            state=state)
        others = {name: b for name, b in made.items() if name not in causal}
        if others and denoising:
            report.extend(compare_.compare_denoising(others, denoising, seed=seed, state=state))
        failed |= {} if denoising else dict.fromkeys(others, "for denoising models: --denoising text video")
    elif kind == "pruners":
        scored = [data.classification_task(name, seed, train=48, dev=4, test=96) for name in tasks or ("topics",)]
        report = compare_.compare_pruners(loaded, tokenizer, made, sparsities, tasks=scored, seed=seed, state=state)
    elif kind == "prompts":
        given = [data.classification_task(name, seed, train=48, dev=48, test=96) for name in chosen]
        report = compare_.compare_prompts(looseleaf_text.LocalModel(loaded, tokenizer), made, given, calls=calls,
                                          seeds=range(seed, seed + seeds), state=state)
    else:
        report = compare_.compare_probes(all_loaded, made, seed=seed, state=state)
    common.left_out(report, failed)
    report.facts = {**report.facts, "model": ", ".join(
        f"{name} ({common.model_name(each)})" for name, (each, _) in all_loaded.items())}
    return report


@dataclasses.dataclass(frozen=True)
class Job:
    """What :func:`run` was asked for, with the model loaded and the text read."""

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


def _attention(job: Job) -> Report:
    import torch

    name, plugin, model, tokenizer = job.name, job.plugin, job.model, job.tokenizer
    text, context, seed = job.text, job.context, job.seed
    report = compare_.compare_attention(model, tokenizer, {name: plugin}, (context,), text=text, seed=seed)
    report.title = f"{name} at {context} tokens"
    if not any(t.title == "Left out" for t in report.tables):
        ids = data.prose_ids(tokenizer, context) if text is None else data.token_ids(tokenizer, text, context)
        with torch.inference_mode(), looseleaf.attach(model, plugin) as attached:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
            report.extend(attached.report())
    if job.save is not None:
        try:
            plugin.save(job.save)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
    return report


def _pruners(job: Job) -> Report:
    name, plugin, model, tokenizer = job.name, job.plugin, job.model, job.tokenizer
    text, context, seed = job.text, min(job.context, 512), job.seed
    if plugin.removes != "weights":
        raise ValueError(f"{name} removes {plugin.removes}, not weights, and so needs more than a model: "
                         f"see its README, or measure it with `looseleaf reproduce {name}`")
    windows = 4
    device = next(model.parameters()).device
    if text is None:
        ids = data.prose_ids(tokenizer, context * windows)
    else:
        ids = data.token_ids(tokenizer, text)
        context = min(context, ids.shape[1])
        ids = ids[:, :context * windows]
    ids, first = ids.to(device), data.bos(tokenizer)
    batches = pruners_.calibration_batches(tokenizer, context, device=device)
    before = metrics.perplexity(model, ids, context, bos=first).interval(seed)
    start = time.perf_counter()
    masks = plugin.prune(model, batches)
    seconds = time.perf_counter() - start
    masks.apply(model)
    try:
        after = metrics.perplexity(model, ids, context, bos=first).interval(seed)
    finally:
        masks.remove(model)
    report = Report(f"{name} on {common.model_name(model)}", common.facts(
        **plugin.hyperparameters(), **{"sparsity reached": masks.sparsity(), "seconds to prune": seconds, "seed": seed}))
    report.table("Perplexity", ["model", "perplexity", "from", "to"], [["whole", *before], ["pruned", *after]],
                 note=f"windows of {context} tokens; interval: bootstrap over windows; no retraining")
    report.tables.append(masks.table())
    if job.save is not None:
        masks.save(job.save, {"plugin": name})
    if job.save_model is not None:
        masks.bake(model)  # nobody else has this model
        models.save(model, tokenizer, job.save_model)
    return report


def _prompts(job: Job) -> Report:
    from looseleaf_lab.compare.prompts import PLAIN, rival

    name, plugin, seed = job.name, job.plugin, job.seed
    if job.text is not None:
        raise ValueError("--text is not for prompt optimisers: choose data with --task "
                         f"({', '.join(data.tasks())})")
    wanted = job.task or next(iter(data.tasks()))
    chosen = data.classification_task(wanted, seed, train=48, dev=48, test=96)
    local = looseleaf_text.LocalModel(job.model, job.tokenizer)
    budget = looseleaf.Budget(calls=500 if job.calls is None else job.calls)
    start = time.perf_counter()
    prompt = plugin.optimize(chosen, local, budget, seed=seed)
    seconds = time.perf_counter() - start
    report = Report(f"{name} on {wanted}", common.facts(
        **{**plugin.hyperparameters(), **{k: v for k, v in prompt.info.items() if isinstance(v, (int, float, str))},
           "task": wanted, "seed": seed, "seconds": seconds, "calls used": budget.used["calls"],
           "tokens used": budget.used["tokens"]}))
    table = report.table("Accuracy", ["prompt", "dev", "test", "from", "to"],
                         note="interval: bootstrap over the test examples")
    for label, made in (("plain", rival(PLAIN, chosen, local, budget, seed, 0)), ("found", prompt)):
        marks = chosen.evaluate(made, local).marks
        table.add(label, chosen.evaluate(made, local, list(chosen.dev)).score, *bootstrap(marks, seed))
    report.examples.append(("the prompt around the first test example", prompt.render(chosen.test[0])))
    if job.save is not None:
        prompt.save(Path(job.save))
    return report


def _probes(job: Job) -> Report:
    report: Report = job.plugin.run(job.model, job.text, tokenizer=job.tokenizer, seed=job.seed)
    if job.save is not None:
        report.to_json(job.save)
    return report


_RUN: dict[str, Callable[[Job], Report]] = {
    "attention": _attention, "pruners": _pruners, "prompts": _prompts, "probes": _probes}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}. Give a text file in UTF-8") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
