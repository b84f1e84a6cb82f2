"""Tokens, labels, grammar and MIDI."""

import re

import numpy as np
import pytest
import symusic
import torch

from looseleaf_theme_transformer import Note, Piece, ThemeTokenizer, piano_roll, read_midi, wav, write_midi, write_page
from looseleaf_theme_transformer.tokens import Grammar


def random_piece(seed: int, meter: tuple[int, int] = (4, 4), bars: int = 6) -> Piece:
    rng = np.random.default_rng(seed)
    size = 16 * meter[0] // meter[1]
    notes = [Note(int(rng.integers(bars * size)), int(rng.integers(1, 20)), int(rng.integers(30, 90)),
                  int(rng.integers(1, 127)), str(rng.choice(["MELODY", "PIANO"]))) for _ in range(60)]
    return Piece(notes, meter, [(0, 119.0), (3, 98.0)], [(0, 2), (2, 3), (4, 6)], f"piece {seed}")


def test_the_authors_ids() -> None:
    words = ThemeTokenizer()
    assert len(words) == 1033
    assert (words.id("Bar"), words.id("Theme_Start"), words.id("Theme_End")) == (1028, 1031, 1032)
    assert [words.token(words.id(*t)) for t in (("Tempo", 17), ("Tempo", 194), ("Note-On", 127, "PIANO"))] == [
        ("Tempo", 17, ""), ("Tempo", 194, ""), ("Note-On", 127, "PIANO")]


