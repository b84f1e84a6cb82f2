"""PAROAttention's claims on planted heads and on a small video model: orders, sparsity, integers, speed on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf import AttentionCall, Claim, Report, attach
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import video
from looseleaf_lab.attention import SideBySide
from looseleaf_lab.attention_claims import ratio_of_sums
from looseleaf_lab.study import Results, Study, add_table, curve
from looseleaf_lab.timing import interleave
from looseleaf_paroattention import calibration
from looseleaf_paroattention.backend import PAROAttention
from looseleaf_paroattention.calibration import LayerStatistics, block_masks, density_for
from looseleaf_paroattention.grid import PERMUTATIONS, inverse, permute
from looseleaf_paroattention.plan import LayerPlan, Plan

DENSITIES, DENSITY, MOST = (0.2, 0.3, 0.5), 0.3, 0.99
BLOCK, SMALL_BLOCK = 64, 16
"""A block of 64 tokens is a whole plane of this model's grid, so that the order inside of planes does not count."""
AS_IS = PERMUTATIONS[0]
BASELINES = {"as they come": "with the tokens as they come", "window": "by a window of equal density"}
"""Other ways to choose blocks, and how a claim names them."""
METHODS = ("reordered", *BASELINES)
BITS = {(8, 16): "INT8 QK, float PV", (8, 8): "INT8 QK, INT8 PV", (8, 4): "INT8 QK, INT4 PV", (16, 16): "float"}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Grid and block of the planted heads; training steps of the video model and steps of its sampler; videos of
    calibration, of the errors and of the comparison, and sampler steps of the first two; what is timed how often."""

    planted_grid: tuple[int, int, int] = (8, 16, 16)
    planted_block: int = 64
    training: int = 2400
    sampler: int = 20
    calibration_videos: int = 4
    error_videos: int = 4
    videos: int = 64
    error_steps: int = 10
    speed_grid: tuple[int, int, int] = (8, 32, 32)
    speed_heads: int = 4
    speed_head_dim: int = 64
    rounds: int = 5


@functools.lru_cache(maxsize=1)
def ready(scale: Scale) -> tuple[Any, PAROAttention, dict[int, dict[int, LayerStatistics]]]:
    """The video model, a backend of floats for it, and by block size what calibration observes."""
    model = video.trained(scale.training, progress=False)
    base = PAROAttention(grid=video.grid(model), text_tokens=video.WORDS, qk_bits=16, pv_bits=16, density=DENSITY)

    return model, base, {block: calibration.observe(
        model, lambda _: sample(model, scale.calibration_videos, 1000, scale.error_steps), base.token_grid, block=block,
        steps=scale.error_steps, progress=False) for block in (BLOCK, SMALL_BLOCK)}


def sample(model: Any, count: int, seed: int, steps: int) -> Tensor:
    """Videos to the captions of the test digits."""
    return video.sample(model, video.moving_digits(count, seed, "test").captions, seed, steps=steps, progress=False)


def planned(scale: Scale, method: str, density: float = DENSITY, block: int = BLOCK, **fields: Any) -> PAROAttention:
    """A backend with a plan: in the order of each head, as the tokens come, or a window of equal density."""
    _, base, statistics = ready(scale)
    plugin = dataclasses.replace(base, density=density, block=block, **fields,
                                 permutations="auto" if method == "reordered" else AS_IS)
    plugin.fit(statistics[block])
    if method == "window" and plugin.plan is not None:
        for number, layer in plugin.plan.layers.items():
            layer.masks = window_masks(layer.masks, statistics[block][number].mean_mass(AS_IS))
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


def measure(seed: int, scale: Any) -> dict[str, Any]:
    """One set of planted heads, and the errors of each layer's attention on exact inputs for one set of videos."""
    model, _, _ = ready(scale)
    backends = {f"{name}, density {density}": planned(scale, name, density)
                for density in DENSITIES for name in METHODS}
    backends |= {f"{name}, {BITS[8, pv]}": planned(scale, name, 1.0, qk_bits=8, pv_bits=pv)
                 for pv in (16, 8, 4) for name in ("reordered", "as they come")}
    backends[f"reordered, density {DENSITY}, {BITS[8, 8]}"] = planned(scale, "reordered", qk_bits=8, pv_bits=8)
    backends |= {f"{name}, density {DENSITY}, blocks of {SMALL_BLOCK}": planned(scale, name, block=SMALL_BLOCK)
                 for name in METHODS}
    beside = SideBySide(backends)
    with torch.no_grad(), attach(model, beside, steps=scale.error_steps):
        sample(model, scale.error_videos, seed, scale.error_steps)
    if beside.failed:
        raise RuntimeError(f"expected every backend to run, got {beside.failed}")
    return {"planted": known_heads(seed, scale), **{
        what: {name: fmean(call[what] for call in calls) for name, calls in beside.found.items()}
        for what in ("error", "density")}}


