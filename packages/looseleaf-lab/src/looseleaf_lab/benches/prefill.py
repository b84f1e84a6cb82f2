"""Attention backends against exact attention, in the prefill of a language model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import looseleaf
from looseleaf import AttentionBackend, Report, Series
from looseleaf import progress as progress_
from looseleaf.plugin import In, Plugin
from looseleaf.resume import digest
from looseleaf.statistics import bootstrap
from looseleaf_lab import data, metrics, models, timing
from looseleaf_lab.attention import DENSE, SideBySide, calibrate, density_of, with_start
from looseleaf_lab.benches.bench import Bench, State, ready
from looseleaf_lab.facts import facts, identity, left_out, model_facts, model_name, reason
from looseleaf_lab.results import ResultCache

WINDOW = "(window)"


@dataclasses.dataclass
class Prefill(Bench):
    """Attention backends in the prefill of a language model, against exact attention and a sliding window.

    Args:
        model: short name, folder or hub id of a causal language model.
        dtype: of the model's weights, such as bfloat16.
        context: numbers of tokens.
        passkeys: keys to find at each context, spread over the depths; 0 leaves them out, which take longest.
        rounds: timed rounds.
        last: tokens whose perplexity is measured.
    """

    model: str = "smollm2"
    dtype: str = "float32"
    context: Annotated[tuple[int, ...], In(">= 16")] = (2048,)
    passkeys: Annotated[int, In(">= 0")] = 5
    rounds: Annotated[int, In(">= 1")] = 3
    last: Annotated[int, In(">= 1")] = 256
    interface: ClassVar[type[Plugin]] = AttentionBackend

    def suits(self, plugin: Any) -> str | None:
        """See :meth:`Bench.suits`: the methods of causal attention over a prompt."""
        other = super().suits(plugin)
        if other or "prefill" in plugin.phases:
            return other
        return f"for {' and '.join(sorted(plugin.phases))} calls, not for prefill"

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_attention`."""
        model, tokenizer = models.load(self.model, self.dtype, device=models.device())
        backends, failed = ready(plugins)
        if not any(isinstance(b, looseleaf.SlidingWindow) for b in backends.values()):
            backends[WINDOW] = looseleaf.SlidingWindow()  # what every method must be better than
        report = compare_attention(model, tokenizer, backends, self.context, last=self.last, rounds=self.rounds,
                                   passkeys=self.passkeys, seed=seed, state=state, progress=progress)
        report.facts["model"] = f"{self.model} ({model_name(model)})"
        left_out(report, failed)
        return report


