"""Attention backends for denoising models against exact attention, on the lab's own two: text and video."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import looseleaf
from looseleaf import AttentionBackend, Report, Series
from looseleaf import progress as progress_
from looseleaf.errors import LooseleafError
from looseleaf_lab import metrics, timing
from looseleaf_lab.compare import common
from looseleaf_lab.compare.attention import DENSE, SideBySide, density_of
from looseleaf.resume import Cells
from looseleaf_lab.window import BlockWindow

WINDOW = "(window)"
RUNS = 2
"""Goes up when a model is run in another way, so that what was kept of the former way is measured anew."""


@dataclasses.dataclass
class Denoiser:
    """A model that denoises, and how it is run and judged.

    Attributes:
        name: for people.
        model: what backends are attached to.
        tokens: what backends may want to know of the tokens, by the name of their field: ``grid`` and ``text_tokens``,
            or ``prompt_tokens``.
        steps: denoising steps of a run.
        run: one whole run; given what :func:`looseleaf.attach` returned, or None, and the seed of prompt, captions and
            noise, it gives the output.
        differs: how far an output is from that of the exact run.
        quality: how good an output is, smaller is better.
        units: what ``differs`` and ``quality`` are.
    """

    name: str
    model: Any
    tokens: dict[str, Any]
    steps: int
    run: Callable[[Any, int], Any]
    differs: Callable[[Any, Any], float]
    quality: Callable[[Any], float]
    units: tuple[str, str]


def text(*, prompt: int = 256, response: int = 768, steps: int = 32,
         progress: bool | None = None) -> Denoiser:
    """The small masked diffusion language model, finishing two texts of the evaluation part.

    Tokens and the order of places are drawn, the same draws for every way of attention: the likeliest ones of a model
    this small are almost all spaces, which any attention would agree on.
    """
    import torch

    from looseleaf_lab import data, masked_diffusion

    model, tokenizer = masked_diffusion.small_model(progress=progress)
    ids = tokenizer.encode(data.prose(20_000, "evaluation"))

    def run(attached: Any, seed: int) -> Any:
        starts = torch.randint(0, len(ids) - prompt, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        prompts = torch.stack([ids[n:n + prompt] for n in starts])
        return masked_diffusion.generate(model, prompts, length=response, steps=steps, mask_id=tokenizer.mask_id,
                                         temperature=1.0, remasking="random", seed=seed, attached=attached,
                                         progress=False)

    def quality(found: Any) -> float:
        return float(masked_diffusion.nll(model, found, mask_id=tokenizer.mask_id, prompt_tokens=prompt).mean())

    return Denoiser(
        f"text, {prompt + response} tokens", model, {"prompt_tokens": prompt}, steps, run,
        lambda found, exact: float((found[:, prompt:] != exact[:, prompt:]).double().mean()), quality,
        ("share of the tokens that are others", "nats a token under the exact model, a bound"))


def video(*, count: int = 32, steps: int = 20, progress: bool | None = None) -> Denoiser:
    """The small video model, making moving digits."""
    from looseleaf_lab import video as video_

    model = video_.trained(progress=progress)
    real = video_.moving_digits(count, 0, "test").frames
    grid = video_.grid(model)

    def run(attached: Any, seed: int) -> Any:
        captions = video_.moving_digits(count, seed, "test").captions
        return video_.sample(model, captions, seed, steps=steps, progress=False)

    return Denoiser(
        f"video, {grid[0]} x {grid[1]} x {grid[2]} tokens", model,
        {"grid": grid, "text_tokens": video_.WORDS}, steps, run, metrics.relative_error,
        lambda found: video_.frechet_distance(found, real),
        ("relative error of the videos", "Fréchet distance to real videos"))


MODELS: dict[str, Callable[..., Denoiser]] = {"text": text, "video": video}


def compare_denoising(backends: Mapping[str, AttentionBackend], models: Sequence[str] = ("text", "video"), *,
                      rounds: int = 3, seed: int = 0, state: str | os.PathLike[str] | None = None,
                      progress: bool | None = None) -> Report:
    """Speed, density, error and output of every backend over whole denoising runs of the lab's small models.

    A backend with a field ``grid``, ``text_tokens`` or ``prompt_tokens`` is told them. Those that learn are calibrated
    on one run with another seed: ``calibrate(model, run)``, where ``run(attached)`` runs the model.

    Args:
        backends: name -> backend. A window of 30 % of the blocks takes part as well.
        models: ``text`` (masked diffusion), ``video`` (rectified flow), or both. They are trained on the first call.
        rounds: timed rounds.
        seed: of prompts, captions, noise and intervals.
        state: folder for finished models; the same call resumes.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: an unknown model, or rounds below 1.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown or rounds < 1:
        raise ValueError(f"models={list(models)}, rounds={rounds}: allowed are {', '.join(MODELS)}, and one round or "
                         "more")
    report = Report("Attention backends in denoising", common.facts(models=", ".join(models), rounds=rounds, seed=seed))
    table = report.table(
        "Denoising", ["backend", "model", "seconds", "speed-up", "from", "to", "density", "attention error",
                      "output differs", "quality", "fallbacks"],
        note="a whole run; density: mean over its calls; attention error: relative, mean over layers and steps, each "
             "given exact inputs; smaller quality is better")
    cells, failed = Cells(state), dict[str, str]()
    for name in progress_.track(models, "denoising models", show=progress):
        try:
            made = MODELS[name](progress=progress)
        except LooseleafError as error:  # a package is missing: the other model can be measured without it
            failed[f"all, on {name}"] = common.reason(error)
            continue
        key = {"what": "denoising", "runs": RUNS, "model": name, **common.whose(made.model), "rounds": rounds,
               "seed": seed, "steps": made.steps, "backends": {n: common.identity(b) for n, b in backends.items()}}
        rows = cells.do(key, functools.partial(_measure, made, backends, rounds, seed))
        for backend, row in rows.items():
            if "failed" in row:
                failed[f"{backend} on {made.name}"] = row["failed"]
                continue
            table.add(backend, made.name, row["seconds"], *row["ratio"], row["density"], row["error"], row["differs"],
                      row["quality"], row["fallbacks"])
        table.note += f"; {made.name}: output differs is the {made.units[0]}, quality the {made.units[1]}"
        shown = {n: r for n, r in rows.items() if "failed" not in r}
        report.figure(f"What speed costs: {made.name}", x_label="share of the exact time", y_label=made.units[0],
                      series=[Series(n, [1 / r["ratio"][0]], [r["differs"]], style="points")
                              for n, r in shown.items()])
        for backend, heads in rows[DENSE]["maps"].items():
            report.figure(f"Attention of {backend}: {made.name}, last step, middle layer",
                          panels={f"head {h}": m for h, m in enumerate(heads)},
                          note="rows: queries, columns: keys; what a backend leaves out is empty")
    common.left_out(report, failed)
    return report


