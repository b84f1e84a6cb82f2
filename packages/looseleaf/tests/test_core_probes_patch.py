"""Activation patching, and captures that go to disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from looseleaf import capture, patch
from looseleaf.probes.hooks import CaptureLimitError
from looseleaf.testing.models import tiny_llama

IDS = torch.arange(12).view(2, 6)


def test_patching_everything_gives_the_other_run() -> None:
    model = tiny_llama()
    other = IDS.flip(1)
    with torch.no_grad():
        with capture(model, "model.layers.1") as clean:
            wanted = model(IDS).logits
        with patch(model, clean):
            torch.testing.assert_close(model(other).logits, wanted)
        with patch(model, {"model.layers.1": clean["model.layers.1"][0][:1]}, positions=-1):
            found = model(other).logits
        torch.testing.assert_close(found[:, -1], wanted[:1, -1].expand(2, -1))
        torch.testing.assert_close(found[:, :-1], model(other).logits[:, :-1])


def test_patching_positions_of_other_lengths() -> None:
    model = tiny_llama()
    longer = torch.arange(20, 36).view(2, 8)
    with torch.no_grad():
        with capture(model, "model.layers.1") as clean:
            wanted = model(IDS).logits
        places = torch.tensor([[7, 6], [1, 0]])
        with patch(model, clean, places, source_positions=[5, 2]):
            found = model(longer).logits
    torch.testing.assert_close(found[0, [7, 6]], wanted[0, [5, 2]])
    torch.testing.assert_close(found[1, [1, 0]], wanted[1, [5, 2]])


def test_patching_several_calls_and_bad_input() -> None:
    model = tiny_llama()
    with torch.no_grad():
        with capture(model, "*.mlp") as clean:
            first, second = model(IDS).logits, model(IDS + 1).logits
        with patch(model, clean):
            model(IDS)
            model(IDS)
            with pytest.raises(ValueError, match="expected 2 calls, as in the other run, got call 3"):
                model(IDS)
        assert not torch.equal(first, second)
        for source, arguments, words in (
                ({}, {}, "source: expected a mapping"), ({"model.layers.7": torch.ones(1)}, {}, "Near names are"),
                (clean, {"source_positions": 1}, "got source_positions alone"),
                (clean, {"positions": 0.5}, "positions: expected an integer")):
            with pytest.raises(ValueError, match=words), patch(model, source, **arguments):  # type: ignore[arg-type]
                pass
        for arguments, words in (({}, "got 6 and 4: pass positions"), ({"positions": 5}, r"integers in \[-4, 3\]"),
                                 ({"positions": [1, 2], "source_positions": 1}, "as many as positions, got 1")):
            with pytest.raises(ValueError, match=words), patch(model, clean, **arguments):  # type: ignore[arg-type]
                model(IDS[:, :4])
        with pytest.raises(ValueError, match="expected the shape"), \
                patch(model, {"model.layers.1.mlp": torch.ones(3, 6, 64)}):
            model(IDS)
    assert not any(m._forward_hooks for m in model.modules())


def test_captures_spill_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        with capture(model, ["*.mlp", "model.layers.0"]) as whole:
            for step in range(5):
                model(IDS + step)
        one = whole["model.layers.0"][0]
        for limit in (10, one.numel() * 2 * 4):  # below one tensor; four tensors
            with capture(model, ["*.mlp", "model.layers.0"], lambda x: x.transpose(0, 1), max_bytes=limit,
                         spill=True) as seen:
                for step in range(5):
                    model(IDS + step)
                assert list(seen) == list(whole) and len(list(tmp_path.glob("*/*.safetensors"))) >= 3
                for name in whole:
                    assert len(seen[name]) == 5
                    assert all(torch.equal(a.transpose(0, 1), b) and b.dtype == torch.bfloat16
                               for a, b in zip(seen[name], whole[name], strict=True))
                    assert len(seen[name][1:3]) == 2 and torch.equal(seen[name][-1].transpose(0, 1), whole[name][-1])
            assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="inside its with-block"):
        seen["model.layers.0"][0]


def test_spilling_leaves_nothing_after_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), capture(model, "*.mlp", max_bytes=10, spill=True):
        model(IDS)
        assert list(tmp_path.iterdir())
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()) and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(CaptureLimitError, match="or pass spill=True"), capture(model, "*.mlp", max_bytes=10):
        model(IDS)


def test_spilling_to_a_folder_of_ones_own(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad(), capture(model, "*.mlp", max_bytes=10, spill=tmp_path) as seen:
        model(IDS)
    assert len(list(tmp_path.glob("capture-*.safetensors"))) == 2
    assert seen["model.layers.0.mlp"][0].shape == (2, 6, 64)
    with pytest.raises(ValueError, match="holds an earlier capture"), capture(model, "*.mlp", spill=tmp_path):
        pass
    with pytest.raises(ValueError, match="a folder that exists"), capture(model, "*.mlp", spill=tmp_path / "no"):
        pass
