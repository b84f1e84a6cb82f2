"""The paper's claims: the linear world against closed forms, Meta-World's states in clutter, BabyAI's and own
pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf import Claim, Report
from looseleaf.errors import LooseleafError
from looseleaf.modes import own_random_state
from looseleaf.statistics import Interval, bootstrap
from looseleaf_inverse_dynamics.demonstrations import Demonstrations
from looseleaf_inverse_dynamics.linear import LinearWorld, double_integrator, linear_encoder, with_gains
from looseleaf_inverse_dynamics.networks import PictureEncoder, VectorEncoder
from looseleaf_inverse_dynamics.objectives import (
    Cloning,
    Contrastive,
    ForwardExplicit,
    ForwardImplicit,
    Inverse,
    Objective,
)
from looseleaf_inverse_dynamics.probe import with_states
from looseleaf_inverse_dynamics.training import action_error, pretrain, rollout, transfer
from looseleaf_inverse_dynamics.worlds import Clutter, Manipulation, PointMass, baby_ai, point_mass_demonstrations
from looseleaf_lab import data, models
from looseleaf_lab.study import Results, Study, above, add_table, curve, every

OURS = "this project's rule"
SCRATCH, STATE, IMAGENET, QUARTER, FAR = "scratch", "true state", "EfficientNet-Lite0", "ID, a quarter", "ID, n = 4"
FIVE = ("ID", "BC", "FD-e", "FD-i", "Cont")
NEW_TASKS = ("drawer-open-v3", "window-close-v3", "button-press-topdown-v3")
NEW_MISSION = "BabyAI-GoToRedBall-v0"
WORLDS = {"manipulation": "Meta-World states in clutter", "babyai": "BabyAI pictures", "points": "point mass in "
                                                                                                 "pictures"}
FEW = {"manipulation": (2, 10), "babyai": (5, 20), "points": (1, 2)}
"""Demonstrations of a new task in each world."""
SCALES, NOISES, SIDES = (0.3, 0.7, 1.5, 3.0), (0.01, 0.1, 1.0), (0.5, 0.6, 1.0)
LINEAR: dict[str, Objective] = {"ID": Inverse(hidden=()), "BC": Cloning(hidden=()), "FD-e": ForwardExplicit(hidden=())}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        trajectories, linear_steps: of the corpus in the linear world, and of its pre-trainings.
        steps, picture_steps: of pre-trainings on vectors and on pictures.
        policy_steps, picture_policy_steps: of transfers on either.
        rollouts: of each policy.
        points: trajectories of the point mass.
        imagenet: whether ImageNet's features are measured.
    """

    trajectories: int = 1000
    linear_steps: int = 700
    steps: int = 1500
    picture_steps: int = 500
    policy_steps: int = 500
    picture_policy_steps: int = 300
    rollouts: int = 20
    points: int = 300
    imagenet: bool = True


# ------------------------------------------------------------------------------------------------------ linear world
def few_shot(encode: Callable[[Demonstrations], Tensor], new: LinearWorld, count: int, seed: int) -> float:
    """Error of the mean action on a new context, over its variance, by ridge regression on a few trajectories; the
    penalty is the best for the test, which favours features of many numbers."""
    few, test = new.sample(count, seed), new.sample(200, seed + 1)
    inputs, target = encode(test)[test.pairs(0)], states(test)[test.pairs(0)] @ new.gains[0].T
    x, actions = encode(few)[few.pairs(0)], few.actions[few.pairs(0)].double()
    scatter = x.T @ x
    penalties = scatter.trace() / len(scatter) * 10.0 ** torch.arange(-6, 4)
    fits = [torch.linalg.solve(scatter + p * torch.eye(len(scatter)), x.T @ actions) for p in penalties]
    return min(float((inputs @ f - target).square().sum() / target.square().sum()) for f in fits)


def regressed(world: LinearWorld, trajectories: int, seed: int) -> float:
    """R^2 of the state in the two directions that a regression of the action on both observations uses most."""
    corpus = world.sample(trajectories, seed)
    rows = corpus.pairs(1)
    both = torch.cat([corpus.observations[rows], corpus.observations[rows + 1]], 1).double()
    now, later = torch.linalg.lstsq(both, corpus.actions[rows].double()).solution.T.chunk(2, 1)
    return world.moments(1).state_r2(torch.linalg.svd(torch.cat([now, later]), full_matrices=False)[2][:2])


