"""Attention backends against exact attention."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import looseleaf
from looseleaf import AttentionBackend, AttentionCall, Paper, Report, Series
from looseleaf import progress as progress_
from looseleaf.statistics import bootstrap
from looseleaf_lab import data, metrics, timing
from looseleaf_lab.compare import common, patterns
from looseleaf.resume import Cells, digest

DENSE = "(exact)"
"""The model's own attention, in the rows of the tables."""


@dataclasses.dataclass
class SideBySide(AttentionBackend):
    """Runs backends and exact attention on the same inputs, keeps their differences, and returns the exact output.

    Errors of different layers are so measured apart from each other, in one pass for all backends.

    Args:
        inner: name -> backend.
        drawn: layers whose attention maps are kept.
        drawn_step: the denoising step of which; None: of any, the last.
    """

    inner: Mapping[str, AttentionBackend] = dataclasses.field(default_factory=dict)
    drawn: tuple[int, ...] = ()
    drawn_step: int | None = None
    paper: ClassVar[Paper] = Paper("Side by side", ("The Looseleaf authors",), 2026)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.inner}
        self.failed: dict[str, str] = {}
        self.maps: dict[int, dict[str, Any]] = {}
        self._states: dict[tuple[str, int], SimpleNamespace] = {}

    def attend(self, call: AttentionCall) -> Any:
        """The exact output, (B, Hq, Lq, D)."""
        exact = call.dense()
        for name, backend in self.inner.items():
            if name in self.failed:
                continue
            said: dict[str, Any] = {"layer": call.layer}
            own = self._states.setdefault((name, call.layer), SimpleNamespace())
            try:
                out = backend.attend(dataclasses.replace(call, state=own, record=said.update))
            except Exception as error:  # one backend that fails must not cost the others their figures
                self.failed[name] = common.reason(error)
                continue
            said["error"] = metrics.relative_error(out, exact)
            self.found[name].append({k: v.tolist() if hasattr(v, "tolist") else v for k, v in said.items()})
        if call.layer in self.drawn and self.drawn_step in (None, call.step):
            self._draw(call)
        return exact

    def _draw(self, call: AttentionCall) -> None:
        maps = self.maps[call.layer] = {}
        for name, backend in {DENSE: None, **self.inner}.items():
            fell_back = name != DENSE and (not self.found[name] or "fallback" in self.found[name][-1])
            if name not in self.failed and not fell_back:
                own = self._states.get((name, call.layer), call.state)
                found = patterns.attention_map(backend, dataclasses.replace(call, state=own)).double().cpu()
                # three digits are more than a colour shows
                maps[name] = [[[float(f"{v:.3g}") for v in row] for row in head] for head in found.tolist()]


def compare_attention(model: Any, tokenizer: Any, backends: Mapping[str, AttentionBackend],
                      contexts: Sequence[int] = (2048,), *, text: str | None = None, last: int = 256,
                      rounds: int = 3, passkeys: int = 0, seed: int = 0,
                      state: str | os.PathLike[str] | None = None, progress: bool | None = None) -> Report:
    """Speed, density, error and perplexity of every backend at every context length.

    For each length: latency of a prefill, all backends and the model's own attention in turns (medians of paired
    ratios); share of the scores computed (density); relative error of each layer's attention output, exact inputs
    given; perplexity on the last tokens, with a paired bootstrap over tokens of the loss added; pass-key retrieval
    where asked for.

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
            raise ValueError(f"context={context}: allowed is 16 to {longest or 'any length'} for this model")
    if not contexts or rounds < 1 or last < 1:
        raise ValueError(f"contexts={list(contexts)}, rounds={rounds}, last={last}: allowed is one of each or more")
    if text is None:
        ids = data.prose_ids(tokenizer, max(contexts), "evaluation")
    else:
        ids = data.token_ids(tokenizer, text, max(contexts))
    device = next(model.parameters()).device
    ids = _begun(tokenizer, ids).to(device)
    failed: dict[str, str] = {}
    ready = dict(backends)
    for name, backend in backends.items():
        try:
            calibrate(backend, model, tokenizer)
        except Exception as error:  # one backend that fails must not cost the others their figures
            failed[name] = common.reason(error)
            del ready[name]
    cells, whose = Cells(state), common.whose(model)
    found: dict[int, dict[str, Any]] = {}
    for context in progress_.track(contexts, "contexts", show=progress):
        key = {"what": "attention", "context": context, **whose, "last": last,
               "rounds": rounds, "passkeys": passkeys, "seed": seed, "text": digest(ids[0, :context].tolist()),
               "backends": {name: common.identity(b) for name, b in ready.items()}}
        found[context] = cells.do(key, lambda n=context: _measure(  # type: ignore[misc]
            model, tokenizer, ready, ids[:, :n], last, rounds, passkeys, seed, progress))
    report = Report("Attention backends side by side", common.facts(
        model=common.model_name(model), contexts=", ".join(map(str, contexts)), rounds=rounds, seed=seed,
        text=getattr(text, "source", "given") if text is not None else "documentation of Python, evaluation part"))
    _show(report, [DENSE, *ready], found, failed, passkeys)
    common.left_out(report, failed)
    return report


def _begun(tokenizer: Any, ids: Any) -> Any:
    """The ids with the tokenizer's start token in place of the first, where it has one."""
    first = data.bos(tokenizer)
    if first is not None:
        ids = ids.clone()
        ids[..., 0] = first
    return ids


