"""Helpers that exist once: modes, files, names, statistics, resuming."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from looseleaf import files, modes, names, statistics
from looseleaf.resume import SearchState, StateError
from looseleaf.testing.common import assert_unchanged, mixed_modes, snapshot
from looseleaf.testing.models import small_network


# ------------------------------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize("context", [modes.evaluating, modes.training, modes.frozen])
def test_every_submodule_and_parameter_comes_back(context: object) -> None:
    model = mixed_modes(small_network())
    before = snapshot(model)
    with context(model):  # type: ignore[operator]
        if context is modes.evaluating:
            assert not any(m.training for m in model.modules())
        elif context is modes.training:
            assert all(m.training for m in model.modules())
        else:
            assert not any(p.requires_grad for p in model.parameters())
    assert_unchanged(before, model)
    with pytest.raises(KeyboardInterrupt), context(model):  # type: ignore[operator]
        raise KeyboardInterrupt
    assert_unchanged(before, model)


def test_evaluating_leaves_other_things_alone() -> None:
    with modes.evaluating(lambda x: x):
        pass


# ------------------------------------------------------------------------------------------------------------- files
def test_tensors_and_plain_data_survive(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.safetensors"
    base = torch.arange(6.0).reshape(2, 3)
    files.save_tensors(path, {"view": base.T, "tied": base, "again": base}, {"a": [1, "b"]}, format="test/1")
    tensors, info = files.load_tensors(path, format="test/1")
    assert torch.equal(tensors["view"], base.T) and torch.equal(tensors["again"], base) and info == {"a": [1, "b"]}


def test_others_may_read_tensors_as_they_may_text(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "a")
    files.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, format="test/1")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


def test_bad_tensor_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="expected a file of the format 'test/1', got no file"):
        files.load_tensors(path, format="test/1")
    with pytest.raises(ValueError, match="expected metadata"):
        files.save_tensors(path, {}, {"a": object()}, format="test/1")
    files.save_tensors(path, {"a": torch.ones(300)}, format="other/1")
    with pytest.raises(ValueError, match="expected a file of the format 'test/1', got 'other/1'"):
        files.load_tensors(path, format="test/1")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cut short"):
        files.load_tensors(path, format="other/1")


def test_text_of_other_systems_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffone\r\ntwo\rthree\u2028four\n".encode())
    assert files.read_text(path) == "one\ntwo\nthree\u2028four\n"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="Give a text file in UTF-8"):
        files.read_text(path)


def test_written_text_keeps_its_line_ends(tmp_path: Path) -> None:
    files.write_text(tmp_path / "t.txt", "a\nb\r\n")
    assert (tmp_path / "t.txt").read_bytes() == b"a\nb\r\n"


def test_cache_dir_has_one_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOSELEAF_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOOSELEAF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "xdg" / "looseleaf"


# ------------------------------------------------------------------------------------------------------------- names
NAMES = ["model.layers.0", "model.layers.0.mlp", "model.layers.0.mlp.gate", "model.layers.1", "model.layers.1.mlp",
         "head"]


@pytest.mark.parametrize(("pattern", "found"), [
    ("layers.*", ["model.layers.0", "model.layers.1"]),
    ("model.layers.*.mlp", ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ("mlp", ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ("*.gate", ["model.layers.0.mlp.gate"]),
    ("**.gate", ["model.layers.0.mlp.gate"]),
    ("layers.0.**", ["model.layers.0.mlp", "model.layers.0.mlp.gate"]),
    ("layers.[01]", ["model.layers.0", "model.layers.1"]),
    ("layers.?.ml*", ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ("head", ["head"]),
])
def test_patterns(pattern: str, found: list[str]) -> None:
    assert names.match(NAMES, pattern) == found
    assert names.match([f"wrapper.{n}" for n in NAMES], pattern) == [f"wrapper.{n}" for n in found], \
        "a pattern means the same inside another model"


def test_an_exact_name_names_that_alone() -> None:
    assert names.match(["mlp", "layers.0.mlp"], "mlp") == ["mlp"]
    assert names.match(["layers.0.mlp"], "mlp") == ["layers.0.mlp"]


def test_unknown_patterns_get_near_names() -> None:
    with pytest.raises(ValueError, match=r"no layer matches 'layer\.\*\.mpl'. Near names are .*mlp"):
        names.match(NAMES, "layer.*.mpl", what="layer")
    for bad in ([], "", [3]):
        with pytest.raises(ValueError, match="expected a name pattern"):
            names.match(NAMES, bad)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- statistics
def test_statistics_agree_with_scipy_and_sklearn() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50).astype(float), rng.normal(size=50)
    assert statistics.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    labels = rng.integers(0, 2, 50)
    assert statistics.auroc(x[labels == 1], x[labels == 0]) == pytest.approx(sklearn_metrics.roc_auc_score(labels, x))
    done = scipy_stats.bootstrap((y,), np.mean, method="percentile", n_resamples=20000, random_state=0)
    ours = statistics.bootstrap(y, samples=20000)
    assert ours.low == pytest.approx(done.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(done.confidence_interval.high, abs=0.02)


def test_intervals() -> None:
    value = statistics.paired([2.0, 3.0], [1.0, 1.0])
    assert value.value == 1.5 and value.low == 1.0 and value.high == 2.0
    assert f"{value:+.1f}" == "+1.5 (+1.0 to +2.0)" and (-value).low == -2.0
    assert statistics.bootstrap([4.0]) == (4.0, 4.0, 4.0)
    for bad in ([], [math.nan]):
        with pytest.raises(ValueError, match="expected finite values"):
            statistics.bootstrap(bad)
    with pytest.raises(ValueError, match="expected equally many values, got 1 and 2"):
        statistics.paired([1.0], [1.0, 2.0])


def test_calibration_error() -> None:
    assert statistics.expected_calibration_error([0.95, 0.95, 0.05], [1, 1, 0]) == pytest.approx(0.05)
    assert statistics.expected_calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="confidences in"):
        statistics.expected_calibration_error([1.5], [1])


# ------------------------------------------------------------------------------------------------------------ resume
def test_search_state(tmp_path: Path) -> None:
    state = SearchState(tmp_path, {"seed": 1, "method": "m"})
    assert state.load() is None
    state.save({"tried": [1, 2]})
    assert SearchState(tmp_path, {"seed": 1, "method": "m"}).load() == {"tried": [1, 2]}
    with pytest.raises(StateError, match="seed was 1, is 2"):
        SearchState(tmp_path, {"seed": 2, "method": "m"}).load()
    text = state.path.read_text()  # type: ignore[union-attr]
    state.path.write_text(text.replace("[1, 2]", "[1, 3]"))  # type: ignore[union-attr]
    with pytest.raises(StateError, match="changed or damaged"):
        state.load()
    state.path.write_text(text[:50])  # type: ignore[union-attr]
    with pytest.raises(StateError, match="cannot be read"):
        state.load()
    SearchState(None, {}).save({"kept": "nowhere"})
