"""The paper's claims on fiddle tunes: retrieval, the gate against its baselines, and themes that return."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf import Claim, Report
from looseleaf.files import cache_dir
from looseleaf.modes import evaluating, own_random_state
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data
from looseleaf_lab.study import Results, Study, above, add_table, below
from looseleaf_lab.training import fit
from looseleaf_theme_transformer import retrieval
from looseleaf_theme_transformer.baselines import PromptTransformer, SequentialTransformer
from looseleaf_theme_transformer.model import ThemeTransformer, ThemeTransformerConfig
from looseleaf_theme_transformer.music import Note, Piece, piano_roll, wav, write_midi, write_page
from looseleaf_theme_transformer.tokens import ThemeTokenizer, theme_labels
from looseleaf_theme_transformer.training import ThemeCollator, learning_rate, training_rows

OURS = "this project's rule"
GATED, SEQUENTIAL, PROMPT = "gated", "sequential", "prompt"
METERS = {"2/4": 8, "C|": 4, "C": 4, "4/4": 4}
"""Sixteenths of a quarter: reels in 2/4 are those in C| written in halves, so that two of their bars are one here."""
MEASURES: dict[str, Callable[..., np.ndarray]] = {"edit distance": retrieval.edit_distances,
                                                  "self-similarity": retrieval.self_similarity_distances}
EPS = np.linspace(0.02, 0.8, 40)
SCALE, PARTS, RETURNS = [0, 2, 4, 5, 7, 9, 11], 12, 4
"""Of planted pieces: their scale, segments, and how many of these are the theme's."""
SYMBOLS, THEME, CONTEXT, LENGTH = 16, 10, 64, 256
"""Of the copying task: symbols, length of a theme, of the context, and of a sequence."""
LATE = 8
"""Bar from which on the prompt is out of the window of 128 tokens, with 23 tokens in a bar."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Steps of the retriever, of the copying task and of the models of tunes; planted pieces, tunes whose repeats are
    looked for, themes to generate on and pieces on each."""

    retriever: int = 200
    copying: int = 400
    tunes: int = 900
    planted: int = 40
    repeats: int = 30
    themes: int = 20
    pieces: int = 2


# ---------------------------------------------------------------------- tunes
@functools.cache
def tunes() -> tuple[list[Piece], list[int]]:
    """The tunes of 14 to 18 bars in duple meter, and the family of each: variants share a quarter of their turns.

    Bars are counted from the first note: where repeats are and how long pickups were is not in the data.
    """
    pieces: list[Piece] = []
    families: list[int] = []
    seen: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for row in data.rows("fiddle-tunes"):
        factor = METERS.get(row["meter"])
        notes = [(int(at * factor + 1e-6), int((at + size) * factor + 1e-6), pitch)
                 for at, size, pitch in row["notes"] if size > 0] if factor else []
        if notes and 13 <= max(start for start, _, _ in notes) // 16 <= 17:
            pieces.append(Piece([Note(a, max(1, b - a), p) for a, b, p in notes], name=row["title"]))
    for n, piece in enumerate(pieces):
        steps = np.diff([note.pitch for note in piece.notes])
        turns = {tuple(steps[i:i + 8]) for i in range(len(steps) - 7)}
        shared: dict[int, int] = defaultdict(int)
        for turn in turns:
            for other in seen[turn]:
                shared[other] += 1
            seen[turn].add(n)
        near = [families[other] for other, count in shared.items() if count >= len(turns) / 4]
        families.append(min(near, default=n))
        families = [families[n] if family in near else family for family in families]
    return pieces, families


def parts_of(seed: int) -> dict[str, list[Piece]]:
    """Tunes to train on, to choose eps on, and to test on, by families."""
    pieces, families = tunes()
    order = np.random.default_rng(seed).permutation(sorted(set(families))).tolist()
    ends = {"train": 0.75, "choose": 0.82, "test": 1.0}
    out, first = {}, 0
    for name, end in ends.items():
        last = round(end * len(order))
        chosen = set(order[first:last])
        out[name], first = [p for p, f in zip(pieces, families, strict=True) if f in chosen], last
    return out