def states(demonstrations: Demonstrations) -> Tensor:
    """The true states in double precision."""
    assert demonstrations.states is not None
    return demonstrations.states.double()


def linear(seed: int, scale: Scale) -> dict[str, Any]:
    """Trained linear encoders and their closed forms, errors on a new context, and the sweeps."""
    def trained(world: LinearWorld, name: str, n: int = 1) -> dict[str, float]:
        objective = dataclasses.replace(LINEAR[name], n=n) if name != "BC" else LINEAR[name]
        corpus = dataclasses.replace(world.sample(scale.trajectories, seed), states=None)
        encoder = pretrain(corpus, objective, linear_encoder(world, seed=seed), steps=scale.linear_steps, lr=4e-2,
                           seed=seed, progress=False).encoder
        weight, moments = next(encoder.parameters()).detach().double(), world.moments(n)
        best, nothing = moments.best(name, 2), moments.reached(name, torch.zeros(1, weight.shape[1]))
        gain = nothing - best.loss
        found = {"r2": moments.state_r2(weight), "closed": best.state_r2,
                 "gain": (nothing - moments.reached(name, weight)) / gain if gain > 1e-6 else 1.0}
        if world.d == world.B.shape[1]:
            def features(demonstrations: Demonstrations) -> Tensor:
                return demonstrations.observations.double() @ weight.T

            found |= {str(count): few_shot(features, new(world), count, seed) for count in (2, 5, 10)}
        return found

    def new(world: LinearWorld) -> LinearWorld:
        gain = torch.randn(1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(10_000 + seed))
        return with_gains(world, 0.5 * gain / torch.linalg.matrix_norm(gain, 2) - 0.3 * torch.eye(2))

    world = LinearWorld()
    out: dict[str, Any] = {"trained": {name: trained(world, name) for name in LINEAR}}
    baselines: dict[str, Callable[[Demonstrations], Tensor]] = {"raw": lambda d: d.observations.double(), STATE: states}
    for name, baseline in baselines.items():
        out["trained"][name] = {str(count): few_shot(baseline, new(world), count, seed) for count in (2, 5, 10)}
    out["nuisance"] = {str(s): {name: trained(dataclasses.replace(world, nuisance_scale=s), name) for name in LINEAR}
                       for s in SCALES}
    weak = dataclasses.replace(with_gains(world, 0.1 * world.gains), exploration=0.05)
    out["noise"] = {str(w): {"ID": {"r2": regressed(dataclasses.replace(weak, process=w), scale.trajectories, seed),
                                    "closed": dataclasses.replace(weak, process=w).moments(1).best("ID", 2).state_r2}}
                    for w in NOISES}
    out["sides"] = {str(p): {name: trained(with_gains(world, world.gains, (p, 1 - p)), name) for name in ("ID", "BC")}
                    for p in SIDES}
    out["apart"] = {str(n): {"ID": trained(double_integrator(length=n), "ID", n)} for n in (1, 2, 3)}
    return out


