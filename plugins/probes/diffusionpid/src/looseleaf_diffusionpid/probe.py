"""DiffusionPID: how much of a picture, and where, comes from one word, another, either, or only both together."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from looseleaf import Paper, Probe, Report, Series
from looseleaf import progress as progress_
from looseleaf.files import load_tensors, save_tensors
from looseleaf.fingerprint import content_fingerprint, fingerprint
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.resume import digest
from looseleaf_diffusionpid.denoisers import PipelineDenoiser, as_picture
from looseleaf_diffusionpid.information import (
    Denoiser,
    Observation,
    Redundancy,
    decompose,
    known_case,
    logistic_samples,
    observe,
    with_errors,
)

Estimator = Literal["orthogonal", "standard"]
ESTIMATORS: tuple[Estimator, ...] = ("orthogonal", "standard")
FORMAT = "looseleaf.diffusionpid/1"
PARTS = ("R", "U1", "U2", "S")
EXAMPLES = ((None, "a red apple", "red", "apple"), (None, "a dog left of a cat", "dog", "cat"))
"""What is asked where no data are given."""


@dataclasses.dataclass
class Explanation:
    """What two words say about one picture.

    Attributes:
        picture: (C, H, W), floats in [0, 1] where it comes from a pipeline.
        prompt, words: as they were asked for.
        texts: what the denoiser was given: the context, with the first word, with the second, with both.
        observation: everything that was measured.
        terms: estimator -> I1, I2, I12, R, U1, U2, S -> (value, standard error) of the picture, in nats.
        maps: the same names -> (h, w) float64 by pixel of the latent, of the estimator asked for.
        negative: fraction of pixels whose standard information of both words is negative.
        notes: what one should know of it.
    """

    picture: Tensor
    prompt: str
    words: tuple[str, str]
    texts: list[str]
    observation: Observation
    terms: dict[str, dict[str, tuple[float, float]]]
    maps: dict[str, Tensor]
    negative: float
    notes: list[str]

    def map(self, name: str) -> Tensor:
        """A map in the picture's own size, (H, W), bilinear."""
        small = self.maps[name][None, None]
        return functional.interpolate(small, tuple(self.picture.shape[1:]), mode="bilinear", align_corners=False)[0, 0]

    def overlays(self, names: Sequence[str] = PARTS, *, shared_scale: bool = False) -> list[np.ndarray]:
        """Maps drawn over the picture, (height, width, 3) in [0, 1]: red adds, blue is negative.

        Args:
            names: of :attr:`maps`.
            shared_scale: one scale for all; otherwise each has its own.
        """
        maps = [self.map(name) for name in names]
        largest = [float(m.abs().max()) for m in maps]
        base = self.picture.double().cpu().clamp(0, 1)
        grey = (0.5 + 0.5 * base.mean(0))[..., None].numpy() if len(base) == 3 else np.ones((*maps[0].shape, 1))
        out = []
        for m, own in zip(maps, largest, strict=True):
            value = (m / (max(largest) if shared_scale else own or 1)).nan_to_num()[..., None].numpy()
            colour = np.where(value > 0, np.array([0.85, 0.05, 0.05]), np.array([0.05, 0.15, 0.85]))
            out.append(enlarged((1 - abs(value)) * grey + abs(value) * colour))
        return out


    def save(self, path: str | os.PathLike[str], identity: str = "") -> None:
        """Write it to a safetensors file; ``identity`` is what :meth:`load` may ask for."""
        seen = vars(self.observation)
        tensors = {"picture": self.picture, **{f"maps.{name}": value for name, value in self.maps.items()},
                   **{f"observation.{name}": v for name, v in seen.items() if isinstance(v, Tensor)}}
        info = {name: getattr(self, name) for name in ("prompt", "words", "texts", "terms", "negative", "notes")}
        plain = {name: v for name, v in seen.items() if not isinstance(v, Tensor)}
        save_tensors(path, tensors, {**info, "observation": plain, "identity": identity}, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], identity: str | None = None) -> Explanation:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another file, or one of another identity than asked for.
        """
        tensors, info = load_tensors(path, format=FORMAT)
        if info.pop("identity") != identity and identity is not None:
            raise ValueError(f"{path}: expected an explanation of this run, got one of another model, data, seed or "
                             "other parameters: give another state_dir, or remove it")
        seen: dict[str, Any] = {name.partition(".")[2]: t for name, t in tensors.items()
                                if name.startswith("observation.")}
        observation = Observation(**info.pop("observation"), **seen)
        info["terms"] = {e: {name: (value, error) for name, (value, error) in terms.items()}
                         for e, terms in info["terms"].items()}
        maps = {name: tensors[f"maps.{name}"] for name in ("I1", "I2", "I12", *PARTS)}
        return cls(picture=tensors["picture"], observation=observation, maps=maps,
                   **{**info, "words": tuple(info["words"])})


@dataclasses.dataclass
class DiffusionPID(Probe):
    """How much of a picture comes from word 1, word 2, either, or only both together (arXiv 2406.05191)?

    Args:
        steps: log-SNRs at which a picture is looked at (authors: 100).
        noises: noises at each of them (authors: 1 for maps, 100 for scores).
        loc: log-SNRs are drawn from a logistic with this centre (this and the next two are Info-Decomp's for Stable
            Diffusion).
        scale: of the logistic.
        clip: scales on either side of the centre where it is cut.
        estimator: of the maps; "orthogonal" is smooth and never negative but right only on average over pictures of a
            text, "standard" is exact for each picture and noisy. Tables have both.
        redundancy: "min" of the two words' information; or "pointwise", which needs how frequent the words are.
        conditional: the context is the rest of the prompt (CPID); otherwise it is the empty text (PID).
        drop: how words leave the prompt of a conditional decomposition: "text" takes them out, "padding" puts padding
            tokens in their place (ours).
        single: template of the text of one word, in an unconditional decomposition.
        both: template of that of both.
        priors: word -> frequency in (0, 1], for "pointwise"; None: those of the package wordfreq.
        shared_scale: draw the four maps of a picture on one scale.
        batch: rows the model is given at a time; every noisy picture takes four.
        shown: pictures whose maps are drawn.
        num_inference_steps: of a picture that is generated; None: the pipeline's own.
        guidance_scale: likewise.
    """

    steps: Annotated[int, In(">= 2")] = 100
    noises: Annotated[int, In(">= 1")] = 1
    loc: float = 1.0
    scale: Annotated[float, In("> 0")] = 2.0
    clip: Annotated[float, In("> 0")] = 3.0
    estimator: Estimator = "orthogonal"
    redundancy: Redundancy = "min"
    conditional: bool = False
    drop: Literal["text", "padding"] = "text"
    single: str = "{}"
    both: str = "{} {}"
    priors: dict[str, float] | None = None
    shared_scale: bool = False
    batch: Annotated[int, In(">= 1")] = 32
    shown: Annotated[int, In(">= 0")] = 8
    num_inference_steps: Annotated[int, In(">= 1")] | None = None
    guidance_scale: Annotated[float, In(">= 0")] | None = None
    paper: ClassVar[Paper] = Paper(
        title="Diffusion PID: Interpreting Diffusion via Partial Information Decomposition",
        authors=("Shaurya Dewan", "Rushikesh Zawar", "Prakanshul Saxena", "Yingshan Chang", "Andrew Luo",
                 "Yonatan Bisk"), year=2024, arxiv="2406.05191", venue="NeurIPS 2024",
        summary="How much of a picture, and where, comes from one word, another, either, or only both together.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A mixture whose information is known; the other one is another of them."""
        picture = known_case("xor").means[0]
        return {"make": lambda: cls(steps=40), "data": [(picture, "a b", "a", "b")],
                "subject": lambda: known_case("xor"), "other": lambda: known_case("copy")}

    def validate(self) -> None:
        self.check("single", self.single.count("{}") == 1, "a text with one {}")
        self.check("both", self.both.count("{}") == 2, "a text with two {}")
        self.check("priors", all(0 < p <= 1 for p in (self.priors or {}).values()), "frequencies in (0, 1]")

    # ---------------------------------------------------------------------------------------------------- one picture
    def explain(self, subject: Any, picture: Any, prompt: str, y1: str, y2: str, *, seed: int = 0,
                step: Callable[[int], Any] = lambda rows: None) -> Explanation:
        """Decompose what two words say about one picture.

        Args:
            subject: a text-to-image pipeline of diffusers, or a :class:`Denoiser`.
            picture: of PIL; uint8 (H, W, 3); floats (3, H, W) in [0, 1]; None: the pipeline draws one of ``prompt``. A
                denoiser without ``latent`` gets floats (C, H, W) as they are.
            prompt: where the words stand in; without ``conditional`` only for a picture that is drawn.
            y1, y2: the words, or phrases.
            seed: of levels, noise and the picture.
            step: called with the number of rows after each forward pass.

        Raises:
            ValueError: a word that is not in the prompt, or a picture that the model cannot take.
        """
        denoiser = self.denoiser(subject)
        texts, notes = self.texts(prompt, y1, y2, denoiser)
        with getattr(denoiser, "ready", lambda: evaluating(denoiser))(), torch.no_grad():
            if picture is None:
                if not hasattr(denoiser, "generate"):
                    raise ValueError(f"picture: expected one, as {type(denoiser).__name__} draws none, got None")
                picture = denoiser.generate(prompt, seed)
            picture = as_picture(picture)
            x = denoiser.latent(picture) if hasattr(denoiser, "latent") else picture
            draw = torch.Generator().manual_seed(seed)
            limits = getattr(denoiser, "log_snr_range", (-math.inf, math.inf))
            a, weights = logistic_samples(self.steps, loc=self.loc, scale=self.scale, clip=self.clip, limits=limits,
                                          generator=draw)
            noise = torch.randn(self.steps * self.noises, *x.shape, dtype=x.dtype, generator=draw)
            observation = observe(denoiser, x, texts, a.repeat_interleave(self.noises),
                                  weights.repeat_interleave(self.noises), noise, groups=self.noises, batch=self.batch,
                                  step=step)
        surprisals = self._surprisals(y1, y2)
        terms: dict[str, dict[str, tuple[float, float]]] = {
            name: with_errors(observation.contributions(name)[1:], self.redundancy, surprisals) for name in ESTIMATORS}
        seen = observation.orthogonal_map if self.estimator == "orthogonal" else observation.standard_map
        pixels = seen[0].numel()
        parts = decompose(seen[1], seen[2], seen[3], self.redundancy, (surprisals[0] / pixels, surprisals[1] / pixels))
        maps = {"I1": seen[1], "I2": seen[2], "I12": seen[3], **parts._asdict()}
        negative = float((observation.standard_map[3] < 0).double().mean())
        return Explanation(picture, prompt, (y1, y2), texts, observation, terms, maps, negative, notes)

    def denoiser(self, subject: Any) -> Denoiser:
        """The denoiser of a subject: itself, or a pipeline's; of a pair such as ``(pipeline, tokenizer)`` its first.

        Raises:
            TypeError: neither of them.
        """
        if isinstance(subject, (tuple, list)) and len(subject) == 2:
            subject = subject[0]
        if isinstance(subject, Denoiser):
            return subject
        return PipelineDenoiser(subject, num_inference_steps=self.num_inference_steps,
                                guidance_scale=self.guidance_scale)

    def texts(self, prompt: str, y1: str, y2: str, denoiser: Any = None) -> tuple[list[str], list[str]]:
        """The four texts, context first, and notes.

        Raises:
            ValueError: an empty word; with ``conditional`` one that is not in the prompt, or two that overlap.
        """
        for name, word in (("y1", y1), ("y2", y2)):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"{name}: expected a word, got {word!r}")
        notes = [f"both words are {y1!r}: their unique information is 0"] if y1 == y2 else []
        if not self.conditional:
            return ["", self.single.format(y1), self.single.format(y2), self.both.format(y1, y2)], notes
        first, second = places(prompt, y1), places(prompt, y2)
        if y1 == y2 and len(first) > 1:
            first, second = first[:1], first[1:]
            notes = [f"y1 is the first {y1!r} of the prompt, y2 the rest"]
        elif y1 != y2 and any(a < d and c < b for a, b in first for c, d in second):
            raise ValueError(f"y1, y2: expected words that do not overlap, got {y1!r} and {y2!r} in {prompt!r}")
        put = None if self.drop == "text" else getattr(denoiser, "padding", None)
        if self.drop == "padding" and put is None:
            raise ValueError(f"drop: expected 'text' for a denoiser without padding(text), got {self.drop!r}")
        gone: tuple[list[tuple[int, int]], ...] = (
            [*first, *(s for s in second if s not in first)], [s for s in second if s not in first],
            [s for s in first if s not in second], [])
        return [without(prompt, spans, put) for spans in gone], notes

    def _surprisals(self, y1: str, y2: str) -> tuple[float, float]:
        if self.redundancy == "min":
            return 0.0, 0.0
        found = []
        for word in (y1, y2):
            frequency = (self.priors or {}).get(word)
            if self.priors is None:
                try:
                    from wordfreq import word_frequency
                except ImportError as error:
                    raise ModuleNotFoundError("redundancy='pointwise' needs how frequent words are: pip install "
                                              "wordfreq, or give priors={word: frequency}") from error
                frequency = word_frequency(word, "en")
            if not frequency:
                raise ValueError(f"priors: expected a frequency of {word!r} in (0, 1], got {frequency}")
            found.append(-math.log(frequency))
        return found[0], found[1]

    # --------------------------------------------------------------------------------------------------- many pictures
    def run(self, subject: Any, data: Any = None, *, seed: int = 0, progress: bool | None = None,
            state_dir: str | os.PathLike[str] | None = None) -> Report:
        """Decompose what pairs of words say about pictures.

        Args:
            subject: a text-to-image pipeline of diffusers, a pair that begins with one, or a :class:`Denoiser`.
            data: ``[(picture or None, prompt, y1, y2), ...]``, see :meth:`explain`; None: two prompts of the package.
            seed: of levels, noise and drawn pictures; the i-th picture takes ``seed + i``.
            progress: show a progress bar; None: only on a terminal.
            state_dir: folder for finished explanations, one file each; the same run takes them from there.

        Raises:
            TypeError: a subject of another kind.
            ValueError: data of another form, or a ``state_dir`` of another run; see also :meth:`explain`.
        """
        denoiser, rows = self.denoiser(subject), entries(EXAMPLES if data is None else data)
        for _, prompt, y1, y2 in rows:
            self.texts(prompt, y1, y2, denoiser)  # before anything takes time
            self._surprisals(y1, y2)
        found, folder = [], None if state_dir is None else Path(state_dir)
        whole = digest([self.hyperparameters(), seed, _weights(denoiser)]) if folder is not None else ""
        counts = [len(set(self.texts(*row[1:], denoiser)[0])) * self.steps * self.noises for row in rows]
        with progress_.bar("DiffusionPID", sum(counts), progress) as bar:
            for n, (picture, prompt, y1, y2) in enumerate(rows):
                path = folder / f"{n}.safetensors" if folder is not None else None
                identity = digest([whole, prompt, y1, y2, content_fingerprint(picture)]) if path is not None else ""
                if path is not None and path.exists():
                    found.append(Explanation.load(path, identity))
                    bar.update(counts[n])
                    continue
                found.append(self.explain(denoiser, picture, prompt, y1, y2, seed=seed + n, step=bar.update))
                if path is not None:
                    found[-1].save(path, identity)
        return self.report(found, type(subject).__name__, getattr(denoiser, "log_snr_range", (-math.inf, math.inf)))

    def report(self, explanations: Sequence[Explanation], subject: str = "",
               limits: tuple[float, float] = (-math.inf, math.inf)) -> Report:
        """The report on explanations, see :meth:`run`; ``limits`` are the log-SNRs that the model knows."""
        low, high = self.loc - self.scale * self.clip, self.loc + self.scale * self.clip
        report = Report(f"DiffusionPID of {len(explanations)} pictures", facts={
            "subject": subject, "maps": f"{self.estimator} estimator, redundancy: {self.redundancy}",
            "context": f"rest of the prompt, words dropped by {self.drop}" if self.conditional else "empty text",
            "samples of a picture": self.steps * self.noises,
            "log-SNR": f"{max(low, limits[0]):.2f} to {min(high, limits[1]):.2f}"})
        if low < limits[0] or high > limits[1]:
            report.facts["cut"] = (f"log-SNRs {low:.2f} to {high:.2f} asked for, the noise schedule has "
                                   f"{limits[0]:.2f} to {limits[1]:.2f}: information beyond is missing")
        table = report.table("Information in nats", ["picture", "y1", "y2", "term", *(
            name for e in ESTIMATORS for name in (e, f"{e}, standard error")), "sum of the map"],
            note="R of a picture is that of the sums; the sum of its map decomposes by pixel. Orthogonal terms are "
                 "right on average over pictures of a text, standard ones for each picture.")
        about = report.table("Pictures", ["picture", "prompt", "context", "with y1", "with y2", "with both",
                                          "-log p, context", "-log p, both", "negative pixels", "note"],
                             note="-log p in nats, over the log-SNRs above; negative pixels: of the standard estimator")
        for n, found in enumerate(explanations):
            for name in found.maps:
                table.add(n, *found.words, name, *(value for e in ESTIMATORS for value in found.terms[e][name]),
                          float(found.maps[name].sum()))
            nll = found.observation.negative_log_likelihood()
            about.add(n, found.prompt, *found.texts, float(nll[0]), float(nll[3]), found.negative,
                      "; ".join(found.notes))
        self._curves(report, explanations)
        for n, found in enumerate(explanations[:self.shown]):
            y1, y2 = found.words
            plain = [enlarged(found.picture.double().cpu().clamp(0, 1).permute(1, 2, 0).numpy())] if len(
                found.picture) == 3 else []
            captions = [f"redundant: {y1!r}, {y2!r}", f"only {y1!r}", f"only {y2!r}", "only both together"]
            report.image(f"{n}: {found.prompt}", plain + found.overlays(shared_scale=self.shared_scale),
                         "red: adds to the picture's likelihood; blue: negative; "
                         + ("one scale" if self.shared_scale else "each on its own scale"),
                         captions=["picture"][:len(plain)] + captions)
            report.arrays |= {f"{n} {name}": found.maps[name].tolist() for name in PARTS}
        return report

    def _curves(self, report: Report, explanations: Sequence[Explanation], bins: int = 20) -> None:
        """Error of the noise, and the integrand of the information, by log-SNR, averaged over pictures."""
        a = torch.cat([e.observation.log_snr for e in explanations])
        order = a.argsort()
        groups = [group for group in order.tensor_split(min(bins, len(a))) if len(group)]
        x = [float(a[group].mean()) for group in groups]

        def curve(name: str, values: Tensor) -> Series:
            return Series(name, x, [float(values[group].mean()) for group in groups], style="line")

        def joined(field: str, row: int) -> Tensor:
            return torch.cat([getattr(e.observation, field)[row] / e.observation.dimensions for e in explanations])

        roles = ("context", "with y1", "with y2", "with both")
        report.figure("Error of the noise", x_label="log-SNR", y_label="squared error of a number",
                      series=[curve(role, joined("errors", n)) for n, role in enumerate(roles)])
        report.figure("Information of both words by log-SNR", x_label="log-SNR", y_label="nats of a number",
                      series=[curve(e, joined(e, 3)) for e in ESTIMATORS])