# ---------------------------------------------------------------------- retrieval
def planted(pool: Sequence[Piece], seed: int) -> tuple[list[list[Note]], list[int]]:
    """Segments of tunes in one key, of which four are variations of one; which those are."""
    rng = np.random.default_rng(seed)

    def segment() -> list[Note]:
        while True:
            piece = pool[int(rng.integers(len(pool)))]
            scale, found = retrieval.scale_of(piece.notes), retrieval.segments(piece)
            tonic = next(t for t in range(12) if sorted((t + c) % 12 for c in SCALE) == scale)
            chosen = found[int(rng.integers(len(found)))]
            if len(chosen) >= 8:
                return [note._replace(pitch=note.pitch - tonic + 12 * (tonic > 6)) for note in chosen]

    theme, truth = segment(), sorted(rng.choice(PARTS, RETURNS, replace=False).tolist())
    parts = [segment() for _ in range(PARTS)]
    for n in truth:
        part = retrieval.shifted(theme, int(rng.integers(-3, 4)), SCALE)
        for _ in range(int(rng.integers(0, 3))):
            part = retrieval.split(part, rng, SCALE) if rng.random() < 0.5 else retrieval.merged(part, rng)
        parts[n] = retrieval.lengthened(part, rng) if rng.random() < 0.5 else part
    return parts, truth


