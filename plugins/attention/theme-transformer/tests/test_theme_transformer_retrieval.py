"""Retrieval on planted themes, distances and clusters; rows and batches for training."""

import numpy as np
import pytest
import torch

from looseleaf_theme_transformer import (
    Note,
    Piece,
    ThemeCollator,
    ThemeRetriever,
    ThemeTokenizer,
    ThemeTransformer,
    ThemeTransformerConfig,
    paper_optimizer,
    training_rows,
)
from looseleaf_theme_transformer.retrieval import (
    clusters,
    edit_distance,
    edit_distances,
    largest,
    lengthened,
    merged,
    nt_xent,
    pairwise_f1,
    scale_of,
    segments,
    self_similarity_distances,
    shifted,
    split,
    varied,
)

C_MAJOR = [0, 2, 4, 5, 7, 9, 11]


def phrase(rng: np.random.Generator) -> list[Note]:
    pitches = 60 + rng.choice(C_MAJOR, 10) + 12 * rng.integers(0, 2, 10)
    starts = np.sort(rng.choice(np.arange(1, 16), 9, replace=False)) * 2
    starts = [0, *starts.tolist()]
    return [Note(s, e - s, int(p)) for s, e, p in zip(starts, [*starts[1:], 32], pitches)]


def planted(seed: int, total: int = 10, themes: int = 4) -> tuple[Piece, list[int]]:
    """A piece of two-bar segments of which some are variations of one theme."""
    rng = np.random.default_rng(seed)
    theme = phrase(rng)
    truth = sorted(rng.choice(total, themes, replace=False).tolist())
    notes = []
    for n in range(total):
        part = phrase(rng)
        if n in truth:
            part = shifted(theme, int(rng.integers(-3, 4)), C_MAJOR)
            part = split(part, rng, C_MAJOR) if rng.random() < 0.5 else part
        notes += [note._replace(start=note.start + 32 * n) for note in part]
    return Piece(notes, name=f"planted {seed}"), truth


@pytest.fixture(scope="module")
def retriever() -> ThemeRetriever:
    retriever = ThemeRetriever(size=32)
    losses = retriever.fit([planted(100 + n)[0] for n in range(24)], steps=60, batch=48, lr=5e-3, seed=1)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    return retriever


def test_planted_themes_are_found(retriever: ThemeRetriever) -> None:
    scores = [pairwise_f1(retriever.find(piece), truth) for piece, truth in map(planted, range(20))]
    shuffled = [pairwise_f1(np.random.default_rng(n).choice(10, 4, replace=False).tolist(), planted(n)[1])
                for n in range(20)]
    assert np.mean(scores) > 0.8 > 0.5 > np.mean(shuffled)


def test_annotate_save_and_load(retriever: ThemeRetriever, tmp_path) -> None:
    piece, _ = planted(0)
    found = retriever.find(piece)
    regions = retriever.annotate(piece).themes
    assert regions == [(2 * n, 2 * n + 2) for n in found]
    retriever.save(tmp_path / "r.safetensors")
    assert ThemeRetriever.load(tmp_path / "r.safetensors").find(piece) == found
    up = retriever.embed(segments(piece.transposed(5)))
    torch.testing.assert_close(up, retriever.embed(segments(piece)))


def test_bad_retrieval(retriever: ThemeRetriever) -> None:
    with pytest.raises(ValueError, match="expected a trained encoder, got a new one"):
        ThemeRetriever().find(planted(0)[0])
    with pytest.raises(ValueError, match="lone, bars 1 to 1: expected a theme that returns, got no cluster"):
        retriever.annotate(Piece([Note(0, 4, 60)], name="lone"))
    with pytest.raises(ValueError, match="empty: expected notes, got none"):
        retriever.annotate(Piece([], name="empty"))
    with pytest.raises(ValueError, match="pieces: expected two segments of three notes or more, got 0 in 1"):
        ThemeRetriever().fit([Piece([Note(0, 4, 60)])])
    with pytest.raises(ValueError, match="eps: expected a number > 0, got 0"):
        ThemeRetriever(eps=0)


def test_variations() -> None:
    rng = np.random.default_rng(0)
    notes = phrase(rng)
    up = shifted(notes, 2, C_MAJOR)
    assert all(b.pitch % 12 in C_MAJOR and 3 <= b.pitch - a.pitch <= 4 for a, b in zip(notes, up))
    assert shifted(up, -2, C_MAJOR) == notes
    assert shifted([Note(0, 1, 61)], 1, C_MAJOR)[0].pitch == 63  # a sharp stays one
    assert [n.duration for n in lengthened(notes, rng)[:-1]] == [n.duration for n in notes[:-1]]
    assert len(split(notes, rng)) == len(notes) + 1 and len(merged(notes, rng)) == len(notes) - 1
    for change in (split, merged):
        out = change(notes, rng)
        assert sum(n.duration for n in out) == 32 and [n.start for n in out] == sorted(n.start for n in out)
    assert scale_of([Note(0, 4, 60 + c) for c in C_MAJOR]) == C_MAJOR
    assert all(n.duration >= 1 for _ in range(50) for n in varied(notes, C_MAJOR, rng))