def _weights(denoiser: Any) -> str:
    """What tells one denoiser from another: its type, and the weights of the networks that it has."""
    parts = [denoiser, *vars(denoiser).values()] if hasattr(denoiser, "__dict__") else []
    return " ".join([type(denoiser).__name__, *(fingerprint(p) for p in parts if isinstance(p, torch.nn.Module))])


def entries(data: Any) -> list[tuple[Any, str, str, str]]:
    """Rows ``(picture, prompt, y1, y2)``.

    Raises:
        ValueError: anything else.
    """
    rows = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else []
    wrong = [row for row in rows if not isinstance(row, (tuple, list)) or len(row) != 4
             or not all(isinstance(text, str) for text in row[1:])]
    if not rows or wrong:
        got = f"{type(data).__name__} of {len(rows)}" if not wrong else \
            f"a row of {[type(v).__name__ for v in wrong[0]] if isinstance(wrong[0], (tuple, list)) else wrong[0]!r}"
        raise ValueError(f"data: expected rows (picture or None, prompt, y1, y2), got {got}")
    return [tuple(row) for row in rows]


def places(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where a word or phrase stands in a prompt, as whole words; upper and lower case are one.

    Raises:
        ValueError: nowhere.
    """
    found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE)]
    if not found:
        raise ValueError(f"y1, y2: expected words of the prompt {prompt!r}, got {word!r}: conditional=False asks for "
                         "words that are not in it")
    return found


def without(prompt: str, spans: Sequence[tuple[int, int]], put: Callable[[str], str] | None = None) -> str:
    """A prompt without the characters of ``spans``; ``put`` makes what stands in their place."""
    for begin, end in sorted(spans, reverse=True):
        prompt = prompt[:begin] + (put(prompt[begin:end]) if put else "") + prompt[end:]
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", prompt)).strip(" ,;:")


def enlarged(picture: np.ndarray, least: int = 160) -> np.ndarray:
    """A small picture (height, width, 3) of larger pixels, so that one sees something."""
    factor = max(1, -(-least // max(picture.shape[:2])))
    return picture.repeat(factor, 0).repeat(factor, 1).clip(0, 1)


__all__ = ["DiffusionPID", "Estimator", "Explanation"]
