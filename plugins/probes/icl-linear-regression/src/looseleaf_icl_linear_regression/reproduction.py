"""The paper's claims, measured on layers that are trained here from random weights, d = 5 and L = 40."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch

from looseleaf import Claim, Report, Series
from looseleaf.statistics import bootstrap
from looseleaf_icl_linear_regression import regression as reg
from looseleaf_icl_linear_regression.probe import show_heads
from looseleaf_icl_linear_regression.regression import Regression, Sequences
from looseleaf_icl_linear_regression.signature import LIMITS, head_signature, preconditioner, task_specialisation
from looseleaf_icl_linear_regression.training import Trained, risk, train
from looseleaf_lab.study import Results, Study, add_table, curve

TASK, ANISOTROPIC = Regression(), Regression(rho=0.5)
LENGTHS = (TASK.L, 2 * TASK.L, 4 * TASK.L)
SUPPORTS = {"overlapping": ((0, 1, 2), (1, 2, 3, 4)), "disjoint": ((0, 1), (2, 3, 4))}
"""Two tasks with three and four of five covariates, as in the authors' code; and two that share none."""
SHARED = (("overlapping", 3), ("overlapping", 4), ("overlapping", 6), ("disjoint", 4))
TEST_SEED = 10 ** 6
"""Test sequences come from this seed and up, which no training uses."""
ONE, TWO, FOUR, LINEAR = "1 head", "2 heads", "4 heads", "linear attention, 2 heads"
OWN = "linear attention that divides by the length at hand"
DEBIASED, RIDGE = "debiased gradient descent", "ridge (Bayes)"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained and measured: steps of the trainings, random starts that are looked at for heads on one side
    and their steps, test sequences of each seed and length, sequences a step, and those the risk is followed on."""

    one: int = 4000
    two: int = 12000
    four: int = 10000
    linear: int = 4000
    anisotropic: int = 10000
    several: int = 10000
    many: int = 20
    many_steps: int = 4000
    test: int = 10000
    batch: int = 256
    validation: int = 4096


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """Train a layer in each setting, and read its signature and its risk on test sequences of the seed's own."""
    def trained(task: Regression, heads: int, steps: int, attention: str = "softmax") -> Trained:
        return train(task, heads, (seed,), attention=attention, steps=steps, batch=scale.batch,
                     validation=scale.validation)

    def test_risk(layer: Trained, length: int = TASK.L, own_length: bool = False) -> float:
        data = _sequences(layer.task, seed, length, scale.test)
        normaliser = None if own_length else layer.task.L
        return float(risk(layer.kq(0), layer.ov(0), layer.task, data, layer.attention, normaliser))

    layers = {ONE: trained(TASK, 1, scale.one), TWO: trained(TASK, 2, scale.two), FOUR: trained(TASK, 4, scale.four),
              LINEAR: trained(TASK, 2, scale.linear, "linear")}
    longer = {name: [test_risk(layers[name], length) for length in LENGTHS] for name in (TWO, FOUR, LINEAR)}
    longer[OWN] = [test_risk(layers[LINEAR], length, own_length=True) for length in LENGTHS]
    row: dict[str, Any] = {
        "layer": {name: _read(layer) for name, layer in layers.items()}, "longer": longer,
        "risk": {**{name: test_risk(layer) for name, layer in layers.items()}, **_closed_forms(TASK, seed, scale.test)}}
    whitened = trained(ANISOTROPIC, 4, scale.anisotropic)
    row["anisotropic"] = {**_read(whitened), **vars(preconditioner(whitened.kq(0), whitened.ov(0), ANISOTROPIC)),
                          "risk": {FOUR: test_risk(whitened), **_closed_forms(ANISOTROPIC, seed, scale.test)}}
    row["tasks"] = {}
    for label, heads in SHARED:
        layer = trained(dataclasses.replace(TASK, supports=SUPPORTS[label]), heads, scale.several)
        row["tasks"][f"{label}, {heads}"] = {
            **_read(layer), **vars(task_specialisation(layer.kq(0), layer.ov(0), TASK.d)), "risk": test_risk(layer)}
    return row