def test_distances() -> None:
    a = [Note(0, 2, 60), Note(2, 2, 62), Note(4, 4, 64)]
    assert edit_distance(a, [n._replace(pitch=n.pitch + 5) for n in a]) == 0
    assert edit_distance(a, a[:2]) == pytest.approx(1 / 3)
    assert edit_distance(a, [*a[:2], a[2]._replace(duration=8)]) == pytest.approx(0.5 / 3)
    assert edit_distance(a, []) == 1 and edit_distance([], []) == 0
    parts = [a, [n._replace(pitch=n.pitch - 2) for n in a], [Note(0, 8, 50)]]
    for distances in (edit_distances(parts), self_similarity_distances(parts)):
        assert distances.shape == (3, 3) and np.allclose(distances, distances.T)
        assert distances[0, 1] < 1e-9 < 0.2 < distances[0, 2]


def test_noise_is_no_cluster() -> None:
    far = 1 - np.eye(4)
    assert largest(clusters(far, 0.5)) == []
    far[0, 2] = far[2, 0] = far[1, 3] = far[3, 1] = 0.1
    assert largest(clusters(far, 0.5)) == [0, 2]  # of equal ones the first
    assert largest([-1, -1, -1, 1, 1]) == [3, 4]
    assert pairwise_f1([0, 2, 5], [0, 2]) == pytest.approx(0.5) and pairwise_f1([], []) == 0


def test_nt_xent() -> None:
    x, y = torch.eye(4), torch.eye(4)
    scores = torch.tensor([10.0] + [0.0] * 6)
    torch.testing.assert_close(nt_xent(x, y), torch.logsumexp(scores, 0) - 10)


PIECE = Piece([Note(4 * n, 4, 60 + n % 7) for n in range(40)], themes=[(0, 2), (6, 8)], name="a")


def test_training_rows() -> None:
    words = ThemeTokenizer.fit([PIECE])
    ids, theme = words.encode(PIECE), words.theme(PIECE)
    labels = words.labels(torch.tensor(ids)).tolist()
    every = training_rows([PIECE], words, length=17)
    starts = [n for n in range(0, len(ids) - 1, 16)]
    kept = [n for n in starts if {words.id("Theme_Start"), words.id("Theme_End")} & set(ids[n:n + 17])]
    assert [row["input_ids"] for row in every] == [ids[n:n + 17] for n in kept] and len(kept) < len(starts)
    assert [row["theme_labels"] for row in every] == [labels[n:n + 17] for n in kept]
    assert all(row["theme_ids"] == theme for row in every)
    today = training_rows([PIECE], words, starts="theme")
    assert [row["input_ids"][0] for row in today] == [words.id("Theme_Start")] * 2
    assert training_rows([PIECE], words, length=999, prompt=True)[0]["input_ids"] == theme + ids
    with pytest.raises(ValueError, match="a, bars 1 to 10: expected theme regions, got none"):
        training_rows([Piece(PIECE.notes, name="a")], words)


def test_batches_are_transposed_together_within_range() -> None:
    words = ThemeTokenizer.fit([PIECE])
    rows = training_rows([PIECE], words, length=33)
    seen = set()
    collate = ThemeCollator(words, seed=1)
    for _ in range(40):
        batch = collate(rows)
        pitches = words.pitches()
        for n, row in enumerate(rows):
            ids, theme = batch["input_ids"][n], batch["theme_ids"][n]
            moves = {int(a - b) for new, old in ((ids, row["input_ids"]), (theme, row["theme_ids"]))
                     for a, b in zip(pitches[new], pitches[torch.tensor(old)]) if b}
            assert len(moves) == 1
            seen |= moves
        assert torch.equal(batch["labels"] == -100, batch["input_ids"] == 0)
    assert min(seen) < -30 and max(seen) > 30
    held = ThemeCollator(words, transpose=0, skip=("Note-Duration",))(rows)
    assert words.token(int(held["input_ids"][0, 5])).kind == "Note-Duration" and held["labels"][0, 5] == -100


def test_a_small_model_learns_a_piece() -> None:
    words = ThemeTokenizer.fit([PIECE])
    torch.manual_seed(0)
    model = ThemeTransformer(ThemeTransformerConfig(words.to_dict(), hidden_size=32, num_attention_heads=2,
                                                    intermediate_size=64, encoder_layers=1, decoder_layers=2))
    rows, collate = training_rows([PIECE], words, length=65), ThemeCollator(words, transpose=2)
    optimizer, schedule = paper_optimizer(model.parameters(), 60, lr=5e-3, warmup=5)
    losses = []
    for _ in range(60):
        loss = model(**collate(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5, rel=1e-3)
