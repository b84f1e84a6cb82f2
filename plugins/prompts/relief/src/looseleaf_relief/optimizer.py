"""RELIEF: a policy decides which nodes of a graph get a small vector, and which, in front of a frozen network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from looseleaf import Paper
from looseleaf.modes import own_random_state
from looseleaf.plugin import In
from looseleaf_relief.graphs import GraphNetwork
from looseleaf_relief.policy import PPO, Choice, Critic, Noise, Policy, RunningNorm, episode
from looseleaf_relief.prompt import LEARNERS, GraphOptimizer, Learner, LearnerSpec, Run

OVERLAP = 0.2
"""Fraction of every other part that a member's training graphs have, too."""
LAST_LOG_STD = -5.0
"""Logarithm of the standard deviation of the vectors, towards which it falls."""


class PromptingPolicy(Learner):
    """Pairs of actors that prompt a graph before the head sees it.

    Attributes:
        policy: the actors.
        critic: while they are trained; no part of the prompt.
    """

    critic: Critic

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.policy = Policy(spec.d, spec.width, **spec.options)

    def prompt(self, network: GraphNetwork, batch: Batch, noise: Noise) -> Tensor:
        """(nodes, D) by the joint policy: nodes drawn, vectors their means."""
        return episode(self.policy, network, batch, noise)[0]


LEARNERS["relief"] = PromptingPolicy


