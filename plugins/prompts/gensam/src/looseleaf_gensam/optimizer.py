"""GenSAM: words, points and boxes for each picture, that make a promptable segmenter find what one task text asks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from looseleaf import Budget, Example, Paper, Predictor, Prompt, Report, Task
from looseleaf.files import replacing
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.progress import bar
from looseleaf.prompts.optimizer import PromptOptimizer, Search
from looseleaf_gensam.heat import heat_map, points_of, similarities
from looseleaf_gensam.measures import MEASURES, iou
from looseleaf_gensam.namer import FixedWords, Words, words_of
from looseleaf_gensam.segmenter import PromptableModels
from looseleaf_vision import IMAGENET_TEMPLATES, as_image, picture_of

PAPER = Paper(title="Relax Image-Specific Prompt Requirement in SAM: A Single Generic Prompt for Segmenting "
                    "Camouflaged Objects", authors=("Jian Hu", "Jiayi Lin", "Weitong Cai", "Shaogang Gong"), year=2024,
              arxiv="2312.07374", venue="AAAI", code="https://github.com/jyLin8100/GenSAM",
              summary="masks for a folder of pictures from one task text: CLIP and a chat model find the points")
SCENE_TEMPLATES = ("there is a {} in the scene.", "there is the {} in the scene.", "this is a {} in the scene.",
                   "this is the {} in the scene.", "this is one {} in the scene.")
TEMPLATES = (*IMAGENET_TEMPLATES, *SCENE_TEMPLATES)
"""The 85 templates of CLIP Surgery."""
ADJECTIVES = ("camouflaged", "disguised", "hidden")
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


# ----------------------------------------------------------------------------------------------- steps of the method
def box_of(mask: Tensor, widen: int = 10) -> Tensor | None:
    """The box (x1, y1, x2, y2) of the largest of the mask's connected parts, widened; None without any.

    The largest is that of the largest box. Its corner goes out by a ``widen``-th of the size, rounded down, then the
    opposite one by a ``widen``-th of the size that this gives, rounded up (official code). It may leave the picture.

    Args:
        mask: (H, W) bool.
        widen: 10 for 10 %.
    """
    parts, _ = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(parts)]
    return widened(max(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])), widen) if boxes else None


def widened(box: Sequence[int], widen: int = 10) -> Tensor:
    """A box (x1, y1, x2, y2) of whole pixels made larger by the rule of :func:`box_of`."""
    x1, y1, x2, y2 = map(int, box)
    x1, y1 = x1 - (x2 - x1) // widen, y1 - (y2 - y1) // widen
    return torch.tensor([x1, y1, x2 - -(x2 - x1) // widen, y2 - -(y2 - y1) // widen])


def weighed(original: Tensor, picture: Tensor, heat: Tensor, weight: float = 0.3) -> Tensor:
    """What CLIP sees in the next pass: original * heat * weight + picture * (1 - weight)."""
    return original * heat * weight + picture * (1 - weight)


def fuse(logits: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The mask of the mean of all passes' logits (H, W), and the pass whose own mask is nearest to it.

    The distance is the squared one, as in the official code; the first of equals is taken.
    """
    fused = torch.stack(list(logits)).mean(0) > 0
    distances = [int(((one > 0) != fused).sum()) for one in logits]
    return fused, distances.index(min(distances))


# ------------------------------------------------------------------------------------------------------------ results
@dataclasses.dataclass
class Pass:
    """One pass over a picture.

    Attributes:
        words: what was named.
        heat: (h, w) of the patches, 0 to 1.
        points: (n, 2) as (x, y) in pixels.
        labels: (n,), 1 for the object and 0 for what is not.
        box: x1, y1, x2, y2 that the segmenter was given; None: none.
        mask: (H, W) bool.
        score: predicted IoU of the mask.
    """

    words: Words
    heat: Tensor
    points: Tensor
    labels: Tensor
    box: Tensor | None
    mask: Tensor
    score: float


