"""The paper's measurements on SmolLM2-135M, on a stratified sample of freshly made problems, and the controls."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from looseleaf import Claim, Report
from looseleaf.statistics import bootstrap
from looseleaf_abstract_reasoning import DATASETS, AbstractReasoningProbe, Item, draw_remapping, problems, render, suite
from looseleaf_abstract_reasoning.items import REMAPPINGS, Problem, text_of
from looseleaf_abstract_reasoning.probe import control_rows
from looseleaf_abstract_reasoning.scores import Score, of_category, pairs, write_report
from looseleaf_lab import models
from looseleaf_lab.study import Results, Study, above
from looseleaf_text import LocalModel

SUITE_DIGEST = "f93b0b6e37487a81803b16e210fa0511521d98b0b1bfe8e7369b5aa3d33d8cda"
"""Of the full suite of seed 0, whatever the machine and the version of Python."""
SECONDS_LIMIT = 10.0
smollm2 = functools.cache(functools.partial(models.load, "smollm2"))


@dataclasses.dataclass(frozen=True)
class Scale:
    """The probe that each seed runs, and problems of each sub-dataset for the controls (None: the full suite)."""

    probe: AbstractReasoningProbe
    controls: int | None = None


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """``scores`` of SmolLM2 on the problems of one seed."""
    # problems of different seeds are different, though their names are not
    items = [dataclasses.replace(item, problem=f"{item.problem} of seed {seed}") for item in scale.probe.items(seed)]
    return {"scores": [dataclasses.asdict(score) for score in scale.probe.score(LocalModel(*smollm2()), items, False)]}


def scores_of(rows: Iterable[dict[str, Any]]) -> list[Score]:
    """The scores in what :func:`measure` gave."""
    return [Score(**{**score, "item": Item(**{**score["item"], "choices": tuple(score["item"]["choices"])})})
            for row in rows for score in row["scores"]]


def exact(scale: Scale) -> dict[str, Any]:
    """What is not random: both controls on every problem in every remapping, and faults of the full suite."""
    start = time.perf_counter()
    items = list(suite(0))
    seconds = time.perf_counter() - start
    code = "from looseleaf_abstract_reasoning.reproduction import *; print(digest(suite(0)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "1234"}).stdout.strip()
    by_dataset = [problems(name) for name in DATASETS]
    originals = [problem for some in by_dataset for problem in some]
    questions = {(problem.dataset, problem.rule, text_of(problem.question)) for problem in originals}
    remapped = [(problem, kind) for problem in originals for kind in problem.remappings]
    return {"controls": both_controls([problem for some in by_dataset for problem in some[:scale.controls]]),
            "items": len(items), "datasets": len({(item.dataset, item.kind) for item in items}), "seconds": seconds,
            "digests": [digest(items), other, SUITE_DIGEST], "remappings": len(remapped),
            "duplicates": len(items) - len({item.prompt for item in items}) + len(originals) - len(questions),
            "faults": sum(not sound(problem, kind) for problem, kind in remapped)}


def both_controls(originals: Sequence[Problem]) -> list[list[Any]]:
    """Control, scoring, remapping, problems, Gamma, Delta and what it must be."""
    items = [render(problem, kind) for problem in originals for kind in ("original", *problem.remappings)]
    rows = [[name, scoring, *rest] for scoring in ("likelihood", "match") for name, *rest in control_rows(
        AbstractReasoningProbe(scoring=scoring).controls(items, originals))]  # type: ignore[arg-type]
    return sorted(rows, key=lambda row: str(row[0]))


def digest(items: Iterable[Item]) -> str:
    """SHA-256 of everything in ``items``."""
    return hashlib.sha256("".join(repr(dataclasses.astuple(item)) for item in items).encode()).hexdigest()


def sound(problem: Problem, kind: str) -> bool:
    """Whether a remapping is one to one and nothing that it is to replace is left."""
    new = draw_remapping(problem, kind)
    before = set(problem.symbols("operand", "operator", "words"))
    after = set("".join([text_of(new.question(question)) for question in problem.questions]
                        + [new.operand(answer) for answer in problem.answers]))
    images = set(new.operands.values())
    replaced = problem.symbols("operand") if kind != "operators" else []
    return sorted(new.operands) == replaced and len(images) == len(replaced) and not images & before and \
        (kind != "both" or not (after - {" "}) & before)


def show(report: Report, results: Results) -> None:
    """What the probe reports, of all seeds, and the controls."""
    probe = results.scale.probe
    report.facts |= {
        "model": "SmolLM2-135M-Instruct, float32", "prompts": len(results.joined("scores")),
        "sample": f"{probe.per_category} problems of each category and seed, spread evenly over its sub-datasets",
        **probe.hyperparameters(), "categories": ", ".join(probe.categories)}
    write_report(report, scores_of(results.rows))
    report.table("Controls", ["control", "scoring", "remapping", "problems", "Gamma", "Delta", "must be"],
                 results.once["controls"], note="the first only remembers, the second only reasons")


OWN, NONE = "this project's rule", "not in the paper"
RELEASED = "gpt-4o-mini in the results released with the authors' code"
ABOVE = "the 95 % interval lies above 0: holds; at or below 0: does not hold; across 0: not shown"


def claims(results: Results) -> Iterator[Claim]:
    """The controls, the suite and the paper; what is not random is decided by the quick run too."""
    once, scores, claim = results.once, scores_of(results.rows), results.claim
    exactly = functools.partial(results.claim, any_scale=True)
    for name, must in (("memoriser", 1), ("oracle", 0)):
        rows = [row for row in once["controls"] if row[0] == name]
        right = all(gamma == 1.0 and delta == wanted for *_, gamma, delta, wanted in rows)
        yield exactly(f"Control: the {name} has Gamma 1 and Delta {must}", OWN, NONE,
                      "exact for every category, remapping and way of scoring", right,
                      f"exactly so on {sum(row[3] for row in rows)} remapped items, by likelihood and by match" if right
                      else "not so; see the table")
    yield exactly("The full suite is made in seconds", f"section 4; {OWN}",
                  "9,095 items in 82 sub-datasets: 96 each, and 1,319 word problems",
                  f"these numbers, in less than {SECONDS_LIMIT:.0f} s",
                  [once["items"], once["datasets"]] == [9095, 82] and once["seconds"] < SECONDS_LIMIT,
                  f"{once['items']} items in {once['datasets']} sub-datasets in {once['seconds']:.1f} s")
    yield exactly("The same seed gives the same suite on any machine", OWN, NONE, "all three equal",
                  len(set(once["digests"])) == 1, "SHA-256 {:.12} here, {:.12} in a process with another hash seed, "
                  "{:.12} on record".format(*once["digests"]))
    yield exactly("No item is there twice; remappings are bijections that leave no symbol behind", OWN, NONE,
                  "no duplicate prompt or question, no fault", not once["duplicates"] and not once["faults"],
                  f"{once['duplicates']} duplicates among {once['items']} items; {once['faults']} faults in "
                  f"{once['remappings']} remappings")
    basic, extended = ({kind: -np.diff(pairs(scores, kind, category))[:, 0] for kind in REMAPPINGS}
                       for category in ("basic-computation", "extended-calculation"))  # losses of accuracy
    each, mean = ({kind: f"{bootstrap(loss):+.3f}" for kind, loss in losses.items()} for losses in (basic, extended))
    seeds = len(results.seeds)
    both = bootstrap(basic["both"])
    yield claim("SmolLM2-135M depends on the symbols of basic computation: Delta above 0", OWN,
                "Delta of the paper is of extended calculation alone", f"{ABOVE} (both remapped)",
                above(both, touching=False), f"both remapped: {both:+.3f}; operators {each['operators']}, operands "
                f"{each['operands']}; {len(basic['both'])} problems, {seeds} seeds")
    together = bootstrap(np.concatenate([*extended.values()]))
    yield claim("Symbolic reasoning falls behind the same tasks in original symbols", "abstract, results",
                f"Delta 0.114 operators, 0.310 operands, 0.351 both: {RELEASED}", f"{ABOVE} (all three together)",
                above(together, touching=False), f"all three remappings {together:+.3f}; operators "
                f"{mean['operators']}, operands {mean['operands']}, both {mean['both']}; {len(extended['both'])} "
                f"problems, {seeds} seeds")
    more = bootstrap(extended["operands"] - extended["operators"])
    yield claim("Operands are memorised more than operators", "abstract",
                f"Delta 0.310 of operands against 0.114 of operators: {RELEASED}", ABOVE, above(more, touching=False),
                f"Delta of operands less Delta of operators {more:+.3f}; extended calculation, {len(extended['both'])} "
                f"problems, {seeds} seeds")
    decimal, other = (np.array([np.mean([score.correct - score.chance for score in of_category(scores_of([row]), name)])
                                for row in results.rows]) for name in ("basic-computation", "number-base"))
    gap = bootstrap(decimal - other)
    yield claim("Arithmetic in other bases is harder than decimal arithmetic", "abstract",
                f"Gamma 0.059 against 0.544: {RELEASED}", f"{ABOVE}; at least 3 seeds",
                above(gap, touching=False) if seeds >= 3 else None, f"Gamma above chance {np.mean(decimal):+.3f} "
                f"decimal, {np.mean(other):+.3f} other bases; difference {gap:+.3f} over {seeds} seeds")
    yield from results.unmeasured("abstract", "figures not copied here", {
        "The gaps persist with chain-of-thought prompts": "a model that reasons in steps",
        "Models of 7B to 70B, commercial ones and several agents together depend on symbols too":
            "models of 7B and more"})


study = Study("Abstract reasoning of SmolLM2-135M-Instruct", measure, claims, show, once=exact,
              full=Scale(AbstractReasoningProbe(per_category=14)),
              quick=Scale(AbstractReasoningProbe(per_category=8), controls=4), quick_seeds=1)