# ------------------------------------------------------------------------------------------------------ other worlds
def contest(corpus: Demonstrations, new: Demonstrations, envs: Mapping[str, Any] | None, encoder: nn.Module,
            objectives: Mapping[str, Objective], scale: Scale, seed: int, *, steps: int,
            policy_steps: int, counts: Sequence[int], batch: int = 128, lr: float = 4e-3, crop: int = 0,
            others: Mapping[str, nn.Module] | None = None) -> dict[str, Any]:
    """Each pre-training, and each baseline, on the same few demonstrations: error and success, means over new tasks."""
    out: dict[str, Any] = {"trajectories": len(corpus)}
    encoders: dict[str, tuple[nn.Module, bool]] = {SCRATCH: (encoder, True)}
    for name, objective in objectives.items():
        part = corpus.take(range(seed % 4, len(corpus), 4)) if name == QUARTER else corpus
        result = pretrain(part.at_least(objective.n + 1), objective, encoder, steps=steps, batch=batch, lr=lr,
                          seed=seed, progress=False)
        encoders[name] = (result.encoder, False)
        out.setdefault("r2", {})[name] = 1 - fmean(result.state_losses[-50:]) if result.state_losses else None
    encoders |= {name: (other, False) for name, other in (others or {}).items()}
    if new.states is not None:
        encoders[STATE] = (nn.Identity(), False)
    for name, (net, tune) in encoders.items():
        for count in counts:
            errors, successes = [], []
            for label in sorted(set(new.contexts)):
                drawn = [i for i, context in enumerate(new.contexts) if context == label]
                random.Random(f"{seed} {label}").shuffle(drawn)  # the same for every method
                few, rest = new.take(drawn[:count]), new.take(drawn[max(counts):])
                if name == STATE:
                    few, rest = with_states(few), with_states(rest)
                policy = transfer(net, few, tune=tune, steps=policy_steps, batch=batch, lr=lr, seed=seed,
                                  crop=crop, progress=False)
                errors.append(action_error(policy, rest))
                if envs is not None and name != STATE:
                    successes.append(fmean(rollout(policy, envs[label], rollouts=scale.rollouts, seed=1000 * seed)))
            out.setdefault("error", {}).setdefault(name, {})[str(count)] = fmean(errors)
            if successes:
                out.setdefault("success", {}).setdefault(name, {})[str(count)] = fmean(successes)
    return out


def manipulation(seed: int, scale: Scale) -> dict[str, Any]:
    """Three tasks of ten are new; goals are hidden, and the state is mixed with distractors."""
    rows = [row for row in data.rows("manipulation") if row["solved"]]
    known = [np.asarray(row["states"], np.float32)[:, :36] for row in rows]
    clutter, rng = Clutter(np.concatenate(known), seed=seed), np.random.default_rng(seed)
    seen = []
    for trajectory in known:
        walk = [clutter.begin(rng)]
        for _ in trajectory[1:]:
            walk.append(clutter.next(walk[-1], rng))
        seen.append(clutter.mix(trajectory, np.stack(walk)))
    whole = Demonstrations.from_arrays(seen, [row["actions"] for row in rows], states=known,
                                       contexts=[row["task"] for row in rows])
    corpus, new = whole.hold_out(NEW_TASKS)
    envs = None
    if installed("metaworld"):
        envs = {task: [Manipulation(task, clutter) for _ in range(min(5, scale.rollouts))] for task in NEW_TASKS}
    with own_random_state(seed):
        encoder = VectorEncoder(128, 64)
    objectives = {**dict(zip(FIVE, (Inverse(), Cloning(), ForwardExplicit(), ForwardImplicit(), Contrastive()),
                             strict=True)), QUARTER: Inverse(), FAR: Inverse(n=4)}
    return contest(corpus, new, envs, encoder, objectives, scale, seed, steps=scale.steps,
                   policy_steps=scale.policy_steps, counts=FEW["manipulation"])


def babyai(seed: int, scale: Scale) -> dict[str, Any]:
    """Going to the red ball is new; missions are withheld, and the corpus has none that go there."""
    pictures = data.pictures("grid-worlds")
    episodes: dict[str, list[int]] = {}
    for number, row in enumerate(pictures.rows):
        episodes.setdefault(row["episode"], []).append(number)
    first = {name: pictures.rows[numbers[0]] for name, numbers in episodes.items()}
    kept = {name: numbers for name, numbers in episodes.items() if first[name]["task"] == NEW_MISSION
            or first[name]["mission"] not in ("go to a red ball", "go to the red ball")}
    whole = Demonstrations.from_arrays(
        [np.asarray(pictures.images[numbers]) for numbers in kept.values()],
        [np.array([pictures.rows[i]["action"] for i in numbers]) for numbers in kept.values()],
        contexts=[first[name]["task"] for name in kept], choices=7)
    corpus, new = whole.hold_out([NEW_MISSION])
    with own_random_state(seed):
        encoder = nn.Sequential(nn.AvgPool2d(2), PictureEncoder(3, 64, (16, 32), (2, 1), 32))
    objectives = dict(zip(FIVE, (Inverse(crop=4), Cloning(crop=4), ForwardExplicit(), ForwardImplicit(crop=4),
                                 Contrastive(crop=4)), strict=True))
    envs = {NEW_MISSION: [baby_ai(NEW_MISSION) for _ in range(10)]} if installed("minigrid") else None
    return contest(corpus, new, envs, encoder, objectives, scale, seed, steps=scale.picture_steps,
                   policy_steps=scale.picture_policy_steps, counts=FEW["babyai"], batch=64, lr=8e-3, crop=4,
                   others=imagenet() if scale.imagenet else None)


