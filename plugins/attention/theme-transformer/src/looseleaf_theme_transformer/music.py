"""Pieces of music on a grid of sixteenths: from and to MIDI, as a picture and as sound."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
import wave
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from looseleaf.files import replacing, write_text
from looseleaf.report import png

MELODY, BRIDGE, PIANO = TRACKS = ("MELODY", "BRIDGE", "PIANO")
LONGEST, LOUDEST = 64, 126
"""Longest duration in sixteenths and largest velocity that tokens have."""
STARTS, ENDS = "Theme_Start", "Theme_End"
"""Names of the MIDI markers between which the theme stands."""
TICKS = 480
Quantise = Literal["floor", "nearest"]


class Note(NamedTuple):
    """A note: start and duration in sixteenths from the beginning of the piece, MIDI pitch and velocity, track."""

    start: int
    duration: int
    pitch: int
    velocity: int = 80
    track: str = MELODY


@dataclasses.dataclass
class Piece:
    """A piece on a grid of sixteenths.

    Notes are sorted; of equal ones in a track the longest is kept, and a note ends where the next of its pitch and
    track begins. Durations end at 64 sixteenths, velocities at 126.

    Attributes:
        notes: the notes.
        meter: beats of a bar and their unit, such as (6, 8).
        tempos: bar, from 0, and quarters a minute from it on; the first is of bar 0.
        themes: first bar of each theme region and the bar after its last, in their order.
        name: such as the file, for messages.
        ignored: what was in the file and is not here, and how often.

    Raises:
        ValueError: a pitch, a start or a duration that no token has, a bar that is no whole number of sixteenths, or
            theme regions that overlap or have no bar.
    """

    notes: list[Note]
    meter: tuple[int, int] = (4, 4)
    tempos: list[tuple[int, float]] = dataclasses.field(default_factory=lambda: [(0, 120.0)])
    themes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    name: str = "piece"
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        beats, unit = self.meter
        if beats < 1 or unit < 1 or 16 * beats % unit:
            raise ValueError(f"{self.name}, bar 1: expected a meter whose bars are whole numbers of sixteenths, got "
                             f"{beats}/{unit}")
        for note in self.notes:
            if not 1 <= note.pitch <= 127 or note.start < 0 or note.duration < 1:
                raise ValueError(f"{self.name}, bar {note.start // self.bar_sixteenths + 1}: expected notes of pitch "
                                 f"1 to 127, start >= 0 and duration >= 1, got {note}")
        self.notes = _tidied(self.notes)
        self.themes = sorted((int(low), int(high)) for low, high in self.themes)
        ends = [0, *(high for _, high in self.themes)]
        for (low, high), before in zip(self.themes, ends):
            if low < before or high <= low:
                raise ValueError(f"{self.name}, bar {low + 1}: expected theme regions of one bar or more that do not "
                                 f"overlap, got {self.themes}")

    @property
    def bar_sixteenths(self) -> int:
        """Sixteenths of a bar."""
        return 16 * self.meter[0] // self.meter[1]

    @property
    def bars(self) -> int:
        """How many bars there are, up to the last onset or the end of the last theme region."""
        last = max((note.start for note in self.notes), default=-1) // self.bar_sixteenths
        return max([last + 1, *(high for _, high in self.themes)])

    def excerpt(self, low: int, high: int) -> Piece:
        """Bars ``low`` to ``high`` (not included) as a piece of their own, without theme regions."""
        first, end = low * self.bar_sixteenths, high * self.bar_sixteenths
        notes = [note._replace(start=note.start - first) for note in self.notes if first <= note.start < end]
        tempo = [bpm for bar, bpm in self.tempos if bar <= low][-1:] or [120.0]
        return Piece(notes, self.meter, [(0, tempo[0])], name=f"{self.name}, bars {low + 1} to {high}")

    def transposed(self, by: int) -> Piece:
        """The piece ``by`` semitones higher."""
        return dataclasses.replace(self, notes=[note._replace(pitch=note.pitch + by) for note in self.notes])

    def melody(self) -> list[Note]:
        """The notes of the melody, or of all tracks where there is none."""
        return [note for note in self.notes if note.track == MELODY] or self.notes

    def without_intro(self) -> Piece:
        """The piece from the bar of the first note of the melody on, as the authors prepare their data."""
        first = self.melody()[0].start // self.bar_sixteenths if self.notes else 0
        rest = self.excerpt(first, max(first + 1, self.bars))
        tempos = rest.tempos + [(bar - first, bpm) for bar, bpm in self.tempos if bar > first]
        themes = [(low - first, high - first) for low, high in self.themes if low >= first]
        return dataclasses.replace(self, notes=rest.notes, tempos=tempos, themes=themes)


def _tidied(notes: Iterable[Note]) -> list[Note]:
    out: list[Note] = []
    sounding: dict[tuple[str, int], int] = {}  # track and pitch -> where in out
    order = sorted(notes, key=lambda n: (n.start, TRACKS.index(n.track) if n.track in TRACKS else 9, n.track, n.pitch,
                                         -n.duration))
    for note in order:
        key = (note.track, note.pitch)
        if (place := sounding.get(key)) is not None:
            before = out[place]
            if before.start == note.start:
                continue
            if before.start + before.duration > note.start:
                out[place] = before._replace(duration=note.start - before.start)
        sounding[key] = len(out)
        out.append(note._replace(duration=min(note.duration, LONGEST), velocity=max(1, min(note.velocity, LOUDEST))))
    return out


# ---------------------------------------------------------------------- MIDI
def read_midi(source: Any, melody: str | int | None = None, *, drop: Iterable[str] = (BRIDGE,),
              quantise: Quantise = "floor") -> Piece:
    """A piece from MIDI.

    Starts and ends fall on the sixteenth before (``"nearest"``: nearest, for played music); a duration of zero becomes
    one. Drums are ignored. Markers ``Theme_Start`` and ``Theme_End`` give theme regions, by bars.

    Args:
        source: path or bytes of a MIDI file, a ``symusic.Score``, or a ``pretty_midi.PrettyMIDI``.
        melody: name or index of the melody's track, or ``"skyline"``: the highest note of each onset. None: the track
            named MELODY, else the skyline. All other notes are the PIANO's.
        drop: names of tracks that are left out, whatever their case.
        quantise: see above.

    Raises:
        ValueError: not MIDI, no notes, a pitch of 0, a meter that changes or that has no whole number of sixteenths, an
            unknown track. The message names the file and, where there is one, the bar.
    """
    score, name = _score(source)
    per = score.ticks_per_quarter / 4
    signatures = sorted(score.time_signatures, key=lambda s: s.time)
    meters = [(s.time, (s.numerator, s.denominator)) for s in signatures] or [(0, (4, 4))]
    meter = meters[0][1]
    bar = Piece([], meter, name=name).bar_sixteenths
    for time, other in meters[1:]:
        if other != meter:
            raise ValueError(f"{name}, bar {int(time / per) // bar + 1}: expected one meter, got {other[0]}/{other[1]} "
                             f"after {meter[0]}/{meter[1]}: cut the file there")

    def grid(time: float) -> int:
        return int(time / per + (0.5 if quantise == "nearest" else 1e-9))

    dropped = {each.upper() for each in drop}
    tracks = [t for t in score.tracks if not t.is_drum and t.name.strip().upper() not in dropped]
    ignored = Counter({"drum notes": sum(len(t.notes) for t in score.tracks if t.is_drum)})
    ignored["notes of dropped tracks"] = sum(len(t.notes) for t in score.tracks) - ignored["drum notes"] - sum(
        len(t.notes) for t in tracks)
    chosen = _melody_track(tracks, melody, name)
    notes = []
    for n, track in enumerate(tracks):
        for each in track.notes:
            start = grid(each.time)
            if each.pitch == 0:
                raise ValueError(f"{name}, bar {start // bar + 1}: expected pitches from 1 to 127, got 0")
            notes.append(Note(start, max(1, grid(each.end) - start), each.pitch, each.velocity,
                              MELODY if n == chosen else PIANO))
    if not notes:
        raise ValueError(f"{name}: expected notes, got none"
                         + (f" ({ignored['drum notes']} of drums)" if ignored["drum notes"] else ""))
    if chosen is None:
        highest: dict[int, int] = {}
        for note in notes:
            highest[note.start] = max(highest.get(note.start, 0), note.pitch)
        notes = [note._replace(track=MELODY) if note.pitch == highest[note.start] else note for note in notes]
    tempos = {0: 120.0}
    for tempo in sorted(score.tempos, key=lambda t: t.time):
        tempos[int(tempo.time / per) // bar] = float(tempo.qpm)  # the last one of a bar
    marks = {kind: [int(m.time / per) // bar for m in sorted(score.markers, key=lambda m: m.time) if m.text == kind]
             for kind in (STARTS, ENDS)}
    return Piece(notes, meter, sorted(tempos.items()), list(zip(marks[STARTS], marks[ENDS])), name,
                 {what: count for what, count in ignored.items() if count})


def _score(source: Any) -> tuple[Any, str]:
    """A symusic score and the name for messages."""
    import symusic

    name = str(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a MIDI file, got no file")
        source = path.read_bytes()
    elif hasattr(source, "instruments") and hasattr(source, "write"):  # pretty_midi
        buffer = io.BytesIO()
        source.write(buffer)
        source = buffer.getvalue()
    if isinstance(source, bytes):
        try:
            return symusic.Score.from_midi(source), name
        except Exception as error:  # symusic raises RuntimeError and others
            raise ValueError(f"{name}: expected a MIDI file, got something else ({error})") from error
    if not hasattr(source, "ticks_per_quarter"):
        raise TypeError(f"source: expected a path, bytes, a symusic.Score or a PrettyMIDI, got {name}")
    return source, name


def _melody_track(tracks: list[Any], melody: str | int | None, name: str) -> int | None:
    """Index of the melody's track; None: the skyline."""
    names = [track.name.strip().upper() for track in tracks]
    if isinstance(melody, int):
        if not 0 <= melody < len(tracks):
            raise ValueError(f"{name}: expected a track from 0 to {len(tracks) - 1} for the melody, got {melody}")
        return melody
    if melody is None:
        return names.index(MELODY) if MELODY in names else None
    if melody.upper() in names:
        return names.index(melody.upper())
    if melody == "skyline":
        return None
    raise ValueError(f"{name}: expected the name of a track for the melody ({', '.join(names)}) or 'skyline', got "
                     f"{melody!r}")


