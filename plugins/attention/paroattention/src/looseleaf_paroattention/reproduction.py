"""PAROAttention's claims on planted heads and on a small video model: orders, sparsity, integers, speed on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf import AttentionCall, Claim, Report, Series, attach
from looseleaf_paroattention import synthetic
from looseleaf_paroattention.backend import PAROAttention
from looseleaf_paroattention.calibration import LayerStatistics, Observer, make_plan, observe
from looseleaf_paroattention.masks import block_masks
from looseleaf_paroattention.permutations import PERMUTATIONS, inverse, permute
from looseleaf_paroattention.plan import LayerPlan, Plan

PLANTED_GRID, PLANTED_BLOCK, SHARE, FACTOR_MARGIN = (8, 16, 16), 64, 0.99, 0.25
TRAINING_STEPS, SAMPLER_STEPS = 2400, 20
CALIBRATION_VIDEOS, ERROR_VIDEOS, VIDEOS = 4, 4, 64
ERROR_STEPS = 10
DENSITIES, DENSITY = (0.2, 0.3, 0.5), 0.3
SMALL_BLOCK = 16
"""A block of 64 tokens is a whole plane of this model's grid, so that the order inside of planes does not count."""
HALF = 0.5
INT8_LIMIT = 2e-2
SPEED_GRID, SPEED_HEADS, SPEED_WIDTH = (8, 32, 32), 4, 64
OVERHEAD_LIMIT = 0.01
WAYS = ("reordered", "as they come", "window")

Errors = dict[str, list[float]]


def reproduce(*, seeds: int = 5, quick: bool = False, progress: bool | None = None) -> Report:
    """Measure what the paper claims, at the scale of a video model of 0.4 million weights and one CPU core.

    Args:
        seeds: sets of planted heads, and sets of noise and captions for the errors of the video model.
        quick: one of each, a model that is hardly trained, shorter inputs; what that cannot show is said so.
        progress: show progress bars; None: only on a terminal.
    """
    from looseleaf_lab import video

    count = 1 if quick else seeds
    steps = TRAINING_STEPS // 40 if quick else TRAINING_STEPS
    report = Report("PAROAttention on planted heads and on a small video model")
    report.facts = {"model": f"CogVideoX transformer, 4 layers of 4 heads of 16, trained for {steps} steps of 2 videos",
                    "tokens": "8 x 8 x 8 and 3 of text, blocks of 64", "seeds": count,
                    "threads": torch.get_num_threads(), "torch": torch.__version__}
    _planted(report, count)
    model = video.trained(steps, progress=progress)
    base = PAROAttention(grid=video.grid(model), text_tokens=video.WORDS, qk_bits=16, pv_bits=16, density=DENSITY)
    small = dataclasses.replace(base, block=SMALL_BLOCK)
    statistics, in_small = (observe(plugin, model, lambda _: _videos(model, CALIBRATION_VIDEOS, 1000, ERROR_STEPS),
                                    steps=ERROR_STEPS, progress=progress) for plugin in (base, small))
    _maps(report, base, statistics)
    for plugin, of in ((base, statistics), (small, in_small)):
        _kept(report, plugin, of)
    rivals = {f"{way}, density {DENSITY}, blocks of {SMALL_BLOCK}": _made(small, in_small, way, DENSITY)
              for way in WAYS}
    _errors(report, model, base, statistics, rivals, count, quick, progress)
    _quality(report, model, base, statistics, quick, progress)
    _speed(report, quick)
    _elsewhere(report)
    return report


