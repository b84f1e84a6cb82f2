"""What studies of attention methods have in common: perplexity beside exact attention, a layer's time, ratios."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf import AttentionBackend, AttentionCall, Figure, Report, attach
from looseleaf.statistics import Interval
from looseleaf_lab.attention import KeepAttention
from looseleaf_lab.metrics import perplexity
from looseleaf_lab.study import Decision, Results, add_table, resampled
from looseleaf_lab.timing import interleave

Row = dict[str, Any]


def perplexity_beside_exact(model: Any, backend: AttentionBackend, ids: Tensor, last: int) -> Row:
    """One window of text, read with exact attention and with ``backend``.

    Args:
        model: a transformers causal language model.
        backend: what computes the attention the second time.
        ids: (L,) int64, the window.
        last: how many of the last tokens are scored.

    Returns:
        ``exact`` and ``sparse``: nats a token; ``density`` and what else the backend records: means over the calls
        that did not fall back; ``figures``: those of the report of :class:`looseleaf.Attached`, as dictionaries.
    """
    window = len(ids)
    exact = perplexity(model, ids, window, last=last, progress=False).losses[0]
    with attach(model, backend) as attached:
        sparse = perplexity(model, ids, window, last=last, progress=False).losses[0]
        records = [r for r in attached.records if "density" in r]
        figures = [{"title": f.title, "image": f.image, "note": f.note, "x_label": f.x_label, "y_label": f.y_label}
                   for f in attached.report().figures]
    means = {name: sum(r[name] for r in records) / len(records)
             for name, value in records[0].items() if isinstance(value, float)} if records else {"density": 1.0}
    return {**means, "exact": exact, "sparse": sparse, "figures": figures}


def perplexity_ratio(results: Results, *path: str | int) -> Interval:
    """Perplexity over that of exact attention, paired by windows; ``path`` leads to what
    :func:`perplexity_beside_exact` gave."""
    return Interval(*(math.exp(x) for x in results.interval(*path, "sparse", minus=(*path, "exact"))))


def show_perplexity(report: Report, results: Results, name: str, last: int, windows: Mapping[int, Sequence[str]],
                    more: Mapping[str, str] | None = None) -> None:
    """Add the table of :func:`perplexity_beside_exact`, and its heat maps, means over windows.

    Args:
        report: goes on.
        results: of the study.
        name: of the method.
        last: how many tokens were scored.
        windows: length of the windows -> path to what was measured on them.
        more: further columns -> what the backend recorded.
    """
    add_table(report, f"Perplexity on the last {last} tokens of each window", (
        {"context": length, "dense": math.exp(results.mean(*path, "exact")),
         name: math.exp(results.mean(*path, "sparse")), "ratio": perplexity_ratio(results, *path),
         "density": results.interval(*path, "density"),
         **{column: results.mean(*path, recorded) for column, recorded in (more or {}).items()}}
        for length, path in windows.items()), "intervals: 95 % bootstrap over windows, paired")
    for length, path in windows.items():
        for same in zip(*results.values(*path, "figures"), strict=True):
            image = torch.tensor([f["image"] for f in same], dtype=torch.float64).mean(0).tolist()
            title = f"{same[0]['title']}, {length} tokens"
            report.figures.append(Figure(**{**same[0], "title": title, "image": image}))


def kept_activations(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Layer -> query, key and value of a prefill of ``ids`` (1, L)."""
    keep = KeepAttention(layers=tuple(layers))
    with torch.inference_mode(), attach(model, keep):
        model.base_model(input_ids=ids, use_cache=False)
    return keep.found


def layer_times(activations: dict[int, tuple[Tensor, Tensor, Tensor]], backend: AttentionBackend,
                repeats: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds of a layer's causal attention, the estimation of the pattern included, against torch's own.

    Args:
        activations: what :func:`kept_activations` gives.
        backend: the method.
        repeats: lengths, as multiples of the activations', which are repeated.
        rounds: timed rounds, in which both take turns.

    Returns:
        Rows of tokens, layer, density, seconds of torch's attention and of the method, ratio of the first to the
        second with its interval.
    """
    rows = []
    with torch.inference_mode():
        for times in repeats:
            for layer, tensors in activations.items():
                query, key, value = (torch.cat([x] * times, 2) for x in tensors)
                recorded: Row = {}
                call = AttentionCall(query, key, value, query.shape[-1] ** -0.5, layer=layer, record=recorded.update)
                group = query.shape[1] // key.shape[1]
                timing = interleave({
                    "exact": functools.partial(F.scaled_dot_product_attention, query, key.repeat_interleave(group, 1),
                                               value.repeat_interleave(group, 1), is_causal=True),
                    "sparse": functools.partial(backend.attend, call)}, rounds)
                rows.append([query.shape[2], layer, float(recorded.get("density", 1.0)), timing.median("exact"),
                             timing.median("sparse"), *timing.ratio("sparse", "exact")])
    return rows


def show_times(report: Report, results: Results, name: str) -> None:
    """Add the table of ``results.once["times"]``, see :func:`layer_times`; ``name``: of the method."""
    report.table("Seconds of one layer's attention, estimation included", [
        "tokens", "layer", "density", "SDPA", name, "ratio", "low", "high"], results.once["times"],
        note=f"ratio: SDPA over {name}, medians of interleaved rounds; longer than a window: its activations, repeated")


def faster_everywhere(results: Results) -> Decision:
    """Whether every row of ``results.once["times"]``, see :func:`layer_times`, has a ratio above 1."""
    rows = results.once["times"]
    slower = [f"layer {layer} at {tokens}" for tokens, layer, _, _, _, ratio, _, _ in rows if ratio <= 1]
    ratios = [row[5] for row in rows]
    lengths = " and ".join(dict.fromkeys(str(row[0]) for row in rows))
    return not slower, (f"{min(ratios):.2f}x to {max(ratios):.2f}x over {len(rows)} cases of {lengths} tokens"
                        + (f"; slower: {', '.join(slower)}" if slower else ""))


def ratio_of_sums(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Sum of ``values`` over the sum of ``reference``, paired, with its 95 % bootstrap interval."""
    above, below = np.array(values), np.array(reference)
    return resampled(len(values), lambda i: above[i].sum(-1) / below[i].sum(-1))


__all__ = ["faster_everywhere", "kept_activations", "layer_times", "perplexity_beside_exact",
           "perplexity_ratio", "ratio_of_sums", "show_perplexity", "show_times"]