def write_midi(piece: Piece, path: str | os.PathLike[str]) -> None:
    """Write a piece as a MIDI file, atomically: tracks by name, tempos, meter, theme regions as markers."""
    import symusic

    per = TICKS // 4
    score: Any = symusic.Score(TICKS)
    score.time_signatures.append(symusic.TimeSignature(0, *piece.meter))
    bar = piece.bar_sixteenths * per
    for at, bpm in piece.tempos:
        score.tempos.append(symusic.Tempo(at * bar, bpm))
    for low, high in piece.themes:
        score.markers.append(symusic.TextMeta(low * bar, STARTS))
        score.markers.append(symusic.TextMeta(high * bar, ENDS))
    for name in dict.fromkeys([*TRACKS, *(note.track for note in piece.notes)]):
        track: Any = symusic.Track(name, 0, False)
        for note in piece.notes:
            if note.track == name:
                track.notes.append(symusic.Note(note.start * per, note.duration * per, note.pitch, note.velocity))
        if len(track.notes):
            score.tracks.append(track)
    with replacing(path) as part:
        part.write_bytes(score.dumps_midi())


# ---------------------------------------------------------------------- to hear and to see
def sound(piece: Piece, rate: int = 22050) -> np.ndarray:
    """The piece as sound, (samples,) float32 in [-1, 1]: plucked tones of six harmonics, no soundfont."""
    seconds = _seconds(piece)
    end = max((seconds(note.start + note.duration) for note in piece.notes), default=0.0) + 0.6
    out = np.zeros(int(end * rate) + 1, np.float32)
    for note in piece.notes:
        begin, length = seconds(note.start), seconds(note.start + note.duration) - seconds(note.start)
        t = np.arange(int((length + 0.5) * rate)) / rate
        tone = np.zeros(len(t))
        frequency = 440 * 2 ** ((note.pitch - 69) / 12)
        for harmonic in range(1, 7):
            if harmonic * frequency < rate / 2:
                tone += np.sin(2 * np.pi * harmonic * frequency * t) * np.exp(-1.5 * harmonic * t) / harmonic ** 1.5
        tone *= np.minimum(1, t / 0.005) * np.exp(-np.maximum(0, t - length) * 18) * note.velocity / 127
        tone *= 1.0 if note.track == MELODY else 0.5
        first = int(begin * rate)
        out[first:first + len(t)] += tone[:len(out) - first].astype(np.float32)
    return out / max(1.0, float(np.abs(out).max()))