@dataclasses.dataclass
class Segmentation:
    """What was found in a picture.

    Attributes:
        passes: all passes.
        chosen: number of the pass whose mask is the answer.
        fused: (H, W) bool, the mask of the mean of all passes' logits.
    """

    passes: list[Pass]
    chosen: int
    fused: Tensor

    @property
    def mask(self) -> Tensor:
        """The answer, (H, W) bool."""
        return self.passes[self.chosen].mask

    @property
    def heat(self) -> Tensor:
        """The heat map (H, W) of the chosen pass, 0 to 1, at the picture's size."""
        return resized(self.passes[self.chosen].heat, tuple(self.mask.shape))

    def draw(self, picture: Any, side: int = 256) -> list[np.ndarray]:
        """Heat map, points with box, and mask, each drawn over the picture, uint8 of at most ``side`` pixels."""
        return [self._drawn(picture, kind, side) for kind in ("heat", "points", "mask")]

    def _drawn(self, picture: Any, kind: str, side: int) -> np.ndarray:
        from PIL import Image, ImageDraw

        one, image = self.passes[self.chosen], as_image(picture)
        scale = side / max(image.size)
        size = tuple(max(1, round(v * scale)) for v in image.size)
        canvas: Any = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
        pixels = np.asarray(canvas, dtype=np.float32)
        if kind == "points":
            pen = ImageDraw.Draw(canvas)
            radius, line = max(2, side // 80), max(1, side // 128)
            if one.box is not None:
                pen.rectangle([float(v) * scale for v in one.box], outline=(255, 200, 0), width=line)
            for (x, y), label in zip((one.points + 0.5).mul(scale).tolist(), one.labels.tolist(), strict=True):
                pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline="white",
                            fill=(30, 170, 60) if label else (215, 40, 40))
            return np.asarray(canvas)
        if kind == "heat":
            heat = resized(one.heat, size[::-1]).numpy()[..., None]
            colour = np.concatenate([255 * heat, 255 * (1 - abs(2 * heat - 1)), 255 * (1 - heat)], -1)
            return (0.5 * pixels + 0.5 * colour).round().astype(np.uint8)
        inside = resized(self.mask.float(), size[::-1]).numpy()[..., None] > 0.5
        tinted = np.where(inside, 0.5 * pixels + np.array([20, 100, 40], np.float32), 0.35 * pixels + 0.65 * 255)
        return tinted.round().astype(np.uint8)


def resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(h, w) at another size, bilinear."""
    return F.interpolate(values[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]


@dataclasses.dataclass
class PointPrompt(Prompt):
    """Points and a box for one picture.

    Attributes:
        points: (n, 2) as (x, y) in pixels.
        labels: (n,), 1 for the object and 0 for what is not.
        box: x1, y1, x2, y2; None: none.
    """

    points: Tensor
    labels: Tensor
    box: Tensor | None = None

    def on(self, model: PromptableModels) -> PointPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return PointPredictor(self, model)


class PointPredictor(Predictor):
    """A :class:`PointPrompt` and a segmenter."""

    def __init__(self, prompt: PointPrompt, models: PromptableModels) -> None:
        self.prompt, self.models = prompt, models

    def predict(self, examples: Sequence[Example]) -> list[Tensor]:
        """The mask (H, W) bool of each example's picture."""
        masks, prompt = [], self.prompt
        with _quiet(self.models):
            for example in examples:
                embedded = self.models.embed(as_image(picture_of(example)))
                logits, scores = self.models.masks(embedded, prompt.points, prompt.labels, prompt.box)
                masks.append(logits[int(scores.argmax())] > 0)
        return masks


@dataclasses.dataclass
class GenericPrompt(Prompt):
    """The settings that points are made with, anew for each picture.

    Attributes:
        settings: hyper-parameters of :class:`GenSAM`.
        seed: of the sampling of words.
    """

    settings: dict[str, Any]
    seed: int = 0

    def on(self, model: PromptableModels) -> GenSAMPredictor:
        """See :meth:`looseleaf.Prompt.on`."""
        return GenSAM(**self.settings).on(model, self.seed)


@contextlib.contextmanager
def _quiet(models: PromptableModels) -> Iterator[None]:
    """Evaluation mode and no gradients."""
    with contextlib.ExitStack() as stack:
        for network in models.networks:
            stack.enter_context(evaluating(network))
        stack.enter_context(torch.no_grad())
        yield