def points(seed: int, scale: Scale) -> dict[str, Any]:
    """Three new goals of the point mass; every trajectory of the corpus has one of its own. No crops: they would move
    it."""
    corpus = point_mass_demonstrations(scale.points, 100 + seed)
    goals = np.random.default_rng(200 + seed).uniform(-0.8, 0.8, (3, 2)).round(2)
    each = [point_mass_demonstrations(12, 300 + 10 * seed + i, goal) for i, goal in enumerate(goals)]
    new = Demonstrations.joined(each)
    envs = {each[i].contexts[0]: [PointMass(goal) for _ in range(scale.rollouts)] for i, goal in enumerate(goals)}
    with own_random_state(seed):
        encoder = PictureEncoder(2, 64, (16, 32), (2, 1), 32)
    objectives = dict(zip(FIVE, (Inverse(crop=0), Cloning(crop=0), ForwardExplicit(), ForwardImplicit(crop=0),
                                 Contrastive(crop=4)), strict=True))
    return contest(corpus, new, envs, encoder, objectives, scale, seed, steps=scale.picture_steps,
                   policy_steps=scale.picture_policy_steps, counts=FEW["points"], batch=64, lr=8e-3)


class ImageNet(nn.Module):
    """Features of EfficientNet-Lite0, of pictures enlarged to 112 pixels."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1280)."""
        enlarged = functional.interpolate(pictures, size=(112, 112), mode="bilinear")
        out: Tensor = self.net.features((255 * enlarged - 127) / 128)
        return out


def imagenet() -> dict[str, nn.Module]:
    """ImageNet's features as a baseline, where the model is at hand."""
    try:
        return {IMAGENET: ImageNet(models.load("efficientnet-lite0")[0])}
    except LooseleafError:
        return {}


def installed(name: str) -> bool:
    """Whether a package is there."""
    return importlib.util.find_spec(name) is not None


def measure(seed: int, scale: Scale) -> dict[str, Any]:
    """All worlds whose data are at hand."""
    out: dict[str, Any] = {"linear": linear(seed, scale)}
    for name, world in (("manipulation", manipulation), ("babyai", babyai), ("points", points)):
        try:
            out[name] = world(seed, scale)
        except LooseleafError as error:
            out[name] = {"missing": str(error)}
    return out


# ------------------------------------------------------------------------------------------------------ what came out
def lead(results: Results, world: str, ours: str, other: str, *, what: str = "success",
         count: int | None = None) -> Interval | None:
    """By how much one is better than another in a world, paired by seed; mean over counts, or one. None: not
    measured."""
    if any(what not in row for row in results.values(world)):
        return None

    def mean(row: Any, name: str) -> float:
        values: dict[str, float] = row[what][name]
        return values[str(count)] if count is not None else fmean(values.values())

    sign = 1 if what == "success" else -1
    return bootstrap([sign * (mean(row, ours) - mean(row, other)) for row in results.values(world)])


