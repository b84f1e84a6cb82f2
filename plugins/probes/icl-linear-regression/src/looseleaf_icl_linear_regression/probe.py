"""The probe: the heads of a model, of a freshly trained layer and of the construction, by the same scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from looseleaf import Claim, Paper, Probe, Report, Series
from looseleaf.plugin import In
from looseleaf.probes.subject import parts
from looseleaf_icl_linear_regression.attention import EffectiveHeads, probe_layers
from looseleaf_icl_linear_regression.regression import (
    Regression,
    debiased_gd,
    gd_risk,
    optimal_step,
    softmax_predictor,
)
from looseleaf_icl_linear_regression.signature import LIMITS, Invariants, Signature, head_signature, invariants
from looseleaf_icl_linear_regression.training import (
    CHECKS,
    Trained,
    Weights,
    initial_weights,
    opposite_heads,
    predict,
    train,
)

OMEGA = 0.1
"""Of the constructed heads: small, so that they take a step of debiased gradient descent."""
BLOCKS = 32
"""A large KQ is shown in so many blocks a side."""


@dataclasses.dataclass
class ICLRegressionProbe(Probe):
    """Which attention heads are a debiased gradient-descent estimator (arXiv 2503.12734).

    Reads the effective KQ and OV of every attention layer of a decoder, and scores them next to three layers whose
    answer is known: the construction of two opposite heads, a layer trained here on in-context linear regression, and
    random weights.

    Args:
        d: number of covariates of the regression.
        L: points in a context.
        sigma2: variance of the noise; 0.1 in the authors' code.
        H: heads of the layer that is trained. All on one side, they stay a single head (see README): that happened to 5
            of 20 starts with two heads and to 1 of 20 with four.
        steps: of its training; the authors' code takes 500,000 at a tenth of the learning rate.
        lr: learning rate of Adam; constant for two thirds of the steps, then falling to zero along a cosine.
        batch: fresh sequences for each step; 256 in the authors' code.
        layers: indices of the model's layers to read; empty for all.
    """

    d: Annotated[int, In(">= 2")] = 5
    L: Annotated[int, In(">= 2")] = 40
    sigma2: Annotated[float, In(">= 0")] = 0.1
    H: Annotated[int, In(">= 1")] = 4
    steps: Annotated[int, In(f">= {CHECKS}")] = 6000
    lr: Annotated[float, In("> 0")] = 0.01
    batch: Annotated[int, In(">= 1")] = 256
    layers: tuple[int, ...] = ()
    paper: ClassVar[Paper] = Paper(
        title="In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of "
              "Multi-Head Softmax Attention",
        authors=("Jianliang He", "Xintian Pan", "Siyu Chen", "Zhuoran Yang"), year=2025, arxiv="2503.12734",
        venue="ICML 2025", code="https://github.com/XintianPan/ICL_linear",
        summary="Watch heads become a debiased gradient-descent estimator, and test your model's heads for it.")

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """A short training."""
        return {"make": lambda: cls(steps=CHECKS, batch=8)}

    def validate(self) -> None:
        self.check("layers", isinstance(self.layers, (tuple, list)) and all(isinstance(i, int) for i in self.layers),
                   "a tuple of indices, empty for all layers")

    @property
    def task(self) -> Regression:
        """The regression that the probe's parameters describe."""
        return Regression(self.d, self.L, self.sigma2)

    def run(self, subject: Any, data: None = None, *, seed: int = 0, progress: bool | None = None) -> Report:
        """Score the heads of a model next to those of known answers.

        Args:
            subject: a transformers decoder, alone or with its tokenizer.
            data: nothing: weights are read, and the sequences of the training are drawn from ``seed``.
            seed: of the layer that is trained, and of the random weights.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            TypeError: another subject.
            ValueError: data was given, or an unknown layer.
            UnsupportedModelError: the model has no attention that can be read.
        """
        model, _ = parts(subject)
        if data is not None:
            raise ValueError("data: expected None, as this probe reads weights and draws its sequences from the seed, "
                             f"got {type(data).__name__}. Choose d, L and sigma2 instead")
        read = probe_layers(model, list(self.layers) or None, progress=progress)
        trained = train(self.task, self.H, (seed,), steps=self.steps, lr=self.lr, batch=self.batch, progress=progress)
        known = {
            "constructed: two opposite heads": opposite_heads(
                self.d, OMEGA, optimal_step(self.task) / (2 * OMEGA)),
            f"trained here: {self.H} heads": Weights(*(w[0].double() for w in trained.weights)),
            "control: random weights": Weights(*(w.double() for w in initial_weights(
                self.d, max(2, self.H), 1, torch.Generator().manual_seed(seed)))),
        }
        signatures = {name: head_signature(w.kq(), w.ov()) for name, w in known.items()}
        report = Report("Heads as in-context linear regression", {
            **{k: v for k, v in self.hyperparameters().items() if k != "layers"}, "layers read": len(read),
            "heads read": sum(len(layer.key) for layer in read),
            "positions": "rotary positions at distance zero (content part); biases left out",
            "training converged": trained.converged()[0], "heads on both sides": trained.opposite()[0],
            "risk of the trained layer": float(trained.risks[0, -1]),
            "risk of debiased gradient descent": gd_risk(self.task)})
        _coordinates(report, signatures, read)
        _without_coordinates(report, known, read, seed)
        _dynamics(report, trained, gd_risk(self.task))
        for name, weights in list(known.items())[:2]:
            show_heads(report, weights.kq().tolist(), weights.ov().tolist(), name)
        self._controls(report, known, signatures)
        return report

    def _controls(self, report: Report, known: dict[str, Weights], signatures: dict[str, Signature]) -> None:
        """The known answers; a failure here means that nothing else in the report can be trusted."""
        constructed, _, random = signatures.values()
        weights = next(iter(known.values()))
        step = optimal_step(self.task)
        data = self.task.sample(512, torch.Generator().manual_seed(0), dtype=torch.float64)
        x, y, query = data.context[..., :-1], data.context[..., -1], data.query[..., :-1]
        model = predict(weights.kq(), weights.ov(), data)[:, 0]
        closed = softmax_predictor([OMEGA, -OMEGA], [step / 2 / OMEGA, -step / 2 / OMEGA], x, y, query)
        gap = float((model - closed).abs().max())
        descent = debiased_gd(x, y, query, step)
        near = float((model - descent).norm() / descent.norm())
        wrong, missed = constructed.fails(), random.fails()
        for holds, statement, measured, rule in (
                (not wrong, "Control: constructed heads have the signature",
                 "all scores within the limits" if not wrong else f"outside: {', '.join(wrong)}", _limits()),
                (len(missed) >= 3, "Control: random weights do not", f"outside: {', '.join(missed) or 'none'}",
                 "at least three of the four scores outside the limits"),
                (gap < 1e-9, "Control: the layer built with those weights is the closed-form predictor",
                 f"largest difference {gap:.1e} over 512 sequences", "below 1e-9 in double precision"),
                (near < 0.05, "Control: two opposite heads take a step of debiased gradient descent",
                 f"relative difference {near:.2%} at omega = {OMEGA}", "below 5 %; it falls with omega^2")):
            report.claims.append(Claim.decide(holds, statement=statement, source="this project's rule", paper="-",
                                              measured=measured, rule=rule))