def _planted(report: Report, seeds: int) -> None:
    """Heads whose right order is known."""
    plugin = PAROAttention(grid=PLANTED_GRID, block=PLANTED_BLOCK, density=1.0)
    chosen: dict[float, list[bool]] = {alpha: [] for alpha in (0.0, 0.5, 1.0)}
    factors: dict[str, list[tuple[float, float]]] = {name: [] for name in PERMUTATIONS}
    density: dict[str, list[float]] = {name: [] for name in PERMUTATIONS}
    integers: dict[int, list[float]] = {8: [], 4: []}
    for seed in range(seeds):
        call = AttentionCall(*synthetic.planted(PLANTED_GRID, seed), 1.0, False, phase="encode")
        observer = Observer(plugin)
        exact = observer.attend(call)
        layer = observer.found[0]
        for alpha, hits in chosen.items():
            found = make_plan(dataclasses.replace(plugin, alpha=alpha), observer.found).layers[0].permutations
            hits += [one == two for one, two in zip(found, PERMUTATIONS, strict=True)]
        for h, name in enumerate(PERMUTATIONS):
            needed = [float(synthetic.density_for(layer.mass[0, layer.names.index(order), h], SHARE))
                      for order in (PERMUTATIONS[0], name)]
            predicted = [float(synthetic.density_for(synthetic.expected_mass(name, order, PLANTED_GRID, plugin.block),
                                                     SHARE)) for order in (PERMUTATIONS[0], name)]
            factors[name].append((predicted[0] / predicted[1], needed[0] / needed[1]))
            density[name].append(needed[1])
        for bits in integers:
            pair = [_relative(dataclasses.replace(plugin, pv_bits=bits, permutations=names).attend(call), exact)
                    for names in ({0: PERMUTATIONS}, PERMUTATIONS[0])]
            integers[bits].append(pair[0] / pair[1])
    table = report.table("Planted heads", ["head", "density for 99 %", "factor expected", "factor measured"],
                         note="factor: share of the blocks that hold 99 % of the attention, as the tokens come over in "
                              "the head's order; means over the seeds")
    for name in PERMUTATIONS:
        table.add(name, _mean(density[name]), *(_mean([f[i] for f in factors[name]]) for i in (0, 1)))
    report.table("Orders found for planted heads", ["alpha", "heads", "right"],
                 [[alpha, len(hits), sum(hits)] for alpha, hits in chosen.items()],
                 note="alpha 0: by empty blocks alone; 1: by uniform blocks alone")
    hits = chosen[PAROAttention.alpha]
    report.claims.append(Claim.decide(
        all(hits), statement="Calibration finds the order of each head that has one",
        source="paper, token reordering; here: heads made to have one", paper="-",
        measured=f"{sum(hits)} of {len(hits)} heads", rule="all heads of all seeds, alpha 0.5"))
    ratios = [two / one for of in factors.values() for one, two in of]
    report.claims.append(Claim.decide(
        all(1 - FACTOR_MARGIN <= r <= 1 + FACTOR_MARGIN for r in ratios),
        statement="In its order a head needs as many fewer blocks as the geometry of its pattern says",
        source="this project's rule", paper="-",
        measured=f"measured over expected factor {min(ratios):.2f} to {max(ratios):.2f}; the largest factor is "
                 f"{max(two for of in factors.values() for _, two in of):.1f}",
        rule="within 25 % of the expected factor for each head of each seed"))
    report.table("Integers on planted heads", ["bits of P and V", "error ratio"],
                 [[bits, _mean(r)] for bits, r in integers.items()],
                 note="relative error of the output in each head's order over that of the tokens as they come, all "
                      "blocks computed")


def _videos(model: Any, count: int, seed: int, steps: int) -> Tensor:
    """Videos to the captions of the test digits."""
    from looseleaf_lab import video

    return video.sample(model, video.moving_digits(count, seed, "test").captions, seed, steps=steps, progress=False)