def known_heads(seed: int, scale: Scale) -> dict[str, Any]:
    """Orders found for heads whose right order is known, blocks needed in it, and what integers gain by it."""
    grid, block = scale.planted_grid, scale.planted_block
    plugin = PAROAttention(grid=grid, block=block, density=1.0)
    call = AttentionCall(*calibration.planted(grid, seed), 1.0, False, phase="bidirectional")
    observer = calibration.Observer(plugin.token_grid, block, plugin.eps)
    exact = observer.attend(call)
    layer = observer.layers[0]
    out: dict[str, Any] = {"right": {}, "heads": {}, "integers": {}}
    for alpha in (0.0, 0.5, 1.0):
        weighted = dataclasses.replace(plugin, alpha=alpha)
        weighted.fit(observer.layers)
        assert weighted.plan is not None
        out["right"][alpha] = [a == b for a, b in zip(weighted.plan.layers[0].permutations, PERMUTATIONS, strict=True)]
    for h, name in enumerate(PERMUTATIONS):
        plain, own = (float(density_for(layer.mass[0, layer.names.index(order), h], MOST)) for order in (AS_IS, name))
        expected = [float(density_for(calibration.expected_mass(name, order, grid, block), MOST))
                    for order in (AS_IS, name)]
        out["heads"][name] = {"density": own, "expected": expected[0] / expected[1], "measured": plain / own}
    for bits in (8, 4):
        errors = [float((dataclasses.replace(plugin, pv_bits=bits, permutations=names).attend(call) - exact).norm()
                        / exact.norm()) for names in ({0: PERMUTATIONS}, AS_IS)]
        out["integers"][bits] = errors[0] / errors[1]
    return out


def once(scale: Any) -> dict[str, Any]:
    """Orders and blocks of the video model, videos by each method, and seconds of a layer."""
    return {"orders": orders(scale), "kept": {block: kept(scale, block) for block in (BLOCK, SMALL_BLOCK)},
            "videos": videos(scale), "seconds": seconds(scale)}


def orders(scale: Scale) -> dict[str, Any]:
    """Orders that were chosen, what the metrics say of them, and the map of the head that gains most."""
    plan, statistics = planned(scale, "reordered").plan, ready(scale)[2][BLOCK]
    assert plan is not None
    rows: list[list[Any]] = []
    falls: list[float] = []
    best: dict[str, Any] = {"gain": 0.0}
    for number, layer in plan.layers.items():
        empty, incoherence = ([metric[name][h] for h, name in enumerate(layer.permutations)]
                              for metric in (layer.sparsity, layer.incoherence))
        rows.append([number, ", ".join(layer.permutations), fmean(empty), fmean(layer.sparsity[AS_IS]),
                     fmean(incoherence), fmean(layer.incoherence[AS_IS])])
        falls += [a / b for a, b in zip(incoherence, layer.incoherence[AS_IS], strict=True)]
        for h, name in enumerate(layer.permutations):
            maps = {order: statistics[number].mean_mass(order)[0, h] for order in (AS_IS, name)}
            needed = density_for(torch.stack([maps[AS_IS], maps[name]]), 0.9)
            if float(needed[0] / needed[1]) > best["gain"]:
                best = {"gain": float(needed[0] / needed[1]), "layer": number, "head": h, "order": name,
                        "maps": [[order, maps[order].tolist()] for order in (AS_IS, name)]}
    names = [name for layer in plan.layers.values() for name in layer.permutations]
    return {"rows": rows, "best": best, "changed": sum(name != AS_IS for name in names), "heads": len(names),
            "incoherence": fmean(falls)}


