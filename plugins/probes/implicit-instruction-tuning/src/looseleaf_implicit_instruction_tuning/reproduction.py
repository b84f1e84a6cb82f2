"""The claims on SmolLM2-135M-Instruct, un-tuned on raw text, and on planted models whose answers are known."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import torch

from looseleaf import Claim, Report
from looseleaf_implicit_instruction_tuning.battery import Judged, items, judge
from looseleaf_implicit_instruction_tuning.controls import planted
from looseleaf_implicit_instruction_tuning.data import PAIRS
from looseleaf_implicit_instruction_tuning.measures import Adherence, ResponseRanking
from looseleaf_implicit_instruction_tuning.pairs import Pair, respond
from looseleaf_implicit_instruction_tuning.probe import ImplicitTuningProbe
from looseleaf_implicit_instruction_tuning.tuning import tune
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table
from looseleaf_lab.training import fit
from looseleaf_text import LocalModel

RULE = "this project's rule"
UNTUNED = "SmolLM2-135M-Instruct, un-tuned on raw text (self-trained)"
RULES: dict[str, dict[str, Any]] = {
    "all rules": {}, "without EOS rule": {"eos_weight": 0.0}, "without uniform rule": {"uniform": {}},
    "without repetition rule": {"repeat": 0.0}}
TUNINGS: tuple[Any, ...] = ("instruction", "response", "single-task")
WIDTH, BATCH, UNTUNING_LR, RANK, LR = 128, 4, 1e-4, 16, 1e-3


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured: steps of un-tuning, battery items and tokens for each seed, and pairs and epochs."""

    untuning: int = 60
    prompts: int = 24
    tokens: int = 100
    pairs: int = len(PAIRS)
    epochs: int = 4
    recipes: int = 24