def _maps(report: Report, base: PAROAttention, statistics: Mapping[int, LayerStatistics]) -> None:
    """Orders that were chosen, what the metrics say of them, and the map of the head that gains most."""
    plan = make_plan(base, statistics)
    table = report.table("Orders found in the video model", ["layer", "orders of the heads", "empty blocks",
                                                              "as they come", "incoherence", "as they come "])
    gains, falls = {}, []
    for number, layer in plan.layers.items():
        pairs = {}
        for what, metric in (("sparse", layer.sparsity), ("incoherent", layer.incoherence)):
            own = [metric[name][h] for h, name in enumerate(layer.permutations)]
            pairs[what] = own, metric[PERMUTATIONS[0]]
        table.add(number, ", ".join(layer.permutations), *(_mean(x) for pair in pairs.values() for x in pair))
        falls += [own / plain for own, plain in zip(*pairs["incoherent"], strict=True)]
        of = statistics[number]
        for h, name in enumerate(layer.permutations):
            maps = [of.mass[0, of.names.index(order), h] / of.samples[0] for order in (PERMUTATIONS[0], name)]
            needed = synthetic.density_for(torch.stack(maps), 0.9)
            gains[number, h] = float(needed[0] / needed[1]), maps, name
    (number, h), (gain, maps, name) = max(gains.items(), key=lambda item: item[1][0])
    for order, mass in zip((PERMUTATIONS[0], name), maps, strict=True):
        report.figure(f"Block map of layer {number}, head {h}, in the order {order}", x_label="key block",
                      y_label="query block", image=mass.tolist(),
                      note=f"share of a query's attention; 90 % needs {gain:.1f} times fewer blocks in {name}")
    changed = [name != PERMUTATIONS[0] for layer in plan.layers.values() for name in layer.permutations]
    report.facts["heads reordered"] = f"{sum(changed)} of {len(changed)}"
    report.facts["incoherence, reordered over as they come"] = f"{_mean(falls):.3f} (mean over heads)"


def _kept(report: Report, plugin: PAROAttention, statistics: Mapping[int, LayerStatistics]) -> None:
    """How much of the attention the blocks of each order hold."""
    table = report.table(f"Attention in {DENSITY:.0%} of the blocks of {plugin.block}", [
        "layer", "reordered", "as they come", "best order"],
        note="share of the calibration's attention that the heaviest blocks hold, means over heads; best: the order of "
             "each head that holds most")
    for number, layer in make_plan(plugin, statistics).layers.items():
        of = statistics[number]
        mass = of.mass[0] / of.samples[0]
        held = (mass * block_masks(mass, density=DENSITY)).sum((2, 3)) / mass.shape[-1]
        chosen = [float(held[of.names.index(name), h]) for h, name in enumerate(layer.permutations)]
        table.add(number, _mean(chosen), float(held[of.names.index(PERMUTATIONS[0])].mean()),
                  float(held.amax(0).mean()))


