"""Prompts on disk, the common part of searches, and what the kit for prompt optimisers finds."""

from __future__ import annotations

import dataclasses
import json
import random
import string
import subprocess
import sys
import types
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from looseleaf import Budget, BudgetExhausted, Example, Paper, Predictor, Prompt, PromptOptimizer, Task
from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
from looseleaf.plugin import In
from looseleaf.prompts.optimizer import Search
from looseleaf.prompts.prompt import storable
from looseleaf.resume import StateError
from looseleaf.testing import check, checks, conformance_tests
from looseleaf.testing.common import run
from looseleaf.testing.prompts import PictureClassifier, picture_task

PAPER = Paper(title="A made-up paper", authors=("A B",), year=2026, summary="Made up.")


# -- prompts on disk ----------------------------------------------------------------------------------------------

@storable
@dataclasses.dataclass(frozen=True)
class Box:
    label: str
    corners: tuple[float, ...]


@dataclasses.dataclass
class Anything(Prompt):
    """Holds whatever a prompt may hold."""

    value: Any = None

    def on(self, model: Any) -> Predictor:
        return Predictor()


def saved(prompt: Prompt, folder: Path) -> Any:
    prompt.save(folder / "prompt.json")
    return Prompt.load(folder / "prompt.json")


@pytest.mark.parametrize("value", [
    None, True, 0, -1.5, "a \u2028 {text} \U0001f600", [], (), {}, [1, [2, (3, "x")]], {"a": {"$b": 1}},
    {"$type": "float"}, {1: "a", (2, 3): "b"}, float("inf"), Box("car", (0.0, 1.5)), [Box("a", ()), Box("b", (1.0,))],
    Example({"text": "x", "n": 3}, "good"), [Example({"a": 1}, (1, 2))], Anything(Anything(3), info={"fitness": 1.0})],
    ids=str)
def test_plain_values_come_back(value: Any, tmp_path: Path) -> None:
    prompt = Anything(value, info={"fitness": 0.25, "tried": [[1, "a"]]})
    again = saved(prompt, tmp_path)
    assert again == prompt and type(again.value) is type(value) and repr(again) == repr(prompt)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.json"]


@pytest.mark.parametrize("value", [
    torch.arange(6.0).reshape(2, 3).T, torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 3), torch.tensor(True),
    np.arange(6).reshape(2, 3), np.float32(1.5), [torch.ones(2), torch.zeros(2)], {"gate.weight": torch.ones(1, 2)},
    Example({"picture": torch.ones(3, 2, 2)}, torch.tensor(1)), Anything((Anything(torch.ones(2)),)),
    nn.Parameter(torch.ones(2))], ids=str)
def test_numbers_go_beside_the_json(value: Any, tmp_path: Path) -> None:
    prompt = Anything(value)
    again = saved(prompt, tmp_path)
    if not isinstance(value, (np.generic, nn.Parameter)):  # these come back as an array and as a tensor
        assert again.fingerprint() == prompt.fingerprint()
    if isinstance(value, Tensor):
        assert torch.equal(again.value, value) and again.value.dtype == value.dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompt.json", "prompt.safetensors"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "I;16"])