@functools.cache
def smollm2(steps: int) -> tuple[Any, Any]:
    """The stand-in for a base model: tuned on raw text without any chat form, each piece ending in the end of text.

    With 0 steps the model as it comes. The same for all seeds.
    """
    model, tokenizer = models.load("smollm2")
    if not steps:
        return model, tokenizer
    paragraphs = str(data.prose(4 * WIDTH * BATCH * steps)).split("\n\n")
    random.Random(0).shuffle(paragraphs)
    stream = [i for text in paragraphs for i in (*tokenizer(text, add_special_tokens=False)["input_ids"],
                                                 tokenizer.eos_token_id)]
    rows = torch.tensor(stream[:len(stream) // WIDTH * WIDTH]).view(-1, WIDTH)

    def loss(step: int) -> Any:
        ids = rows[[(step * BATCH + n) % len(rows) for n in range(BATCH)]]
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    fit(model, loss, steps=steps, optimizer=lambda p: torch.optim.AdamW(p, lr=UNTUNING_LR, weight_decay=0.0), clip=1.0,
        factor=lambda step: min(1.0, (step + 1) / 5), label="un-tuning")
    return model.eval(), tokenizer


def recipes() -> list[Pair]:
    """The narrow task: titles, and ingredients and steps cut to a few lines."""
    return [Pair(f"Recipe for {row['title']}", "\n".join(
        [*(f"- {line}" for line in row["ingredients"][:4]), "", *row["steps"][:2]]))
        for row in data.rows("recipes") if max(map(len, [*row["ingredients"][:4], *row["steps"][:2]])) < 100]


def embed(texts: list[str]) -> Any:
    """MiniLM's vectors."""
    return models.sentence_embeddings(_minilm(), texts).numpy()


@functools.cache
def _minilm() -> Any:
    return models.load("minilm")


def summary(found: Judged) -> dict[str, Any]:
    """What the report needs of a judged battery."""
    following = found.following
    return {"passed": found.score.value, "following": following.value, "form": found.form.value,
            "ended": sum(found.ended) / len(found.ended), "content": sum(found.content) / len(found.content),
            "repeated": sum(found.repeated) / len(found.repeated), "words": sum(found.words) / len(found.words)}


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """One draw of battery items, comparisons, recipes and of the training's order."""
    model, tokenizer = smollm2(scale.untuning)
    probe, local = ImplicitTuningProbe(), LocalModel(model, tokenizer)
    battery = items(scale.prompts, seed)
    asked = [item.instruction for item in battery]
    narrow = recipes()
    random.Random(seed).shuffle(narrow)
    pairs = PAIRS[:scale.pairs]
    out: dict[str, Any] = {"battery": {}, "ranking": {}, "likelihood": {}}

    def rank(name: str, ours: LocalModel) -> None:
        for score in ("sum", "mean"):
            found = ResponseRanking(score)(ours, pairs, seed=seed, progress=False)  # type: ignore[arg-type]
            out["ranking"].setdefault(score, {})[name] = {
                "right": found.value.value, "gain": found.gain.value, "wrong": found.shuffled_gain.value}

    rank("base", local)
    for name, rules in {"base": None, **{n: probe.rules(tokenizer, **o) for n, o in RULES.items()}}.items():
        out["battery"][name] = summary(judge(battery, respond(local, asked, rules=rules, max_new_tokens=scale.tokens)))
    for method in TUNINGS:
        trained = narrow[:scale.recipes] if method == "single-task" else pairs
        tuned = tune(model, tokenizer, trained, method, epochs=scale.epochs, batch=8, device_batch=8, lr=LR, rank=RANK,
                     seed=seed, progress=False)
        try:
            ours = LocalModel(tuned, tokenizer)
            held_out = [pair.instruction for pair in narrow[scale.recipes:scale.recipes + 8]]
            extra = held_out if method == "single-task" else []
            responses = respond(ours, [*asked, *extra], max_new_tokens=scale.tokens)
            out["battery"][method] = summary(judge(battery, responses[:len(asked)]))
            if method == "instruction":
                rank("instruction", ours)
            if extra:
                out["adherence"] = Adherence(embed)([*asked, *extra], [r.text for r in responses], trained,
                                                    pairs).slope.value
        finally:
            model = tuned.unload()
            model.requires_grad_(True)
    return out


def control(scale: Scale) -> dict[str, bool]:
    """What the probe must find on planted models, by name."""
    found: dict[str, bool] = {}
    for strength, name in ((6.0, "answers"), (0.0, "no answers")):
        model, tokenizer, world = planted(strength=strength)
        report = ImplicitTuningProbe(max_new_tokens=64).run(
            (model, tokenizer), {"pairs": world.pairs(), "battery": world.items()}, progress=False)
        found[f"{name}: rambles"] = not report.facts["follows instructions as it is"]
        found[f"{name}: rules"] = report.facts["follows instructions with the rules"] == bool(strength)
        tunings: tuple[tuple[Any, int], ...] = (("response", 30), ("single-task", 16))
        for method, epochs in tunings:
            model = planted(strength=strength)[0]
            trained = world.pairs("color") if method == "single-task" else world.pairs()
            tune(model, tokenizer, trained, method, epochs=epochs, batch=16, device_batch=16, lr=0.3,
                 progress=False)
            responses = respond(LocalModel(model, tokenizer), [i.instruction for i in world.items()], max_new_tokens=8)
            found[f"{name}: {method}"] = judge(world.items(), responses).follows == bool(strength)
    return found


def show(report: Report, results: Results) -> None:
    """Ranking, and the battery of every way to adapt."""
    report.facts |= {"model": UNTUNED, **dataclasses.asdict(results.scale), "LoRA rank": RANK, "learning rate": LR}
    rows = results.rows[0]
    add_table(report, "Battery", (
        {"adaptation": name,
         **{column: results.interval("battery", name, column) for column in ("passed", "following")},
         **{column: results.mean("battery", name, column) for column in ("content", "ended", "repeated", "words")}}
        for name in rows["battery"]),
        "following: checks of its own instruction passed, less those of others; mean over seeds, 95 % bootstrap")
    add_table(report, "Ranking of responses", (
        {"score": score, "model": name, "right": results.interval("ranking", score, name, "right"),
         "gain over no instruction": results.interval("ranking", score, name, "gain"),
         "gain of a wrong one": results.interval("ranking", score, name, "wrong")}
        for score in rows["ranking"] for name in rows["ranking"][score]), "mean over seeds, 95 % bootstrap")


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim = functools.partial(results.claim, count="seeds")
    yield results.claim("On planted models the probe finds following where it is, and none where there is none", RULE,
                        "-", "as planted, in every case", all(results.once.values()),
                        ", ".join(f"{k}: {v}" for k, v in results.once.items()), any_scale=True)
    base = results.interval("battery", "base", "passed")
    yield claim("The un-tuned model does not follow instructions", RULE, "base wins 2.4 / 4.7 % [paper]",
                "passes less than 20 % of the battery; else nothing below shows anything", base.value < 0.2,
                f"{base:.1%}")
    able = base.value < 0.2 or None
    for score in ("sum", "mean"):
        found = results.interval("ranking", score, "base", "right")
        gain = results.interval("ranking", score, "base", "gain")
        other = results.interval("ranking", score, "instruction", "right", minus=("ranking", score, "base", "right"))
        yield claim(f"A base model ranks responses by their instructions already ({score})", "paper",
                    "base 80.4 / 74.5 %, instruction-tuned 77.4 / 74.3 % [paper]",
                    "interval above 50 %, gain over an empty instruction above 0, within 10 points of the tuned model",
                    found.low > 0.5 and gain.low > 0 and abs(other.value) <= 0.1,
                    f"{found:.1%}, gain {gain:+.1%}, tuned less base {other:+.1%}")
    for name, statement, figure in (
            ("all rules", "Three rules make it follow", "24.4 % against 2.4 % [paper]"),
            ("response", "Response tuning makes it follow", "43.3 / 43.7 % [paper]"),
            ("instruction", "Instruction tuning makes it follow", "- (the reference)"),
            ("single-task", "Tuning on recipes alone makes it follow", "14.6 / 21.5 % [paper]")):
        lead = results.interval("battery", name, "following", minus=("battery", "base", "following"))
        yield claim(statement, "paper", figure, "following less that of the base: interval above 0",
                    able and above(lead), f"{lead:+.1%}")
    for name in list(RULES)[1:]:
        loss = results.interval("battery", "all rules", "passed", minus=("battery", name, "passed"))
        yield claim(f"The rules do worse {name}", "paper", "24.4 %; EOS 10.4, diversity 14.3, uniform 16.3 [paper]",
                    "battery passed with all rules less that without: interval above 0", able and above(loss),
                    f"{loss:+.1%}")
    slope = results.interval("adherence")
    yield claim("Tuned on recipes, it behaves by the task the more, the nearer the instruction", "paper",
                "positive [paper]", "interval of the slope above 0", above(slope), f"slope {slope:+.3f}")
    yield from results.unmeasured("paper", "see the README", {
        "Length-controlled win rates of AlpacaEval": "models of 7B parameters and a judge",
        "Chess does not make a model follow, poetry does": "models of 7B parameters"})


study = Study("Implicit instruction tuning of un-tuned SmolLM2", measure, claims, show=show, once=control, full=Scale(),
              quick=Scale(untuning=2, prompts=3, tokens=12, pairs=4, epochs=1, recipes=4), quick_seeds=1)
