"""Pre-training of an encoder on a corpus, and its transfer to a new task of which there are few demonstrations."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from looseleaf.modes import evaluating, own_random_state, with_gradients
from looseleaf.progress import bar
from looseleaf_inverse_dynamics.demonstrations import Demonstrations, as_pictures
from looseleaf_inverse_dynamics.networks import default_encoder, learning, mlp, random_crop, represent
from looseleaf_inverse_dynamics.objectives import Objective, action_loss, find_objective

WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Pretrained:
    """What a pre-training gave.

    Attributes:
        encoder: in evaluation mode.
        heads: those of the objective, which are not needed any more.
        losses: of each step.
        state_losses: of a head that predicts the true state (standardised) from features that carry no gradient back,
            of each step; empty where no state is known.
    """

    encoder: nn.Module
    heads: nn.ModuleDict
    losses: list[float] = field(repr=False)
    state_losses: list[float] = field(repr=False)


def pretrain(demonstrations: Demonstrations, objective: str | Objective, encoder: nn.Module | None = None, *,
             k: int = 64, steps: int = 100_000, batch: int = 256, lr: float = 1e-3, seed: int = 0,
             progress: bool | None = None) -> Pretrained:
    """Train an encoder on a corpus of demonstrations of many tasks.

    AdamW with a weight decay of 1e-4 (the authors' library's default), the learning rate falls to 0 along a cosine.

    Args:
        demonstrations: the corpus.
        objective: ``"ID"``, ``"BC"``, ``"FD-e"``, ``"FD-i"``, ``"Cont"``, or one of your own.
        encoder: a module from observations (B, ...) to features, see :func:`represent`; a copy is trained, on its
            device, and what is frozen in it stays so. None: the paper's for pictures, an MLP for vectors.
        k: features of the encoder that is made for None.
        steps: 100,000 to 200,000 in the authors' code.
        batch: pairs of a step; 256 in the authors' code, 128 for FD-e.
        lr: learning rate for 256 pairs; it is multiplied by ``batch / 256``.
        seed: the only source of randomness.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: a single trajectory, trajectories shorter than n + 1, actions that never vary, an encoder of which
            all is frozen, a loss that is not finite.
    """
    wanted = find_objective(objective)
    if len(demonstrations) < 2:
        raise ValueError("demonstrations: expected two trajectories or more to pre-train on, got one")
    actions = demonstrations.actions[demonstrations.acted]
    if bool((actions == actions[0]).all()):
        raise ValueError(f"actions: expected actions that vary, got {actions[0].tolist()} at each of {len(actions)} "
                         f"steps: nothing can be learned from them")
    rows = demonstrations.pairs(wanted.n)
    with own_random_state(seed):
        draw = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(encoder) if encoder is not None else default_encoder(demonstrations.observation_shape, k)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("encoder: expected parameters that ask for a gradient, got none: unfreeze the part to "
                             "train, or go to transfer directly")
        device = next(model.parameters()).device
        size = feature_size(model, demonstrations)
        heads = wanted.heads(size, demonstrations).to(device)
        states = None if demonstrations.states is None else standardised(demonstrations.states)
        state_head = mlp(size, states.shape[1], (256,)).to(device) if states is not None else None
        state_losses: list[float] = []

        def loss(step: int) -> Tensor:
            chosen = rows[torch.randint(0, len(rows), (batch,), generator=draw)]
            seen: list[Tensor] = []

            def encode(observations: Tensor) -> Tensor:
                seen.append(represent(model, observations))
                return seen[-1]

            value = wanted.loss(encode, heads, wanted.batch(demonstrations, chosen, draw, device))
            if state_head is None or states is None or not seen:
                return value
            # its gradient ends at the features, so the encoder does not notice
            guess = functional.mse_loss(state_head(seen[0][:batch].detach()), states[chosen].to(device))
            state_losses.append(float(guess.detach()))
            return value + guess - guess.detach()

        parts = nn.ModuleList([model, heads, *([state_head] if state_head is not None else [])])
        losses = optimise(parts, loss, steps, lr * batch / 256, "pre-training", progress)
    return Pretrained(model.eval(), heads, losses, state_losses)


class Policy(nn.Module):
    """A head on an encoder; made by :func:`transfer`.

    Args:
        encoder, head: networks.
        demonstrations: that it is for; size and kind of its actions are taken from them.
        bounded: actions in [-1, 1], by tanh.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, demonstrations: Demonstrations, bounded: bool) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.discrete, self.history = demonstrations.discrete, demonstrations.history
        self.bounded = bounded and not self.discrete

    def from_features(self, features: Tensor) -> Tensor:
        """Features (B, k) -> actions (B, A), or scores of choices."""
        out: Tensor = self.head(features)
        return out.tanh() if self.bounded else out

    def forward(self, observations: Tensor) -> Tensor:
        """Observations as :meth:`Demonstrations.inputs` gives them -> actions (B, A), or scores of choices."""
        return self.from_features(represent(self.encoder, observations))

    def act(self, observations: Tensor) -> np.ndarray:
        """The actions to take, (B, A) float32 or (B,) int64."""
        with evaluating(self), torch.no_grad():
            out = self(observations.to(next(self.parameters()).device)).cpu()
        return (out.argmax(-1) if self.discrete else out).numpy()