def test_pictures_come_back_to_the_last_bit(mode: str, tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image = image.quantize(4) if mode == "P" else Image.new(mode, (3, 2), 7) if mode == "I;16" else image.convert(mode)
    again = saved(Anything(Example({"picture": image}, "a")), tmp_path).value.inputs["picture"]
    assert again.mode == image.mode and again.size == image.size and again.tobytes() == image.tobytes()


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Open:
        pass

    for value, place in ((print, "prompt.value"), ([1, {"a": Open()}], r"prompt.value.1.a"),
                         (np.array([object()]), "prompt.value"), (Path("a"), "prompt.value")):
        with pytest.raises(ValueError, match=rf"{place}: expected text, numbers, tensors"):
            Anything(value).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"expected a path such as prompt\.json"):
        Anything().save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_prompt(tmp_path: Path) -> None:
    Anything(torch.ones(2)).save(tmp_path / "p.json")
    sound = (tmp_path / "p.json").read_text()
    for text, message in (("{", "expected a prompt as JSON"), ("[]", "got 'list'"),
                          ('{"schema": "else"}', "got 'else'"),
                          ('{"schema": "looseleaf.prompt/1"}', "got 'looseleaf.prompt/1': search again"),
                          (sound.replace('"value"', '"other"'), "expected the fields .*got .*other"),
                          (sound.replace("test_core_prompts:Anything", "test_core_prompts:Nothing"),
                           "expected a prompt of an installed Looseleaf package")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Prompt.load(tmp_path / "bad.json")
    Anything(torch.zeros(2)).save(tmp_path / "other.json")
    (tmp_path / "other.safetensors").replace(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="expected the tensors that were saved with it"):
        Prompt.load(tmp_path / "p.json")
    (tmp_path / "p.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match=r"p\.safetensors"):
        Prompt.load(tmp_path / "p.json")


def test_a_prompt_of_another_class_is_refused(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Other(Anything):
        """One class below."""

    Anything(1).save(tmp_path / "p.json")
    assert Anything.load(tmp_path / "p.json").value == 1
    with pytest.raises(ValueError, match="expected a Other, got a Anything"):
        Other.load(tmp_path / "p.json")


def test_no_module_is_imported_that_is_no_looseleaf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    Anything(1).save(tmp_path / "p.json")
    for name in ("evil:Prompt", "os:system", "looseleaf.tasks:Task", "builtins:dict", "looseleaf.no:Where"):
        data = json.loads((tmp_path / "p.json").read_text())
        data["prompt"]["$type"] = name
        (tmp_path / "p.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"expected a prompt of an installed Looseleaf package|cannot be imported"):
            Prompt.load(tmp_path / "p.json")


def test_a_plugin_is_imported_when_its_prompt_is_loaded(distribution: Any, tmp_path: Path) -> None:
    distribution("looseleaf-borders", "borders", """
        import dataclasses
        from looseleaf import Prompt

        @dataclasses.dataclass
        class Border(Prompt):
            width: int = 1

            def on(self, model):
                return None

        class Method:
            pass
        """, kind="prompts")
    write = "import looseleaf_borders, sys; looseleaf_borders.Border(3).save(sys.argv[1])"
    read = "import looseleaf, sys; print(looseleaf.Prompt.load(sys.argv[1]))"
    path = str(tmp_path / "p.json")
    subprocess.run([sys.executable, "-c", write, path], check=True)
    done = subprocess.run([sys.executable, "-c", read, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Border(info={}, width=3)"


def test_a_former_file_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Anything(1).save(tmp_path / "p.json")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        Anything(2).save(tmp_path / "p.json")
    assert Prompt.load(tmp_path / "p.json").value == 1  # type: ignore[attr-defined]


def test_the_fingerprint_leaves_the_metadata_out() -> None:
    assert Anything(1, info={"a": 1}).fingerprint() == Anything(1).fingerprint() != Anything(2).fingerprint()
    assert len({Anything(torch.ones(2)).fingerprint(), Anything(torch.zeros(2)).fingerprint(),
                Anything(Anything(1)).fingerprint(), Anything(Anything(2)).fingerprint()}) == 4


# -- searches -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Shade(Prompt):
    """A number added to every pixel."""

    value: float
    classes: tuple[str, ...]

    def on(self, model: nn.Module) -> Predictor:
        return Shaded(self, model)


class Shaded(Predictor):
    def __init__(self, prompt: Shade, model: nn.Module) -> None:
        self.prompt, self.model, self.classes = prompt, model, prompt.classes

    def scores(self, examples: Any) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            return self.model(torch.stack([e.inputs["picture"] for e in examples]) + self.prompt.value)


@dataclasses.dataclass
class Shades(PromptOptimizer):
    """Tries random shades, and does everything right.

    Args:
        trials: how many.
    """

    trials: Annotated[int, In(">= 1")] = 12
    paper: ClassVar[Paper] = PAPER
    accepts: ClassVar[type] = nn.Module

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Prompt:
        search = Search(self, task, model, **options)
        task.validate()
        scores = search.state.setdefault("scores", [])
        with search:
            for n in search.steps(self.trials):
                scores.append(self.score(task, self.shade(task, search.seed, n), search.model))
        best = max(range(len(scores)), key=scores.__getitem__, default=0)
        found = self.shade(task, search.seed, best)
        found.info = search.info(scores[best] if scores else 0.0, len(scores))
        return found

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        rows = task.evaluate(prompt.on(model), "dev").class_scores or []
        return sum(row[list(task.classes or ()).index(e.target)] for row, e in zip(rows, task.dev, strict=True))

    def shade(self, task: Task, seed: int, n: int) -> Shade:
        return Shade(random.Random(f"{seed} {n}").uniform(-2, 2), tuple(task.classes or ()))


test_a_good_optimiser_passes = conformance_tests(Shades)


def test_a_search_ends_where_its_budget_does_and_goes_on(tmp_path: Path) -> None:
    task, model = picture_task(), PictureClassifier()
    first = Shades().optimize(task, model, budget=Budget(calls=40), state_dir=tmp_path, progress=False)
    assert first.info["stopped"] == "budget: calls" and first.info["evaluations"] == 3
    with pytest.raises(StateError, match="seed was 0, is 1"):
        Shades().optimize(task, model, state_dir=tmp_path, seed=1)
    with torch.no_grad():
        model.last.bias += 1
    with pytest.raises(StateError, match="weights was"):
        Shades().optimize(task, model, state_dir=tmp_path)
    budget = Budget()
    more = Shades().optimize(task, PictureClassifier(), budget=budget, state_dir=tmp_path, progress=False)
    assert more.info["evaluations"] == 12 and budget.used["calls"] == 12 * 12
    assert more == Shades().optimize(task, PictureClassifier(), progress=False)


def test_starts_are_part_of_a_search(tmp_path: Path) -> None:
    task, model = picture_task(), PictureClassifier()
    Shades().optimize(task, model, state_dir=tmp_path, progress=False)
    for start in (Shade(0.0, ("left", "right")), Shade(1.0, ("left", "right"))):
        with pytest.raises(StateError, match="start was None, is"):
            Shades().optimize(task, model, start=start, state_dir=tmp_path, progress=False)


def test_a_search_does_not_hide_errors() -> None:
    search = Search(Shades(), picture_task(), PictureClassifier(), progress=False)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), search:
            raise error
    with search:
        raise BudgetExhausted("budget: tokens (1 of 1 used, 1 more requested)")
    assert search.info(1, 2, more="x") == {"fitness": 1.0, "evaluations": 2, "stopped": "budget: tokens", "more": "x"}


def test_models_that_are_not_accepted() -> None:
    with pytest.raises(UnsupportedModelError, match="Shades: expected a Module to find a prompt for, got str"):
        Shades().optimize(picture_task(), "gpt")  # type: ignore[arg-type]


def test_identity_leaves_the_budget_out() -> None:
    found = Shades().identity(picture_task(), PictureClassifier(), None, 3)
    assert found["seed"] == 3 and found["parameters"] == {"trials": 12} and found["model"] == "PictureClassifier"
    assert found == Shades().identity(picture_task(), Budget().meter(PictureClassifier()), None, 3)


# -- the kit ------------------------------------------------------------------------------------------------------

def outcome(cls: type, name: str, **given: Any) -> str:
    """What comes out of one check."""
    found = run([next(c for c in checks(cls, **given) if c.name == name)])[0]
    return found.problem or found.skipped or "passes"


class IgnoresTheTask(Shades):
    """A search whose marks have nothing to do with the task."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        model(torch.zeros(1, 8, 8))
        return prompt.value


class IgnoresTheModel(Shades):
    """A search that asks nobody."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        return sum(e.target == "left" for e in task.train) * prompt.value + hash(task.train[0]) % 7


class Unmetered(Shades):
    """A search that gets at the model behind the metered one."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        return super().score(task, prompt, model.__wrapped__)  # type: ignore[arg-type]


class SeedsGlobally(Shades):
    """A search that sets the seeds of everybody."""

    def shade(self, task: Task, seed: int, n: int) -> Shade:
        torch.manual_seed(seed)
        return super().shade(task, seed, n)


class DrawsGlobally(Shades):
    """A search with random numbers from nowhere."""

    def shade(self, task: Task, seed: int, n: int) -> Shade:
        return Shade(random.uniform(-1, 1), tuple(task.classes or ()))


class FlipsModes(Shades):
    """A search that puts the whole model back to train mode."""

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Prompt:
        training = any(m.training for m in model.modules())
        found = super().optimize(task, model, **options)
        return [found, model.train(training)][0]  # type: ignore[return-value]


class LeavesGradients(Shades):
    """A search that leaves gradients in the model."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        score = super().score(task, prompt, model)
        with evaluating(model):
            model(torch.zeros(1, 8, 8)).sum().backward()
        return score


class ReadsTheTest(Shades):
    """A search that looks at the test."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        return super().score(dataclasses.replace(task, dev=[*task.dev, *task.test]), prompt, model)


class Swallows(Shades):
    """A search that nothing stops."""

    def score(self, task: Task, prompt: Shade, model: nn.Module) -> float:
        try:
            return super().score(task, prompt, model)
        except BaseException:
            return 0.0


class Forgets(Shades):
    """A search that keeps its state and does not look at it."""

    def optimize(self, task: Task, model: nn.Module, *, state_dir: Any = None, **options: Any) -> Prompt:
        if state_dir is not None:
            (Path(state_dir) / "state.json").unlink(missing_ok=True)
        return super().optimize(task, model, state_dir=state_dir, **options)


class KeepsNothing(Shades):
    """A search without a state."""

    def optimize(self, task: Task, model: nn.Module, *, state_dir: Any = None, **options: Any) -> Prompt:
        return super().optimize(task, model, **options)


class TakesAnyTask(Shades):
    """A search that validates nothing."""

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Prompt:
        return super().optimize(_Tolerant(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)}), model,
                                **options)


class _Tolerant(Task):
    def validate(self) -> None:
        pass


class SaysNothing(Shades):
    """A search without metadata."""

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Prompt:
        found = super().optimize(task, model, **options)
        found.info = {"fitness": float("nan"), "stopped": "maybe"}
        return found


@dataclasses.dataclass
class Lossy(Shade):
    """A prompt that loses a field on its way to disk."""

    value: float = dataclasses.field(init=False, default=0.0)
    classes: tuple[str, ...] = ("left", "right")


class LosesFields(Shades):
    """A search whose prompt cannot be saved."""

    def optimize(self, task: Task, model: nn.Module, **options: Any) -> Prompt:
        found: Any = super().optimize(task, model, **options)
        lossy = Lossy(info=found.info)
        lossy.value = found.value
        return lossy


@pytest.mark.parametrize(("cls", "name", "problem"), [
    (IgnoresTheTask, "is at work", "the task is ignored"),
    (IgnoresTheModel, "is at work", "the model is never asked"),
    (Unmetered, "keeps budget of calls", "Budget(calls=1): 144 calls were made"),
    (SeedsGlobally, "global random state untouched", "torch was used or seeded"),
    (DrawsGlobally, "same seed same result", "the same seed gave"),
    (FlipsModes, "model left as it was", "the modes of"),
    (LeavesGradients, "model left as it was", "the gradients of"),
    (ReadsTheTest, "test examples are never read", "reads task.test"),
    (Swallows, "resumes after a kill", "swallows KeyboardInterrupt"),
    (Swallows, "resumes after a failure of the model", "they look like a result"),
    (Forgets, "resumes after a kill", "the search began from the beginning"),
    (KeepsNothing, "resumes after a kill", "no state on disk"),
    (KeepsNothing, "refuses the state of another search", "writes nothing into state_dir"),
    (TakesAnyTask, "refuses bad tasks", "a task without examples: expected ValueError, got nothing"),
    (SaysNothing, "info fields", "info['fitness'] is nan"),
    (LosesFields, "saved and loaded prompt predicts the same", "has other fields"),
])
def test_the_kit_finds_what_is_wrong(cls: Any, name: str, problem: str) -> None:
    assert problem in outcome(dataclasses.dataclass(cls), name)


def test_the_kit_needs_a_model_that_is_accepted() -> None:
    @dataclasses.dataclass
    class ForOthers(Shades):
        """For models that the core has none of."""

        accepts: ClassVar[type] = dict

    @dataclasses.dataclass
    class ForAll(Shades):
        """Does not say what it is for."""

        accepts: ClassVar[type] = object

    assert "expected task= and model=, functions that make a small task and a dict" in outcome(ForOthers, "is at work")
    assert "set the class attribute `accepts`" in outcome(ForAll, "declares the model it accepts")
    assert "got ['task']" in outcome(ForOthers, "is at work", task=picture_task)


def test_the_kit_refuses_what_is_no_optimiser() -> None:
    @dataclasses.dataclass
    class NotOne:
        """No plugin."""

    with pytest.raises(ValueError, match="expected a plugin of the kind"):
        checks(NotOne)


# -- the template of `looseleaf new` ------------------------------------------------------------------------------

def template() -> Any:
    """The class of ``looseleaf new prompts``."""
    pytest.importorskip("looseleaf_text", reason="looseleaf-text is not installed")
    source = string.Template((resources.files("looseleaf") / "templates" / "prompts.py.txt").read_text("utf-8"))
    module = types.ModuleType("made_from_the_template")
    sys.modules[module.__name__] = module  # dataclasses and type hints look names up there
    exec(compile(source.substitute(cls="Subsets"), "template", "exec"), vars(module))
    return module.Subsets


def test_the_template_passes() -> None:
    check(template())


def test_the_former_signature_is_not_taken_for_the_present_one() -> None:
    with pytest.raises(TypeError):
        template()().optimize(picture_task(), PictureClassifier(), Budget(calls=3))