def calibrate(backend: AttentionBackend, model: Any, tokenizer: Any, tokens: int = 2048, count: int = 2) -> bool:
    """Calibrate a backend that learns, on ``count`` batches of ``tokens`` tokens; says whether it is one."""
    if type(backend).calibrate is AttentionBackend.calibrate:
        return False
    device = next(model.parameters()).device
    tokens = min(tokens, getattr(model.config, "max_position_embeddings", tokens))
    ids = data.prose_ids(tokenizer, tokens * count, "calibration").reshape(count, 1, tokens)
    ids = _begun(tokenizer, ids).to(device)
    backend.calibrate(model, [{"input_ids": row} for row in ids])
    return True


def _measure(model: Any, tokenizer: Any, backends: Mapping[str, AttentionBackend], ids: Any, last: int, rounds: int,
             passkeys: int, seed: int, progress: bool | None) -> dict[str, Any]:
    import torch

    context = ids.shape[1]
    last = min(last, context // 2)
    rows: dict[str, dict[str, Any]] = {DENSE: {"density": 1.0, "error": 0.0, "layers": None}}
    losses: dict[str, Any] = {}
    with torch.inference_mode(), progress_.bar(f"{context} tokens", 1 + rounds * (1 + len(backends)),
                                               progress) as moving:
        both = SideBySide(inner=backends)
        with looseleaf.attach(model, both) as attached:
            both.drawn = (sorted(attached.chosen)[len(attached.chosen) // 2],) if attached.chosen else ()
            metrics.token_losses(model, ids, 1)
        moving.update()
        rows[DENSE]["maps"] = {str(layer): maps for layer, maps in both.maps.items()}
        for name in backends:
            failed = both.failed.get(name)
            rows[name] = density_of(both.found[name]) if failed is None else {"failed": failed}

        def prefill(name: str) -> None:
            losses[name] = metrics.token_losses(model, ids, last)[0]
            moving.update()

        ready = [name for name in rows if "failed" not in rows[name]]
        # the pass above has warmed everything but the backends' own code, which is quick on a short beginning
        for name in ready:
            with _attached(model, backends.get(name)):
                metrics.token_losses(model, ids[:, :min(context, 256)], 1)
        measured = timing.interleave(
            {name: functools.partial(prefill, name) for name in ready}, rounds, warmup=0,
            around={name: functools.partial(_attached, model, backends.get(name)) for name in ready})
        exact = losses[DENSE].double().cpu()
        for name in ready:
            row, mine = rows[name], losses[name].double().cpu()
            row["perplexity"] = math.exp(min(700.0, float(mine.mean())))
            row["added"] = bootstrap((mine - exact).tolist(), seed)
            row["seconds"] = measured.median(name)
            row["ratio"] = measured.ratio(name, DENSE, seed)
            row["passkey"] = row["depths"] = None
            if passkeys and context >= 128:  # the question and the key take about half of that
                with _attached(model, backends.get(name)):
                    found = metrics.passkey(model, tokenizer, context, trials=passkeys, seed=seed, progress=progress)
                row["passkey"], row["depths"] = found.accuracy, [found.depths, found.digits]
    return rows


def _attached(model: Any, backend: AttentionBackend | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if backend is None else looseleaf.attach(model, backend)


def density_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean density and error over layers, both by layer, and why calls fell back."""
    densities, errors = [], []
    for r in records:
        value = r.get("density", 1.0 if "fallback" in r else None)
        if isinstance(value, (list, tuple)):
            value = _mean_of(value)
        densities.append(value)
        errors.append(r["error"])
    known = [d for d in densities if d is not None]
    reasons = [r["fallback"] for r in records if "fallback" in r]
    return {"density": sum(known) / len(known) if known else None, "error": sum(errors) / max(1, len(errors)),
            "layers": {"density": densities, "error": errors}, "calls": len(records), "fallbacks": len(reasons),
            "reasons": list(dict.fromkeys(reasons))}


def _mean_of(value: Any) -> float:
    import numpy as np

    return float(np.mean(np.asarray(value, dtype=np.float64)))


def _show(report: Report, names: Sequence[str], found: Mapping[int, Mapping[str, Any]], failed: dict[str, str],
          passkeys: int) -> None:
    columns = ["backend", "tokens", "seconds", "speed-up", "from", "to", "density", "attention error", "perplexity",
               "loss added", "from ", "to ", "fallbacks", *(["pass key"] if passkeys else [])]
    table = report.table("Prefill", columns, note=(
        "speed-up: exact time over time, median of paired rounds; loss added: nats a token on the last tokens, "
        "against exact attention, interval by bootstrap over tokens; attention error: relative, mean over layers, "
        "each layer given exact inputs; fallbacks: layers that used exact attention"))
    for context, rows in found.items():
        for name in names:
            row = rows[name]
            if "failed" in row:
                failed[f"{name} at {context}"] = row["failed"]
                continue
            table.add(name, context, row["seconds"], *row["ratio"], row["density"], row["error"], row["perplexity"],
                      *row["added"], row.get("fallbacks", 0), *([row["passkey"]] if passkeys else []))
    reasons = {(n, r) for rows in found.values() for n, row in rows.items() for r in row.get("reasons", ())}
    if reasons:
        report.table("Fallbacks to exact attention", ["backend", "reason"], sorted(reasons))
    for title, label, field in (("Speed-up of prefill", "exact time / time", "ratio"),
                                ("Loss added", "nats a token", "added")):
        report.figure(title, x_label="tokens", y_label=label, x_log=len(found) > 1, series=[
            _series(name, found, field) for name in names if name != DENSE])
    report.figure("What the error buys", x_label="density", y_label="attention error", series=[
        Series(name, [float(r["density"]) for r in rows], [float(r["error"]) for r in rows])
        for name in names if name != DENSE
        for rows in [[f[name] for f in found.values() if "failed" not in f[name] and f[name]["density"] is not None]]])
    for context, rows in found.items():
        shown = [n for n in names if "failed" not in rows[n]]
        report.figure(
            f"What speed costs at {context} tokens", x_label="share of the exact time",
            y_label="loss added, nats a token",
            note="lower and further left is better; whoever has nobody below and to the left is on the Pareto front: "
                 + ", ".join(_front({n: (1 / rows[n]["ratio"][0], rows[n]["added"][0]) for n in shown})),
            series=[Series(n, [1 / rows[n]["ratio"][0]], [rows[n]["added"][0]], [rows[n]["added"][1]],
                           [rows[n]["added"][2]], style="points") for n in shown])
        deep = {n: rows[n]["depths"] for n in shown if rows[n].get("depths")}
        if deep:
            report.table(f"Pass keys by depth at {context} tokens", [
                "backend", *(f"{d:.0%}" for d in next(iter(deep.values()))[0])],
                [[n, *d] for n, (_, d) in deep.items()],
                note="share of the key's digits that were right, by where it stood: 0 % is the beginning")
    for context, rows in found.items():
        # where every call fell back there is nothing to see
        kept = [n for n in names if any((rows[n].get("layers") or {}).get("error", ()))]
        if kept:
            report.figure(f"Attention error by layer at {context} tokens", x_label="layer", y_label="relative error",
                          series=[Series(n, [float(i) for i in range(len(rows[n]["layers"]["error"]))],
                                         rows[n]["layers"]["error"], style="line") for n in kept])
    longest = max(found)
    for layer, maps in found[longest][DENSE].get("maps", {}).items():
        for name, heads in maps.items():
            report.figure(
                f"Attention of {name}, layer {layer}, {longest} tokens",
                panels={f"head {h}": m for h, m in enumerate(heads)},
                note="rows: queries, columns: keys, in cells of equal width; what a backend leaves out is empty")


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other betters in one coordinate without losing in the other."""
    return [n for n, (x, y) in points.items()
            if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())]


def _series(name: str, found: Mapping[int, Mapping[str, Any]], field: str) -> Series:
    points = [(c, rows[name][field]) for c, rows in found.items() if "failed" not in rows[name]]
    return Series(name, [float(c) for c, _ in points], [p[0] for _, p in points], [p[1] for _, p in points],
                  [p[2] for _, p in points])
