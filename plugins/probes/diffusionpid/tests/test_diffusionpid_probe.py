"""The probe on denoisers whose information is known: texts, terms, maps, reports and bad input."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from looseleaf import Report
from looseleaf_diffusionpid import DiffusionPID, Explanation, Mixture, known_case

LOG2 = math.log(2)
ROW = [(known_case("xor").means[0], "a b", "a", "b")]


def texts(prompt: str, y1: str, y2: str, **options: Any) -> list[str]:
    return DiffusionPID(**{"conditional": True, **options}).texts(prompt, y1, y2)[0]


def test_words_leave_the_prompt() -> None:
    assert texts("A red dog, left of a cat.", "red", "cat") == ["A dog, left of a.", "A red dog, left of a.",
                                                                "A dog, left of a cat.", "A red dog, left of a cat."]
    assert texts("Red and red again", "red", "again")[0] == "and"  # every place, whatever the case
    assert texts("a big red apple", "big red", "apple") == ["a", "a big red", "a apple", "a big red apple"]
    assert texts("cart of cars, car", "car", "cart") == ["of cars", "of cars, car", "cart of cars", "cart of cars, car"]
    assert texts("", "nurse", "woman", conditional=False) == ["", "nurse", "woman", "nurse woman"]
    assert texts("", "nurse", "woman", conditional=False, single="a {}", both="a {}, a {}") == [
        "", "a nurse", "a woman", "a nurse, a woman"]


def test_the_same_word_twice() -> None:
    assert texts("dog and dog", "dog", "dog") == ["and", "dog and", "and dog", "dog and dog"]
    plugin = DiffusionPID(steps=5)
    found = plugin.run(Mixture(torch.randn(2, 1, 2, 2), 1.0, {"": [0.5, 0.5], "a": [1, 0], "a a": [1, 0]}),
                       [(torch.zeros(1, 2, 2), "a", "a", "a")])
    values = {row[3]: row[4] for row in found.tables[0].rows}
    assert values["U1"] == values["U2"] == values["S"] == 0 and values["R"] == values["I1"] > 0
    assert found.tables[1].rows[0][-1] == "both words are 'a': their unique information is 0"
    once, notes = DiffusionPID(conditional=True).texts("a dog", "dog", "dog")
    assert once == ["a", "a dog", "a dog", "a dog"] and "unique information is 0" in notes[0]


@pytest.mark.parametrize(("case", "part"), [("xor", "S"), ("copy", "R"), ("unique", "U1")])
def test_known_cases(case: str, part: str) -> None:
    """Averaged over pictures, in multiples of log 2; and the whole of a picture is the sum of its pixels."""
    denoiser, plugin = known_case(case), DiffusionPID(steps=400, clip=6, batch=4000)
    rows = [(x.float(), "a b", "a", "b") for x in denoiser.sample("a b", 24, torch.Generator().manual_seed(0))]
    report = plugin.run(denoiser, rows)
    for name in ("R", "U1", "U2", "S"):
        values = [row[4] for row in report.tables[0].rows if row[3] == name]
        assert np.mean(values) == pytest.approx(LOG2 * (name == part), abs=0.12), name
    assert all(row[4] == pytest.approx(row[8]) for row in report.tables[0].rows)  # one pixel
    assert Report.from_dict(report.to_dict()).to_json() == report.to_json()


def test_maps_and_pictures() -> None:
    """Two words that each change one half of a picture."""
    means = -torch.ones(4, 3, 4, 8)
    means[1::2, :, :, :4], means[2:, :, :, 4:] = 1, 1
    denoiser = Mixture(means, 0.3, {"": [0.25] * 4, "left": [0, 0.5, 0, 0.5], "right": [0, 0, 0.5, 0.5],
                                    "left right": [0, 0, 0, 1]})
    plugin = DiffusionPID(steps=60, loc=-4.0)
    found = plugin.explain(denoiser, means[3], "", "left", "right")
    assert found.maps["U1"][:, :4].min() > 100 * found.maps["U1"][:, 4:].max()
    assert found.maps["U2"][:, 4:].min() > 100 * found.maps["U2"][:, :4].max()
    assert found.maps["R"].max() < 0.01 * found.maps["U1"].max()  # by pixel nothing is shared ...
    assert found.terms["orthogonal"]["R"][0] > 0.5  # ... and the sums' minimum says otherwise
    torch.testing.assert_close(found.maps["I12"], found.maps["R"] + found.maps["U1"] + found.maps["U2"]
                               + found.maps["S"])
    pictures = found.overlays(("U1", "U2"))
    assert pictures[0].shape == (80, 160, 3) and pictures[0].min() >= 0 and pictures[0].max() <= 1
    red = pictures[0][..., 0] - pictures[0][..., 2]
    assert red[:, 20].min() > 0.5 and abs(red[:, 140]).max() < 0.05
    report = plugin.run(denoiser, [(means[3], "", "left", "right")] * 3)
    assert len(report.images) == 3 and len(report.images[0].pngs) == 5
    assert len(DiffusionPID(steps=5, shown=1).run(denoiser, [(means[3], "", "left", "right")] * 3).images) == 1
    assert report.tables[0].rows[0][4:] != report.tables[0].rows[7][4:]  # each has its own noise
    faint = dataclasses.replace(found, maps={"U1": found.maps["U1"], "R": 0.1 * found.maps["U1"]})
    own, shared = (faint.overlays(("U1", "R"), shared_scale=shared) for shared in (False, True))
    np.testing.assert_allclose(own[0], own[1])
    np.testing.assert_allclose(own[0], shared[0])
    assert shared[1].min() > 0.5 > own[1].min()


def test_long_runs_go_on(tmp_path: Path) -> None:
    """What is finished is read, not measured again; another run's is not taken."""
    denoiser, plugin = known_case("copy"), DiffusionPID(steps=20, batch=32)
    data = [*ROW, (ROW[0][0], "b a", "b", "a b")]
    denoiser.conditions["b a b"] = denoiser.conditions["a b"]
    expected = plugin.run(denoiser, data).to_json()
    eps, calls = denoiser.eps, 0

    def failing(z: Any, log_snr: Any, condition: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return eps(z, log_snr, condition)

    denoiser.eps = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        plugin.run(denoiser, data, state_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    assert plugin.run(denoiser, data, state_dir=tmp_path).to_json() == expected and calls == 4 + 3
    assert plugin.run(denoiser, data, state_dir=tmp_path).to_json() == expected and calls == 7
    for other in (lambda: plugin.run(denoiser, data, seed=1, state_dir=tmp_path),
                  lambda: plugin.run(denoiser, data[::-1], state_dir=tmp_path),
                  lambda: DiffusionPID(steps=21).run(denoiser, data, state_dir=tmp_path)):
        with pytest.raises(ValueError, match=r"0\.safetensors: expected an explanation of this run, got one of"):
            other()
    found = plugin.explain(denoiser, *ROW[0])
    found.save(tmp_path / "one.safetensors")
    again = Explanation.load(tmp_path / "one.safetensors")
    assert again.terms == found.terms and again.words == found.words and list(again.maps) == list(found.maps)
    assert torch.equal(again.observation.weights, found.observation.weights)


def test_estimators_and_redundancies(monkeypatch: pytest.MonkeyPatch) -> None:
    one = DiffusionPID(steps=30, estimator="standard").explain(known_case("and"), *ROW[0])
    assert one.maps["I12"].sum().item() == pytest.approx(one.terms["standard"]["I12"][0])
    priors = {"a": 0.5, "b": 0.5}
    two = DiffusionPID(steps=30, redundancy="pointwise", priors=priors).explain(known_case("unique"), *ROW[0])
    assert two.terms["orthogonal"]["R"][0] == pytest.approx(two.terms["orthogonal"]["I1"][0])  # the larger
    assert two.maps["R"].sum().item() == pytest.approx(two.terms["orthogonal"]["R"][0])
    with pytest.raises(ValueError, match=r"priors: expected a frequency of 'b' in \(0, 1\], got None"):
        DiffusionPID(redundancy="pointwise", priors={"a": 0.5}).run(known_case("xor"), ROW)
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wordfreq, or give priors="):
        DiffusionPID(redundancy="pointwise").run(known_case("xor"), ROW)


def test_noises_of_a_level() -> None:
    found = DiffusionPID(steps=20, noises=5).explain(known_case("xor"), *ROW[0])
    assert len(found.observation.log_snr) == 100 and len(found.observation.log_snr.unique()) == 20
    assert found.observation.contributions("standard").shape == (4, 20)


def test_bad_input() -> None:
    plugin, denoiser = DiffusionPID(steps=2, conditional=True), known_case("xor")
    picture = ROW[0][0]
    for prompt, y1, message in (("a cat", "dog", r"expected words of the prompt 'a cat', got 'dog': conditional=False"),
                                ("a cat", "at", "got 'at'"), ("a cat", " ", "y1: expected a word, got ' '")):
        with pytest.raises(ValueError, match=message):
            plugin.run(denoiser, [(picture, prompt, y1, "a")])
    with pytest.raises(ValueError, match="expected words that do not overlap, got 'red apple' and 'apple'"):
        plugin.run(denoiser, [(picture, "a red apple", "red apple", "apple")])
    for data, got in (([], "list of 0"), ("a", "str of 0"), (3, "int of 0"), ([(picture, "a", "b")],
                      r"a row of \['Tensor', 'str', 'str'\]"), ([("a b")], "a row of 'a b'")):
        with pytest.raises(ValueError, match=rf"expected rows \(picture or None, prompt, y1, y2\), got {got}"):
            plugin.run(denoiser, data)
    with pytest.raises(ValueError, match="picture: expected one, as Mixture draws none, got None"):
        DiffusionPID(steps=2).run(denoiser)
    with pytest.raises(TypeError, match=r"expected a text-to-image pipeline of diffusers .* got Linear"):
        plugin.run(torch.nn.Linear(2, 2), ROW)
    with pytest.raises(ValueError, match=r"single: expected a text with one {}, got 'a'"):
        DiffusionPID(single="a")
    with pytest.raises(ValueError, match=r"both: expected a text with two {}"):
        DiffusionPID(both="{}")
    with pytest.raises(ValueError, match=r"priors: expected frequencies in \(0, 1\]"):
        DiffusionPID(priors={"a": 2.0})
