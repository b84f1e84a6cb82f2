"""Attention backends for denoising models against exact attention, on the lab's own two: text and video."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import looseleaf
from looseleaf import AttentionBackend, Report, Series
from looseleaf import progress as progress_
from looseleaf.errors import LooseleafError
from looseleaf.plugin import In, Plugin
from looseleaf_lab import metrics, timing
from looseleaf_lab.attention import DENSE, BlockWindow, SideBySide, density_of
from looseleaf_lab.benches.bench import Bench, State, ready
from looseleaf_lab.facts import facts, identity, left_out, model_facts, reason
from looseleaf_lab.results import ResultCache

WINDOW = "(window)"
RUNS = 2
"""Goes up when a model is run in another way, so that what was kept of the former way is measured anew."""


@dataclasses.dataclass
class Denoising(Bench):
    """Attention backends for bidirectional models over whole denoising runs of two small models of the lab.

    Args:
        denoising: models: text, video or both (trained once, minutes each); without a name none.
        rounds: timed rounds.
    """

    denoising: tuple[Literal["text", "video"], ...] = ("text", "video")
    rounds: Annotated[int, In(">= 1")] = 3
    interface: ClassVar[type[Plugin]] = AttentionBackend

    def suits(self, plugin: Any) -> str | None:
        """See :meth:`Bench.suits`: the methods of bidirectional attention."""
        other = super().suits(plugin)
        if other or "bidirectional" in plugin.phases:
            return other or (None if self.denoising else "for denoising models: --denoising text video")
        return f"for {' and '.join(sorted(plugin.phases))} calls, not for bidirectional attention"

    def run(self, plugins: Mapping[str, Any], *, state: State = None, seed: int = 0,
            progress: bool | None = None) -> Report:
        """See :meth:`Bench.run` and :func:`compare_denoising`."""
        backends, failed = ready(plugins)
        report = compare_denoising(backends, self.denoising, rounds=self.rounds, seed=seed, state=state,
                                   progress=progress)
        left_out(report, failed)
        return report


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
        ("fraction of the tokens that differ", "nats a token under the exact model, a bound"))


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
                      rounds: int = 3, seed: int = 0, state: State = None,
                      progress: bool | None = None) -> Report:
    """Speed, density, error and output of every backend over whole denoising runs of the lab's small models.

    A backend with a field ``grid``, ``text_tokens`` or ``prompt_tokens`` is given them. Those that learn are calibrated
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
        raise ValueError(f"compare_denoising: expected models among {', '.join(MODELS)} and rounds >= 1, "
                         f"got models={list(models)}, rounds={rounds}")
    report = Report("Attention backends in denoising", facts(models=", ".join(models), rounds=rounds, seed=seed))
    table = report.table(
        "Denoising", ["backend", "model", "seconds", "speed-up", "low", "high", "density", "attention error",
                      "output differs", "quality", "fallbacks"],
        note="a whole run; density: mean over its calls; attention error: relative, mean over layers and steps, each "
             "given exact inputs; smaller quality is better")
    cells, failed = ResultCache(state), dict[str, str]()
    for name in progress_.track(models, "denoising models", show=progress):
        try:
            denoiser = MODELS[name](progress=progress)
        except LooseleafError as error:  # a package is missing: the other model can be measured without it
            failed[f"all, on {name}"] = reason(error)
            continue
        key = {"what": "denoising", "runs": RUNS, "model": name, **model_facts(denoiser.model), "rounds": rounds,
               "seed": seed, "steps": denoiser.steps, "backends": {n: identity(b) for n, b in backends.items()}}
        rows = cells.do(key, functools.partial(_measure, denoiser, backends, rounds, seed))
        for backend, row in rows.items():
            if "failed" in row:
                failed[f"{backend} on {denoiser.name}"] = row["failed"]
                continue
            table.add(backend, denoiser.name, row["seconds"], *row["ratio"], row["density"], row["error"],
                      row["differs"], row["quality"], row["fallbacks"])
        differs, quality = denoiser.units
        table.note += f"; {denoiser.name}: output differs is the {differs}, quality the {quality}"
        shown = {n: r for n, r in rows.items() if "failed" not in r}
        report.figure(f"What speed costs: {denoiser.name}", x_label="fraction of the exact time", y_label=differs,
                      series=[Series(n, [1 / r["ratio"][0]], [r["differs"]], style="points")
                              for n, r in shown.items()])
        for backend, heads in rows[DENSE]["maps"].items():
            report.figure(f"Attention of {backend}: {denoiser.name}, last step, middle layer",
                          panels={f"head {h}": m for h, m in enumerate(heads)},
                          note="rows: queries, columns: keys; what a backend leaves out is empty")
    left_out(report, failed)
    return report


def _measure(denoiser: Denoiser, backends: Mapping[str, AttentionBackend], rounds: int, seed: int) -> dict[str, Any]:
    import torch

    rows: dict[str, dict[str, Any]] = {DENSE: {"density": 1.0, "error": 0.0, "fallbacks": 0}}
    working: dict[str, AttentionBackend] = {}
    for title, backend in {**backends, WINDOW: BlockWindow()}.items():
        try:
            known = {f.name: denoiser.tokens[f.name] for f in dataclasses.fields(backend) if f.name in denoiser.tokens}
            working[title] = dataclasses.replace(backend, **known) if known else backend
            if type(backend).calibrate is not AttentionBackend.calibrate:
                working[title].calibrate(denoiser.model, lambda attached: denoiser.run(attached, seed + 1))
        except Exception as error:  # one backend that fails must not cost the others their figures
            working.pop(title, None)
            rows[title] = {"failed": reason(error)}
    with torch.inference_mode():
        both = SideBySide(inner=working, drawn_step=denoiser.steps - 1)
        with looseleaf.attach(denoiser.model, both, steps=denoiser.steps) as attached:
            both.drawn = (len(attached.layers) // 2,)
            exact = denoiser.run(attached, seed)
        for title in list(working):
            if title in both.failed:
                rows[title] = {"failed": both.failed[title]}
                del working[title]
            else:
                found = density_of(both.found[title])
                rows[title] = {k: found[k] for k in ("density", "error", "fallbacks")}
        outputs: dict[str, Any] = {}

        def run(title: str) -> None:
            if title == DENSE:
                outputs[title] = denoiser.run(None, seed)
                return
            with looseleaf.attach(denoiser.model, working[title], steps=denoiser.steps) as attached:
                outputs[title] = denoiser.run(attached, seed)

        measured = timing.interleave({t: functools.partial(run, t) for t in (DENSE, *working)}, rounds, warmup=0)
    for title, output in outputs.items():
        rows[title] |= {"seconds": measured.median(title), "ratio": measured.ratio(title, DENSE, seed),
                        "differs": denoiser.differs(output, exact), "quality": denoiser.quality(output)}
    rows[DENSE]["maps"] = both.maps.get(len(attached.layers) // 2, {})
    return rows