def _errors(report: Report, model: Any, base: PAROAttention, statistics: Mapping[int, LayerStatistics],
            others: Mapping[str, PAROAttention], seeds: int, quick: bool, progress: bool | None) -> None:
    """Errors of each layer's attention on exact inputs: density, orders and bits side by side."""
    from looseleaf.progress import track
    from looseleaf_lab.compare.attention import SideBySide
    from looseleaf.statistics import bootstrap

    rivals = {f"{way}, density {density}": _made(base, statistics, way, density)
              for density in DENSITIES for way in WAYS}
    for bits in ((8, 16), (8, 8), (8, 4)):
        for way in WAYS[:2]:
            rivals[f"{way}, {_bits(bits)}"] = _made(
                dataclasses.replace(base, qk_bits=bits[0], pv_bits=bits[1]), statistics, way, 1.0)
    rivals[f"reordered, density {DENSITY}, {_bits((8, 8))}"] = _made(
        dataclasses.replace(base, qk_bits=8, pv_bits=8), statistics, "reordered", DENSITY)
    rivals.update(others)
    errors: Errors = {name: [] for name in rivals}
    for seed in track(range(seeds), "errors of attention", show=progress):
        together = SideBySide(rivals)
        with torch.no_grad(), attach(model, together, steps=ERROR_STEPS):
            _videos(model, ERROR_VIDEOS, seed, ERROR_STEPS)
        if together.failed:
            raise RuntimeError(f"a rival failed: {together.failed}")
        for name, found in together.found.items():
            errors[name].append(_mean([f["error"] for f in found]))
    density = {name: _mean([f["density"] for f in found]) for name, found in together.found.items()}
    report.table("Relative error of the attention output", ["what", "density", "error", "low", "high"],
                 [[name, density[name], *bootstrap(values)] for name, values in errors.items()],
                 note=f"mean over layers and {ERROR_STEPS} denoising steps, inputs of exact attention; intervals: 95 % "
                      f"bootstrap over {seeds} sets of {ERROR_VIDEOS} videos; floats, blocks of {base.block} "
                      "unless said")
    figure = report.figure("Error of the attention output by density", x_label="density", y_label="relative error",
                           y_log=True)
    for way in WAYS:
        spans = [bootstrap(errors[f"{way}, density {d}"]) for d in DENSITIES]
        figure.series.append(Series(way, [density[f"{way}, density {d}"] for d in DENSITIES], [s[0] for s in spans],
                                    [s[1] for s in spans], [s[2] for s in spans]))
    for rival in WAYS[1:]:
        ratio = _ratio(errors, f"reordered, density {DENSITY}", f"{rival}, density {DENSITY}")
        report.claims.append(Claim.decide(
            None if quick else ratio[2] <= HALF,
            statement=f"At density {DENSITY} the error of the attention is much lower reordered than "
                      f"{_against(rival)}",
            source="paper, sparse attention; here: a small video model", paper="qualitative",
            measured=f"ratio of errors {_span(ratio)}: {_mean(errors[f'reordered, density {DENSITY}']):.3f} against "
                     f"{_mean(errors[f'{rival}, density {DENSITY}']):.3f}",
            rule="at most half, with its 95 % interval"))
    int8, int4 = errors[f"reordered, {_bits((8, 8))}"], errors[f"reordered, {_bits((8, 4))}"]
    report.claims.append(Claim.decide(
        None if quick else bootstrap(int8)[2] < INT8_LIMIT, statement="Eight bits for Q, K, P and V cost little",
        source="paper, quantised attention", paper="lossless metrics",
        measured=f"relative error {_span(bootstrap(int8), 4)}; with 4 bits for P and V {_span(bootstrap(int4), 4)}",
        rule="below 2e-2 with its 95 % interval, all blocks computed"))
    for bits in ((8, 8), (8, 4)):
        ratio = _ratio(errors, f"reordered, {_bits(bits)}", f"as they come, {_bits(bits)}")
        report.claims.append(Claim.decide(
            None if quick else ratio[2] < 1,
            statement=f"Reordering makes the error of the integers smaller, {_bits(bits)}",
            source="paper, quantised attention", paper="qualitative",
            measured=f"ratio of errors {_span(ratio)}", rule="below 1 with its 95 % interval, all blocks computed"))