def measure_retrieval(finder: retrieval.ThemeRetriever, parts: dict[str, list[Piece]], seed: int,
                      scale: Scale) -> dict[str, Any]:
    """F1 of each measure with an eps chosen on other pieces, and repeats in real tunes; sets the finder's eps."""
    out: dict[str, Any] = {"f1": {}, "eps": {}}
    for name, distances in {"encoder": finder.distances, **MEASURES}.items():
        scores: dict[str, np.ndarray] = {}
        for part in ("choose", "test"):
            pieces = [planted(parts[part], 10_000 * seed + 1000 * (part == "test") + n) for n in range(scale.planted)]
            matrices = [(distances(segments), truth) for segments, truth in pieces]
            scores[part] = np.array([[retrieval.pairwise_f1(retrieval.largest(retrieval.clusters(d, eps)), truth)
                                      for d, truth in matrices] for eps in EPS])
        best = int(scores["choose"].mean(1).argmax())
        out["f1"][name], out["eps"][name] = scores["test"][best].tolist(), float(EPS[best])
    finder.eps = out["eps"]["encoder"]
    whole = [piece for piece in parts["test"] if piece.bars == 16][:scale.repeats]
    closed = []
    for piece in whole:  # AABB, as it is played
        halves = [[note for note in piece.notes if low <= note.start < low + 128] for low in (0, 128)]
        notes = [note._replace(start=note.start + 128 * shift) for half, shifts in zip(halves, ((0, 1), (1, 2)))
                 for note in half for shift in shifts]
        found = set(finder.find(Piece(notes)))
        partners = {n + 4 if n // 4 % 2 == 0 else n - 4 for n in found}
        closed.append(float(bool(found) and found == partners))
    return {**out, "repeats": closed}


# ---------------------------------------------------------------------- copying
def copying_sequence(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A theme of random symbols with its markers, and a sequence in which it returns after 64 to 80 others."""
    def symbols(count: int) -> Tensor:
        return torch.randint(1, SYMBOLS + 1, (count,), generator=draw)

    theme = torch.cat([torch.tensor([SYMBOLS + 1]), symbols(THEME), torch.tensor([SYMBOLS + 2])])
    parts = [theme]
    while sum(map(len, parts)) < LENGTH:
        parts += [symbols(int(torch.randint(CONTEXT, CONTEXT + 17, (), generator=draw))), theme]
    return theme, torch.cat(parts)[:LENGTH]


def measure_copying(name: str, seed: int, scale: Scale) -> float:
    """Fraction of the symbols of returns that a trained model predicts, none of the theme within its 64 tokens."""
    config = ThemeTransformerConfig(
        vocab_size=SYMBOLS + 3, theme_start_id=SYMBOLS + 1, theme_end_id=SYMBOLS + 2, hidden_size=64,
        num_attention_heads=4, intermediate_size=128, encoder_layers=2, decoder_layers=2, dropout=0.0,
        attention_dropout=0.0)
    model, draw = new_model(name, config, seed), torch.Generator().manual_seed(seed)

    def windows(ends: Callable[[Tensor], list[int]], count: int, size: int, draw: torch.Generator) -> dict[str, Any]:
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(rows) < count:
            theme, ids = copying_sequence(draw)
            labels = theme_labels(ids, SYMBOLS + 1, SYMBOLS + 2)
            if name == PROMPT:
                ids, labels = torch.cat([theme, ids]), torch.cat([labels[:len(theme)], labels])
            rows += [(ids[end - size:end], labels[end - size:end], theme) for end in ends(ids)]
        ids, labels, themes = (torch.stack(column) for column in zip(*rows[:count], strict=True))
        return arguments(name, {"input_ids": ids, "theme_labels": labels, "theme_ids": themes})

    def anywhere(ids: Tensor) -> list[int]:
        return [int(torch.randint(CONTEXT + 1, len(ids) + 1, (), generator=draw))]

    def returns(ids: Tensor) -> list[int]:
        starts = (ids == SYMBOLS + 1).nonzero()[:, 0].tolist()
        return [n + THEME + 1 for n in starts if n > CONTEXT and n + THEME + 1 <= len(ids)]

    def loss(step: int) -> Tensor:
        batch = windows(anywhere, 16, CONTEXT + 1, draw)
        return model(**batch, labels=batch["input_ids"]).loss

    fit(model, loss, steps=scale.copying, optimizer=lambda p: torch.optim.Adam(p, 1e-3),
        factor=learning_rate(scale.copying, warmup=50), clip=3.0, label=f"copying, {name}", progress=False)
    with evaluating(model), torch.no_grad():
        batch = windows(returns, 200, CONTEXT, torch.Generator().manual_seed(1000 + seed))
        guesses = model(**batch).logits[:, -THEME - 1:-1].argmax(-1)
    return float((guesses == batch["input_ids"][:, -THEME:]).double().mean())


def new_model(name: str, config: ThemeTransformerConfig, seed: int) -> ThemeTransformer:
    """A model of a kind, with the start of a seed."""
    with own_random_state(seed):
        return PromptTransformer.of(config) if name == PROMPT else {
            GATED: ThemeTransformer, SEQUENTIAL: SequentialTransformer}[name](config)


def arguments(name: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a model is given: the prompt model has the theme in front of its ids already, where it still is in sight."""
    return {**{key: x for key, x in batch.items() if key != "theme_ids"}, "encoder_outputs": (None,)} \
        if name == PROMPT else batch


# ---------------------------------------------------------------------- tunes with themes
def measure_tunes(parts: dict[str, list[Piece]], finder: retrieval.ThemeRetriever, seed: int,
                  scale: Scale) -> dict[str, Any]:
    """Two models of equal size: how well they predict returns of held-out tunes, and what they make of new themes."""
    annotated: dict[str, list[Piece]] = {}
    for part in ("train", "test"):
        annotated[part] = [finder.annotate(piece) for piece in parts[part] if finder.find(piece)]
    words = ThemeTokenizer.fit([*annotated["train"], *annotated["test"]])
    config = ThemeTransformerConfig(words.to_dict(), hidden_size=64, num_attention_heads=4, intermediate_size=256,
                                    encoder_layers=2, decoder_layers=4, window=128)
    chosen = annotated["test"][:scale.themes]
    given = [piece.excerpt(*piece.themes[0]) for piece in chosen]
    out: dict[str, Any] = {"tunes": {part: len(pieces) for part, pieces in annotated.items()}, "models": {},
                           "regions": [len(piece.themes) for piece in annotated["train"]],
                           "real": [statistics(piece) for piece in chosen]}
    for name in (GATED, PROMPT):
        model = new_model(name, config, seed)
        rows = training_rows(annotated["train"], words, length=129, starts="all", prompt=name == PROMPT)
        collate, draw = ThemeCollator(words, transpose=3, seed=seed), torch.Generator().manual_seed(seed)

        def loss(step: int) -> Tensor:
            batch = collate([rows[n] for n in torch.randint(len(rows), (8,), generator=draw).tolist()])  # noqa: B023
            return model(**arguments(name, batch)).loss  # noqa: B023

        losses = fit(model, loss, steps=scale.tunes, optimizer=lambda p: torch.optim.Adam(p, 2e-3),
                     factor=learning_rate(scale.tunes, warmup=50), clip=3.0, label=f"tunes, {name}", progress=False)
        made = [model.generate_several(theme, 16, scale.pieces, temperature=1.0, top_p=0.9, seed=seed, hop=32,
                                       progress=False) for theme in given]
        out["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()), "training loss": float(np.mean(losses[-50:])),
            "returns": returns(model, name, annotated["test"], words), "statistics": [
                statistics(piece) for pieces in made for piece in pieces],
            "rank": [np.mean([rank(late_regions(p), given, n) for p in pieces]) for n, pieces in enumerate(made)],
            "rank anywhere": [np.mean([rank(late_segments(p), given, n, True) for p in pieces])
                              for n, pieces in enumerate(made)],
            "example": plain(made[0][0])}
    return {**out, "theme": plain(given[0])}


def late_regions(piece: Piece) -> list[list[Note]]:
    """The notes of each theme region that begins when the prompt is out of sight."""
    return [piece.excerpt(low, high).notes for low, high in piece.themes if low >= LATE]


def late_segments(piece: Piece) -> list[list[Note]]:
    """All two bars from there on, whatever the model says of them."""
    return [part for low in range(LATE, piece.bars - 1) if (part := piece.excerpt(low, low + 2).notes)]


def rank(regions: Sequence[Sequence[Note]], themes: Sequence[Piece], own: int, best: bool = False) -> float:
    """Fraction of other themes that are farther from the regions than the one given, ties half; 0.5 without regions.

    The distance of a theme is the mean edit distance over regions, or the smallest.
    """
    if not regions:
        return 0.5
    distances = [(np.min if best else np.mean)([retrieval.edit_distance(region, theme.notes) for region in regions])
                 for theme in themes]
    others = np.delete(distances, own)
    return float(((others > distances[own]) + 0.5 * (others == distances[own])).mean())


def statistics(piece: Piece) -> dict[str, float]:
    """Regions, bars between their beginnings, entropy of pitch classes of a bar in bits, and groove similarity."""
    onsets = np.zeros((max(1, piece.bars), 16), bool)
    classes = np.zeros((max(1, piece.bars), 12))
    for note in piece.notes:
        onsets[note.start // 16, note.start % 16] = True
        classes[note.start // 16, note.pitch % 12] += 1
    p = classes / np.maximum(classes.sum(1, keepdims=True), 1)
    entropy = -(p * np.log2(np.maximum(p, 1e-12))).sum(1)
    pairs = np.triu_indices(len(onsets), 1)
    groove = 1 - (onsets[pairs[0]] != onsets[pairs[1]]).mean(1) if len(onsets) > 1 else np.ones(1)
    spacing = np.diff([low for low, _ in piece.themes])
    return {"regions": len(piece.themes), "spacing": float(spacing.mean()) if len(spacing) else 0.0,
            "pitch-class entropy": float(entropy.mean()), "groove similarity": float(groove.mean())}


@torch.no_grad()
def returns(model: ThemeTransformer, name: str, pieces: Sequence[Piece],
            words: ThemeTokenizer) -> dict[str, list[float]]:
    """Nats a Note-On of returns whose theme was last seen out of the window, by piece: its own theme, another's."""
    window = model.config.window
    out: dict[str, list[float]] = {kind: [] for kind in ("own", "other") if name != PROMPT or kind == "own"}
    collate = ThemeCollator(words, transpose=0)
    themes = [words.theme(piece) for piece in pieces]
    with evaluating(model):
        for n, piece in enumerate(pieces):
            ids = words.encode(piece)
            labels = words.labels(torch.tensor(ids)).tolist()
            starts = [i for i, index in enumerate(ids) if index == words.id("Theme_Start")]
            ends = [i for i, index in enumerate(ids) if index == words.id("Theme_End")]
            before = {start: ([0] + [end for end in ends if end <= start])[-1] for start in starts}
            spans = [(start, end) for start, end in zip(starts, ends, strict=True)
                     if end > window and before[start] <= end - window]
            for kind in out if spans else ():
                rows = [{"input_ids": ids[end - window:end], "theme_labels": labels[end - window:end],
                         "theme_ids": themes[n if kind == "own" else (n + 1) % len(themes)]} for _, end in spans]
                batch = collate(rows)
                batch.pop("labels")
                log_probs = model(**arguments(name, batch)).logits.log_softmax(-1)[:, :-1]
                targets = batch["input_ids"][:, 1:]
                losses = -log_probs.gather(-1, targets[..., None])[..., 0]
                where = (words.pitches()[targets] > 0) & (batch["theme_labels"][:, 1:] > 0)
                where &= torch.arange(window - 1) >= torch.tensor([[window - (end - start)] for start, end in spans])
                out[kind].append(float(losses[where].mean()))
    return out


def plain(piece: Piece) -> dict[str, Any]:
    """A piece as plain data; see :func:`piece_of`."""
    return {"notes": [list(note) for note in piece.notes], "themes": piece.themes, "name": piece.name}


def piece_of(entry: dict[str, Any]) -> Piece:
    """The piece that :func:`plain` wrote."""
    return Piece([Note(*note) for note in entry["notes"]], themes=[(a, b) for a, b in entry["themes"]],
                 name=entry["name"])


# ---------------------------------------------------------------------- the study
def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Retrieval, copying and tunes, all with the start and the split of one seed."""
    parts = parts_of(seed)
    finder = retrieval.ThemeRetriever()
    finder.fit(parts["train"], steps=scale.retriever, seed=seed, progress=False)
    return {"retrieval": measure_retrieval(finder, parts, seed, scale),
            "copying": {name: measure_copying(name, seed, scale) for name in (GATED, SEQUENTIAL, PROMPT)},
            "tunes": measure_tunes(parts, finder, seed, scale)}


def pooled(results: Results, *path: str, minus: Sequence[str] = ()) -> Interval:
    """The mean over seeds and over what was measured in each, or of paired differences, with its interval."""
    values = np.array(results.joined(*path))
    return bootstrap(values - np.array(results.joined(*minus)) if minus else values)


def show(report: Report, results: Results) -> None:
    """Tables of all three parts, piano rolls, and where the sound is."""
    models = ("tunes", "models")
    report.facts |= {"tunes": len(tunes()[0]), "families": len(set(tunes()[1])),
                     **{f"tunes with a theme, {part}": results.mean("tunes", "tunes", part)
                        for part in ("train", "test")},
                     "theme regions a tune": float(np.mean(results.joined("tunes", "regions")))}
    add_table(report, "Retrieval of planted themes", (
        {"measure": name, "pairwise F1": pooled(results, "retrieval", "f1", name),
         "eps": results.mean("retrieval", "eps", name)} for name in ("encoder", *MEASURES)),
        f"{PARTS} segments, {RETURNS} of them varied; eps chosen for each measure on other pieces; 95 % bootstrap")
    add_table(report, "Copying beyond a context of 64", (
        {"decoder": name, "symbols predicted": results.interval("copying", name)}
        for name in (GATED, SEQUENTIAL, PROMPT)), f"chance 1/{SYMBOLS}; means over seeds")
    add_table(report, "Tunes", ({
        "model": name, "parameters": results.mean(*models, name, "parameters"),
        "training loss": results.mean(*models, name, "training loss"),
        "nats a note of a return": pooled(results, *models, name, "returns", "own"),
        "rank of the theme": pooled(results, *models, name, "rank"),
        "rank anywhere": pooled(results, *models, name, "rank anywhere")} for name in (GATED, PROMPT)),
        "self-trained; ranks from bar 9 on: fraction of other themes that are farther away, chance 0.5")
    rows = {"real tunes": results.joined("tunes", "real"),
            **{name: results.joined(*models, name, "statistics") for name in (GATED, PROMPT)}}
    add_table(report, "What the pieces are like", (
        {"pieces": name, **{key: float(np.mean([entry[key] for entry in entries])) for key in entries[0]}}
        for name, entries in rows.items()), "16 bars; spacing in bars, entropy in bits a bar")
    theme = piece_of(results.values("tunes", "theme")[0])
    pieces = {f"the theme: {theme.name}": theme, **{
        f"{name} on it": piece_of(results.values(*models, name, "example")[0]) for name in (GATED, PROMPT)}}
    report.image("Piano rolls", [piano_roll(piece) for piece in pieces.values()], captions=list(pieces),
                 note="theme regions shaded; the first theme of the first seed, not chosen")
    folder = cache_dir() / "theme-transformer"
    for name, piece in pieces.items():
        path = folder / f"{name.partition(' ')[0]}.mid"
        write_midi(piece, path)
        path.with_suffix(".wav").write_bytes(wav(piece))
    write_page(folder / "listen.html", pieces, "Pieces on a theme", "Theme regions are shaded.")
    report.facts["to hear (MIDI, WAV, listen.html)"] = str(folder)


def claims(results: Results) -> Iterator[Claim]:
    """Every claim with its verdict."""
    claim = functools.partial(results.claim, count="seeds")
    for other in MEASURES:
        gain = pooled(results, "retrieval", "f1", "encoder", minus=("retrieval", "f1", other))
        yield claim(f"Contrastive retrieval finds themes without labels, better than {other}", "abstract",
                    "qualitative [abstract]", "interval over planted pieces of the difference of F1 above 0",
                    above(gain), f"F1 {pooled(results, 'retrieval', 'f1', 'encoder').value:.3f} against "
                    f"{pooled(results, 'retrieval', 'f1', other).value:.3f}, {gain:+.3f}")
    closed = pooled(results, "retrieval", "repeats")
    yield claim("In real tunes AABB a theme comes with its repeats", OURS, "-", "interval over tunes above 0.9",
                above(closed, 0.9), f"{closed:.3f} of the tunes")
    for name, other in ((GATED, SEQUENTIAL), (GATED, PROMPT), (SEQUENTIAL, PROMPT)):
        gain = results.interval("copying", name, minus=("copying", other))
        yield claim(f"Themes beyond the context are copied: {name} better than {other}", OURS, "-",
                    "interval over seeds of the difference above 0", above(gain),
                    f"{results.mean('copying', name):.3f} against {results.mean('copying', other):.3f}, {gain:+.3f}")
    models = ("tunes", "models")
    own = pooled(results, *models, GATED, "returns", "own", minus=(*models, GATED, "returns", "other"))
    yield claim("Returns of held-out tunes are predicted better with their theme than with another", OURS, "-",
                "interval over tunes of the difference in nats below 0", below(own), f"{own:+.3f} nats a note")
    prompt = pooled(results, *models, GATED, "returns", "own", minus=(*models, PROMPT, "returns", "own"))
    yield claim("... and better than by a prompt that has left the window", "abstract",
                "better than prompt-based [abstract]", "interval over tunes of the difference below 0", below(prompt),
                f"{prompt:+.3f} nats a note")
    for kind, words in (("rank", "theme regions"), ("rank anywhere", "any two bars")):
        gated = pooled(results, *models, GATED, kind)
        yield claim(f"The theme returns late in generated pieces ({words})", "abstract",
                    "repetition and plausible variation, to some extent [abstract]",
                    "interval over themes of the rank above 0.5", above(gated, 0.5), f"{gated:.3f}")
        gain = pooled(results, *models, GATED, kind, minus=(*models, PROMPT, kind))
        yield claim(f"... more than in pieces of the prompt model ({words})", "abstract",
                    "better than prompt-based [abstract]", "interval over themes of the difference above 0",
                    above(gain), f"{gain:+.3f}; prompt {pooled(results, *models, PROMPT, kind).value:.3f}")
    yield from results.unmeasured("abstract and tables", "in the paper", {
        "Listeners prefer it to the baselines": "listeners",
        "The same on POP909, with accompaniment": "the data set, and GPU hours"})


study = Study("theme-transformer: themes that return in fiddle tunes", measure, claims, show, full=Scale(),
              quick=Scale(20, 20, 20, 4, 3, 3, 1), quick_seeds=1)