def show(report: Report, results: Results) -> None:
    """Tables and figures of all worlds."""
    names = ("ID", "BC", "FD-e", "raw", STATE)
    add_table(report, "Linear world: error on a new context", (
        {"features": name, "demonstrations": count, "error": results.interval("linear", "trained", name, str(count))}
        for name in names for count in (2, 5, 10)),
        "of the mean action, over its variance; k = 2, 30 nuisance dimensions")
    sweeps = {"nuisance": "standard deviation of the nuisance", "noise": "process noise, weak actions",
              "sides": "P(first context)",
              "apart": "steps apart, double integrator"}
    for sweep, label in sweeps.items():
        at = results.values("linear", sweep)[0]
        series = []
        for name in next(iter(at.values())):
            reached = [results.interval("linear", sweep, x, name, "r2") for x in at]
            closed = [results.mean("linear", sweep, x, name, "closed") for x in at]
            series += [curve(f"{name}, trained", map(float, at), reached, style="points"),
                       curve(f"{name}, closed form", map(float, at), closed, style="line")]
        report.figure(f"R^2 of the state: {label}", x_label=label, y_label="R^2 of the state", series=series)
    for world, title in WORLDS.items():
        rows = results.values(world)
        if any("missing" in row for row in rows):
            continue
        what = [name for name in ("success", "error") if all(name in row for row in rows)]
        add_table(report, title, (
            {"pre-training": name, "demonstrations": count,
             "error": results.interval(world, "error", name, str(count)),
             **{w: results.mean(world, w, name, str(count)) if name in rows[0][w] else None for w in what[:-1]},
             "R^2 of the state": fmean(row["r2"][name] for row in rows) if rows[0]["r2"].get(name) else None}
            for name in rows[0]["error"] for count in FEW[world]),
            "error: squared error over the variance, or fraction of wrong choices, on other demonstrations")
        if "success" in what:
            report.figure(f"{title}: success", x_label="demonstrations", y_label="success", series=[
                curve(name, FEW[world], [results.interval(world, "success", name, str(c)) for c in FEW[world]])
                for name in rows[0]["success"]])