def once(scale: Scale) -> dict[str, Any]:
    """Of many short trainings, the starts whose heads end on one side; and how the factor over ridge grows with d."""
    def on_one_side(heads: int) -> list[int]:
        layers = train(TASK, heads, range(scale.many), steps=scale.many_steps, batch=min(64, scale.batch),
                       validation=min(1024, scale.validation))
        return [seed for seed, opposite in enumerate(layers.opposite()) if not opposite]

    wide = {d: Regression(d, 8 * d, TASK.sigma2) for d in (5, 10, 20, 40)}
    return {"one side": {heads: on_one_side(heads) for heads in (2, 4)},
            "over ridge": {d: reg.gd_risk(task) / _closed_forms(task, 0, scale.test)[RIDGE]
                           for d, task in wide.items()}}


def _sequences(task: Regression, seed: int, length: int, count: int) -> Sequences:
    return task.sample(count, torch.Generator().manual_seed(TEST_SEED + seed), length=length)


def _closed_forms(task: Regression, seed: int, count: int) -> dict[str, float]:
    """Risks of the predictors without training on the test sequences of a seed, for one task."""
    data = Sequences(*(part.double() for part in _sequences(task, seed, task.L, count)))
    x, y, query, target = data.context[..., :-1], data.context[..., -1], data.query[..., :-1], data.target[:, 0]
    if task.rho:
        once_ = reg.debiased_gd(x, y, query, 1.0)
        step = float((once_ * target).sum() / once_.square().sum())
        predictions = {f"{DEBIASED}, preconditioned": reg.debiased_gd(
            x, y, query @ reg.optimal_preconditioner(task), 1.0), f"{DEBIASED}, one step size": step * once_}
    else:
        predictions = {"gradient descent": reg.vanilla_gd(x, y, query, reg.optimal_step(task, debiased=False)),
                       DEBIASED: reg.debiased_gd(x, y, query, reg.optimal_step(task))}
    predictions[RIDGE] = reg.ridge(x, y, query, task.d * task.sigma2)
    return {name: float((p - target).square().mean()) + task.sigma2 for name, p in predictions.items()}


def _read(layer: Trained) -> dict[str, Any]:
    """What the report shows of a layer that was trained for one seed, as plain data."""
    signature = head_signature(layer.kq(0), layer.ov(0), layer.task.tasks)
    return {"kq": layer.kq(0), "ov": layer.ov(0), "converged": layer.converged()[0], "opposite": layer.opposite()[0],
            "scores": {name: signature.mean(name) for name in (*LIMITS, "value_row")}, "fails": signature.fails(),
            "omega": signature.omega, "mu": signature.mu, "steps": layer.steps, "risks": layer.risks[0],
            "omegas": layer.omegas[0], "mus": layer.mus[0]}