def transfer(encoder: nn.Module, demonstrations: Demonstrations, *, tune: bool = False, steps: int = 10_000,
             batch: int = 256, lr: float = 1e-3, hidden: Sequence[int] = (256, 256), dropout: float = 0.1,
             bounded: bool = True, crop: int = 8, seed: int = 0, progress: bool | None = None) -> Policy:
    """Clone the behaviour of a few demonstrations with a policy on an encoder.

    Args:
        encoder: frozen, in evaluation mode, and left as it is; features are computed once.
        demonstrations: of the new task.
        tune: train a copy of the encoder, too; with an encoder of random weights this is training from scratch.
        steps, batch, hidden, dropout: of the policy, as in the authors' code.
        lr: learning rate for 256 pairs; it is multiplied by ``batch / 256``.
        bounded: a tanh at the end.
        crop: pixels by which pictures are moved at random where the encoder is trained; a frozen encoder sees them as
            they are.
        seed, progress: see :func:`pretrain`.

    Raises:
        ValueError: actions beyond [-1, 1] with ``bounded``.
    """
    largest = float(demonstrations.actions[demonstrations.acted].abs().max())
    if bounded and not demonstrations.discrete and largest > 1 + 1e-4:
        raise ValueError(f"actions: expected [-1, 1] for a bounded policy, got {largest:.3g}: scale them, or pass "
                         "bounded=False")
    rows = demonstrations.pairs(0)
    with own_random_state(seed):
        draw = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(encoder) if tune else encoder
        size = feature_size(model, demonstrations)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        head = mlp(size, demonstrations.action_size, hidden, dropout).to(device)
        policy = Policy(model, head, demonstrations, bounded)
        known = None if tune else features(model, demonstrations)

        def loss(step: int) -> Tensor:
            chosen = rows[torch.randint(0, len(rows), (batch,), generator=draw)]
            action = demonstrations.actions[chosen].to(device)
            if known is not None:
                return action_loss(policy.from_features(known[chosen].to(device)), action)
            return action_loss(policy(random_crop(demonstrations.inputs(chosen).to(device), crop, draw)), action)

        optimise(policy if tune else policy.head, loss, steps, lr * batch / 256, "transfer", progress)
    return policy


def optimise(module: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, label: str = "training",
             progress: bool | None = None) -> list[float]:
    """Train ``module`` in place with AdamW and a cosine to 0; the loss of each step.

    Raises:
        ValueError: a loss that is not finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    worker = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(worker, steps)
    losses = []
    with with_gradients(), learning(module), bar(label, steps, progress) as progress_bar:
        for step in range(steps):
            value = loss(step)
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step} of {label}: expected a finite loss, got {losses[-1]}: lower the "
                                 f"learning rate, or scale observations and actions to about 1")
            worker.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            worker.step()
            schedule.step()
            progress_bar.update()
    return losses


def features(encoder: nn.Module, demonstrations: Demonstrations, batch: int = 512) -> Tensor:
    """What the encoder makes of every observation, in evaluation mode, (N, k) float32 on the CPU."""
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    rows = torch.arange(len(demonstrations.trajectory))
    with evaluating(encoder), torch.no_grad():
        return torch.cat([represent(encoder, demonstrations.inputs(some).to(device)).float().cpu()
                          for some in rows.split(batch)])


def feature_size(encoder: nn.Module, demonstrations: Demonstrations) -> int:
    """How many features an encoder has; runs it on two observations.

    Raises:
        TypeError: it does not take them, or gives no features.
    """
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    with evaluating(encoder), torch.no_grad():
        try:
            return represent(encoder, demonstrations.inputs(torch.tensor([0, 0])).to(device)).shape[1]
        except Exception as error:
            raise TypeError(f"encoder: expected a module that takes a batch of observations of shape "
                            f"{demonstrations.observation_shape} and gives features, got {type(encoder).__name__}, "
                            f"which says: {error}") from error


def standardised(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 in each column; constant columns are 0."""
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-6)