def _measure(made: Denoiser, backends: Mapping[str, AttentionBackend], rounds: int, seed: int) -> dict[str, Any]:
    import torch

    rows: dict[str, dict[str, Any]] = {DENSE: {"density": 1.0, "error": 0.0, "fallbacks": 0}}
    ready: dict[str, AttentionBackend] = {}
    for title, backend in {**backends, WINDOW: BlockWindow()}.items():
        try:
            told = {f.name: made.tokens[f.name] for f in dataclasses.fields(backend) if f.name in made.tokens}
            ready[title] = dataclasses.replace(backend, **told) if told else backend
            if type(backend).calibrate is not AttentionBackend.calibrate:
                ready[title].calibrate(made.model, lambda attached: made.run(attached, seed + 1))
        except Exception as error:  # one backend that fails must not cost the others their figures
            ready.pop(title, None)
            rows[title] = {"failed": common.reason(error)}
    with torch.inference_mode():
        both = SideBySide(inner=ready, drawn_step=made.steps - 1)
        with looseleaf.attach(made.model, both, steps=made.steps) as attached:
            both.drawn = (len(attached.layers) // 2,)
            exact = made.run(attached, seed)
        for title in list(ready):
            if title in both.failed:
                rows[title] = {"failed": both.failed[title]}
                del ready[title]
            else:
                found = density_of(both.found[title])
                rows[title] = {k: found[k] for k in ("density", "error", "fallbacks")}
        outputs: dict[str, Any] = {}

        def run(title: str) -> None:
            if title == DENSE:
                outputs[title] = made.run(None, seed)
                return
            with looseleaf.attach(made.model, ready[title], steps=made.steps) as attached:
                outputs[title] = made.run(attached, seed)

        measured = timing.interleave({t: functools.partial(run, t) for t in (DENSE, *ready)}, rounds, warmup=0)
    for title, output in outputs.items():
        rows[title] |= {"seconds": measured.median(title), "ratio": measured.ratio(title, DENSE, seed),
                        "differs": made.differs(output, exact), "quality": made.quality(output)}
    rows[DENSE]["maps"] = both.maps.get(len(attached.layers) // 2, {})
    return rows
