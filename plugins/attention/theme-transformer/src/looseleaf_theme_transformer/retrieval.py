"""Finding the theme of a piece: segments of two bars, an encoder trained on musical variations, and clusters."""

from __future__ import annotations

import dataclasses
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf.files import load_tensors, save_tensors
from looseleaf.modes import evaluating, own_random_state, training
from looseleaf.progress import track
from looseleaf_theme_transformer.music import Note, Piece

FORMAT = "looseleaf.theme-retriever/1"
LARGEST_INTERVAL, LONGEST_NOTE = 12, 16
Segment = Sequence[Note]
"""Notes of one voice, starts counted from the segment's beginning."""


# ---------------------------------------------------------------------- segments and variations
def segments(piece: Piece, bars: int = 2) -> list[list[Note]]:
    """The melody in segments of ``bars`` bars, one behind the other; of notes that begin together the highest."""
    size = bars * piece.bar_sixteenths
    out: list[list[Note]] = [[] for _ in range(-(-piece.bars // bars))]
    highest = {note.start: note for note in sorted(piece.melody(), key=lambda note: note.pitch)}
    for start, note in sorted(highest.items()):
        out[start // size].append(note._replace(start=start % size))
    return out


def scale_of(notes: Segment) -> list[int]:
    """The seven pitch classes of the major scale that most of the notes' time lies in, in their order."""
    weights = np.zeros(12)
    for note in notes:
        weights[note.pitch % 12] += note.duration
    major = np.array([0, 2, 4, 5, 7, 9, 11])
    best = max(range(12), key=lambda tonic: weights[(major + tonic) % 12].sum())
    return sorted(int(c) for c in (major + best) % 12)


def shifted(notes: Segment, steps: int, scale: Sequence[int]) -> list[Note]:
    """Notes moved by steps of a scale; those that are not in it keep their distance to the next lower one that is."""
    ladder = [12 * octave + c for octave in range(-1, 12) for c in scale]
    out = []
    for note in notes:
        place = bisect_right(ladder, note.pitch) - 1
        moved = ladder[min(max(place + steps, 0), len(ladder) - 1)] + note.pitch - ladder[place]
        out.append(note._replace(pitch=min(max(moved, 1), 127)))
    return out


def lengthened(notes: Segment, rng: np.random.Generator) -> list[Note]:
    """The last note longer or shorter."""
    out = list(notes)
    if out:
        out[-1] = out[-1]._replace(duration=max(1, int(out[-1].duration * rng.choice([0.5, 1.5, 2.0]))))
    return out


def split(notes: Segment, rng: np.random.Generator, neighbour: Sequence[int] = ()) -> list[Note]:
    """One note of two sixteenths or more in two; the second one a step of the scale ``neighbour`` away, if given."""
    places = [n for n, note in enumerate(notes) if note.duration >= 2]
    if not places:
        return list(notes)
    n = int(rng.choice(places))
    half = notes[n].duration // 2
    second = notes[n]._replace(start=notes[n].start + half, duration=notes[n].duration - half)
    if neighbour:
        second = shifted([second], int(rng.choice([-1, 1])), neighbour)[0]
    return [*notes[:n], notes[n]._replace(duration=half), second, *notes[n + 1:]]


def merged(notes: Segment, rng: np.random.Generator) -> list[Note]:
    """Two notes that follow each other as one, of the first one's pitch."""
    if len(notes) < 2:
        return list(notes)
    n = int(rng.integers(len(notes) - 1))
    one, two = notes[n:n + 2]
    return [*notes[:n], one._replace(duration=two.start + two.duration - one.start), *notes[n + 2:]]


def varied(notes: Segment, scale: Sequence[int], rng: np.random.Generator) -> list[Note]:
    """A random variation: along the scale, another last note, notes split or merged [2nd; probabilities ours]."""
    out = shifted(notes, int(rng.integers(-4, 5)), scale)
    if rng.random() < 0.5:
        out = lengthened(out, rng)
    for _ in range(int(rng.integers(0, 4))):
        out = split(out, rng, scale if rng.random() < 0.5 else ()) if rng.random() < 0.5 else merged(out, rng)
    return out


# ---------------------------------------------------------------------- distances and clusters
def contour(notes: Segment) -> list[tuple[int, int]]:
    """What is the same in all keys: interval to the note before (0 for the first) and duration of each note."""
    return [(0 if n == 0 else note.pitch - notes[n - 1].pitch, note.duration) for n, note in enumerate(notes)]


def edit_distance(one: Segment, two: Segment) -> float:
    """Least number of notes to insert, delete or change (half for interval or duration alone), over the longer, 0 to 1.

    The first notes have no interval before them, so that keys do not matter.
    """
    a, b = contour(one), contour(two)
    if not a or not b:
        return float(bool(a or b))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            change = before + 0.5 * (x[0] != y[0]) + 0.5 * (x[1] != y[1])
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)  # type: ignore[call-overload]
    return row[-1] / max(len(a), len(b))


def edit_distances(parts: Sequence[Segment]) -> np.ndarray:
    """:func:`edit_distance` of each pair, (n, n)."""
    out = np.zeros((len(parts), len(parts)))
    for i in range(len(parts)):
        for j in range(i):
            out[i, j] = out[j, i] = edit_distance(parts[i], parts[j])
    return out


def self_similarity_distances(parts: Sequence[Segment]) -> np.ndarray:
    """1 - the cosine of piano rolls by pitch class, at the best of twelve transpositions, of each pair, (n, n)."""
    length = max([note.start + note.duration for part in parts for note in part], default=1)
    rolls = np.zeros((len(parts), 12, length))
    for n, part in enumerate(parts):
        for note in part:
            rolls[n, note.pitch % 12, note.start:note.start + note.duration] = 1
    flat = rolls / np.maximum(np.linalg.norm(rolls, axis=(1, 2), keepdims=True), 1e-9)
    cosines = [np.einsum("ipt,jpt->ij", flat, np.roll(flat, k, 1)) for k in range(12)]
    out = 1 - np.max(cosines, 0)
    np.fill_diagonal(out, 0)
    return np.maximum(np.minimum(out, out.T), 0)


def clusters(distances: np.ndarray, eps: float, least: int = 2) -> np.ndarray:
    """The cluster of each segment by DBSCAN, -1: none, (n,) int64.

    Args:
        distances: of each pair, (n, n).
        eps: largest distance of neighbours.
        least: segments near a segment, itself included, that make it the core of a cluster.
    """
    from sklearn.cluster import DBSCAN

    found: np.ndarray = DBSCAN(eps=eps, min_samples=least, metric="precomputed").fit_predict(distances)
    return found


def largest(labels: Sequence[int] | np.ndarray) -> list[int]:
    """The members of the largest cluster, of equal ones the first; empty where all is noise (-1)."""
    labels = np.asarray(labels)
    sizes = [(int((labels == n).sum()), -int(np.argmax(labels == n)), n) for n in set(labels.tolist()) if n >= 0]
    return np.flatnonzero(labels == max(sizes)[2]).tolist() if sizes else []


# ---------------------------------------------------------------------- the encoder
class _Encoder(nn.Module):
    """A GRU over intervals and durations, (B, L, 2) ids and (B,) lengths to (B, d) of length 1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.interval = nn.Embedding(2 * LARGEST_INTERVAL + 1, size)
        self.duration = nn.Embedding(LONGEST_NOTE + 1, size)
        self.gru = nn.GRU(size, size, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * size, size), nn.GELU(), nn.Linear(size, size))

    def forward(self, notes: Tensor, lengths: Tensor) -> Tensor:
        x = self.interval(notes[..., 0]) + self.duration(notes[..., 1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.gru(packed)
        return nn.functional.normalize(self.head(last.transpose(0, 1).flatten(1)), dim=-1)


def _batch(parts: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    rows = [[(min(max(i, -LARGEST_INTERVAL), LARGEST_INTERVAL) + LARGEST_INTERVAL, min(d, LONGEST_NOTE))
             for i, d in contour(part)] or [(LARGEST_INTERVAL, 0)] for part in parts]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), 2, dtype=torch.int64)
    for n, row in enumerate(rows):
        padded[n, :len(row)] = torch.tensor(row)
    return padded, lengths


def nt_xent(one: Tensor, two: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent: each of (B, d) and its variation (B, d) among all 2 B, cosine over ``temperature``; a scalar."""
    both = nn.functional.normalize(torch.cat([one, two]), dim=-1)
    scores = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(one))
    return nn.functional.cross_entropy(scores, partner)


@dataclasses.dataclass
class ThemeRetriever:
    """Finds the theme regions of pieces (paper, section III; its code was not published).

    The melody is cut into segments, an encoder that was trained to know variations of a segment embeds each, and DBSCAN
    groups those of a piece: the largest cluster is the theme, and its members are the theme regions.

    Args:
        bars: bars of a segment.
        eps: largest cosine distance of neighbours; it matters: sweep it on pieces whose theme you know.
        least: smallest size of a cluster.
        size: width of the encoder [ours].
        temperature: of NT-Xent [ours].
    """

    bars: int = 2
    eps: float = 0.15
    least: int = 2
    size: int = 64
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, ok, expected in (("bars", self.bars >= 1, ">= 1"), ("eps", self.eps > 0, "> 0"),
                                   ("least", self.least >= 2, ">= 2"), ("size", self.size >= 1, ">= 1"),
                                   ("temperature", self.temperature > 0, "> 0")):
            if not ok:
                raise ValueError(f"{name}: expected a number {expected}, got {getattr(self, name)}")
        with own_random_state(0):
            self.encoder = _Encoder(self.size)
        self.trained = False

    def fit(self, pieces: Sequence[Piece], *, steps: int = 400, batch: int = 128, lr: float = 2e-3, seed: int = 0,
            progress: bool | None = None) -> list[float]:
        """Train the encoder: two random variations of a segment are alike, those of others are not.

        Args:
            pieces: any pieces; no theme needs to be known.
            steps, batch, lr: training steps, segments of a step, Adam's learning rate [ours].
            seed: of the start and the variations.

        Returns:
            The loss of each step.

        Raises:
            ValueError: fewer than two segments with notes.
        """
        pool = [(part, scale) for piece in pieces for scale in [scale_of(piece.melody())]
                for part in segments(piece, self.bars) if len(part) >= 3]
        if len(pool) < 2:
            raise ValueError(f"pieces: expected two segments of three notes or more, got {len(pool)} in "
                             f"{len(pieces)} pieces")
        rng, losses = np.random.default_rng(seed), []
        with own_random_state(seed):
            self.encoder = _Encoder(self.size)
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr)
        with training(self.encoder), torch.enable_grad():
            for _ in track(range(steps), "training the encoder", show=progress):
                drawn = [pool[i] for i in rng.choice(len(pool), min(batch, len(pool)), replace=False)]
                one, two = (self.encoder(*_batch([varied(part, scale, rng) for part, scale in drawn]))
                            for _ in range(2))
                loss = nt_xent(one, two, self.temperature)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(float(loss.detach()))
        self.trained = True
        return losses

    @torch.no_grad()
    def embed(self, parts: Sequence[Segment]) -> Tensor:
        """Segments as unit vectors, (n, size).

        Raises:
            ValueError: the encoder was not trained.
        """
        if not self.trained:
            raise ValueError("ThemeRetriever: expected a trained encoder, got a new one: call fit(pieces) or load")
        with evaluating(self.encoder):
            out: Tensor = self.encoder(*_batch(parts))
        return out

    def distances(self, parts: Sequence[Segment]) -> np.ndarray:
        """Cosine distance of each pair of segments, (n, n), from 0 to 2."""
        vectors = self.embed(parts).double().numpy()
        out = np.clip(1 - vectors @ vectors.T, 0, 2)
        np.fill_diagonal(out, 0)
        return out

    def find(self, piece: Piece, distances: Callable[[Sequence[Segment]], np.ndarray] | None = None,
             eps: float | None = None) -> list[int]:
        """Which segments of a piece are the theme's, from 0; empty where there is none.

        Args:
            piece: any piece.
            distances, eps: another measure of segments, such as :func:`edit_distances`, with an eps of its own.
        """
        parts = segments(piece, self.bars)
        filled = [n for n, part in enumerate(parts) if part]
        measure = self.distances if distances is None else distances
        if len(filled) < self.least:
            return []
        found = clusters(measure([parts[n] for n in filled]), self.eps if eps is None else eps, self.least)
        return [filled[n] for n in largest(found)]

    def annotate(self, piece: Piece) -> Piece:
        """The piece with its theme regions.

        Raises:
            ValueError: no notes, or no two segments alike.
        """
        if not piece.notes:
            raise ValueError(f"{piece.name}: expected notes, got none")
        found = self.find(piece)
        if not found:
            raise ValueError(f"{piece.name}, bars 1 to {piece.bars}: expected a theme that returns, got no cluster of "
                             f"{self.least} segments of {self.bars} bars: raise eps ({self.eps})")
        regions = [(n * self.bars, min((n + 1) * self.bars, piece.bars)) for n in found]
        return dataclasses.replace(piece, themes=regions)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write encoder and arguments as safetensors."""
        info: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        save_tensors(path, self.encoder.state_dict(), info, format=FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ThemeRetriever:
        """What :meth:`save` wrote."""
        tensors, info = load_tensors(path, format=FORMAT)
        out = cls(**info)
        out.encoder.load_state_dict(tensors)
        out.trained = True
        return out


def pairwise_f1(found: Sequence[int], truth: Sequence[int]) -> float:
    """F1 over pairs of segments that are both in the theme, of what was found against what is, 0 to 1."""
    pairs = [{(a, b) for a in members for b in members if a < b} for members in (found, truth)]
    common = len(pairs[0] & pairs[1])
    return 2 * common / max(1, len(pairs[0]) + len(pairs[1]))