# ---------------------------------------------------------------------------------------------------------- predictor
class GenSAMPredictor(Predictor):
    """The method on three models: words, points and a mask for each picture.

    Args:
        settings: the hyper-parameters.
        models: what answers.
        seed: of the sampling of words.
    """

    def __init__(self, settings: GenSAM, models: PromptableModels, seed: int = 0) -> None:
        settings.check_model(models)
        self.settings, self.models, self.seed = settings, models, seed
        self._texts: dict[str, Tensor] = {}

    def segment(self, picture: Any) -> Segmentation:
        """What the task text means in a picture; see :func:`looseleaf_vision.as_image` for what may be one."""
        own, image = self.settings, as_image(picture)
        if min(image.size) < 1:
            raise ValueError(f"picture: expected a pixel or more, got {image.size[0]} x {image.size[1]}")
        with _quiet(self.models):
            original = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            height, width = original.shape[1:]
            whole = torch.tensor([0, 0, width, height])
            embedded = self.models.embed(image)
            seen, box, words = original, None, None
            passes: list[Pass] = []
            logits: list[Tensor] = []
            changes: list[float] = []
            for n in range(own.recursive + 1):
                if words is None or own.update_text:
                    words = self._words(image, n)
                heat = self._heat(seen, words)
                points, labels = points_of(heat, (height, width), down_sample=own.down_sample, threshold=own.attn_thr)
                given = whole if box is None and not len(points) else box
                masks, scores = self.models.masks(embedded, points, labels, given)
                best = int(scores.argmax())
                logits.append(masks[best])
                mask = masks[best] > 0
                passes.append(Pass(words, heat, points, labels, given, mask, float(scores[best])))
                found = box_of(mask)
                box = whole if found is None else torch.minimum(found.clamp(min=0), whole[[2, 3, 2, 3]])
                seen = weighed(original, seen, resized(heat, (height, width)), own.weight)
                if n:
                    changes.append(float((logits[n].sigmoid() - logits[n - 1].sigmoid()).abs().mean()))
                if own.adaptive and n > 1 and max(changes[-1], abs(changes[-1] - changes[-2])) < own.tolerance:
                    break
        fused, chosen = fuse(logits)
        return Segmentation(passes, chosen, fused)

    def _words(self, image: Any, number: int) -> Words:
        return words_of(lambda question, history, seed: self.models.ask(image, question, history, seed),
                        self.settings.phrases(), f"{self.seed} {number}", background=self.settings.background)

    def _heat(self, seen: Tensor, words: Words) -> Tensor:
        own = self.settings
        features = self.models.patches(self.models.read(seen, own.size), own.depth, own.attention)[0]
        empty = self._features([""])[0]
        foreground, background = (similarities(features, self._features(names), empty, own.normalize) if names else None
                                  for names in (words.foreground, words.background if own.background else []))
        assert foreground is not None
        heat = heat_map(foreground, background, clamp=own.clamp)
        side = round(len(heat) ** 0.5)
        return heat.view(side, side)

    def _features(self, names: Sequence[str]) -> Tensor:
        """Text features, each word asked for once."""
        templates = self.settings.templates or TEMPLATES
        for name in names:
            if name not in self._texts:
                self._texts[name] = self.models.texts([self.models.fitting(name, templates)], templates)[0]
        return torch.stack([self._texts[name] for name in names])

    def adapt(self, example: Example) -> PointPrompt:
        """The points and the box of the chosen pass for one picture, as a prompt of their own."""
        found = self.segment(picture_of(example))
        one = found.passes[found.chosen]
        return PointPrompt(one.points, one.labels, one.box, info={
            "words": dataclasses.asdict(one.words), "passes": len(found.passes), "chosen": found.chosen,
            "predicted IoU": one.score})

    def predict(self, examples: Sequence[Example], progress: bool | None = False) -> list[Segmentation]:
        """What is found in the picture of each example."""
        pictures = [picture_of(example) for example in examples]
        with bar("pictures", len(pictures), progress) as progress_bar:
            found = []
            for picture in pictures:
                found.append(self.segment(picture))
                progress_bar.update()
        return found

    def folder(self, source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool | None = None,
               shown: int = 12) -> Report:
        """A mask for every picture of a folder, as ``<name>.png`` of 0 and 255; those that are there are left out.

        A run that was killed so goes on where it was. The report shows the first pictures of this run.

        Args:
            source: folder of pictures.
            target: folder for the masks, made here; another one than ``source``.
            progress: show a progress bar; None: only on a terminal.
            shown: pictures in the report.

        Raises:
            ValueError: no picture there, two that would have one mask, or a file that is no picture.
        """
        from PIL import Image, UnidentifiedImageError

        into = Path(target)
        paths = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in ENDINGS)
        if not paths or into.resolve() == Path(source).resolve():
            raise ValueError(f"folder: expected pictures ({', '.join(ENDINGS)}) and another folder for the masks, got "
                             f"{len(paths)} pictures in {source} and {target}")
        twice = sorted({p.name for p in paths if sum(p.stem == q.stem for q in paths) > 1})
        if twice:
            raise ValueError(f"folder: expected one picture for each mask <name>.png, got {', '.join(twice)}: rename "
                             "some")
        into.mkdir(parents=True, exist_ok=True)
        todo = [p for p in paths if not (into / f"{p.stem}.png").exists()]
        pictures: list[tuple[str, Any, Segmentation]] = []
        with bar("pictures", len(paths), progress) as progress_bar:
            progress_bar.update(len(paths) - len(todo))
            for path in todo:
                try:
                    image = as_image(Image.open(path))
                except (UnidentifiedImageError, OSError) as error:
                    raise ValueError(f"{path}: expected a picture, got {error}: take it out of the folder") from error
                found = self.segment(image)
                with replacing(into / f"{path.stem}.png") as part:
                    Image.fromarray(found.mask.numpy().astype(np.uint8) * 255).save(part, "PNG")
                if len(pictures) < shown:
                    pictures.append((path.name, image, found))
                progress_bar.update()
        report = Report("GenSAM: what was found", facts={"task": self.settings.text, "pictures": len(paths),
                                                         "made in this run": len(todo), "masks": str(into)})
        self._show(report, pictures)
        return report

    def report(self, pictures: Sequence[Any], targets: Sequence[Any] | None = None,
               names: Sequence[str] = ()) -> Report:
        """Heat map, points with box, and mask of each picture, with its words; measures where masks are known.

        Args:
            pictures: see :meth:`segment`.
            targets: masks (H, W) of them; None: unknown.
            names: of the pictures; none: their numbers.
        """
        for title, given in (("targets", targets), ("names", names or None)):
            if given is not None and len(given) != len(pictures):
                raise ValueError(f"{title}: expected one for each of {len(pictures)} pictures, got {len(given)}")
        found = [(name, picture, self.segment(picture)) for name, picture in
                 zip(names or map(str, range(len(pictures))), pictures, strict=True)]
        report = Report("GenSAM: what was found", facts={"task": self.settings.text, "pictures": len(found)})
        self._show(report, found)
        if targets is not None:
            rows = [[measure(one.mask, target) for measure in MEASURES.values()]
                    for (_, _, one), target in zip(found, targets, strict=True)]
            report.table("Measures", ["picture", *MEASURES], [[name, *row] for (name, _, _), row in zip(
                [*found, ("mean", None, None)], [*rows, np.mean(rows, 0).tolist()], strict=True)],
                         note="MAE: lower is better; all others: higher.")
        return report

    @staticmethod
    def _show(report: Report, found: Sequence[tuple[str, Any, Segmentation]]) -> None:
        table = report.table("Pictures", ["picture", "foreground", "background", "points", "chosen pass", "passes",
                                          "predicted IoU", "area"])
        for name, picture, one in found:
            at = one.passes[one.chosen]
            words = (", ".join(dict.fromkeys(w)) for w in (at.words.foreground, at.words.background))
            table.add(name, *words, len(at.points), one.chosen, len(one.passes), at.score,
                      float(one.mask.float().mean()))
            report.image(name, one.draw(picture), captions=("heat map", "points and box", "mask"))