def show(report: Report, results: Results) -> None:
    """Signature and training of each layer, risks, longer contexts, anisotropic covariates, and two tasks."""
    report.facts |= {"d": TASK.d, "L": TASK.L, "sigma2": TASK.sigma2, "batch": results.scale.batch,
                     "learning rate": "0.01, Adam, cosine to zero in the last third",
                     "test sequences for each seed and length": results.scale.test}
    count, first = len(results.seeds), results.rows[0]
    layers = {name: results.values("layer", name) for name in (ONE, TWO, FOUR)}
    add_table(report, "Signature after training", (
        {"layer": name, "seed": seed, **{limit: layer["scores"][limit] for limit in LIMITS},
         "value row": layer["scores"]["value_row"], "converged": layer["converged"],
         "heads on both sides": layer["opposite"], "omega": _list(layer["omega"]), "mu": _list(layer["mu"])}
        for name, of in layers.items() for seed, layer in zip(results.seeds, of, strict=True)),
        "means over heads, weighted by |mu omega|; converged: the loss had settled at the full learning rate")
    for name, of in layers.items():
        layer, which = of[0], f"{name}, seed {results.seeds[0]}"
        show_heads(report, layer["kq"], layer["ov"], which)
        report.figure(f"Risk in training, {name}", x_label="step", y_label="squared error of y_q", series=[
            Series(f"seed {seed}", layer["steps"], each["risks"], style="line")
            for seed, each in zip(results.seeds, of, strict=True)])
        for title in ("omega", "mu"):
            report.figure(f"{title} in training, {which}", x_label="step", y_label=title, series=[
                Series(f"head {h}", layer["steps"], list(values), style="line")
                for h, values in enumerate(zip(*layer[f"{title}s"], strict=True))])
    add_table(report, "Test risk", (
        {"predictor": name, "risk": results.interval("risk", name),
         "over debiased gradient descent": fmean(_ratio(results, name, DEBIASED))} for name in first["risk"]),
        f"squared error of y_q, its noise ({TASK.sigma2:g}) included; means over {count} seeds, 95 % bootstrap; all "
        f"predictors on the same sequences. Exact for infinitely many: debiased gradient descent "
        f"{reg.gd_risk(TASK):.4f}, plain {reg.gd_risk(TASK, debiased=False):.4f}")
    longer = {"linear attention" if name == LINEAR else name:
              [results.interval("longer", name, i) for i in range(len(LENGTHS))] for name in first["longer"]}
    title = "Longer contexts than in training"
    add_table(report, title, (
        {"layer": name, **{f"L = {length}": risk.value for length, risk in zip(LENGTHS, risks, strict=True)}}
        for name, risks in longer.items()),
        f"risk, means over {count} seeds. Linear attention keeps the 1 / {TASK.L} it was trained with; the last row "
        "gives it the length, which softmax finds by itself")
    report.figure(title, x_label="points in the context", y_label="risk", x_log=True, y_log=True,
                  series=[curve(name, LENGTHS, risks) for name, risks in longer.items()])
    anisotropic = first["anisotropic"]
    add_table(report, "Anisotropic covariates, Sigma = 0.5^|i - j|", (
        {"predictor": name, "risk": results.interval("anisotropic", "risk", name)} for name in anisotropic["risk"]))
    report.figure("What the heads multiply the directions of Sigma with", x_label="variance of the direction",
                  y_label="gain", x_log=True, series=[
                      curve(FOUR, anisotropic["variances"], [results.interval("anisotropic", "gains", i)
                                                             for i in range(TASK.d)]),
                      curve("optimal preconditioner", anisotropic["variances"], anisotropic["optimal"])])
    show_heads(report, anisotropic["kq"], anisotropic["ov"], "4 heads, anisotropic")
    least = {label: sum(reg.gd_risk(Regression(len(s), TASK.L, TASK.sigma2)) for s in supports)
             for label, supports in SUPPORTS.items()}
    add_table(report, "Two tasks", (
        {"tasks": label, "heads": heads, "seed": seed, "y from y": layer["from_values"],
         "dedicated": layer["dedicated"], "shared heads": layer["shared_heads"], "risk": layer["risk"],
         "least": least[label], "converged": layer["converged"],
         "part of task 1 in each head": _list([part[0] for part in layer["part"]]),
         "weight of each head": _list(layer["weight"])} for label, heads in SHARED
        for seed, layer in zip(results.seeds, results.values("tasks", f"{label}, {heads}"), strict=True)),
        "y from y: part of OV that takes a value to itself; near 0 where the layer has y in KQ and covariates in OV. "
        "dedicated: 1 where each head serves one task, 0.5 where each serves both alike. Risk: sum of tasks; least: "
        "exact, of debiased gradient descent on each task's own covariates")
    for label, heads in SHARED:
        layer = first["tasks"][f"{label}, {heads}"]
        show_heads(report, layer["kq"], layer["ov"], f"two {label} tasks, {heads} heads")