def kept(scale: Scale, block: int) -> list[list[float]]:
    """By layer, how much of the attention the blocks hold: in the chosen order, as the tokens come, at best."""
    plan, statistics, rows = planned(scale, "reordered", block=block).plan, ready(scale)[2][block], []
    assert plan is not None
    for number, layer in plan.layers.items():
        names = statistics[number].names
        mass = torch.stack([statistics[number].mean_mass(name)[0] for name in names])
        held = (mass * block_masks(mass, density=DENSITY)).sum((2, 3)) / mass.shape[-1]
        chosen = [float(held[names.index(name), h]) for h, name in enumerate(layer.permutations)]
        rows.append([number, fmean(chosen), float(held[names.index(AS_IS)].mean()), float(held.amax(0).mean())])
    return rows


def videos(scale: Scale) -> dict[str, Any]:
    """Videos from the same noise, by exact attention and by each method: how far from exact, and from real ones."""
    model, _, _ = ready(scale)
    real = video.moving_digits(4 * scale.videos, 77, "test").frames
    exact = sample(model, scale.videos, 500, scale.sampler)
    backends = {name: planned(scale, name) for name in METHODS}
    backends |= {f"reordered, {BITS[8, pv]}": planned(scale, "reordered", qk_bits=8, pv_bits=pv) for pv in (8, 4)}
    distances, frechet = {}, {"exact": video.frechet_distance(exact, real)}
    for name, backend in backends.items():
        with attach(model, backend, steps=scale.sampler):
            frames = sample(model, scale.videos, 500, scale.sampler)
        distances[name] = (frames - exact).square().flatten(1).mean(1).tolist()
        frechet[name] = video.frechet_distance(frames, real)
    others = video.moving_digits(scale.videos, 78, "test").frames
    return {"distances": distances, "frechet": {**frechet, "other real videos": video.frechet_distance(others, real)}}