# ------------------------------------------------------------------------------------------------------- optimiser
def mask_iou(prediction: Any, example: Example) -> float:
    """IoU of a predicted mask, or of a :class:`Segmentation`, and the target. The metric of tasks of masks."""
    return iou(prediction.mask if isinstance(prediction, Segmentation) else prediction, example.target)


@dataclasses.dataclass
class GenSAM(PromptOptimizer):
    """Points and boxes for a promptable segmenter, made for each picture from one text for all; nothing is trained.

    ``optimize`` searches for nothing: it gives the settings as a prompt, tried on a few training examples whose masks
    are known. ``on(models)`` uses them without that.

    Args:
        text: the task, such as "camouflaged animal".
        synonyms: phrases that the chains of questions begin with; empty: for "camouflaged ..." the paper's three
            (camouflaged, disguised, hidden), else the text alone.
        background: subtract the heat of the surroundings.
        attention: of the second path through CLIP: key against key (the paper), value against value (CLIP Surgery).
        depth: last blocks of CLIP's vision tower that the second path goes through; 0: none.
        down_sample: cells of the grid of points are the patches' sides times this.
        attn_thr: heat from which on cells are counted.
        recursive: passes after the first.
        weight: of the heat map in what CLIP sees next.
        clamp: cut differences of heat below 0.
        update_text: ask for the words anew in each pass, as the official code does.
        adaptive: stop where the mask no longer changes.
        tolerance: change of the mask's probabilities that counts as none.
        normalize: CLIP's features over "tokens" (official code) or "features".
        size: side of the picture as CLIP sees it; must be a multiple of the patch.
        templates: texts with {} around each word; empty: the 85 of CLIP Surgery.
        trials: training examples that ``optimize`` tries the settings on; ours.
    """

    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = PromptableModels

    text: str = "camouflaged animal"
    synonyms: tuple[str, ...] = ()
    background: bool = True
    attention: Literal["kk", "vv"] = "kk"
    depth: Annotated[int, In(">= 0")] = 6
    down_sample: Annotated[float, In("> 0")] = 0.5
    attn_thr: Annotated[float, In("(0, 1]")] = 0.9
    recursive: Annotated[int, In(">= 0")] = 5
    weight: Annotated[float, In("[0, 1]")] = 0.3
    clamp: bool = False
    update_text: bool = True
    adaptive: bool = False
    tolerance: Annotated[float, In("> 0")] = 0.003
    normalize: Literal["tokens", "features"] = "tokens"
    size: Annotated[int, In(">= 1")] = 224
    templates: tuple[str, ...] = ()
    trials: Annotated[int, In(">= 1")] = 4

    def validate(self) -> None:
        """See :meth:`looseleaf.plugin.Plugin.validate`."""
        self.check("text", isinstance(self.text, str) and bool(self.text.strip()), "what to look for, in words")
        for name, ok, what in (("synonyms", lambda t: bool(t.strip()), "phrases"),
                               ("templates", lambda t: t.count("{}") == 1, "texts with one {} each")):
            given = getattr(self, name)
            right = isinstance(given, (list, tuple)) and all(isinstance(text, str) and ok(text) for text in given)
            self.check(name, right, what)
        self.synonyms, self.templates = tuple(self.synonyms), tuple(self.templates)

    def phrases(self) -> tuple[str, ...]:
        """The synonyms of the text."""
        first, _, rest = self.text.partition(" ")
        if self.synonyms or first.lower() not in ADJECTIVES or not rest:
            return self.synonyms or (self.text,)
        return tuple(f"{adjective} {rest}" for adjective in ADJECTIVES)

    def on(self, models: PromptableModels, seed: int = 0) -> GenSAMPredictor:
        """What segments pictures: these settings and three models."""
        return GenSAMPredictor(self, models, seed)

    def optimize(self, task: Task, model: PromptableModels, *, budget: Budget | None = None,
                 start: GenericPrompt | None = None, seed: int = 0, state_dir: str | Path | None = None,
                 progress: bool | None = None) -> GenericPrompt:
        """See :meth:`looseleaf.PromptOptimizer.optimize`.

        Args:
            task: examples of a picture and its mask, see :func:`mask_task`.
            start: a prompt whose settings are taken in place of these.

        Returns:
            A prompt whose ``info["fitness"]`` is the task's mean score on the examples that it was tried on.
        """
        self.check_model(model)
        task.validate()
        if start is not None and not isinstance(start, GenericPrompt):
            raise ValueError(f"start: expected a GenericPrompt, got {type(start).__name__}")
        prompt = GenericPrompt(self.hyperparameters() if start is None else start.settings, seed)
        search = Search(self, task, model, budget=budget, start=start, seed=seed, state_dir=state_dir,
                        progress=progress)
        tried = random.Random(seed).sample(list(task.train), min(self.trials, len(task.train)))
        with search:
            predictor = prompt.on(search.model)
            for n in search.steps(len(tried)):
                found, = predictor.predict([tried[n]])
                search.state.setdefault("scores", []).append(task.score(found, tried[n]))
        scores = search.state.get("scores", [])
        prompt.info = search.info(float(np.mean(scores)) if scores else 0.0, evaluations=search.done, scores=scores)
        return prompt

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        return {"task": toy_mask_task, "model": toy_models, "calls": 120,
                "make": lambda: cls("red square", depth=2, size=32, recursive=1, templates=("a {}", "the {}"))}