def claims(results: Results) -> Iterator[Claim]:
    """Every claim with its verdict; the quick run measures and does not decide."""
    claim, rows, scale, count = results.claim, results.rows, results.scale, len(results.seeds)
    for name in (ONE, TWO, FOUR):
        layers = results.values("layer", name)
        wanted = [s for s in LIMITS if not (name == ONE and s == "zero_sum")]  # one head has none to cancel it
        good = [not set(wanted) & set(layer["fails"]) for layer in layers]
        settled = [layer["converged"] for layer in layers]
        yield claim(f"Training gives {name} the signature: diagonal and homogeneous KQ, last-entry-only"
                    f"{'' if name == ONE else ' and zero-sum'} OV", "abstract; section 3",
                    "from random initialisation, consistently [abstract]", "every seed converged and within: "
                    + ", ".join(f"{s} {'>' if s == 'last_entry' else '<'} {LIMITS[s]:g}" for s in wanted),
                    all(good) and all(settled), f"{sum(good)} of {count} seeds within all limits; "
                    + ", ".join(f"{s} {_interval([layer['scores'][s] for layer in layers])}" for s in wanted)
                    + f"; loss settled in {sum(settled)} of {count}")
    for heads, stuck in results.once["one side"].items():
        yield claim(f"{heads} heads always split into a positive and a negative group",
                    "abstract: the patterns consistently appear from random initialization", "consistently [abstract]",
                    f"none of {scale.many} starts ends on one side", not stuck,
                    f"{len(stuck)} of {scale.many} random starts ended with all heads on one side after "
                    f"{scale.many_steps} steps; seeds {stuck or 'none'}")
    both = [i for i, layer in enumerate(results.values("layer", TWO)) if layer["opposite"]]
    two, four = _ratio(results, TWO, DEBIASED), _ratio(results, FOUR, DEBIASED)
    for statement, values in (("Two heads come within 5% of debiased gradient descent with the optimal step", two),
                              ("So do the two heads that ended on opposite sides", [two[i] for i in both]),
                              ("Four heads come within 5% of debiased gradient descent", four)):
        yield claim(statement, "section 3; this project's rule for the distance", "closely tracks it [abstract]",
                    "mean ratio over these seeds within 0.95 to 1.05, on the same test sequences", _near(values),
                    f"risk {_interval(values)} times that of debiased gradient descent; {len(values)} seeds" if values
                    else "no such seed")
    gaps = [row["risk"][ONE] - row["risk"][TWO] for row in rows]
    same, above, wide = _ratio(results, FOUR, TWO), _ratio(results, FOUR, RIDGE), results.once["over ridge"]
    yield claim("Two heads beat one", "abstract", "outperforms single-head attention [abstract]",
                "lower end of the 95% interval of the paired difference over seeds above 0", bootstrap(gaps).low > 0,
                f"risk of one head less that of two: {_interval(gaps)}, on opposite sides "
                f"{_interval([gaps[i] for i in both])}; {count} seeds")
    yield claim("Four heads do as two do", "this project's rule; section 3",
                "more than two heads are equivalent to two [authors' notebook]",
                "mean ratio over all seeds within 0.95 to 1.05", _near(same),
                f"risk of four heads {_interval(same)} times that of two; where the two are on opposite sides "
                f"{_interval([same[i] for i in both])}; {count} seeds")
    yield claim("The layer lies above ridge, the Bayes predictor, by a bounded factor", "abstract",
                "nearly achieves Bayesian optimality up to proportional factor [abstract]",
                "above 1 in every seed at d = 5, and the factor of debiased gradient descent at L = 8 d grows at most "
                "by half from d = 5 to d = 40", min(above) > 1 and max(wide.values()) <= 1.5 * wide["5"],
                f"four heads {_interval(above)} times the risk of ridge at d = 5; debiased gradient descent over ridge "
                "at L = 8 d: " + ", ".join(f"d = {d} {r:.3f}" for d, r in wide.items()))
    rise = {name: [[row["longer"][name][i] - row["longer"][name][0] for row in rows] for i in (1, 2)]
            for name in (TWO, FOUR)}
    yield claim("Softmax attention works on contexts two and four times as long as in training", "abstract",
                "readily generalizes to sequences longer than those seen during training [abstract]",
                "upper end of the 95% interval over seeds of the paired change at most 0, at both lengths, for two and "
                "for four heads", max(bootstrap(values).high for pair in rise.values() for values in pair) <= 0,
                "change of the risk at 2 L and 4 L: " + "; ".join(
                    f"{name} {_interval(pair[0])} and {_interval(pair[1])}" for name, pair in rise.items()))
    lead, informed = ([[row["longer"][name][i] - row["longer"][FOUR][i] for row in rows] for i in (1, 2)]
                      for name in (LINEAR, OWN))
    yield claim("Linear attention does worse there", "abstract", "compared to linear transformers [abstract]",
                "lower end of the 95% interval over seeds of the paired difference above 0 at both lengths, linear "
                "attention as it was trained", min(bootstrap(values).low for values in lead) > 0,
                f"risk of linear attention less that of four softmax heads: {_interval(lead[0])} at 2 L, "
                f"{_interval(lead[1])} at 4 L. Given the length: {_interval(informed[0])} and {_interval(informed[1])}")
    best, plain = results.values("anisotropic", "to_optimal"), results.values("anisotropic", "to_identity")
    falls = [all(a > b for a, b in itertools.pairwise(gains)) for gains in results.values("anisotropic", "gains")]
    yield claim("With anisotropic covariates the heads learn a preconditioner like the inverse covariance", "abstract",
                "a form of pre-conditioned gradient descent [abstract]",
                "in every seed: cosine with the optimal preconditioner above 0.95 and above that with the identity, "
                "and gains that fall from each direction to the next of larger variance",
                all(a > 0.95 and a > b for a, b in zip(best, plain, strict=True)) and all(falls),
                f"cosine of sum_h mu_h KQ_h with the optimal preconditioner {_interval(best)}, with the identity "
                f"{_interval(plain)}; gains fall with the variance in {sum(falls)} of {count} seeds")
    for label, heads in SHARED[1:]:
        dedicated = results.values("tasks", f"{label}, {heads}", "dedicated")
        yield claim(f"With H >= 2 N heads each head serves one task ({label} covariates, N = 2, H = {heads})",
                    "section on multi-task regression",
                    "more than 2 N heads: each active head learns one task [authors' notebook]",
                    "dedicated at least 0.9 in every seed", min(dedicated) >= 0.9,
                    f"dedicated {_interval(dedicated)}, lowest {min(dedicated):.3f}; y from y "
                    f"{_interval(results.values('tasks', f'{label}, {heads}', 'from_values'))}; {count} seeds")
    shared = results.values("tasks", "overlapping, 3", "shared_heads")
    yield claim("With N < H < 2 N heads there is superposition: a head serves both tasks (N = 2, H = 3)", "abstract",
                "a superposition phenomenon [abstract]",
                "in every seed a head with a tenth of the weight or more whose larger part is below 0.9",
                min(shared) >= 1, f"heads that serve both tasks: {', '.join(map(str, shared))}; dedicated "
                f"{_interval(results.values('tasks', 'overlapping, 3', 'dedicated'))}")
    yield claim("In the limit of long contexts and many covariates the layer stays within a constant factor of the "
                "Bayes risk", "theory", "a theorem [abstract]", "none set", None,
                "only the closed-form predictors were measured above d = 5")


def _ratio(results: Results, name: str, other: str) -> list[float]:
    """Risk over another one's, for each seed."""
    return [a / b for a, b in zip(results.values("risk", name), results.values("risk", other), strict=True)]


def _near(values: Sequence[float]) -> bool | None:
    return abs(fmean(values) - 1) <= 0.05 if values else None


def _interval(values: Sequence[float]) -> str:
    return f"{bootstrap(values):.4f}" if values else "-"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


study = Study("icl-linear-regression: the paper's claims", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(48, 48, 48, 48, 48, 48, 3, 48, 200, 32, 128))
