"""Music as tokens (REMI with theme markers): vocabulary, encoding, parsing, and the grammar that generation obeys."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from looseleaf_theme_transformer.music import LONGEST, LOUDEST, TRACKS, Note, Piece

PITCHES, TEMPOS = 127, range(17, 195, 3)
ON, DURATION, VELOCITY, TEMPO, POSITION = "Note-On", "Note-Duration", "Note-Velocity", "Tempo", "Position"
BAR, THEME_START, THEME_END = "Bar", "Theme_Start", "Theme_End"


class Token(NamedTuple):
    """What an id means: kind, value (pitch, sixteenths, velocity, quarters a minute or place), and track."""

    kind: str
    value: int = 0
    track: str = ""

    def __str__(self) -> str:
        value = f"_{self.value}" if self.value or self.kind == POSITION else ""
        return f"{self.kind}{'-' + self.track if self.track else ''}{value}"


@dataclasses.dataclass(frozen=True)
class ThemeTokenizer:
    """Pieces as ids and back (paper, section III; the authors' dictionary).

    A piece is a Tempo, then bar by bar: Bar, and for each onset a Position and its notes, each Note-On, Note-Duration
    and Note-Velocity of a track. Theme_Start stands before the Bar with which a theme region begins, Theme_End before
    the Bar after its last. A tempo that changes stands behind its Bar [ours]; adjacent regions have Theme_End and
    Theme_Start side by side [ours]. The defaults give the authors' 1,033 ids.

    Args:
        tracks: names of the tracks.
        positions: sixteenths of the longest bar.
        velocities: whether notes have velocities; where they are constant, as in scores, they are better left out.
        polyphony: most notes of one onset that generation may make [ours]; None: one of each pitch and track.
        meter: beats of a bar and their unit.
    """

    tracks: tuple[str, ...] = TRACKS
    positions: int = 16
    velocities: bool = True
    polyphony: int | None = 12
    meter: tuple[int, int] = (4, 4)
    _table: list[Token] = dataclasses.field(init=False, repr=False, compare=False)
    _first: dict[tuple[str, str], int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("tracks", tuple(self.tracks)), ("meter", tuple(self.meter))):
            object.__setattr__(self, name, value)
        if not self.tracks or self.positions < 1 or (self.polyphony is not None and self.polyphony < 1):
            raise ValueError("ThemeTokenizer: expected one track or more, positions >= 1, and polyphony None or >= 1, "
                             f"got {self}")
        table = [Token("Pad")]
        first: dict[tuple[str, str], int] = {}

        def add(kind: str, values: Iterable[int], track: str = "") -> None:
            first[kind, track] = len(table)
            table.extend(Token(kind, value, track) for value in values)

        for track in self.tracks:
            add(ON, range(1, PITCHES + 1), track)
            add(DURATION, range(1, LONGEST + 1), track)
            add(VELOCITY, range(1, LOUDEST + 1) if self.velocities else (), track)
        add(TEMPO, TEMPOS)
        add(POSITION, range(self.positions))
        for kind in (BAR, "Phrase_Start", "Phrase_End", THEME_START, THEME_END):
            add(kind, (0,))
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_first", first)

    @classmethod
    def fit(cls, pieces: Iterable[Piece]) -> ThemeTokenizer:
        """The smallest tokenizer for some pieces of one meter: their tracks, and velocities only if they differ.

        Raises:
            ValueError: no pieces, no notes, or several meters.
        """
        pieces = list(pieces)
        notes = [note for piece in pieces for note in piece.notes]
        if not notes:
            raise ValueError(f"pieces: expected pieces with notes, got {len(pieces)} and no note")
        for piece in pieces:
            if piece.meter != pieces[0].meter:
                raise ValueError(f"{piece.name}, bar 1: expected {pieces[0].meter[0]}/{pieces[0].meter[1]} as in "
                                 f"{pieces[0].name}, got {piece.meter[0]}/{piece.meter[1]}: fit one tokenizer a meter")
        there = {note.track for note in notes}
        most = max(max(Counter(note.start for note in piece.notes).values(), default=1) for piece in pieces)
        known = [track for track in TRACKS if track in there]
        return cls((*known, *sorted(there - set(known))), max(piece.bar_sixteenths for piece in pieces),
                   len({note.velocity for note in notes}) > 1, most, pieces[0].meter)

    def __len__(self) -> int:
        return len(self._table)

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as plain data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def id(self, kind: str, value: int = 0, track: str = "") -> int:
        """The id of a token.

        Raises:
            ValueError: there is no such token.
        """
        first = self._first.get((kind, track))
        offset = value - self._table[first].value if first is not None and first < len(self) else 0
        offset = offset // TEMPOS.step if kind == TEMPO else offset
        if first is None or offset < 0 or not 0 < first + offset < len(self) \
                or self._table[first + offset] != Token(kind, value, track):
            raise ValueError(f"expected a token of this vocabulary, got {Token(kind, value, track)}")
        return first + offset

    def token(self, index: int) -> Token:
        """What an id means.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"expected an id from 0 to {len(self) - 1}, got {index}")
        return self._table[index]

    # ------------------------------------------------------------------ pieces
    def encode(self, piece: Piece) -> list[int]:
        """The ids of a piece.

        Raises:
            ValueError: no notes, a track or a position that has no token; the message names the piece and the bar.
        """
        if not piece.notes:
            raise ValueError(f"{piece.name}: expected notes, got none")
        tempos = {bar: self._tempo(bpm) for bar, bpm in piece.tempos}
        out = [tempos.get(0, self._tempo(120.0))]
        by_bar: dict[int, dict[int, list[Note]]] = {}
        for note in piece.notes:
            bar, place = divmod(note.start, piece.bar_sixteenths)
            by_bar.setdefault(bar, {}).setdefault(place, []).append(note)
        starts, ends = {low for low, _ in piece.themes}, {high for _, high in piece.themes}
        for bar in range(piece.bars):
            out += [self.id(kind) for kind, bars in ((THEME_END, ends), (THEME_START, starts)) if bar in bars]
            out.append(self.id(BAR))
            if bar and bar in tempos and tempos[bar] != [t for b, t in sorted(tempos.items()) if b < bar][-1]:
                out.append(tempos[bar])
            try:
                for place, notes in sorted(by_bar.get(bar, {}).items()):
                    out.append(self.id(POSITION, place))
                    for note in notes:
                        out += [self.id(ON, note.pitch, note.track), self.id(DURATION, note.duration, note.track)]
                        out += [self.id(VELOCITY, note.velocity, note.track)] if self.velocities else []
            except ValueError as error:
                raise ValueError(f"{piece.name}, bar {bar + 1}: {error}. Fit the tokenizer on pieces like it") from None
        return out + [self.id(THEME_END)] * (piece.bars in ends)

    def _tempo(self, bpm: float) -> int:
        nearest = round((min(max(bpm, TEMPOS[0]), TEMPOS[-1]) - TEMPOS[0]) / TEMPOS.step)
        return self.id(TEMPO, TEMPOS[nearest])

    def decode(self, ids: Sequence[int] | Tensor, name: str = "tokens") -> Piece:
        """The piece that ids mean, padding left out; a Theme_End missing at the end is added.

        Raises:
            ValueError: ids that are no piece; the message names the bar and the place.
        """
        tokens = [self.token(int(i)) for i in ids if int(i)]
        notes: list[Note] = []
        tempos: list[tuple[int, float]] = []
        themes: list[tuple[int, int]] = []
        place, bar, opened, last = 0, -1, None, "the beginning"

        def wrong(expected: str) -> ValueError:
            got = str(tokens[place]) if place < len(tokens) else "the end"
            return ValueError(f"{name}, bar {max(bar, 0) + 1}, token {place}: expected {expected} after {last}, got "
                              f"{got}")

        def take(kind: str, track: str = "") -> int:
            nonlocal place, last
            if place >= len(tokens) or tokens[place].kind != kind or tokens[place].track != track:
                raise wrong(f"{kind}{'-' + track if track else ''}")
            last, place = str(tokens[place]), place + 1
            return tokens[place - 1].value

        tempos.append((0, float(take(TEMPO))))
        while place < len(tokens):
            if tokens[place].kind == THEME_END:
                if opened is None:
                    raise wrong("no Theme_End outside a theme")
                take(THEME_END)
                themes.append((opened, bar + 1))
                opened = None
                if place == len(tokens):
                    break
            if tokens[place].kind == THEME_START:
                if opened is not None:
                    raise wrong("no Theme_Start inside a theme")
                take(THEME_START)
                opened = bar + 1
            take(BAR)
            bar += 1
            if place < len(tokens) and tokens[place].kind == TEMPO:
                tempos.append((bar, float(take(TEMPO))))
            before = -1
            while place < len(tokens) and tokens[place].kind == POSITION:
                at = take(POSITION)
                if at <= before:
                    raise wrong(f"a position after {before}")
                before, there = at, set()
                while place < len(tokens) and tokens[place].kind == ON:
                    track = tokens[place].track
                    pitch = take(ON, track)
                    if (pitch, track) in there:
                        raise wrong("each note of an onset once")
                    there.add((pitch, track))
                    start = bar * 16 * self.meter[0] // self.meter[1] + at
                    length = take(DURATION, track)
                    notes.append(Note(start, length, pitch, take(VELOCITY, track) if self.velocities else 80, track))
                if not there:
                    raise wrong(ON)
        if opened is not None:
            themes.append((opened, bar + 1))
        return Piece(notes, self.meter, tempos, themes, name)

    def theme(self, theme: Piece | Sequence[int]) -> list[int]:
        """What the encoder is given: the first theme region with its markers, or all of a piece without regions.

        Raises:
            ValueError: no notes in it, or ids without the markers.
        """
        if not isinstance(theme, Piece):
            ids = [int(i) for i in theme]
            if len(ids) < 3 or ids[0] != self.id(THEME_START) or ids[-1] != self.id(THEME_END):
                raise ValueError(f"theme: expected a Piece, or ids from Theme_Start to Theme_End, got {len(ids)} ids "
                                 "that are neither")
            return ids
        low, high = theme.themes[0] if theme.themes else (0, max(1, theme.bars))
        part = theme.excerpt(low, high)
        if not part.notes:
            raise ValueError(f"{theme.name}, bar {low + 1}: expected a theme with notes, got none up to bar {high}")
        return self.encode(dataclasses.replace(part, themes=[(0, high - low)]))[1:]

    # ------------------------------------------------------------------ ids
    def labels(self, ids: Sequence[int] | Tensor, start: int = 0) -> Tensor:
        """l_t: 0 outside a theme region, 1 at Theme_Start, 2, 3 ... behind it, 0 at Theme_End; int64, as ``ids``.

        A function of the ids up to each place alone, so that it is known while they are generated.

        Args:
            ids: (L,) or (B, L).
            start: label of the token before the first one, where a part of a piece begins.
        """
        return theme_labels(torch.as_tensor(ids), self.id(THEME_START), self.id(THEME_END), start)

    def transpose(self, ids: Tensor, by: int) -> Tensor:
        """Ids with all Note-On ``by`` semitones higher; the others stay as they are.

        Raises:
            ValueError: a pitch would leave 1 to 127.
        """
        pitches = self.pitches().to(ids.device)[ids]
        moved = pitches + by
        sounding = pitches > 0
        if bool(((moved < 1) | (moved > PITCHES))[sounding].any()):
            raise ValueError(f"by: expected pitches to stay from 1 to {PITCHES}, got {int(pitches[sounding].min())} to "
                             f"{int(pitches.max())} moved by {by}")
        return torch.where(sounding, ids + by, ids)

    def pitches(self) -> Tensor:
        """The pitch of each id, 0 for those that are no Note-On, (vocabulary,) int64."""
        return torch.tensor([token.value if token.kind == ON else 0 for token in self._table])

    def span(self, kind: str, track: str = "") -> tuple[int, int]:
        """First id of a kind and the one after its last."""
        first = self._first[kind, track]
        end = first
        while end < len(self) and self._table[end].kind == kind and self._table[end].track == track:
            end += 1
        return first, end


