"""The reproduction runs on stand-ins of the tunes, and its measures are what they say."""

import dataclasses

import numpy as np
import pytest

from looseleaf.statistics import Interval
from looseleaf_theme_transformer import Note, Piece, ThemeRetriever, reproduction

TINY = reproduction.Scale(2, 2, 2, 2, 1, 2, 1)


def tune(seed: int) -> Piece:
    """Sixteen bars in which the first two return at bars 5, 9 and 13."""
    rng = np.random.default_rng(seed)
    parts = [rng.choice([60, 62, 64, 65, 67, 69, 71, 72], 16) for _ in range(4)]
    order = [0, 1, 0, 2, 0, 3, 0, 1]
    return Piece([Note(32 * n + 2 * i, 2, int(p)) for n, part in enumerate(order) for i, p in enumerate(parts[part])],
                 name=f"tune {seed}")


@pytest.fixture
def stand_ins(monkeypatch) -> None:
    pieces = [tune(n) for n in range(16)]
    monkeypatch.setattr(reproduction, "tunes", lambda: (pieces, list(range(16))))
    monkeypatch.setattr(ThemeRetriever, "find", lambda self, piece: [0, 4, 6])  # one that is new would find nothing


def test_it_runs_and_reports(stand_ins, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path))
    study = dataclasses.replace(reproduction.study, quick=TINY)
    report = study(quick=True, seeds=1, progress=False)
    assert len(report.claims) == 14 and {c.verdict for c in report.claims} == {"not shown at this scale"}
    assert report.images[0].captions[1:] == ["gated on it", "prompt on it"]
    assert {p.name for p in (tmp_path / "theme-transformer").iterdir()} == {
        *(f"{name}.{end}" for name in ("the", "gated", "prompt") for end in ("mid", "wav")), "listen.html"}


def test_families_are_split_whole_and_variants_are_one(monkeypatch) -> None:
    kinds = [(0, 0), (1, 0), (0, 5), (2, 0), (1, 2)]
    rows = [{"meter": "C|", "title": "", "notes": [[note.start / 4, 0.5, note.pitch + up] for note in tune(n).notes]}
            for n, up in kinds]
    monkeypatch.setattr(reproduction.data, "rows", lambda name: rows)
    reproduction.tunes.cache_clear()
    pieces, families = reproduction.tunes()
    reproduction.tunes.cache_clear()
    assert [p.bars for p in pieces] == [16] * 5
    assert families[0] == families[2] != families[1] == families[4] and len(set(families)) == 3


def test_rank_of_a_planted_theme() -> None:
    themes = [tune(n).excerpt(0, 2) for n in range(6)]
    again = themes[3].transposed(4).notes
    assert reproduction.rank([again], themes, 3) == 1.0 and reproduction.rank([again], themes, 2) < 0.8
    assert reproduction.rank([], themes, 3) == 0.5
    piece = dataclasses.replace(tune(1), themes=[(0, 2), (8, 10), (12, 14)])
    late = reproduction.late_regions(piece)
    assert len(late) == 2 and reproduction.rank(late, themes, 1) == 1.0
    assert reproduction.rank(reproduction.late_segments(piece), themes, 1, True) == 1.0


def test_statistics_of_a_known_piece() -> None:
    piece = Piece([Note(16 * bar + 4 * beat, 4, 60 + beat) for bar in range(4) for beat in range(4)],
                  themes=[(0, 1), (2, 3)])
    found = reproduction.statistics(piece)
    assert found == {"regions": 2, "spacing": 2.0, "pitch-class entropy": pytest.approx(2.0), "groove similarity": 1.0}


def test_pooled_differences_are_paired() -> None:
    rows = [{"a": [1.0, 2.0], "b": [0.5, 1.5]}, {"a": [3.0], "b": [2.5]}]
    results = reproduction.Results(rows, {}, [0, 1], None, False)
    assert reproduction.pooled(results, "a", minus=("b",)) == Interval(0.5, 0.5, 0.5)