def _seconds(piece: Piece) -> Any:
    """A function from sixteenths to seconds."""
    starts = [bar * piece.bar_sixteenths for bar, _ in piece.tempos]
    rates = [15 / bpm for _, bpm in piece.tempos]
    times = np.concatenate([[0.0], np.cumsum(np.diff(starts) * rates[:-1])])

    def at(sixteenth: int) -> float:
        n = int(np.searchsorted(starts, sixteenth, side="right")) - 1
        return float(times[n] + (sixteenth - starts[n]) * rates[n])

    return at


def wav(piece: Piece, rate: int = 22050) -> bytes:
    """The piece as a WAV file of 16 bits, one channel; see :func:`sound`."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound(piece, rate) * 32767 * 0.9).astype("<i2").tobytes())
    return buffer.getvalue()


def piano_roll(piece: Piece, bars: int | None = None, size: int = 4) -> np.ndarray:
    """The piece as a picture, (H, W, 3) uint8: time to the right, pitch up, theme regions shaded, lines at bars.

    Args:
        bars: how many to draw; None: all.
        size: height of a pitch in pixels; a sixteenth is half as wide.
    """
    bars = piece.bars if bars is None else bars
    bar, step = piece.bar_sixteenths, max(1, size // 2)
    pitches = [note.pitch for note in piece.notes] or [60]
    low, high = min(pitches) - 2, max(pitches) + 3
    out = np.full(((high - low) * size, bars * bar * step + 1, 3), 255, np.uint8)
    for first, end in piece.themes:
        out[:, first * bar * step:end * bar * step] = (255, 226, 178)
    out[:, ::bar * step] = (200, 200, 200)
    for note in sorted(piece.notes, key=lambda note: note.track == MELODY):
        top, left = (high - 1 - note.pitch) * size, note.start * step
        width = max(1, note.duration * step - 1)
        out[top:top + size, left:left + width] = (32, 74, 135) if note.track == MELODY else (140, 160, 180)
    return out


def write_page(path: str | os.PathLike[str], pieces: Mapping[str, Piece], title: str = "Pieces",
               text: str = "") -> None:
    """Write one HTML file to see and hear pieces: piano rolls and sound are inside it, and it opens offline."""
    parts = []
    for name, piece in pieces.items():
        picture, audio = (base64.b64encode(data).decode() for data in (png(piano_roll(piece)), wav(piece, 11025)))
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="piano roll" src="data:image/png;base64,{picture}">'
                     f'<p><audio controls src="data:audio/wav;base64,{audio}"></audio></p>')
    write_text(path, f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
                     "<style>body{font-family:sans-serif;margin:2rem}img{max-width:100%;image-rendering:pixelated}"
                     f"</style><h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>{''.join(parts)}</html>\n")