@dataclasses.dataclass
class RELIEF(GraphOptimizer):
    """A policy, trained by PPO, that adds one small vector after another to chosen nodes of a graph.

    Args:
        z_max: largest mean of an element of a vector (0.05 to 1 in the official scripts).
        members: pairs of actors (M); each is trained on its own part of the graphs and on a fifth of every other.
        alpha_d: weight of KL(joint policy || member) over nodes (1 or 1e5 in the official scripts).
        alpha_c: weight of KL(member || mean of the members) over vectors.
        batch_size: graphs whose episodes are collected before an update.
        minibatch_size: transitions of an update (64 to 512 in the official scripts); a batch with no more is skipped.
        passes: most passes over a batch's transitions.
        policy_lr: learning rate of Adam for actors and critic.
        policy_decay: let it fall linearly to zero.
        gamma: discount.
        lam: of the generalised advantages.
        clip: of the probability ratios.
        entropy: weight of the node distribution's entropy; falls linearly to zero.
        critic_weight: of the critic's squared error.
        max_norm: largest norm of the gradients.
        kl_discrete: passes end where the approximate KL of the nodes is larger.
        kl_content: the same for the vectors.
        log_std: first logarithm of the vectors' standard deviation; falls linearly to -5.
        critic: "flat" reads all nodes side by side, so its size grows with the largest training graph; "pool" reads
            their mean, and is the same for any order of the nodes (ours).
        clip_action: cut sampled vectors off at z_max (the official code does for node tasks).
        warmup: passes of the head without a prompt before the first round.
        nodes: "random" draws nodes uniformly (an ablation).
        content: "random" draws vectors uniformly within z_max (an ablation).
        draws: prompts that a prediction is the mean of.
        deterministic: in predictions take the most probable node instead of drawing one.
        epochs: rounds: policy, then head, then validation.
        head_layers: linear layers of the head, with ReLU between.
        head_epochs: passes of the head over the training graphs in each round.
        head_lr: learning rate of Adam for the head (5e-4 to 1.5e-3 in the official scripts).
        head_decay: let it fall linearly to zero.
        skip: rounds before which no validation counts.
    """

    paper = Paper("RELIEF: Reinforcement Learning Empowered Graph Feature Prompt Tuning",
                  ("Jiapeng Zhu", "Zichen Ding", "Jianxiang Yu", "Jiaqi Tan", "Xiang Li", "Weining Qian"), 2025,
                  "2408.03195", "KDD", "https://github.com/JasonZhujp/RELIEF",
                  "few-shot tasks of graphs: a policy adds small vectors to the features of chosen nodes")
    z_max: Annotated[float, In("> 0")] = 0.1
    members: Annotated[int, In(">= 1")] = 3
    alpha_d: Annotated[float, In(">= 0")] = 1.0
    alpha_c: Annotated[float, In(">= 0")] = 0.1
    batch_size: Annotated[int, In(">= 1")] = 8
    minibatch_size: Annotated[int, In(">= 2")] = 64
    passes: Annotated[int, In(">= 1")] = 10
    policy_lr: Annotated[float, In("> 0")] = 5e-4
    policy_decay: bool = False
    gamma: Annotated[float, In("[0, 1]")] = 0.99
    lam: Annotated[float, In("[0, 1]")] = 0.95
    clip: Annotated[float, In("> 0")] = 0.2
    entropy: Annotated[float, In(">= 0")] = 0.01
    critic_weight: Annotated[float, In(">= 0")] = 0.5
    max_norm: Annotated[float, In("> 0")] = 0.5
    kl_discrete: Annotated[float, In("> 0")] = 1e-3
    kl_content: Annotated[float, In("> 0")] = 0.1
    log_std: Annotated[float, In("[-5, 2]")] = 0.0
    critic: Literal["flat", "pool"] = "flat"
    clip_action: bool = False
    warmup: Annotated[int, In(">= 0")] = 0
    nodes: Choice = "learned"
    content: Choice = "learned"
    draws: Annotated[int, In(">= 1")] = 1
    deterministic: bool = False

    @classmethod
    def conformance(cls) -> dict[str, Any]:
        """See :meth:`looseleaf.Plugin.conformance`."""
        from looseleaf_relief.data import toy_graphs, toy_network

        return {"task": toy_graphs, "model": toy_network, "calls": 2000, "make": lambda: cls(
            epochs=5, skip=1, members=2, batch_size=4, minibatch_size=8, passes=2, z_max=0.5, policy_lr=5e-3,
            head_lr=0.02)}

    def options(self, graphs: Sequence[Data]) -> tuple[str, dict[str, Any]]:
        """See :meth:`GraphOptimizer.options`."""
        if len(graphs) < self.members:
            raise ValueError(f"members: expected at most {len(graphs)}, the number of training graphs, got "
                             f"{self.members}: each pair of actors has a part of its own")
        return "relief", {"members": self.members, "z_max": self.z_max, "nodes": self.nodes, "content": self.content,
                          "clip": self.clip_action}

    def groups(self, learner: Learner) -> list[dict[str, Any]]:
        """See :meth:`GraphOptimizer.groups`: the head alone."""
        return [{"params": list(learner.head.parameters()), "lr": self.head_lr}]

    def optimizers(self, run: Run) -> list[torch.optim.Optimizer]:
        """See :meth:`GraphOptimizer.optimizers`: one more for each member, with the critic that they share."""
        learner = run.learner
        assert isinstance(learner, PromptingPolicy)
        with own_random_state(run.seed + 1):
            most = max(int(g.num_nodes or 0) for g in run.graphs)
            learner.critic = Critic(self.critic, learner.spec.d, most).to(run.network.device)
        members = [[*pair.parameters(), *learner.critic.parameters()] for pair in learner.policy.pairs]
        return [*super().optimizers(run),
                *(torch.optim.Adam(each, lr=self.policy_lr, eps=1e-5, fused=True) for each in members)]

    def evaluation(self) -> dict[str, Any]:
        """See :meth:`GraphOptimizer.evaluation`."""
        return {"draws": self.draws, "deterministic": self.deterministic}

    def ppo(self) -> PPO:
        """How members are trained."""
        return PPO(**{f.name: getattr(self, f.name) for f in dataclasses.fields(PPO)})

    def before(self, run: Run, epoch: int) -> dict[str, float]:
        """Every member collects episodes and is updated; the mean decrease of the loss over an episode is noted."""
        if epoch == 0 and self.warmup:
            run.train_head(epoch, self.warmup)
        if self.nodes == self.content == "random":
            return {}
        learner, left = run.learner, 1 - epoch / self.epochs
        assert isinstance(learner, PromptingPolicy)
        log_std = self.log_std + (LAST_LOG_STD - self.log_std) * epoch / self.epochs
        generator, norm, ppo = run.generator(epoch), RunningNorm(), self.ppo()
        parts = member_parts(len(run.graphs), self.members, run.seed)
        returns: list[float] = []
        updates = skipped = 0
        learner.eval()
        for member, part in enumerate(parts):
            optimizer = run.optimizers[1 + member]
            for group in optimizer.param_groups:
                group["lr"] = self.policy_lr * (left if self.policy_decay else 1.0)
            order = torch.randperm(len(part), generator=generator).tolist()
            for at in range(0, len(order), self.batch_size):
                rows = [part[n] for n in order[at:at + self.batch_size]]
                batch = run.network.collate([run.graphs[n] for n in rows])
                _, steps = episode(learner.policy, run.network, batch, Noise([generator], len(rows)), member=member,
                                   log_std=log_std, loss=run.loss_of(batch, run.labels[rows]))
                assert steps is not None
                returns.append(float(steps.reward.sum()) / len(rows))
                made = ppo.update(learner.policy, member, learner.critic, optimizer, steps, norm(steps.reward),
                                  entropy=self.entropy * left, log_std=log_std, generator=generator)
                updates, skipped = updates + made, skipped + (made == 0)
        if not updates:
            run.warn(f"the policy was not trained: expected batches of more than minibatch_size={self.minibatch_size} "
                     f"transitions, one for each node of {self.batch_size} graphs, got none: lower minibatch_size or "
                     "raise batch_size")
        return {"return": sum(returns) / len(returns), "updates": updates, "skipped_batches": skipped}


def member_parts(count: int, members: int, seed: int) -> list[list[int]]:
    """Numbers of the training graphs of each member: a part of its own, and the last fifth of every other.

    Args:
        count: training graphs; they are shuffled by ``seed``.
        members: parts; the last has what is left over.
        seed: random seed.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    size = count // members
    parts = [order[n * size:(n + 1) * size if n < members - 1 else count] for n in range(members)]
    shared = int(size * OVERLAP)
    return [part + [n for other in parts if other is not part for n in other[len(other) - shared:]] for part in parts]


__all__ = ["RELIEF", "PromptingPolicy", "member_parts"]
