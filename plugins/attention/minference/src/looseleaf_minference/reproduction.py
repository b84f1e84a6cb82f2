"""MInference's claims on SmolLM2-135M and real text: calibration, quality, retrieval, and speed on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from looseleaf import AttentionBackend, AttentionCall, Claim, Report, attach
from looseleaf.statistics import Interval, bootstrap
from looseleaf_kernels import Layout
from looseleaf_lab import attention_claims as shared
from looseleaf_lab import data, metrics, models
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_minference import search
from looseleaf_minference.backend import MInference
from looseleaf_minference.patterns import NAMES, Keys, Pattern, a_shape_blocks
from looseleaf_minference.search import CANDIDATES, KNOWN_HEADS, VERTICAL_SLASH

DENSITY, KNOWN_DENSITY, SINK, ENOUGH_KEYS = 0.5, 0.3, 100, 8
KEY_SEED = 10
"""Of the first set of pass keys: those before were looked at while the default candidates were chosen."""
CELLS = 64
"""Most cells along a side of a drawn pattern."""
CALIBRATIONS = {
    "all patterns, keys and values": CANDIDATES, "vertical-slash, keys and values": VERTICAL_SLASH,
    "vertical-slash, documentation": VERTICAL_SLASH}
"""Candidates and text of a calibration for pass keys. The authors calibrate on keys and values, and publish
vertical-slash heads only; documentation is what the keys are hidden in."""


@dataclass(frozen=True)
class Scale:
    """Tokens of the windows and of their last part, which is scored; of prompts with a key, how many keys a set has,
    and most sets; tokens of the known heads; which layers are timed how often, at which multiple of the window; and
    the head size of the published shape."""

    context: int = 4096
    last: int = 512
    prompt: int = 1536
    trials: int = 4
    key_sets: int = 4
    known: int = 2048
    layers: tuple[int, ...] = (5, 15, 25)
    repeats: int = 2
    rounds: int = 5
    head_dim: int = 128


@functools.lru_cache(maxsize=1)
def ready(scale: Scale) -> tuple[Any, Any, dict[str, MInference]]:
    """Model, tokenizer, and the calibrated backends: ``""`` for whole windows, and those of :data:`CALIBRATIONS`."""
    model, tokenizer = models.load("smollm2")
    plugins = {name: MInference() for name in ("", *CALIBRATIONS)}
    for name, plugin in plugins.items():
        text = search.key_value_ids(tokenizer, scale.prompt) if "values" in name else data.prose_ids(
            tokenizer, scale.prompt if name else scale.context, "calibration")
        plugin.calibrate(model, {"input_ids": text}, candidates=CALIBRATIONS.get(name, VERTICAL_SLASH),
                         density=DENSITY, progress=False)
    return model, tokenizer, plugins


def measure(seed: int, scale: Any) -> dict[str, Any]:
    """One window of text, one set of pass keys (for the first seeds), and one set of heads whose pattern is known."""
    model, tokenizer, plugins = ready(scale)
    text = data.prose_ids(tokenizer, scale.context * (seed + 1))[0, scale.context * seed:]
    known = search.Search(MInference().selector, CANDIDATES, density=KNOWN_DENSITY)
    with torch.inference_mode():
        known.attend(AttentionCall(*search.known_heads(scale.known, 10 * seed), 1.0))
    errors = known.relative_errors(0)
    row = {"quality": shared.perplexity_beside_exact(model, plugins[""], text, scale.last),
           "chosen": [p.name for p in known.assignment()[0]],
           "errors": [[min(float(errors[c, h]) for c, p in enumerate(known.tried) if p.name == name)
                       for name in KNOWN_HEADS] for h in range(len(KNOWN_HEADS))]}
    return {**row, "keys": pass_keys(seed, scale)} if seed < scale.key_sets else row


def pass_keys(seed: int, scale: Scale) -> dict[str, Any]:
    """Which keys of a set are found by exact attention, by each calibrated backend, and by A-shape of its density."""
    model, tokenizer, plugins = ready(scale)

    def ask() -> list[float]:
        return metrics.passkey(model, tokenizer, scale.prompt, trials=scale.trials, seed=KEY_SEED + seed,
                               progress=False).correct

    def found(backend: AttentionBackend) -> tuple[list[float], float]:
        with attach(model, backend) as attached:
            correct = ask()
            densities = [r["density"] for r in attached.records if "density" in r]
        return correct, fmean(densities)

    @functools.cache
    def a_shape(window: int) -> list[float]:
        return found(MInference(config=[[Pattern("a_shape", SINK, window)] * len(heads)
                                        for heads in plugins[""].assignment or []]))[0]

    out: dict[str, Any] = {"exact": ask()}
    for name in CALIBRATIONS:
        correct, density = found(plugins[name])
        window, same = equal_a_shape(scale.prompt, density)
        out[name] = {"sparse": correct, "a_shape": a_shape(window), "density": density, "same": same, "window": window}
    return out


def equal_a_shape(length: int, density: float, block: int = 64) -> tuple[int, float]:
    """The smallest window, in whole blocks, with which A-shape computes no less than ``density``; and its density."""
    lengths = torch.tensor([length])
    layout = Layout(lengths, lengths, length, length, block)
    for window in range(block, length + block, block):
        blocks = a_shape_blocks(torch.tensor([[SINK]]), torch.tensor([[window]]), layout)
        reached = float(Keys(blocks, torch.zeros(1, 1, length, dtype=torch.bool), layout).density())
        if reached >= density:
            break
    return window, reached


def once(scale: Any) -> dict[str, Any]:
    """What the searches chose, seconds of single layers, and a configuration of a published model's shape."""
    model, tokenizer, plugins = ready(scale)
    first = next(iter(CALIBRATIONS))
    by_last = search.calibrate(
        plugins[first].selector, model, {"input_ids": search.key_value_ids(tokenizer, scale.prompt)}, CANDIDATES,
        density=DENSITY, last=MInference.last_q, progress=False)
    kept = shared.kept_activations(model, data.prose_ids(tokenizer, scale.context), scale.layers)
    layer = scale.layers[len(scale.layers) // 2]
    query, key, value = kept[layer]
    with torch.inference_mode():
        drawn = panels(plugins[""], AttentionCall(query, key, value, query.shape[-1] ** -0.5, layer=layer))
    return {"assignments": {name: [[[p.name, p.first, p.second, p.score] for p in heads]
                                   for heads in plugin.assignment or []] for name, plugin in plugins.items()},
            "winners": {queries: [p.name for heads in assignment or [] for p in heads] for queries, assignment in (
                ("all", plugins[first].assignment), (f"last {MInference.last_q}", by_last))},
            "drawn": drawn, "layer": layer, **published(scale.head_dim),
            "times": shared.layer_times(kept, plugins[""], (scale.repeats,), scale.rounds)}


def panels(plugin: MInference, call: AttentionCall) -> dict[str, Any]:
    """What each head of a layer attends to, block by block: name -> the fraction of each cell that is computed."""
    patterns = plugin.patterns(call, call.layer)
    keys = plugin.select(call, patterns)
    layout = keys.layout
    single = F.pad(keys.columns, (0, layout.columns * layout.block - layout.k_len))
    per_block = single.unflatten(-1, (layout.columns, layout.block)).float().mean(-1)
    computed = torch.where(keys.blocks, 1.0, per_block[:, :, None]) * layout.causal
    cells = min(CELLS, layout.rows)
    maps = F.adaptive_avg_pool2d(computed, (cells, cells))[0].mul(1000).round().div(1000).tolist()
    return {f"head {h}: {p.name} {p.first}, {p.second}": maps[h] for h, p in enumerate(patterns)}


def published(head_dim: int) -> dict[str, Any]:
    """32 layers of 32 heads in the authors' format, on random weights of that shape cut to two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = [(1000, 6096), (30, 800), (100, 800), (500, 700), (3500, 100)]
    content = [{str(h): ["vertical_and_slash", *sizes[(7 * layer + h) % 5], 0.9] for h in range(32)}
               for layer in range(32)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32 * head_dim, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=32, num_key_value_heads=8, head_dim=head_dim)).eval()
        ids = torch.randint(0, 64, (1, 1536))
    with torch.inference_mode(), attach(model, MInference(config=content[:2])) as attached:
        finite = bool(torch.isfinite(model(ids).logits).all())
    return {"read": len(MInference(config=content).assignment or []), "finite": finite,
            "ran": [r["density"] for r in attached.records if "density" in r]}


def _keys(results: Results, name: str, outside: bool = True) -> list[tuple[float, float, float]]:
    """Whether exact attention, MInference and A-shape found each key; of those ``outside`` only what A-shape's window
    does not reach and exact attention finds."""
    scale, out = results.scale, []
    for keys in (row["keys"] for row in results.rows if "keys" in row):
        for i, found in enumerate(zip(keys["exact"], keys[name]["sparse"], keys[name]["a_shape"], strict=True)):
            place = (i + 0.5) / scale.trials * scale.prompt
            # The question at the end sees the window rounded out to blocks; a key is outside if it ends before that.
            far = SINK + 64 < place < scale.prompt - keys[name]["window"] - 192
            if not outside or (far and found[0]):
                out.append(found)
    return out


def _densities(results: Results, name: str) -> list[float]:
    """Density of MInference and of A-shape, means over the sets of keys."""
    return [fmean(row["keys"][name][what] for row in results.rows if "keys" in row) for what in ("density", "same")]


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project, two for each calibration."""
    claim, scale, once = results.claim, results.scale, results.once
    ratio, density = shared.perplexity_ratio(results, "quality"), results.interval("quality", "density")
    yield claim("Calibrated on one text, the quality on another is that of full attention",
                "paper, tables of RULER, InfiniteBench and PG-19; here: perplexity", "on par or slightly better",
                "perplexity on the last 512 tokens at most 2 % above dense at 4096 tokens", ratio.value <= 1.02,
                f"ratio {ratio:.4f} at density {density.value:.3f}, {scale.context} tokens, {len(results.seeds)} "
                "windows")
    yield claim("The patterns are sparse", "this project's rule", "-", "computed scores below 0.60 of those of all "
                "causal blocks at 4096 tokens", density.value < 0.6, f"density {density:.3f} at {scale.context} tokens")
    for name in CALIBRATIONS:
        keys, (ours, same) = _keys(results, name), _densities(results, name)
        enough, count = len(keys) >= ENOUGH_KEYS, len(keys)
        gap = bootstrap([sparse - fixed for _, sparse, fixed in keys]) if keys else Interval(*[math.nan] * 3)
        fraction = sum(fixed for _, _, fixed in keys) / count if keys else math.nan
        yield claim(f"Keys outside the window are found more often than by A-shape of equal density, {name}",
                    "paper, ablation of the patterns", "the mixture wins", "paired difference above 0 with its 95 % "
                    f"interval, over keys outside that dense attention finds; {ENOUGH_KEYS} keys or more",
                    gap.low > 0 if enough else None,
                    f"{gap:+.2f} of {count} keys, density {ours:.3f} against {same:.3f}", any_scale=True)
        yield claim(f"A-shape alone fails at retrieval, at the density of {name}", "paper, ablation of the patterns",
                    "fails", f"at most 20 % of them; {ENOUGH_KEYS} keys or more", fraction <= 0.2 if enough else None,
                    f"A-shape finds {fraction:.2f} of {count} keys outside its window that dense attention finds",
                    any_scale=True)
    right = [name == known for row in results.values("chosen") for name, known in zip(row, KNOWN_HEADS, strict=True)]
    yield claim("The search gives each head the pattern that it has", "paper, section 3.2; here: heads made to have "
                "one", "-", "all heads of all seeds", all(right), f"{sum(right)} of {len(right)} heads at "
                f"{scale.known} tokens and cost {KNOWN_DENSITY}", any_scale=True)
    yield claim("Attention is faster than full attention", "paper, figure of kernel latency; here: CPU",
                "about 1.8x at 100k tokens on a GPU [memory]",
                "median ratio above 1 at 8192 tokens for every layer timed", *shared.faster_everywhere(results))
    yield claim("A configuration of the authors' format and a published model's shape loads and runs",
                "this project's rule", "-", "32 x 32 heads read, two layers run sparsely with finite logits",
                once["read"] == 32 and len(once["ran"]) == 2 and once["finite"], f"{once['read']} layers read; 2 "
                f"layers of 32 heads of {scale.head_dim} ran at densities {', '.join(f'{d:.3f}' for d in once['ran'])} "
                "at 1536 tokens", any_scale=True)
    yield claim("One million tokens are prefilled ten times faster by an 8B model on an A100", "paper, figure of "
                "latency", "30 minutes to 3 minutes", "ratio of at least 5", None,
                "not measured: needs a GPU and an 8B model")
    yield claim("On a GPU, attention is faster by 1.8x, 4.1x, 6.8x and 10x at 100k, 300k, 500k and 1M tokens",
                "paper, figure of kernel latency", "as stated [memory]", "ratio above 1 to SDPA's flash kernel at 100k "
                "tokens", None, "not measured: needs a GPU")
    yield claim("On RULER, InfiniteBench and needle tests quality is that of full attention", "paper, tables",
                "on par or slightly better", "averages within one point of full attention", None,
                "not measured: needs an 8B model and 128k tokens")


def show(report: Report, results: Results) -> None:
    """Assignments of patterns, perplexity, pass keys, heads whose pattern is known, maps and times."""
    scale, once = results.scale, results.once
    _show_assignment(report, once["assignments"][""], f"{scale.context} tokens")
    shared.show_perplexity(report, results, "MInference", scale.last, {scale.context: ("quality",)})
    table = report.table(f"Pass keys found at {scale.prompt} tokens", [
        "candidates, calibrated on", "keys", "of", "dense", "MInference", "A-shape", "density", "A-shape density",
        "A-shape window"],
        note="outside: beyond the first tokens, further from the question than the window, found by dense attention")
    for name in CALIBRATIONS:
        _show_assignment(report, once["assignments"][name], f"{scale.prompt} tokens, {name}")
        windows = sorted({row["keys"][name]["window"] for row in results.rows if "keys" in row})
        for which in ("all", "outside"):
            keys = _keys(results, name, outside=which == "outside")
            table.add(name, which, len(keys), *(sum(found[i] for found in keys) for i in range(3)),
                      *_densities(results, name), windows[0] if len(windows) == 1 else ", ".join(map(str, windows)))
    add_table(report, f"Best pattern of each head in the search, by the queries that count, {scale.prompt} tokens", (
        {"queries": queries, **{f"{name} heads": won.count(name) for name in NAMES}}
        for queries, won in once["winners"].items()),
        "keys and values, the same candidates at the same cost; the last queries are those that write the answer")
    chosen = {name: results.values("chosen", h) for h, name in enumerate(KNOWN_HEADS)}
    add_table(report, "Heads whose pattern is known", (
        {"head": name, "heads": len(chosen[name]), "found": chosen[name].count(name),
         **{other: results.mean("errors", h, n) for n, other in enumerate(KNOWN_HEADS)}}
        for h, name in enumerate(KNOWN_HEADS)),
        "last three columns: mean relative error of the best candidate of each pattern")
    cells = len(next(iter(once["drawn"].values())))
    report.figure(f"What each head of layer {once['layer']} attends to, {scale.context} tokens", panels=once["drawn"],
                  note=f"rows: queries, columns: keys, in cells of {scale.context // cells} tokens; the fraction of a "
                       "cell that is computed")
    shared.show_times(report, results, "MInference")


def _show_assignment(report: Report, assignment: Sequence[Sequence[Sequence[Any]]], what: str) -> None:
    """Patterns that a search chose, rows of name, first, second and score by layer and head."""
    rows = {name: [row for heads in assignment for row in heads if row[0] == name] for name in NAMES}
    add_table(report, f"Patterns found on {what}", (
        {"pattern": name, "heads": len(of), "first": fmean(row[1] for row in of),
         "second": fmean(row[2] for row in of), "relative error": fmean(row[3] for row in of)}
        for name, of in rows.items() if of), "sizes and errors are means over the heads")
    report.figure(f"Fraction of the heads by pattern, {what}", x_label="layer", y_label="fraction of heads", series=[
        curve(name, range(len(assignment)), [fmean(row[0] == name for row in heads) for heads in assignment])
        for name, of in rows.items() if of])


study = Study("MInference on SmolLM2-135M-Instruct", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(context=1536, layers=(5,), repeats=1, rounds=3, head_dim=16), quick_seeds=1,
              facts=lambda results: {
                  "model": "SmolLM2-135M-Instruct, float32", "context": results.scale.context,
                  "windows": len(results.seeds), "cost given to calibrate": DENSITY,
                  "calibration tokens": results.scale.context, "threads": torch.get_num_threads()})