@pytest.mark.parametrize("meter", [(4, 4), (2, 4), (6, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_midi_ids_midi_is_idempotent(seed: int, meter: tuple[int, int], tmp_path) -> None:
    piece = random_piece(seed, meter)
    words = ThemeTokenizer(meter=meter)
    for path in (tmp_path / "one.mid", tmp_path / "two.mid"):
        write_midi(piece, path)
        read = read_midi(path, drop=())
        again = words.decode(words.encode(read))
        assert again.notes == read.notes == piece.notes
        assert again.themes == read.themes == piece.themes and again.meter == piece.meter
        assert again.tempos == [(0, 119.0), (3, 98.0)]
        piece = again
    assert (tmp_path / "one.mid").read_bytes() == (tmp_path / "two.mid").read_bytes()


def test_starts_and_ends_are_floored_to_sixteenths() -> None:
    score = symusic.Score(480)
    track = symusic.Track("MELODY", 0, False)
    for start, end in ((119, 130), (120, 121), (250, 480)):
        track.notes.append(symusic.Note(start, end - start, 60 + start % 7, 100))
    score.tracks.append(track)
    assert [(n.start, n.duration) for n in read_midi(score).notes] == [(0, 1), (1, 1), (2, 2)]
    assert [n.start for n in read_midi(score, quantise="nearest").notes] == [1, 1, 2]


def test_the_melody_is_the_named_track_or_the_skyline_or_what_is_chosen(tmp_path) -> None:
    score = symusic.Score(480)
    for name, pitches in (("lead", [50, 70]), ("Bridge", [40]), ("chords", [60, 62])):
        track = symusic.Track(name, 0, False)
        for n, pitch in enumerate(pitches):
            track.notes.append(symusic.Note(480 * n, 240, pitch, 90))
        score.tracks.append(track)
    drums = symusic.Track("kit", 0, True)
    drums.notes.append(symusic.Note(0, 10, 36, 90))
    score.tracks.append(drums)
    skyline = read_midi(score)
    assert [n.pitch for n in skyline.melody()] == [60, 70]
    assert skyline.ignored == {"drum notes": 1, "notes of dropped tracks": 1}
    assert [n.pitch for n in read_midi(score, "chords").melody()] == [60, 62]
    assert [n.pitch for n in read_midi(score, 0).melody()] == [50, 70]
    with pytest.raises(ValueError, match=r"ScoreTick: expected the name of a track for the melody .*, got 'flute'"):
        read_midi(score, "flute")
    score.tracks[2].name = "Melody"
    assert [n.pitch for n in read_midi(score).melody()] == [60, 62]


def test_pretty_midi_objects_are_read() -> None:
    score = symusic.Score(480)
    track = symusic.Track("MELODY", 0, False)
    track.notes.append(symusic.Note(480, 480, 64, 90))
    score.tracks.append(track)

    class PrettyMIDI:
        instruments = ()

        def write(self, file) -> None:
            file.write(score.dumps_midi())

    assert read_midi(PrettyMIDI()).notes == [Note(4, 4, 64, 90)]


def reference_labels(ids: list[int], start: int, end: int) -> list[int]:
    out, count = [], 0
    for i in ids:
        count = 1 if i == start else 0 if i == end else count + 1 if count else 0
        out.append(count)
    return out


def test_labels_count_from_theme_start_and_need_no_future() -> None:
    words = ThemeTokenizer()
    ids = words.encode(random_piece(0))
    labels = words.labels(torch.tensor(ids))
    expected = reference_labels(ids, words.id("Theme_Start"), words.id("Theme_End"))
    assert labels.tolist() == expected and max(expected) > 10
    for cut in range(1, len(ids), 7):
        assert words.labels(torch.tensor(ids[:cut])).tolist() == expected[:cut]
        assert words.labels(torch.tensor(ids[cut:]), expected[cut - 1]).tolist() == expected[cut:]
    batch = torch.tensor([ids, [0, 0, *ids[:-2]]])
    assert words.labels(batch)[1, 2:].tolist() == expected[:-2]


def test_transposition_moves_note_on_alone() -> None:
    words = ThemeTokenizer()
    ids = torch.tensor(words.encode(random_piece(1)))
    up = words.transpose(ids, 5)
    moved = [(words.token(int(a)), words.token(int(b))) for a, b in zip(ids, up)]
    assert all(b == (a._replace(value=a.value + 5) if a.kind == "Note-On" else a) for a, b in moved)
    assert torch.equal(words.transpose(up, -5), ids)
    with pytest.raises(ValueError, match=r"expected pitches to stay from 1 to 127, got .* moved by 60"):
        words.transpose(ids, 60)


@pytest.mark.parametrize("words", [ThemeTokenizer(), ThemeTokenizer(("MELODY",), 12, False, 1, (6, 8))])
def test_what_the_grammar_allows_parses_and_it_is_never_stuck(words: ThemeTokenizer) -> None:
    draws = torch.Generator().manual_seed(0)
    for bars in (1, 2, 5):
        for _ in range(6):
            grammar, ids = Grammar(words, bars), []
            while not grammar.finished:
                allowed = grammar.allowed()
                assert bool(allowed.any())
                kinds = {}  # kinds are drawn alike, so that rare ones come up
                for i in allowed.nonzero()[:, 0].tolist():
                    kinds.setdefault(words.token(i).kind, []).append(i)
                choices = list(kinds.values())[int(torch.randint(len(kinds), (), generator=draws))]
                ids += grammar.take(choices[int(torch.randint(len(choices), (), generator=draws))])
            piece = words.decode(ids)
            assert piece.bars <= bars
            if piece.notes:
                again = words.encode(piece)
                assert again[0] == ids[0] and words.decode(again).notes == piece.notes


def test_what_the_grammar_forbids_does_not_parse() -> None:
    """One token changed into a forbidden one, at every place of a piece: the parser, which is other code, refuses."""
    words = ThemeTokenizer(polyphony=None)
    ids = words.encode(random_piece(2))
    grammar, refused = Grammar(words, 99), 0
    for n, index in enumerate(ids[:150]):
        allowed = grammar.allowed()
        assert words.token(index).kind == "Tempo" or allowed[index]
        for other in (~allowed).nonzero()[::97, 0].tolist():
            if words.token(other).kind in ("Tempo", "Pad", "Theme_End"):  # tempos may change; empty themes do parse
                continue
            with pytest.raises(ValueError):
                words.decode([*ids[:n], other, *ids[n + 1:n + 2]])
            refused += 1
        grammar.take(index)
    assert refused > 300


def test_fit_takes_what_the_pieces_need() -> None:
    melody = Piece([Note(4 * n, 4, 60 + n, 90) for n in range(8)])
    words = ThemeTokenizer.fit([melody])
    assert words.tracks == ("MELODY",) and not words.velocities and words.polyphony == 1
    assert words.decode(words.encode(melody)).notes == [n._replace(velocity=80) for n in melody.notes]
    with pytest.raises(ValueError, match="bar 1: expected a token of this vocabulary, got Note-On-PIANO_50"):
        words.encode(Piece([Note(0, 1, 50, 1, "PIANO")]))
    with pytest.raises(ValueError, match="waltz, bar 1: expected 4/4 as in piece, got 3/4"):
        ThemeTokenizer.fit([melody, Piece([Note(0, 1, 50)], (3, 4), name="waltz")])


def test_theme_of_a_piece_is_its_first_region() -> None:
    words, piece = ThemeTokenizer(), random_piece(3)
    theme = words.theme(piece)
    ids = words.encode(piece)
    first, last = ids.index(words.id("Theme_Start")), ids.index(words.id("Theme_End"))
    assert theme == ids[first:last + 1] and words.theme(theme) == theme
    assert words.theme(Piece([Note(0, 4, 60)]))[0] == words.id("Theme_Start")


BAD = {
    "no file": (lambda d: read_midi(d / "none.mid"), FileNotFoundError, r"none.mid: expected a MIDI file, got no file"),
    "not MIDI": (lambda d: read_midi(b"RIFF1234"), ValueError, "bytes: expected a MIDI file, got something else"),
    "not a source": (lambda d: read_midi(3), TypeError, "source: expected a path"),
    "pitch 0": (lambda d: Piece([Note(40, 1, 0)]), ValueError, "piece, bar 3: expected notes of pitch 1 to 127"),
    "odd meter": (lambda d: Piece([Note(0, 1, 60)], (3, 32)), ValueError, "bar 1: expected a meter whose bars"),
    "long bar": (lambda d: ThemeTokenizer().encode(Piece([Note(40, 1, 60)], (12, 8), name="a.mid")), ValueError,
                 "a.mid, bar 2: expected a token of this vocabulary, got Position_16"),
    "no notes": (lambda d: ThemeTokenizer().encode(Piece([], name="a.mid")), ValueError, "a.mid: expected notes"),
    "empty theme": (lambda d: ThemeTokenizer().theme(Piece([Note(40, 1, 60)], themes=[(0, 1)])), ValueError,
                    "piece, bar 1: expected a theme with notes, got none"),
    "unknown id": (lambda d: ThemeTokenizer().decode([960, 1028, 5000]), ValueError, "expected an id from 0 to 1032"),
    "no piece": (lambda d: ThemeTokenizer().decode([960, 1028, 5]), ValueError,
                 "bar 1, token 2: expected Bar after Bar, got Note-On-MELODY_5"),
    "overlap": (lambda d: Piece([Note(0, 1, 60)], themes=[(0, 2), (1, 3)]), ValueError, "bar 2: expected theme reg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path) -> None:
    function, error, message = BAD[case]
    with pytest.raises(error, match=message):
        function(tmp_path)


def test_bad_files_are_named_with_their_bar(tmp_path) -> None:
    for name, change, message in (
            ("zero", lambda s: s.tracks[0].notes.append(symusic.Note(3840, 9, 0, 9)), "bar 3: expected pitches from 1"),
            ("meter", lambda s: s.time_signatures.append(symusic.TimeSignature(3840, 3, 4)),
             "bar 3: expected one meter, got 3/4 after 4/4"),
            ("empty", lambda s: s.tracks.clear(), "expected notes, got none")):
        score = symusic.Score(480)
        score.time_signatures.append(symusic.TimeSignature(0, 4, 4))
        track = symusic.Track("MELODY", 0, False)
        track.notes.append(symusic.Note(0, 480, 60, 90))
        score.tracks.append(track)
        change(score)
        path = tmp_path / f"{name}.mid"
        path.write_bytes(score.dumps_midi())
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            read_midi(path)


def test_to_see_and_to_hear(tmp_path) -> None:
    piece = random_piece(4)
    picture = piano_roll(piece)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert (picture == (32, 74, 135)).all(-1).any() and (picture == (255, 226, 178)).all(-1).any()
    data = wav(Piece([Note(0, 4, 69)], tempos=[(0, 60.0)]), 8000)
    samples = np.frombuffer(data[44:], "<i2").astype(float)
    assert data[:4] == b"RIFF" and abs(len(samples) / 8000 - 1.6) < 0.01
    spectrum = np.abs(np.fft.rfft(samples[:8000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1  # a quarter at 60 is a second, and A is 440 Hz
    write_page(tmp_path / "page.html", {"one": piece})
    assert "data:audio/wav" in (tmp_path / "page.html").read_text(encoding="utf-8")