def _limits() -> str:
    return (f"off-diagonal below {LIMITS['off_diagonal']:g}, variation below {LIMITS['variation']:g}, last entry above "
            f"{LIMITS['last_entry']:g}, zero-sum below {LIMITS['zero_sum']:g}")


def _coordinates(report: Report, signatures: dict[str, Signature], read: list[EffectiveHeads]) -> None:
    table = report.table(
        "Signature in coordinates", ["layer", "off-diagonal", "variation", "last entry", "zero-sum"],
        note=f"with the signature: {_limits()}. Means over heads, weighted by |mu omega|. The stream of a language "
             "model has no known value coordinate: its largest entry of OV takes the place of the last one, and its "
             "coordinates are those that training happened to give")
    rows = {**signatures, **{layer.name: head_signature(layer.kq(), layer.ov(), 0) for layer in read}}
    for name, found in rows.items():
        table.add(name, *(found.mean(score) for score in LIMITS))


def _without_coordinates(report: Report, known: dict[str, Weights], read: list[EffectiveHeads], seed: int) -> None:
    rows: dict[str, Invariants] = {}
    for name, w in known.items():
        visible = torch.zeros(w.query.shape[-1], dtype=w.query.dtype)
        visible[:-1] = 1  # the query's value is 0
        rows[name] = invariants(w.key, w.query * visible, w.value, w.output, rank=w.key.shape[-1] - 1)
    generator = torch.Generator().manual_seed(seed)
    key, query, value, output = (torch.randn(m.shape, generator=generator) for m in (
        read[0].key, read[0].query, read[0].value, read[0].output))
    rows["control: random, shaped as the model's"] = invariants(key, query, value, output)
    of_model = {layer.name: invariants(layer.key, layer.query, layer.value, layer.output) for layer in read}
    table = report.table(
        "Signature without coordinates",
        ["layer", "isotropy, mean", "isotropy, largest", "rank one", "zero-sum", "opposite pair", "heads"],
        note="with the signature: isotropy +-1 (KQ a multiple of a projection), rank one 1, zero-sum 0, opposite pair "
             "1. No rotation of the stream changes these")
    for name, found in {**rows, **of_model}.items():
        table.add(name, float(found.isotropy.abs().mean()), float(found.isotropy.abs().max()),
                  float(found.rank_one.mean()), found.zero_sum, found.opposite,
                  "-" if found.pair is None else f"{found.pair[0]} and {found.pair[1]}")
    isotropy = [found.isotropy.tolist() for found in of_model.values()]
    report.figure("Isotropy of the model's heads", x_label="head", y_label="layer", image=isotropy,
                  note="1 or -1: KQ is a multiple of a projection, as in a trained regression layer")
    layer, head = max(((i, j) for i, row in enumerate(isotropy) for j in range(len(row))),
                      key=lambda at: abs(isotropy[at[0]][at[1]]))
    report.figure(f"KQ of the most isotropic head: {read[layer].name}, head {head}", x_label="query coordinate",
                  y_label="key coordinate", image=_blocks(read[layer].kq(head)),
                  note=f"isotropy {isotropy[layer][head]:.3f}; mean |entry| in blocks")