def mask_task(name: str, train: Sequence[tuple[Any, Any]], dev: Sequence[tuple[Any, Any]] = (),
              test: Sequence[tuple[Any, Any]] = (), *, metric: Callable[[Any, Example], float] = mask_iou) -> Task:
    """A task of (picture, mask) pairs; see :func:`looseleaf_vision.as_image` for pictures, masks are (H, W) bool.

    Raises:
        ValueError: a mask of another size than its picture.
    """
    parts = []
    for part, pairs in (("train", train), ("dev", dev), ("test", test)):
        for n, (picture, mask) in enumerate(pairs):
            size = as_image(picture).size[::-1]
            if tuple(np.shape(mask)) != size:
                raise ValueError(f"task {name!r}, {part}[{n}]: expected a mask {size}, as the picture is high and "
                                 f"wide, got {np.shape(mask)}")
        parts.append([Example({"image": picture}, mask) for picture, mask in pairs])
    return Task(name, parts[0], parts[1], parts[2], metric=metric)


# ----------------------------------------------------------------------------------------------- for trying it out
def toy_segmenter(image: Any, points: Tensor | None, labels: Tensor | None, box: Tensor | None) -> tuple[Any, Any]:
    """A made-up segmenter: what has the colour of the positive points, or lies in the box; three tolerances."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32))
    height, width = pixels.shape[:2]
    inside = torch.ones(height, width, dtype=torch.bool)
    if box is not None:
        x1, y1, x2, y2 = box.tolist()
        inside[:] = False
        inside[max(0, y1):y2, max(0, x1):x2] = True
    if points is None or labels is None:
        return torch.where(inside, 1.0, -1.0).expand(3, -1, -1), torch.tensor([0.5, 0.4, 0.3])
    colour = pixels[points[labels == 1][:, 1], points[labels == 1][:, 0]].median(0).values
    away = (pixels - colour).abs().mean(-1)
    return torch.stack([torch.where(inside, t - away, -t) / 20 for t in (30.0, 50.0, 80.0)]), torch.tensor(
        [0.6, 0.8, 0.7])


def toy_models(words: FixedWords | None = None) -> PromptableModels:
    """A CLIPModel with random weights, a made-up segmenter, and fixed words; for trying the method out."""
    from looseleaf_vision.testing import toy_clip

    return PromptableModels(toy_clip(), toy_segmenter, words or FixedWords("red square", "black disc"))


def toy_mask_task(count: int = 4, size: int = 32, seed: int = 0) -> Task:
    """Red squares on noisy grey, with their masks."""
    rng = np.random.default_rng(seed)

    def pair() -> tuple[np.ndarray, np.ndarray]:
        picture = rng.integers(90, 160, (size, size, 3)).astype(np.uint8)
        mask = np.zeros((size, size), dtype=bool)
        side = int(rng.integers(size // 4, size // 2))
        y, x = rng.integers(0, size - side, 2)
        mask[y:y + side, x:x + side] = True
        picture[mask] = (220, 30, 30)
        return picture, mask

    return mask_task("squares", *([pair() for _ in range(count)] for _ in range(3)))


__all__ = ["TEMPLATES", "GenSAM", "GenSAMPredictor", "GenericPrompt", "Pass", "PointPredictor", "PointPrompt",
           "Segmentation", "box_of", "fuse", "mask_iou", "mask_task", "toy_mask_task", "toy_models", "toy_segmenter",
           "weighed", "widened"]
