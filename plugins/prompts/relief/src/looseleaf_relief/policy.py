"""The policy of RELIEF: which node gets a prompt next and which vector, and how PPO trains both (sections 4 and 5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from looseleaf_relief.graphs import GraphNetwork, counts

Choice = Literal["learned", "random"]
REWARD_CLIP = 100.0
"""Largest reward of a step, as in the official code."""


class DiscreteActor(nn.Module):
    """Which node: one logit for each, d -> d/2 -> d/4 -> 1, tanh between.

    Args:
        d: width of the node embeddings.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = _orthogonal([d, max(1, d // 2), max(1, d // 4), 1])

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """Log-probabilities (B, N) of the nodes of states (B, N, d); -inf where ``real`` (B, N) is False."""
        return _log_softmax(self.layers(states)[..., 0], real)


class ContentActor(nn.Module):
    """Which vector: the mean z_max * tanh of d -> d/2 -> d/2 -> D, tanh between, for each node by itself.

    Args:
        d, width: of the node embeddings and of the input embeddings.
        z_max: largest mean of an element.
    """

    def __init__(self, d: int, width: int, z_max: float) -> None:
        super().__init__()
        self.z_max = z_max
        self.layers = _orthogonal([d, max(1, d // 2), max(1, d // 2), width])

    def forward(self, nodes: Tensor) -> Tensor:
        """Means (B, D) of the vectors for chosen nodes (B, d)."""
        return self.z_max * torch.tanh(self.layers(nodes))


class Critic(nn.Module):
    """The value of a state.

    Args:
        kind: ``flat`` reads all nodes side by side, zeros up to ``most`` of them, through ReLU layers of 5 % and
            2.5 % of that width (the paper's); ``pool`` their mean, through layers of the embeddings' width (ours).
        d: width of the node embeddings.
        most: most nodes of a graph it is trained on.
    """

    def __init__(self, kind: Literal["flat", "pool"], d: int, most: int) -> None:
        super().__init__()
        self.kind, self.most = kind, most
        width = d * most if kind == "flat" else d
        first, second = (max(1, width // 20), max(1, width // 40)) if kind == "flat" else (d, max(1, d // 2))
        self.layers = nn.Sequential(nn.Linear(width, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(),
                                    nn.Linear(second, 1))
        linears: Any = self.layers[::2]
        for layer in linears:
            nn.init.xavier_normal_(layer.weight, gain=nn.init.calculate_gain("relu"))
            nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """(B,) values of states (B, N, d) with zeros where ``real`` (B, N) is False."""
        if self.kind == "pool":
            out: Tensor = self.layers(states.sum(1) / real.sum(1, keepdim=True))[:, 0]
            return out
        missing = self.most - states.shape[1]
        if missing < 0:
            raise ValueError(f"critic: expected at most {self.most} nodes, those of the largest training graph, got "
                             f"{states.shape[1]}: train it with larger graphs, or take critic='pool'")
        out = self.layers(nn.functional.pad(states, (0, 0, 0, missing)).flatten(1))[:, 0]
        return out


class Actors(nn.Module):
    """One pair of actors."""

    def __init__(self, d: int, width: int, z_max: float) -> None:
        super().__init__()
        self.discrete, self.content = DiscreteActor(d), ContentActor(d, width, z_max)


class Policy(nn.Module):
    """Pairs of actors, and the joint policy that they make.

    Args:
        d, width: of the node embeddings and of the input embeddings.
        members: how many pairs.
        z_max: largest mean of an element of a vector.
        nodes, content: ``random``: not by an actor but uniformly, over the nodes or over [-z_max, z_max].
        clip: added vectors are cut off at +-z_max, as in the official code for nodes.
    """

    def __init__(self, d: int, width: int, members: int, z_max: float, nodes: Choice = "learned",
                 content: Choice = "learned", clip: bool = False) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(Actors(d, width, z_max) for _ in range(members))
        self.width, self.z_max, self.nodes, self.content, self.clip = width, z_max, nodes, content, clip

    def node_log_probs(self, states: Tensor, real: Tensor, member: int | None = None) -> Tensor:
        """(B, N) of one member, or of the joint policy: the largest of all members' probabilities, normalised."""
        if self.nodes == "random":
            return _log_softmax(torch.zeros_like(states[..., 0]), real)
        pairs: Any = self.pairs
        if member is not None:
            out: Tensor = pairs[member].discrete(states, real)
            return out
        return joint([pair.discrete(states, real) for pair in pairs])

    def means(self, nodes: Tensor, member: int | None = None) -> Tensor:
        """(B, D) of one member, or the mean of all members' means."""
        pairs: Any = self.pairs
        chosen = pairs if member is None else [pairs[member]]
        return torch.stack([pair.content(nodes) for pair in chosen]).mean(0)


def joint(log_probs: Sequence[Tensor]) -> Tensor:
    """Elementwise largest of distributions (B, N), normalised; all as log-probabilities."""
    largest = torch.stack(list(log_probs)).max(0).values
    return largest - largest.logsumexp(-1, keepdim=True)


def discrete_kl(of: Tensor, to: Tensor) -> Tensor:
    """(B,): KL(of || to) of distributions (B, N) as log-probabilities; places of probability 0 count nothing."""
    return (of.exp() * (of - to).masked_fill(of == -math.inf, 0.0)).sum(-1)


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """(T,): generalised advantages of an episode of T steps that ends at its last one.

    Args:
        rewards: (T,).
        values: (T,), of the state before each step.
        gamma, lam: discount, and weight of longer horizons.
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas, out, last = rewards + gamma * following - values, torch.empty_like(values), values.new_zeros(())
    for t in range(len(rewards) - 1, -1, -1):
        last = deltas[t] + gamma * lam * last
        out[t] = last
    return out


class RunningNorm:
    """Numbers less their running mean, over their running standard deviation (Welford)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, x: float) -> None:
        """Count ``x`` in."""
        self.count += 1
        before = self.mean
        self.mean += (x - before) / self.count
        self.squares += (x - before) * (x - self.mean)

    def __call__(self, rewards: Tensor) -> Tensor:
        """(n,): each reward normalised with all that came before it; the first are counted in beforehand."""
        plain = rewards.tolist()
        if not self.count:
            for x in plain:
                self.update(x)
        out = []
        for x in plain:
            self.update(x)
            out.append((x - self.mean) / (math.sqrt(self.squares / self.count) + 1e-8))
        return torch.tensor(out, dtype=rewards.dtype, device=rewards.device)


@dataclasses.dataclass
class Transitions:
    """Steps of several episodes, S of them: the padding is left out.

    Attributes:
        states: (S, N, d) node embeddings, zeros behind a graph's last node.
        real: (S, N), which places are nodes.
        node, action: (S,), (S, D): what was done.
        node_log_prob, action_log_prob: (S,), of the member that did it.
        reward: (S,), decrease of the loss.
        graph: (S,), of which graph; its steps follow one another.
    """

    states: Tensor
    real: Tensor
    node: Tensor
    action: Tensor
    node_log_prob: Tensor
    action_log_prob: Tensor
    reward: Tensor
    graph: Tensor

    def part(self, rows: Tensor) -> Transitions:
        """Some of the steps."""
        return Transitions(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


class Noise:
    """Where an episode takes its randomness from.

    Args:
        generators: one for each graph, or a single one for all.
        count: graphs.
        deterministic: take the most probable node.
    """

    def __init__(self, generators: Sequence[torch.Generator], count: int, *, deterministic: bool = False) -> None:
        self.generators, self.count, self.deterministic = generators, count, deterministic

    def uniform(self) -> Tensor:
        """(graphs,) in [0, 1)."""
        return self._draw(torch.rand)

    def normal(self, width: int) -> Tensor:
        """(graphs, width), standard normal."""
        return self._draw(torch.randn, width)

    def uniforms(self, width: int) -> Tensor:
        """(graphs, width) in [-1, 1)."""
        return 2 * self._draw(torch.rand, width) - 1

    def _draw(self, kind: Callable[..., Tensor], *shape: int) -> Tensor:
        if len(self.generators) == 1:
            return kind(self.count, *shape, generator=self.generators[0])
        return torch.stack([kind(shape, generator=g) for g in self.generators])

    def node(self, log_probs: Tensor) -> Tensor:
        """(graphs,): a node drawn from each row of log-probabilities (graphs, N)."""
        if self.deterministic:
            return log_probs.argmax(-1)
        below = log_probs.exp().cumsum(-1)
        drawn = (below <= self.uniform().to(below)[:, None] * below[:, -1:]).sum(-1)
        last = (log_probs > -math.inf).long().cumsum(-1).argmax(-1)  # rounding may lead behind the last node
        return torch.minimum(drawn, last)


def dense(nodes: Tensor, batch: Batch) -> Tensor:
    """(graphs, N, d) of node embeddings (nodes, d), zeros behind the last node of a graph."""
    out = nodes.new_zeros(batch.num_graphs, int(counts(batch).max()), nodes.shape[1])
    out[batch.batch, places(batch)] = nodes
    return out


def places(batch: Batch) -> Tensor:
    """(nodes,): the number of each node inside its graph."""
    numbers = counts(batch)
    return torch.arange(len(batch.batch), device=numbers.device) - (numbers.cumsum(0) - numbers)[batch.batch]


def episode(policy: Policy, network: GraphNetwork, batch: Batch, noise: Noise, *, member: int | None = None,
            log_std: float | None = None, loss: Callable[[Tensor], Tensor] | None = None,
            ) -> tuple[Tensor, Transitions | None]:
    """Prompt every graph for as many steps as it has nodes, without gradient.

    Args:
        policy, network, batch: who prompts what; the network is run as it is, once more than the largest graph has
            nodes where ``loss`` is asked, and that often where it is not.
        noise: of nodes and vectors.
        member: the pair of actors that acts; None: the joint policy.
        log_std: of the vectors; None: their mean.
        loss: node embeddings (nodes, d) -> (graphs,); the rewards are its decreases.

    Returns:
        The prompt (nodes, D), and the transitions where ``loss`` is given.
    """
    numbers, place = counts(batch), places(batch)
    first = numbers.cumsum(0) - numbers
    steps = int(numbers.max())
    real = torch.arange(steps, device=numbers.device)[None] < numbers[:, None]
    rows = torch.arange(batch.num_graphs, device=numbers.device)
    done: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        prompt: Tensor | None = None
        before: Tensor | None = None
        embedded = network.embed(batch).float()
        for t in range(steps):
            states = embedded.new_zeros(len(rows), steps, embedded.shape[1])
            states[batch.batch, place] = embedded
            if before is None and loss is not None:
                before = loss(embedded)
            log_probs = policy.node_log_probs(states, real, member)
            node = noise.node(log_probs)
            mean = policy.means(states[rows, node], member)
            action, log_prob = mean, mean.new_zeros(len(rows))
            if policy.content == "random":
                action = policy.z_max * noise.uniforms(policy.width).to(mean)
            elif log_std is not None:
                action = mean + math.exp(log_std) * noise.normal(policy.width).to(mean)
                log_prob = normal_log_prob(action, mean, log_std)
            going = t < numbers
            added = action.clamp(-policy.z_max, policy.z_max) if policy.clip else action
            if prompt is None:
                prompt = added.new_zeros(len(place), added.shape[1])
            prompt = prompt.index_add(0, (first + node)[going], added[going])
            if t + 1 < steps or loss is not None:
                embedded = network.embed(batch, prompt).float()
            if loss is not None:
                after = loss(embedded)
                assert before is not None
                reward = (before - after).clamp(-REWARD_CLIP, REWARD_CLIP)
                done.append((states, node, action, log_probs[rows, node], log_prob, reward, going))
                before = after
    assert prompt is not None
    if loss is None:
        return prompt, None
    states, node, action, node_log_prob, log_prob, reward, going = (torch.stack(c, 1) for c in zip(*done, strict=True))
    kept = going.reshape(-1)
    graph = rows[:, None].expand(-1, steps)
    wide = real[:, None].expand(-1, steps, -1)
    return prompt, Transitions(*(v.flatten(0, 1)[kept] for v in (
        states, wide, node, action, node_log_prob, log_prob, reward, graph)))


@dataclasses.dataclass(frozen=True)
class PPO:
    """How a member is trained on the transitions of a batch; see :class:`RELIEF` for what each number is."""

    gamma: float
    lam: float
    clip: float
    critic_weight: float
    max_norm: float
    passes: int
    minibatch_size: int
    kl_discrete: float
    kl_content: float
    alpha_d: float
    alpha_c: float

    def returns(self, steps: Transitions, rewards: Tensor, critic: Critic) -> tuple[Tensor, Tensor]:
        """(S,), (S,): advantages, and returns = advantages + values; rewards are normalised already."""
        with torch.no_grad():
            values = critic(steps.states, steps.real)
        ends = (steps.graph.diff().nonzero()[:, 0] + 1).tolist()
        parts = zip(rewards.tensor_split(ends), values.tensor_split(ends), strict=True)
        advantages = torch.cat([gae(r, v, self.gamma, self.lam) for r, v in parts])
        return advantages, advantages + values

    def update(self, policy: Policy, member: int, critic: Critic, optimizer: torch.optim.Optimizer,
               steps: Transitions, rewards: Tensor, *, entropy: float, log_std: float,
               generator: torch.Generator) -> int:
        """Several passes over the transitions; the number of updates made.

        None is made where there are no more transitions than ``minibatch_size``, as in the official code.
        """
        count = len(steps.node)
        if count <= self.minibatch_size:
            return 0
        advantages, returns = self.returns(steps, rewards, critic)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        trained = [p for p in (*policy.pairs[member].parameters(), *critic.parameters())]
        each, updates, others = count // self.minibatch_size, 0, self.others(policy, member, steps)
        for _ in range(self.passes):
            order = torch.randperm(count, generator=generator).to(steps.node.device)
            kl = [0.0, 0.0]
            for n in range(each):
                rows = order[n * self.minibatch_size:(n + 1) * self.minibatch_size]
                some = steps.part(rows)
                loss, *kls = self.loss(policy, member, some, advantages[rows], entropy, log_std,
                                       None if others is None else (others[0][rows], others[1][rows]))
                value = nn.functional.mse_loss(critic(some.states, some.real), returns[rows])
                optimizer.zero_grad()
                (loss + self.critic_weight * value).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trained, self.max_norm)
                optimizer.step()
                updates += 1
                kl = [a + b for a, b in zip(kl, kls, strict=True)]
            if kl[0] / each > self.kl_discrete or kl[1] / each > self.kl_content:
                break
        return updates

    def others(self, policy: Policy, member: int, steps: Transitions) -> tuple[Tensor, Tensor] | None:
        """What the other members, who stay as they are meanwhile, would do; None where there are none or nobody asks.

        Returns:
            (S, N), the largest of their log-probabilities, and (S, N, D), the sum of their means at every node.
        """
        rest: list[Any] = [pair for n, pair in enumerate(policy.pairs) if n != member]
        if not rest or not (self.alpha_d or self.alpha_c):
            return None
        with torch.no_grad():
            log_probs = torch.stack([pair.discrete(steps.states, steps.real) for pair in rest]).max(0).values
            means = sum(pair.content(steps.states) for pair in rest)
        return log_probs, means  # type: ignore[return-value]

    def loss(self, policy: Policy, member: int, steps: Transitions, advantages: Tensor, entropy: float,
             log_std: float, others: tuple[Tensor, Tensor] | None) -> tuple[Tensor, float, float]:
        """The loss of both actors of a member, and the approximate KL of each to the one that acted.

        Args:
            policy, member: who learns.
            steps, advantages: (S,) from what.
            entropy: weight of the entropy of the nodes.
            log_std: of the vectors.
            others: of :meth:`others` for these steps; None: no penalty.
        """
        rows, total, kls = torch.arange(len(steps.node), device=steps.node.device), torch.zeros(()), [0.0, 0.0]
        log_probs = policy.node_log_probs(steps.states, steps.real, member)
        best: Tensor | None = None
        if others is not None:
            together = joint([log_probs.detach(), others[0] if policy.nodes == "learned" else log_probs])
            best = together.argmax(-1)
        if policy.nodes == "learned":
            surrogate, kls[0] = self._surrogate(log_probs[rows, steps.node], steps.node_log_prob, advantages)
            spread = -(log_probs.exp() * log_probs.masked_fill(~steps.real, 0.0)).sum(-1)
            total = total - (surrogate + entropy * spread).mean()
            if others is not None and self.alpha_d:
                total = total + self.alpha_d * discrete_kl(together, log_probs).mean()
        if policy.content == "learned":
            at = steps.node if best is None else torch.cat([steps.node, best])
            means = policy.means(steps.states[rows.repeat(len(at) // len(rows)), at], member)
            mean, std = means[:len(rows)], math.exp(log_std)
            surrogate, kls[1] = self._surrogate(normal_log_prob(steps.action, mean, log_std), steps.action_log_prob,
                                                advantages)
            total = total - surrogate.mean()
            if others is not None and best is not None and self.alpha_c:
                own = means[len(rows):]
                common = (own.detach() + others[1][rows, best]) / len(policy.pairs)
                total = total + self.alpha_c * ((own - common) ** 2).sum(-1).mean() / (2 * std ** 2)
        return total, kls[0], kls[1]

    def _surrogate(self, now: Tensor, then: Tensor, advantages: Tensor) -> tuple[Tensor, float]:
        """(S,): the clipped objective; and the approximate KL."""
        difference = now - then
        ratio = difference.exp()
        kl = float((ratio - 1 - difference).detach().mean())
        return torch.min(ratio * advantages, ratio.clamp(1 - self.clip, 1 + self.clip) * advantages), kl


def normal_log_prob(x: Tensor, mean: Tensor, log_std: float) -> Tensor:
    """(S,): log-density of vectors (S, D) under N(mean, exp(log_std)), the same for all elements."""
    scaled = (x - mean) / math.exp(log_std)
    return -0.5 * scaled.square().sum(-1) - x.shape[-1] * (log_std + 0.5 * math.log(2 * math.pi))


def _orthogonal(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between, orthogonal weights of gain sqrt 2, of .01 in the last, no bias at first."""
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(pairwise(widths)):
        last = n == len(widths) - 2
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight, gain=0.01 if last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


def _log_softmax(logits: Tensor, real: Tensor) -> Tensor:
    return torch.log_softmax(logits.masked_fill(~real, -math.inf), -1)


__all__ = ["PPO", "Actors", "ContentActor", "Critic", "DiscreteActor", "Noise", "Policy", "RunningNorm", "Transitions",
           "dense", "discrete_kl", "episode", "gae", "joint", "normal_log_prob", "places"]