def seconds(scale: Scale) -> dict[str, Any]:
    """One layer's attention against torch's, reordering included; the time does not depend on the numbers."""
    heads, grid = scale.speed_heads, scale.speed_grid
    tokens = math.prod(grid)
    g = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, tokens, scale.speed_head_dim, generator=g)
    call = AttentionCall(query, key, value, scale.speed_head_dim ** -0.5, False, phase="bidirectional")
    names = (PERMUTATIONS * heads)[1:heads + 1]
    mass = torch.rand(1, heads, tokens // BLOCK, tokens // BLOCK, generator=g)
    functions: dict[str, Callable[[], Any]] = {
        "exact": lambda: F.scaled_dot_product_attention(query, key, value)}
    for density in DENSITIES:
        for bits in ((16, 16), (8, 8)):
            plugin = PAROAttention(grid=grid, density=density, qk_bits=bits[0], pv_bits=bits[1])
            plugin.plan = Plan(plugin.settings(), {0: LayerPlan(names, block_masks(mass, density=density))})
            functions[f"{density}, {BITS[bits]}"] = functools.partial(plugin.attend, call)
    order = plugin.token_grid.orders(names, tokens, None)
    back = inverse(order)
    functions["reordering"] = lambda: [permute(x, o) for x, o in ((query, order), (key, order), (value, order),
                                                                  (query, back))]
    with torch.inference_mode():
        timing = interleave(functions, rounds=scale.rounds)
    return {name: [timing.median(name), *timing.ratio(name, "exact")] for name in functions}


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, videos = results.claim, results.once["videos"]["distances"]
    hits = results.joined("planted", "right", str(PAROAttention.alpha))
    heads = [head for row in results.values("planted", "heads") for head in row.values()]
    factors = [head["measured"] / head["expected"] for head in heads]
    int8, int4 = (results.interval("error", f"reordered, {BITS[8, pv]}") for pv in (8, 4))
    times = results.once["seconds"]
    overhead = times["reordering"][0] / times[f"{DENSITY}, {BITS[16, 16]}"][0]
    half, here = "at most half, with its 95 % interval", "here: a small video model"
    yield claim("Calibration finds the order of each head that has one", "paper, token reordering; here: heads made to "
                "have one", "-", "all heads of all seeds, alpha 0.5", all(hits), f"{sum(hits)} of {len(hits)} heads",
                any_scale=True)
    yield claim("In its order a head needs as many fewer blocks as the geometry of its pattern says",
                "this project's rule", "-", "within 25 % of the expected factor for each head of each seed",
                all(0.75 <= factor <= 1.25 for factor in factors), f"measured over expected factor {min(factors):.2f} "
                f"to {max(factors):.2f}; the largest factor is {max(head['measured'] for head in heads):.1f}",
                any_scale=True)
    yield claim("Eight bits for Q, K, P and V cost little", "paper, quantised attention", "lossless metrics",
                "below 2e-2 with its 95 % interval, all blocks computed", int8.high < 2e-2,
                f"relative error {int8:.4f}; with 4 bits for P and V {int4:.4f}")
    yield claim("Reordering costs next to nothing", "paper, overheads", "below 1 %, fused into other kernels",
                "below 1 %", overhead < 0.01, f"{overhead:.1%} of the attention at density {DENSITY}, not fused")
    for name, against in BASELINES.items():
        one, two = (results.values("error", f"{each}, density {DENSITY}") for each in ("reordered", name))
        error, distance = ratio_of_sums(one, two), ratio_of_sums(videos["reordered"], videos[name])
        yield claim(f"At density {DENSITY} the error of the attention is much lower reordered than {against}",
                    f"paper, sparse attention; {here}", "qualitative", half, error.high <= 0.5,
                    f"ratio of errors {error:.3f}: {fmean(one):.3f} against {fmean(two):.3f}")
        yield claim(f"At density {DENSITY} videos stay much nearer to those of exact attention reordered than "
                    f"{against}", f"paper, tables of CogVideoX and Flux; {here}", "lossless metrics", half,
                    distance.high <= 0.5,
                    f"ratio of squared distances {distance:.3f} over {results.scale.videos} videos")
    for pv in (8, 4):
        ratio = ratio_of_sums(*(results.values("error", f"{name}, {BITS[8, pv]}") for name in METHODS[:2]))
        yield claim(f"Reordering makes the error of the integers smaller, {BITS[8, pv]}", "paper, quantised attention",
                    "qualitative", "below 1 with its 95 % interval, all blocks computed", ratio.high < 1,
                    f"ratio of errors {ratio:.3f}")
    for bits in (BITS[16, 16], BITS[8, 8]):
        ratios = {density: Interval(*times[f"{density}, {bits}"][1:]) for density in DENSITIES}
        yield claim(f"Attention is faster by near 1/density, {bits}", "paper, kernel benchmark; here: CPU",
                    "close to 1/density at 0.2 to 0.5", "median of paired ratios at least half of 1/density at each "
                    "density, float32 against torch's kernel", all(r.value >= 0.5 / d for d, r in ratios.items()),
                    ", ".join(f"{r.value:.2f}x ({r.low:.2f} to {r.high:.2f}) at {d}" for d, r in ratios.items()))
    for words in (
            ("Metrics of CogVideoX and Flux are lossless at 20 to 30 % density and INT8 or INT4", "abstract",
             "nearly identical to full precision", "metrics within the noise of exact attention"),
            ("Images and videos are made faster end to end", "abstract", "1.9x to 2.7x", "ratio above 1.5 on a GPU"),
            ("At equal quality it is faster than SpargeAttn and SparseVideoGen", "paper, kernel benchmark", "as stated",
             "ratio above 1 on a GPU")):
        yield claim(*words, None, "not measured: needs a GPU and those models")


def show(report: Report, results: Results) -> None:
    """Planted heads, orders, block maps, errors, videos and times."""
    scale, once, densities = results.scale, results.once, results.rows[-1]["density"]
    report.facts |= {
        "model": f"CogVideoX transformer, 4 layers of 4 heads of 16, trained for {scale.training} steps of 2 videos",
        "tokens": f"8 x 8 x 8 and 3 of text, blocks of {BLOCK}", "threads": torch.get_num_threads(),
        "heads reordered": f"{once['orders']['changed']} of {once['orders']['heads']}",
        "incoherence, reordered over as they come": f"{once['orders']['incoherence']:.3f} (mean over heads)"}
    add_table(report, "Planted heads", (
        {"head": name, "density for 99 %": results.mean("planted", "heads", name, "density"),
         "factor expected": results.mean("planted", "heads", name, "expected"),
         "factor measured": results.mean("planted", "heads", name, "measured")} for name in PERMUTATIONS),
        "factor: fraction of the blocks that hold 99 % of the attention, as the tokens come over in the head's order; "
        "means over the seeds")
    right = {alpha: results.joined("planted", "right", alpha) for alpha in results.rows[0]["planted"]["right"]}
    add_table(report, "Orders found for planted heads", (
        {"alpha": float(alpha), "heads": len(hits), "right": sum(hits)} for alpha, hits in right.items()),
        "alpha 0: by empty blocks alone; 1: by uniform blocks alone")
    add_table(report, "Integers on planted heads", (
        {"bits of P and V": bits, "error ratio": results.mean("planted", "integers", bits)} for bits in (8, 4)),
        "relative error of the output in each head's order over that of the tokens as they come, all blocks computed")
    report.table("Orders found in the video model", [
        "layer", "orders of the heads", "empty blocks", "empty blocks as they come", "incoherence",
        "incoherence as they come"], once["orders"]["rows"])
    best = once["orders"]["best"]
    for order, mass in best["maps"]:
        report.figure(f"Block map of layer {best['layer']}, head {best['head']}, in the order {order}",
                      x_label="key block", y_label="query block", image=mass, note="fraction of a query's attention; "
                      f"90 % needs {best['gain']:.1f} times fewer blocks in {best['order']}")
    for block, rows in once["kept"].items():
        report.table(f"Attention in {DENSITY:.0%} of the blocks of {block}", [
            "layer", "reordered", "as they come", "best order"], rows,
            note="fraction of the calibration's attention that the heaviest blocks hold, means over heads; best: the "
                 "order of each head that holds most")
    add_table(report, "Relative error of the attention output", (
        {"variant": name, "density": density, "error": results.interval("error", name)}
        for name, density in densities.items()),
        f"mean over layers and {scale.error_steps} denoising steps, inputs of exact attention; 95 % bootstrap "
        f"intervals over {len(results.seeds)} sets of {scale.error_videos} videos; floats, blocks of {BLOCK} unless "
        "named")
    names = {method: [f"{method}, density {density}" for density in DENSITIES] for method in METHODS}
    report.figure("Error of the attention output by density", x_label="density", y_label="relative error", y_log=True,
                  series=[curve(method, map(densities.get, of), [results.interval("error", name) for name in of])
                          for method, of in names.items()])
    mean = {name: bootstrap(values) for name, values in once["videos"]["distances"].items()}
    psnr = {name: 10 * torch.tensor(4 / max(distance.value, 1e-12)).log10().item() for name, distance in mean.items()}
    mean["exact"] = Interval(0.0, 0.0, 0.0)
    report.table(f"{scale.videos} videos at density {DENSITY}", [
        "attention", "distance to exact", "low", "high", "PSNR, dB", "Fréchet distance to real"],
        [[name, *mean.get(name, [None] * 3), psnr.get(name), frechet]
         for name, frechet in once["videos"]["frechet"].items()],
        f"{scale.sampler} steps from the same noise; distance: mean squared difference of pixels in [-1, 1] to the "
        "video that exact attention makes, 95 % bootstrap over videos; Fréchet distance in 16 principal components to "
        f"{4 * scale.videos} real videos")
    add_table(report, f"Seconds of one layer's attention, {math.prod(scale.speed_grid)} tokens, {scale.speed_heads} "
              f"heads of {scale.speed_head_dim}", (
        {"variant": name, "seconds": seconds, "faster than exact": Interval(*ratio)}
        for name, (seconds, *ratio) in once["seconds"].items()),
        "reordering of queries, keys, values and outputs included; medians of interleaved rounds; random blocks")


study = Study("PAROAttention on planted heads and on a small video model", measure, claims, show=show, once=once,
              full=Scale(), quick_seeds=1,
              quick=Scale(training=60, sampler=5, videos=32, speed_grid=(8, 16, 16), rounds=2))