def _blocks(matrix: Tensor) -> list[list[float]]:
    size = min(BLOCKS, *matrix.shape)
    pooled = torch.nn.functional.adaptive_avg_pool2d(matrix.abs()[None], size)[0]
    return [[float(v) for v in row] for row in pooled]


def _dynamics(report: Report, trained: Trained, floor: float) -> None:
    steps = [float(s) for s in trained.steps]
    report.figure("Risk of the trained layer", x_label="step", y_label="squared error of y_q", series=[
        Series("trained", steps, trained.risks[0].tolist(), style="line"),
        Series("debiased gradient descent", [steps[0], steps[-1]], [floor, floor], style="line")])
    for title, values in (("omega", trained.omegas), ("mu", trained.mus)):
        report.figure(f"{title} of the trained heads", x_label="step", y_label=title, series=[
            Series(f"head {h}", steps, values[0, :, h].tolist(), style="line") for h in range(values.shape[2])])


def show_heads(report: Report, kq: Sequence[Any], ov: Sequence[Any], name: str) -> None:
    """Heat maps of KQ of each head (H, D, D), and of the last rows of OV, (H, N, D) one below the other, as lists."""
    for head, matrix in enumerate(kq):
        report.figure(f"KQ, head {head} ({name})", x_label="query coordinate", y_label="key coordinate", image=matrix,
                      note="the last coordinates are values")
    report.figure(f"OV, last rows of all heads ({name})", x_label="coordinate", y_label="head",
                  image=[row for rows in ov for row in rows])


__all__ = ["ICLRegressionProbe", "show_heads"]