def _quality(report: Report, model: Any, base: PAROAttention, statistics: Mapping[int, LayerStatistics], quick: bool,
             progress: bool | None) -> None:
    """Videos from the same noise, by exact attention and by each rival."""
    from looseleaf.progress import track
    from looseleaf_lab import video
    from looseleaf.statistics import bootstrap

    count, steps = (32, 5) if quick else (VIDEOS, SAMPLER_STEPS)
    real = video.moving_digits(4 * count, 77, "test").frames
    dense = _videos(model, count, 500, steps)
    integers = {bits: dataclasses.replace(base, qk_bits=8, pv_bits=bits) for bits in (8, 4)}
    rivals = {**{way: _made(base, statistics, way, DENSITY) for way in WAYS},
              **{f"reordered, {_bits((8, bits))}": _made(p, statistics, "reordered", DENSITY)
                 for bits, p in integers.items()}}
    table = report.table(f"{count} videos at density {DENSITY}", [
        "attention", "distance to exact", "low", "high", "PSNR, dB", "Fréchet distance to real"],
        note=f"{steps} steps from the same noise; distance: mean squared difference of pixels in [-1, 1] to the video "
             "that exact attention makes, 95 % bootstrap over videos; Fréchet distance in 16 principal components to "
             f"{len(real)} real videos")
    table.add("exact", 0.0, 0.0, 0.0, None, video.frechet_distance(dense, real))
    distances: Errors = {}
    for name in track(rivals, "making videos", show=progress):
        with attach(model, rivals[name], steps=steps):
            made = _videos(model, count, 500, steps)
        distances[name] = (made - dense).square().flatten(1).mean(1).tolist()
        mean = bootstrap(distances[name])
        psnr = 10 * torch.tensor(4 / max(mean[0], 1e-12)).log10().item()
        table.add(name, *mean, psnr, video.frechet_distance(made, real))
    others = video.moving_digits(count, 78, "test").frames
    table.add("other real videos", None, None, None, None, video.frechet_distance(others, real))
    for rival in WAYS[1:]:
        ratio = _ratio(distances, "reordered", rival)
        report.claims.append(Claim.decide(
            None if quick else ratio[2] <= HALF,
            statement=f"At density {DENSITY} videos stay much nearer to those of exact attention reordered than "
                      f"{_against(rival)}",
            source="paper, tables of CogVideoX and Flux; here: a small video model", paper="lossless metrics",
            measured=f"ratio of squared distances {_span(ratio)} over {count} videos",
            rule="at most half, with its 95 % interval"))