def theme_labels(ids: Tensor, theme_start: int, theme_end: int, start: int | Tensor = 0) -> Tensor:
    """See :meth:`ThemeTokenizer.labels`; padding (id 0) has 0. ``start`` may be one number for each row."""
    place = torch.arange(1, ids.shape[-1] + 1, device=ids.device).expand(ids.shape)
    before = torch.as_tensor(start, device=ids.device)
    before = before.reshape(-1, *[1] * (ids.dim() - 1)) if before.dim() else before
    # Where the last region began, counted from 1; before the first token where the part begins inside one.
    opened = torch.where(ids == theme_start, place, 0).cummax(-1).values
    closed = torch.where(ids == theme_end, place, 0).cummax(-1).values
    inside = torch.where(opened > closed, place - opened + 1,
                         torch.where((closed == 0) & (opened == 0) & (before > 0), place + before, 0))
    return torch.where(ids == 0, 0, inside)


_NEXT = {"the beginning": (TEMPO,), TEMPO: (BAR, THEME_START), THEME_START: (BAR,), THEME_END: (BAR, THEME_START)}


class Grammar:
    """Which tokens may come next in one sequence that is being generated, so that whatever is chosen parses.

    Where the authors reject and draw again, up to 1,024 times, ours masks [ours]: it is never stuck. After the last bar
    the tokens that would begin another one mean the end.

    Args:
        tokenizer: the vocabulary.
        bars: how many bars to make.
    """

    def __init__(self, tokenizer: ThemeTokenizer, bars: int) -> None:
        self.tokenizer, self.bars = tokenizer, bars
        self.bar, self.place, self.inside, self.finished = 0, -1, False, False
        self.last, self.there, self.sounded = Token("the beginning"), set[int](), False

    def allowed(self) -> Tensor:
        """True for each id that may come next, (vocabulary,) bool; one at least."""
        t, kind = self.tokenizer, self.last.kind
        out = torch.zeros(len(t), dtype=torch.bool)
        whole = kind == (VELOCITY if t.velocities else DURATION)  # a note is complete
        if kind == ON:
            spans = [t.span(DURATION, self.last.track)]
        elif kind == DURATION and not whole:
            spans = [t.span(VELOCITY, self.last.track)]
        elif kind in _NEXT:
            spans = [t.span(each) for each in _NEXT[kind]]
        else:
            spans = []
            if kind == POSITION or (whole and len(self.there) < (t.polyphony or len(t))):
                spans += [t.span(ON, track) for track in t.tracks]
            if kind != POSITION:
                first, _ = t.span(POSITION)
                spans += [t.span(BAR), (first + self.place + 1, first + 16 * t.meter[0] // t.meter[1])]
                if self.sounded or not self.inside:
                    spans.append(t.span(THEME_END if self.inside else THEME_START))
        for first, end in spans:
            out[first:end] = True
        if whole:
            out[list(self.there)] = False
        return out

    def take(self, index: int) -> list[int]:
        """Go on with a token that is allowed; what to append: the token, or the end of the piece."""
        token = self.tokenizer.token(index)
        if token.kind in (BAR, THEME_START) and self.bar >= self.bars:
            self.finished = True
            return [self.tokenizer.id(THEME_END)] if self.inside else []
        if token.kind == THEME_END and self.bar >= self.bars:
            self.finished = True
        if token.kind == BAR:
            self.bar, self.place = self.bar + 1, -1
        elif token.kind == POSITION:
            self.place, self.there = token.value, set()
        elif token.kind == ON:
            self.there.add(index)
            self.sounded = True
        elif token.kind in (THEME_START, THEME_END):
            self.inside, self.sounded = token.kind == THEME_START, False
        if token.kind != TEMPO or not self.bar:  # behind a tempo that changes comes what comes behind its Bar
            self.last = token
        return [index]