def claims(results: Results) -> Iterator[Claim]:
    """The paper's claims, and the rule of this project: inverse dynamics beats scratch and cloning."""
    controls = {"ID": results.values("linear", "trained", "ID", "gain"),
              **{f"FD-e, nuisance {s}": results.values("linear", "nuisance", str(s), "FD-e", "gain")
                 for s in (SCALES[0], SCALES[-1])}}
    apart = {n: results.values("linear", "apart", str(n), "ID", "r2") for n in (1, 2)}
    yield results.claim(
        "Control: trained linear encoders come to their closed forms", OURS, "-",
        "what two features take off the loss is within 2 % of the most they can, for ID, and for FD-e where state and "
        "nuisance are told apart, in every seed", all(g > 0.98 for values in controls.values() for g in values),
        "; ".join(f"{name} {min(values):.4f} at least" for name, values in controls.items()), count="seeds")
    found = [results.interval("linear", "trained", other, "5", minus=("linear", "trained", "ID", "5"))
             for other in ("raw", "BC")]
    yield results.claim(
        "Linear world, contexts that cancel: inverse dynamics beats scratch and cloning on a new context", OURS,
        "ID outperforms [abstract]",
        "differences of errors with 5 demonstrations, paired by seed: both intervals above 0",
        every(*(above(f) for f in found)), f"scratch - ID {found[0]:.3f}; BC - ID {found[1]:.3f}; true state "
        f"{results.interval('linear', 'trained', STATE, '5'):.3f}", count="seeds")
    forward = [results.mean("linear", "nuisance", str(s), "FD-e", "r2") for s in (SCALES[0], SCALES[-1])]
    inverse = [results.mean("linear", "nuisance", str(s), "ID", "r2") for s in (SCALES[0], SCALES[-1])]
    yield results.claim(
        "Forward dynamics spends its features on what varies most, inverse dynamics does not", "theory [memory]",
        "-", f"R^2 of the state, nuisance {SCALES[0]} and {SCALES[-1]}: FD-e above 0.9, then below 0.1; ID above 0.9 "
             f"in both",
        forward[0] > 0.9 and forward[1] < 0.1 and min(inverse) > 0.9,
        f"FD-e {forward[0]:.3f}, {forward[1]:.3f}; ID {inverse[0]:.3f}, {inverse[1]:.3f}", count="seeds")
    yield results.claim(
        "Inverse dynamics of one step misses what an action does not move at once; two steps show it",
        "theory [memory]", "-",
        "double integrator, every seed: R^2 of the state below 0.6 for n = 1, above 0.95 for n = 2; 0.5 and 1 in "
        "closed form",
        max(apart[1]) < 0.6 and min(apart[2]) > 0.95,
        f"n = 1: {fmean(apart[1]):.3f}; n = 2: {fmean(apart[2]):.3f}", count="seeds")
    noise = results.interval("linear", "noise", str(NOISES[0]), "ID", "r2",
                             minus=("linear", "noise", str(NOISES[-1]), "ID", "r2"))
    yield results.claim(
        "Inverse dynamics fails where the dynamics are noisy and actions weak", "theory [memory]", "-",
        f"R^2 of the state by regression, process noise {NOISES[0]} less {NOISES[-1]}: interval above 0.1",
        above(noise, 0.1),
        f"{noise:.3f}", count="seeds")
    side = results.interval("linear", "sides", "1.0", "BC", "5", minus=("linear", "sides", "1.0", "ID", "5"))
    yield results.claim(
        "Cloning is as good where contexts are on one side", "theory [memory]", "-",
        "error on a new context with 5 demonstrations: BC - ID below 0.02", side.high < 0.02, f"{side:+.4f}",
        count="seeds")
    verdicts = [every(*(above(f) for f in found))]
    for world, title in WORLDS.items():
        ours = [lead(results, world, "ID", other) for other in (SCRATCH, "BC")]
        rule = "differences of success, paired by seed, mean over numbers of demonstrations: both intervals above 0"
        statement = f"{title}: inverse dynamics beats scratch and cloning"
        if ours[0] is None or ours[1] is None:
            yield from results.unmeasured("figure 1", "-", {statement: "looseleaf-lab[control]"}, rule)
            continue
        verdicts.append(every(above(ours[0]), above(ours[1])))
        yield results.claim(statement, "figure 1", "ID above all [figure 1]", rule, verdicts[-1],
                            f"over scratch {ours[0]:+.3f}; over BC {ours[1]:+.3f}", count="seeds")
    yield results.claim(
        "Inverse dynamics works", OURS, "-",
        "it beats scratch and cloning, by the rules above, in the linear world and in one of the others or more",
        every(verdicts[0], True in verdicts[1:] or None),
        f"in the linear world {'yes' if verdicts[0] else 'no'}, in {verdicts[1:].count(True)} of the others")
    measured = [w for w in WORLDS if lead(results, w, "ID", SCRATCH) is not None]
    over = {name: bootstrap([
        fmean(fmean(row["success"][name].values()) - fmean(row["success"][SCRATCH].values()) for row in rows)
        for rows in zip(*(results.values(w) for w in measured), strict=True)]) for name in FIVE}
    yield results.claim(
        "Inverse dynamics is the only pre-training that clearly beats training from scratch, averaged over corpora",
        "figure 1", "the only one [figure 1]",
        "success less that of scratch, averaged over worlds: interval above 0 for ID, and for no other",
        over["ID"].low > 0 and all(over[name].low <= 0 for name in FIVE[1:]),
        f"{', '.join(measured)}: " + "; ".join(f"{name} {over[name]:+.3f}" for name in FIVE), count="seeds")
    grows, near = (lead(results, "manipulation", "ID", name) for name in (QUARTER, FAR))
    few = FEW["manipulation"]
    gains = [lead(results, "manipulation", "ID", SCRATCH, what="error", count=c) for c in few]
    if grows is not None and near is not None and gains[0] is not None and gains[1] is not None:
        yield results.claim(
            "The gain grows with the corpus", "figures", "[figures]",
            "Meta-World, success of ID with the whole corpus less that with a quarter: interval above 0", above(grows),
            f"{grows:+.3f}", count="seeds")
        verdict = gains[0].low > gains[1].high or (False if gains[0].high < gains[1].low else None)
        yield results.claim(
            "The gain is largest with few demonstrations", "figures", "[figures]",
            f"Meta-World, action error: gain over scratch with {few[0]} demonstrations above that with {few[1]}, "
            "intervals apart", verdict, f"{gains[0]:.3f} and {gains[1]:.3f}", count="seeds")
        yield results.claim(
            "Observations further apart do not help much", "[memory]", "[memory]",
            "Meta-World, success: n = 1 less n = 4 above -0.1", near.low > -0.1, f"{near:+.3f}", count="seeds")
    yield from results.unmeasured("abstract; section 5", "-", {
        "Earlier explanations, such as controllable states, do not explain it": "a definition to measure",
        "The same on pixels of kitchens and of Meta-World, and against R3M": "a renderer, and R3M's weights"})


study = Study("inverse-dynamics: the paper's claims", measure, claims, show=show, full=Scale(),
              quick=Scale(60, 30, 20, 10, 20, 20, 1, 24, False))