def action_error(policy: Policy, demonstrations: Demonstrations) -> float:
    """Error on other demonstrations: squared error over the variance of actions, or the fraction of wrong choices."""
    rows = demonstrations.pairs(0)
    chosen = torch.cat([torch.from_numpy(policy.act(demonstrations.inputs(some))) for some in rows.split(512)])
    action = demonstrations.actions[rows]
    if demonstrations.discrete:
        return float((chosen != action).float().mean())
    return float((chosen - action).square().sum() / (action - action.mean(0)).square().sum().clamp_min(1e-12))


def succeeded(reward: float, terminated: bool, info: Mapping[str, Any]) -> bool:
    """Whether a step solved the task: ``success`` or ``is_success`` of its information, else an end with a reward."""
    for name in ("success", "is_success"):
        if name in info:
            return bool(info[name])
    return bool(terminated and reward > 0)


def rollout(policy: Policy, env: Any, *, rollouts: int = 100, steps: int = 500, seed: int = 0,
            observation: str | None = None, success: Callable[[float, bool, Mapping[str, Any]], bool] = succeeded,
            ) -> list[bool]:
    """Run a policy in its environment; whether each rollout succeeded.

    Args:
        policy: of :func:`transfer`; continuous actions are clipped to [-1, 1] where it is bounded.
        env: a gymnasium environment of the new task; or a list of them, which run side by side so that the encoder sees
            their observations in one batch.
        rollouts: 100 in the paper, 50 for its kitchen.
        steps: of a rollout at most.
        seed: rollout i is reset with ``seed + i``.
        observation: key of the observation where they are dictionaries.
        success: from reward, whether the episode ended, and the step's information.
    """
    envs = list(env) if isinstance(env, (list, tuple)) else [env]
    out = [False] * rollouts
    waiting, running = deque(range(rollouts)), dict[int, tuple[int, int, deque[Tensor]]]()

    def seen(value: Any) -> Tensor:
        array = value[observation] if observation is not None else value
        return as_pictures(np.asarray(array)[None])[0]

    while waiting or running:
        for place in range(len(envs)):
            if place not in running and waiting:
                number = waiting.popleft()
                first = seen(envs[place].reset(seed=seed + number)[0])
                running[place] = (number, 0, deque([first] * policy.history, maxlen=policy.history))
        batch = torch.stack([torch.cat(list(frames)) if policy.history > 1 else frames[0] for _, _, frames in
                             running.values()])
        actions = policy.act(batch.float() / 255 if batch.dtype == torch.uint8 else batch)
        for (place, (number, count, frames)), action in zip(list(running.items()), actions, strict=True):
            if policy.bounded:
                action = action.clip(-1, 1)
            new, reward, terminated, truncated, info = envs[place].step(int(action) if policy.discrete else action)
            out[number] = success(float(reward), bool(terminated), info)
            frames.append(seen(new))
            if out[number] or terminated or truncated or count + 1 >= steps:
                del running[place]
            else:
                running[place] = (number, count + 1, frames)
    return out


def agreement(known: Mapping[str, Tensor], train: Tensor, test: Tensor, *, steps: int = 1000, batch: int = 256,
              seed: int = 0) -> dict[str, dict[str, float]]:
    """How well an MLP predicts one representation from another: source -> target -> fraction of variance, on ``test``
    rows.

    One MLP of 256 hidden units for each source predicts all targets, standardised and of equal weight.

    Args:
        known: name -> (N, k) of the same observations.
        train, test: rows.
        steps, batch: of each MLP.
        seed: of the MLPs.
    """
    targets = {name: standardised(values) for name, values in known.items()}
    joined = torch.cat([values / math.sqrt(values.shape[1]) for values in targets.values()], 1)
    out: dict[str, dict[str, float]] = {}
    for source, values in targets.items():
        with own_random_state(seed):
            draw = torch.Generator().manual_seed(seed)
            net = mlp(values.shape[1], joined.shape[1], (256,))

            def loss(step: int, net: nn.Module = net, values: Tensor = values,
                     draw: torch.Generator = draw) -> Tensor:
                rows = train[torch.randint(0, len(train), (batch,), generator=draw)]
                return (net(values[rows]) - joined[rows]).square().sum(-1).mean()

            optimise(net, loss, steps, 3e-3, progress=False)
        with torch.no_grad():
            predicted = net(values[test])
        out[source] = {}
        begin = 0
        for name, target in targets.items():
            end = begin + target.shape[1]
            true, guess = joined[test, begin:end], predicted[:, begin:end]
            rest = (guess - true).square().sum() / (true - true.mean(0)).square().sum().clamp_min(1e-12)
            out[source][name] = float(1 - rest)
            begin = end
    return out


__all__ = ["Policy", "Pretrained", "action_error", "agreement", "feature_size", "features", "optimise", "pretrain",
           "rollout", "standardised", "succeeded", "transfer"]