def compare_attention(model: Any, tokenizer: Any, backends: Mapping[str, AttentionBackend],
                      contexts: Sequence[int] = (2048,), *, text: str | None = None, last: int = 256,
                      rounds: int = 3, passkeys: int = 0, seed: int = 0, state: State = None,
                      progress: bool | None = None) -> Report:
    """Speed, density, error and perplexity of every backend at every context length.

    For each length: latency of a prefill, all backends and the model's own attention in turns (medians of paired
    ratios); fraction of the scores computed (density); relative error of each layer's attention output, exact inputs
    given; perplexity on the last tokens, with a paired bootstrap over tokens of the increase in loss; pass-key
    retrieval where asked for.

    Args:
        model, tokenizer: a transformers causal language model.
        backends: name -> backend. Those that learn are calibrated first, on the calibration part of the prose.
        contexts: numbers of tokens, at least 16 each.
        text: what is read; None: the evaluation part of :func:`looseleaf_lab.data.prose`.
        last: tokens whose perplexity is measured (fewer where the context is short).
        rounds: timed rounds.
        passkeys: trials of pass-key retrieval at each length of 128 or more, spread over the depths; 0: none.
        seed: of intervals and keys.
        state: folder for finished lengths; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a context out of range, or more text needed than there is.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    for context in contexts:
        if context < 16 or (longest is not None and context > longest):
            raise ValueError(f"contexts: expected 16 to {longest or 'any number of'} tokens for this model, "
                             f"got {context}")
    if not contexts or rounds < 1 or last < 1:
        raise ValueError("compare_attention: expected one context or more, rounds >= 1 and last >= 1, "
                         f"got contexts={list(contexts)}, rounds={rounds}, last={last}")
    if text is None:
        ids = data.prose_ids(tokenizer, max(contexts), "evaluation")
    else:
        ids = data.token_ids(tokenizer, text, max(contexts))
    device = next(model.parameters()).device
    ids = with_start(tokenizer, ids).to(device)
    failed: dict[str, str] = {}
    calibrated = dict(backends)
    for name, backend in backends.items():
        try:
            calibrate(backend, model, tokenizer)
        except Exception as error:  # one backend that fails must not cost the others their figures
            failed[name] = reason(error)
            del calibrated[name]
    cells, about = ResultCache(state), model_facts(model)
    cell_of: dict[int, dict[str, Any]] = {}
    for context in progress_.track(contexts, "contexts", show=progress):
        key = {"what": "attention", "context": context, **about, "last": last,
               "rounds": rounds, "passkeys": passkeys, "seed": seed, "text": digest(ids[0, :context].tolist()),
               "backends": {name: identity(b) for name, b in calibrated.items()}}
        cell_of[context] = cells.do(key, functools.partial(
            _measure, model, tokenizer, calibrated, ids[:, :context], last, rounds, passkeys, seed, progress))
    report = Report("Attention backends side by side", facts(
        model=model_name(model), contexts=", ".join(map(str, contexts)), rounds=rounds, seed=seed,
        text=getattr(text, "source", "the caller's") if text is not None
        else "documentation of Python, evaluation part"))
    _show(report, [DENSE, *calibrated], cell_of, failed, passkeys)
    left_out(report, failed)
    return report


def _measure(model: Any, tokenizer: Any, backends: Mapping[str, AttentionBackend], ids: Any, last: int, rounds: int,
             passkeys: int, seed: int, progress: bool | None) -> dict[str, Any]:
    import torch

    context = ids.shape[1]
    last = min(last, context // 2)
    rows: dict[str, dict[str, Any]] = {DENSE: {"density": 1.0, "error": 0.0, "layers": None}}
    losses: dict[str, Any] = {}
    turns = 1 + rounds * (1 + len(backends))
    with torch.inference_mode(), progress_.bar(f"{context} tokens", turns, progress) as progress_bar:
        both = SideBySide(inner=backends)
        with looseleaf.attach(model, both) as attached:
            both.drawn = (sorted(attached.chosen)[len(attached.chosen) // 2],) if attached.chosen else ()
            metrics.token_losses(model, ids, 1)
        progress_bar.update()
        rows[DENSE]["maps"] = {str(layer): maps for layer, maps in both.maps.items()}
        for name in backends:
            failed = both.failed.get(name)
            rows[name] = density_of(both.found[name]) if failed is None else {"failed": failed}

        def prefill(name: str) -> None:
            losses[name] = metrics.token_losses(model, ids, last)[0]
            progress_bar.update()

        names = [name for name in rows if "failed" not in rows[name]]
        # the pass above has warmed everything but the backends' own code, which is quick on a short beginning
        for name in list(names):
            try:
                with _attached(model, backends.get(name)):
                    metrics.token_losses(model, ids[:, :min(context, 256)], 1)
            except Exception as error:  # one backend that fails must not cost the others their figures
                if name == DENSE:
                    raise
                rows[name] = {"failed": reason(error)}
                names.remove(name)
        measured = timing.interleave(
            {name: functools.partial(prefill, name) for name in names}, rounds, warmup=0,
            around={name: functools.partial(_attached, model, backends.get(name)) for name in names})
        exact = losses[DENSE].double().cpu()
        for name in names:
            row, ours = rows[name], losses[name].double().cpu()
            row["perplexity"] = math.exp(min(700.0, float(ours.mean())))
            row["added"] = bootstrap((ours - exact).tolist(), seed)
            row["seconds"] = measured.median(name)
            row["ratio"] = measured.ratio(name, DENSE, seed)
            row["passkey"] = row["depths"] = None
            if passkeys and context >= 128:  # the question and the key take about half of that
                with _attached(model, backends.get(name)):
                    keys = metrics.passkey(model, tokenizer, context, trials=passkeys, seed=seed, progress=progress)
                row["passkey"], row["depths"] = keys.accuracy, [keys.depths, keys.digits]
    return rows


def _attached(model: Any, backend: AttentionBackend | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if backend is None else looseleaf.attach(model, backend)


def _show(report: Report, names: Sequence[str], cell_of: Mapping[int, Mapping[str, Any]], failed: dict[str, str],
          passkeys: int) -> None:
    columns = ["backend", "tokens", "seconds", "speed-up", "low", "high", "density", "attention error", "perplexity",
               "increase in loss", "low ", "high ", "fallbacks", *(["pass key"] if passkeys else [])]
    table = report.table("Prefill", columns, note=(
        "speed-up: exact time over time, median of paired rounds; increase in loss: nats a token on the last tokens, "
        "against exact attention, interval by bootstrap over tokens; attention error: relative, mean over layers, "
        "each layer given exact inputs; fallbacks: layers that used exact attention"))
    for context, rows in cell_of.items():
        for name in names:
            row = rows[name]
            if "failed" in row:
                failed[f"{name} at {context}"] = row["failed"]
                continue
            table.add(name, context, row["seconds"], *row["ratio"], row["density"], row["error"], row["perplexity"],
                      *row["added"], row.get("fallbacks", 0), *([row["passkey"]] if passkeys else []))
    reasons = {(n, r) for rows in cell_of.values() for n, row in rows.items() for r in row.get("reasons", ())}
    if reasons:
        report.table("Fallbacks to exact attention", ["backend", "reason"], sorted(reasons))
    for title, label, field in (("Speed-up of prefill", "exact time / time", "ratio"),
                                ("Increase in loss", "nats a token", "added")):
        report.figure(title, x_label="tokens", y_label=label, x_log=len(cell_of) > 1, series=[
            _series(name, cell_of, field) for name in names if name != DENSE])
    known = {name: [f[name] for f in cell_of.values() if "failed" not in f[name] and f[name]["density"] is not None]
             for name in names if name != DENSE}
    report.figure("What the error buys", x_label="density", y_label="attention error", series=[
        Series(name, [float(r["density"]) for r in rows], [float(r["error"]) for r in rows])
        for name, rows in known.items()])
    for context, rows in cell_of.items():
        shown = [n for n in names if "failed" not in rows[n]]
        report.figure(
            f"What speed costs at {context} tokens", x_label="fraction of the exact time",
            y_label="increase in loss, nats a token",
            note="lower and further left is better; on the Pareto front, with nothing below and to the left, are "
                 + ", ".join(_front({n: (1 / rows[n]["ratio"][0], rows[n]["added"][0]) for n in shown})),
            series=[Series(n, [1 / rows[n]["ratio"][0]], [rows[n]["added"][0]], [rows[n]["added"][1]],
                           [rows[n]["added"][2]], style="points") for n in shown])
        deep = {n: rows[n]["depths"] for n in shown if rows[n].get("depths")}
        if deep:
            report.table(f"Pass keys by depth at {context} tokens", [
                "backend", *(f"{d:.0%}" for d in next(iter(deep.values()))[0])],
                [[n, *d] for n, (_, d) in deep.items()],
                note="fraction of the key's digits that were right, by where it stood: 0 % is the beginning")
    for context, rows in cell_of.items():
        # where every call fell back there is nothing to see
        kept = [n for n in names if any((rows[n].get("layers") or {}).get("error", ()))]
        if kept:
            report.figure(f"Attention error by layer at {context} tokens", x_label="layer", y_label="relative error",
                          series=[Series(n, [float(i) for i in range(len(rows[n]["layers"]["error"]))],
                                         rows[n]["layers"]["error"], style="line") for n in kept])
    longest = max(cell_of)
    for layer, maps in cell_of[longest][DENSE].get("maps", {}).items():
        for name, heads in maps.items():
            report.figure(
                f"Attention of {name}, layer {layer}, {longest} tokens",
                panels={f"head {h}": m for h, m in enumerate(heads)},
                note="rows: queries, columns: keys, in cells of equal width; what a backend leaves out is empty")


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other is better than in one coordinate without being worse in the other."""
    return [n for n, (x, y) in points.items()
            if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())]


def _series(name: str, cell_of: Mapping[int, Mapping[str, Any]], field: str) -> Series:
    points = [(c, rows[name][field]) for c, rows in cell_of.items() if "failed" not in rows[name]]
    return Series(name, [float(c) for c, _ in points], [p[0] for _, p in points], [p[1] for _, p in points],
                  [p[2] for _, p in points])