def _speed(report: Report, quick: bool) -> None:
    """One layer's attention against torch's, reordering included; the time does not depend on the numbers."""
    from looseleaf_lab.timing import interleave

    grid = (SPEED_GRID[0], SPEED_GRID[1] // 2, SPEED_GRID[2] // 2) if quick else SPEED_GRID
    tokens = grid[0] * grid[1] * grid[2]
    g = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, SPEED_HEADS, tokens, SPEED_WIDTH, generator=g)
    call = AttentionCall(query, key, value, SPEED_WIDTH ** -0.5, False, phase="encode")
    names = (PERMUTATIONS * SPEED_HEADS)[1:SPEED_HEADS + 1]
    mass = torch.rand(1, SPEED_HEADS, tokens // 64, tokens // 64, generator=g)
    functions: dict[str, Callable[[], Any]] = {
        "exact": lambda: F.scaled_dot_product_attention(query, key, value)}
    for density in DENSITIES:
        for bits in ((16, 16), (8, 8)):
            plugin = PAROAttention(grid=grid, density=density, qk_bits=bits[0], pv_bits=bits[1])
            plugin.plan = Plan(plugin.settings(), {0: LayerPlan(names, block_masks(mass, density=density))})
            functions[f"{density}, {_bits(bits)}"] = lambda p=plugin: p.attend(call)  # type: ignore[misc]
    order = plugin.orders(names, tokens, None)
    back = inverse(order)
    functions["reordering"] = lambda: [permute(x, o) for x, o in ((query, order), (key, order), (value, order),
                                                                  (query, back))]
    with torch.inference_mode():
        timing = interleave(functions, rounds=2 if quick else 5)
    table = report.table(f"Seconds of one layer's attention, {tokens} tokens, {SPEED_HEADS} heads of {SPEED_WIDTH}", [
        "what", "seconds", "faster than exact", "low", "high"],
        note="reordering of queries, keys, values and outputs included; medians of interleaved rounds; random blocks")
    for name in functions:
        table.add(name, timing.median(name), *(timing.ratio(name, "exact") if name != "exact" else (1.0, 1.0, 1.0)))
    for bits in ((16, 16), (8, 8)):
        ratios = {density: timing.ratio(f"{density}, {_bits(bits)}", "exact") for density in DENSITIES}
        report.claims.append(Claim.decide(
            None if quick else all(r[0] >= HALF / d for d, r in ratios.items()),
            statement=f"Attention is faster by near 1/density, {_bits(bits)}",
            source="paper, kernel benchmark; here: CPU", paper="close to 1/density at 0.2 to 0.5",
            measured=", ".join(f"{r[0]:.2f}x ({r[1]:.2f} to {r[2]:.2f}) at {d}" for d, r in ratios.items()),
            rule="median of paired ratios at least half of 1/density at each density, float32 against torch's kernel"))
    share = timing.median("reordering") / timing.median(f"{DENSITY}, {_bits((16, 16))}")
    report.claims.append(Claim.decide(
        None if quick else share < OVERHEAD_LIMIT, statement="Reordering costs next to nothing",
        source="paper, overheads", paper="below 1 %, fused into other kernels",
        measured=f"{share:.1%} of the attention at density {DENSITY}, not fused", rule="below 1 %"))


def _elsewhere(report: Report) -> None:
    for statement, source, paper, rule in (
            ("Metrics of CogVideoX and Flux are lossless at 20 to 30 % density and INT8 or INT4", "abstract",
             "nearly identical to full precision", "metrics within the noise of exact attention"),
            ("Images and videos are made faster end to end", "abstract", "1.9x to 2.7x", "ratio above 1.5 on a GPU"),
            ("At equal quality it is faster than SpargeAttn and SparseVideoGen", "paper, kernel benchmark",
             "as said", "ratio above 1 on a GPU")):
        report.claims.append(Claim.decide(None, statement=statement, source=source, paper=paper, rule=rule,
                                          measured="not measured: needs a GPU and those models"))


def _made(base: PAROAttention, statistics: Mapping[int, LayerStatistics], way: str, density: float) -> PAROAttention:
    """A backend with a plan: in the order of each head, as the tokens come, or a window of equal density."""
    plugin = dataclasses.replace(base, density=density, permutations="auto" if way == "reordered" else PERMUTATIONS[0])
    plugin.plan = make_plan(plugin, statistics)
    if way == "window":
        for number, layer in plugin.plan.layers.items():
            mass = statistics[number].mass[:, statistics[number].names.index(PERMUTATIONS[0])]
            layer.masks = window_masks(layer.masks, mass / statistics[number].samples[:, None, None, None])
    return plugin


def window_masks(masks: Tensor, mass: Tensor) -> Tensor:
    """As many blocks for each head as ``masks`` has, those nearest to the diagonal; (G, H, N, N) bool.

    The keys of the last block, which holds the text, count as next to every query. Of blocks equally near, those with
    the larger ``mass`` (G, H, N, N) come first.
    """
    place = torch.arange(masks.shape[-1])
    away = (place[:, None] - place).abs().float()
    away[:, -1].clamp_(max=1)
    order = torch.sort((mass * 0.5 - away).flatten(2), dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    return (rank < masks.flatten(2).sum(-1, keepdim=True)).view_as(masks)


def _bits(bits: tuple[int, int]) -> str:
    names = {8: "INT8", 4: "INT4", 16: "float"}
    return "float" if bits == (16, 16) else f"{names[bits[0]]} QK, {names[bits[1]]} PV"


def _against(rival: str) -> str:
    return "with the tokens as they come" if rival == WAYS[1] else "by a window of equal density"


def _ratio(values: Errors, one: str, two: str) -> tuple[float, float, float]:
    """Sum of ``one`` over sum of ``two``, paired, with its 95 % bootstrap interval."""
    import numpy as np

    from looseleaf.statistics import bootstrap

    pairs = np.array([values[one], values[two]])

    def statistic(rows: Any) -> Any:
        above, below = pairs[:, rows.astype(int)].sum(-1)
        return above / below

    return bootstrap(range(pairs.shape[1]), statistic=statistic)


def _span(values: tuple[float, float, float], digits: int = 3) -> str:
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"


def _relative(out: Tensor, exact: Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
