"""The pieces of the method by hand, and a whole episode and update against a plain reference."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.nn import functional as F
from torch_geometric.data import Data

from looseleaf.fingerprint import fingerprint
from looseleaf_relief import RELIEF, FineTuning, GraphNetwork, LinearProbe, RandomPrompt, coverage
from looseleaf_relief.data import planted, toy_graphs, toy_network
from looseleaf_relief.graphs import counts, graph_of, pooled
from looseleaf_relief.optimizer import member_parts
from looseleaf_relief.policy import (
    PPO,
    Critic,
    DiscreteActor,
    Noise,
    Policy,
    RunningNorm,
    Transitions,
    dense,
    discrete_kl,
    episode,
    gae,
    joint,
    normal_log_prob,
    places,
)
from looseleaf_relief.prompt import LearnerSpec

PPO_ = PPO(gamma=0.9, lam=0.8, clip=0.2, critic_weight=0.5, max_norm=0.5, passes=3, minibatch_size=8, kl_discrete=1e-3,
           kl_content=0.1, alpha_d=2.0, alpha_c=0.1)


def quick(**options):
    return RELIEF(**{"epochs": 4, "skip": 1, "members": 2, "batch_size": 4, "minibatch_size": 8, "passes": 2,
                     "z_max": 0.5, "policy_lr": 5e-3, "head_lr": 0.02, **options})


def toy_batch(network=None, count=6):
    network = network or toy_network()
    return network, network.collate([graph_of(e) for e in toy_graphs().train[:count]])


def a_policy(members=2, **options):
    torch.manual_seed(3)
    policy = Policy(6, 4, members, 0.5, **options)
    for parameter in policy.parameters():  # the last layers begin near zero: all members would be alike
        nn.init.normal_(parameter, std=0.7)
    return policy


# ------------------------------------------------------------------------------------------ by hand
def test_gae() -> None:
    r, v = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64), torch.tensor([0.2, 0.4, 0.1], dtype=torch.float64)
    d2 = -1.0 - 0.1  # the episode ends: no value behind it
    d1 = 0.5 + 0.9 * 0.1 - 0.4
    d0 = 1.0 + 0.9 * 0.4 - 0.2
    expected = torch.tensor([d0 + 0.72 * (d1 + 0.72 * d2), d1 + 0.72 * d2, d2], dtype=torch.float64)
    assert torch.allclose(gae(r, v, 0.9, 0.8), expected, atol=1e-12)
    assert torch.allclose(gae(r, torch.zeros(3).double(), 1.0, 1.0), torch.tensor([0.5, -0.5, -1.0]).double())


def test_joint_policy() -> None:
    one, two, largest = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.5, 0.4]], [[0.7, 0.5, 0.4]]], dtype=torch.float64)
    assert torch.allclose(joint([one.log(), two.log()]).exp(), largest / 1.6, atol=1e-12)
    policy, nodes = a_policy(), torch.randn(5, 6)
    assert torch.allclose(policy.means(nodes), (policy.means(nodes, 0) + policy.means(nodes, 1)) / 2, atol=1e-6)
    assert policy.means(nodes).abs().max() <= 0.5


def test_divergences() -> None:
    p, q = torch.tensor([[[0.5, 0.3, 0.2, 0.0]], [[0.2, 0.2, 0.6, 0.0]]], dtype=torch.float64)
    expected = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    assert float(discrete_kl(p.log(), q.log())) == pytest.approx(expected, abs=1e-12)
    assert float(discrete_kl(p.log(), p.log())) == 0
    x, mean = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = Normal(mean, math.exp(-0.7)).log_prob(x).sum(-1)
    assert torch.allclose(normal_log_prob(x, mean, -0.7), expected, atol=1e-12)


def test_running_norm() -> None:
    norm, values = RunningNorm(), [0.3, -0.2, 0.5]
    found = norm(torch.tensor(values, dtype=torch.float64))
    seen = list(values)  # the first batch is counted in beforehand, then once more as it is normalised
    for x, y in zip(values, found.tolist(), strict=True):
        seen.append(x)
        t = torch.tensor(seen, dtype=torch.float64)
        assert y == pytest.approx((x - float(t.mean())) / (float(t.std(correction=0)) + 1e-8), abs=1e-12)
    assert norm.count == 6


def test_places_and_padding() -> None:
    _, batch = toy_batch()
    assert counts(batch).tolist() == [2, 3, 4, 2, 3, 4]
    assert places(batch).tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    nodes = torch.randn(18, 3)
    padded = dense(nodes, batch)
    assert padded.shape == (6, 4, 3) and torch.equal(padded[1, :3], nodes[2:5]) and not padded[1, 3].any()
    assert torch.allclose(pooled(nodes, batch)[1], nodes[2:5].mean(0), atol=1e-6)


def test_nodes_that_are_not_there_have_probability_0() -> None:
    _, batch = toy_batch()
    states = dense(torch.randn(18, 6), batch)
    real = torch.arange(4)[None] < counts(batch)[:, None]
    policy = a_policy()
    for log_probs in (policy.node_log_probs(states, real, 0), policy.node_log_probs(states, real)):
        assert (log_probs.exp()[~real] == 0).all() and torch.allclose(log_probs.exp().sum(1), torch.ones(6), atol=1e-6)
    noise = Noise([torch.Generator().manual_seed(0)], 6)
    drawn = torch.stack([noise.node(policy.node_log_probs(states, real)) for _ in range(300)])
    assert (drawn < counts(batch)[None]).all()
    # and each as often as its probability says
    share = torch.stack([(drawn == n).float().mean(0) for n in range(4)], 1)
    assert (share - policy.node_log_probs(states, real).exp()).abs().max() < 0.1
    assert (Noise([torch.Generator()], 6, deterministic=True).node(torch.where(real, 0.0, -torch.inf)) == 0).all()


def test_rounding_leads_to_no_node_behind_the_last() -> None:
    class Highest(Noise):
        def uniform(self) -> torch.Tensor:
            return torch.ones(self.count)

    log_probs = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    assert Highest([], 2).node(log_probs).tolist() == [1, 0]


def test_permuting_nodes_permutes_the_policy() -> None:
    _, batch = toy_batch()
    states, real = dense(torch.randn(18, 6), batch)[2:3], torch.ones(1, 4, dtype=torch.bool)
    order, policy, pool = torch.tensor([2, 0, 3, 1]), a_policy(), Critic("pool", 6, 4)
    one, two = policy.node_log_probs(states, real), policy.node_log_probs(states[:, order], real)
    assert torch.allclose(one[:, order], two, atol=1e-6)
    assert torch.allclose(policy.means(states[0])[order], policy.means(states[0, order]), atol=1e-6)
    assert torch.allclose(pool(states, real), pool(states[:, order], real), atol=1e-6)
    flat = Critic("flat", 6, 4)  # which the paper's is not
    assert not torch.allclose(flat(states, real), flat(states[:, order], real), atol=1e-6)


def test_whole_graphs_permuted_get_permuted_probabilities() -> None:
    network = toy_network()
    graph, order = graph_of(toy_graphs().train[2]), torch.tensor([2, 0, 3, 1])
    place = torch.empty(4, dtype=torch.long)
    place[order] = torch.arange(4)
    other = Data(x=graph.x[order], edge_index=place[graph.edge_index])
    policy, real = a_policy(), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        one, two = (policy.node_log_probs(network.embed(network.collate([g]))[None], real) for g in (graph, other))
    assert torch.allclose(one[:, order], two, atol=1e-5)


def test_sizes_of_the_networks() -> None:
    assert [m.weight.shape for m in DiscreteActor(8).layers[::2]] == [(4, 8), (2, 4), (1, 2)]
    assert [m.weight.shape for m in Policy(8, 5, 1, 0.1).pairs[0].content.layers[::2]] == [(4, 8), (4, 4), (5, 4)]
    assert [m.weight.shape for m in Critic("flat", 8, 10).layers[::2]] == [(4, 80), (2, 4), (1, 2)]
    with pytest.raises(ValueError, match=r"critic: expected at most 3 nodes, .*, got 4: train it"):
        Critic("flat", 8, 3)(torch.zeros(1, 4, 8), torch.ones(1, 4, dtype=torch.bool))
    first = DiscreteActor(8).layers[0].weight
    assert torch.allclose(first @ first.t(), 2 * torch.eye(4), atol=1e-5)  # orthogonal, gain sqrt 2
    assert float(DiscreteActor(8).layers[-1].weight.detach().norm()) == pytest.approx(0.01, abs=1e-6)


def test_parts_of_the_members() -> None:
    parts = member_parts(50, 3, 0)
    assert [len(p) for p in parts] == [16 + 3 + 3, 16 + 3 + 3, 18 + 3 + 3]
    own = [part[:n] for part, n in zip(parts, (16, 16, 18), strict=True)]
    assert sorted(n for part in own for n in part) == list(range(50))
    assert parts[0][16:] == own[1][-3:] + own[2][-3:]  # the last fifth of every other
    assert [len(p) for p in member_parts(9, 3, 0)] == [3, 3, 3]  # a fifth of three is none, not all


# ------------------------------------------------------------------------------------------ an episode, plainly
class Recorded(Noise):
    """Numbers drawn beforehand: (steps, graphs) for nodes, (steps, graphs, D) for vectors."""

    def __init__(self, steps, graphs, width):
        super().__init__([], graphs)
        draw = torch.Generator().manual_seed(5)
        self.u, self.z = torch.rand(steps, graphs, generator=draw), torch.randn(steps, graphs, width, generator=draw)
        self.at = 0

    def uniform(self):
        self.at += 1
        return self.u[self.at - 1]

    def normal(self, width):
        return self.z[self.at - 1]


def reference(policy, network, graph, label, head, member, log_std, u, z):
    """One graph by itself; the network runs for the state and again for the reward, as the paper describes it."""
    batch = network.collate([graph])
    prompt, out = torch.zeros(graph.num_nodes, 4), []

    def loss(p):
        return F.cross_entropy(head(network.embed(batch, p).mean(0))[None], torch.tensor([label]))

    for t in range(graph.num_nodes):
        state, pair = network.embed(batch, prompt), policy.pairs[member]
        probabilities = torch.softmax(pair.discrete.layers(state)[:, 0], 0)
        node = int((probabilities.cumsum(0) <= u[t]).sum())
        dist = Normal(0.5 * torch.tanh(pair.content.layers(state[node])), math.exp(log_std))
        action = dist.mean + dist.stddev * z[t]
        before = loss(prompt)
        prompt = prompt.clone()
        prompt[node] += action
        out.append((state, node, action, Categorical(probabilities).log_prob(torch.tensor(node)),
                    dist.log_prob(action).sum(), before - loss(prompt)))
    return prompt, out


@torch.no_grad()
def test_an_episode_of_a_batch_is_that_of_each_graph() -> None:
    network, batch = toy_batch()
    policy, head, labels = a_policy(), nn.Linear(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    noise = Recorded(4, 6, 4)
    prompt, steps = episode(policy, network, batch, noise, member=1, log_std=-1.0,
                            loss=lambda nodes: F.cross_entropy(head(pooled(nodes, batch)), labels, reduction="none"))
    assert steps is not None and len(steps.node) == 18  # as many steps as nodes
    parts, at = prompt.split(counts(batch).tolist()), 0
    for g, example in enumerate(toy_graphs().train[:6]):
        graph = graph_of(example)
        plain, rows = reference(policy, network, graph, int(labels[g]), head, 1, -1.0, noise.u[:, g], noise.z[:, g])
        assert torch.allclose(plain, parts[g], atol=1e-5)
        for state, node, action, lp_d, lp_c, reward in rows:
            n = graph.num_nodes
            assert torch.allclose(steps.states[at, :n], state, atol=1e-5) and not steps.states[at, n:].any()
            assert int(steps.node[at]) == node and int(steps.graph[at]) == g
            assert torch.allclose(steps.action[at], action, atol=1e-5)
            for found, wanted in ((steps.node_log_prob, lp_d), (steps.action_log_prob, lp_c), (steps.reward, reward)):
                assert float(found[at]) == pytest.approx(float(wanted), abs=1e-4)
            at += 1
    assert at == 18


def some_steps(policy, member=0):
    network, batch = toy_batch()
    torch.manual_seed(1)
    head, labels = nn.Linear(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    return episode(policy, network, batch, Noise([torch.Generator().manual_seed(0)], 6), member=member, log_std=-1.0,
                   loss=lambda h: F.cross_entropy(head(pooled(h, batch)), labels, reduction="none"))[1]


def test_the_loss_of_a_member_by_a_plain_reference() -> None:
    behaviour, policy = a_policy(), a_policy()
    steps = some_steps(behaviour)
    with torch.no_grad():
        for parameter in policy.pairs[0].parameters():
            parameter += 0.05
    advantages = torch.randn(18, generator=torch.Generator().manual_seed(2))
    found, kl_d, kl_c = PPO_.loss(policy, 0, steps, advantages, 0.01, -1.0, PPO_.others(policy, 0, steps))
    total, kls = [], []
    for s in range(18):
        n = int(steps.real[s].sum())
        state, node, action, advantage = steps.states[s, :n], int(steps.node[s]), steps.action[s], float(advantages[s])
        members = [torch.softmax(p.discrete.layers(state)[:, 0], 0) for p in policy.pairs]
        dist, own = Categorical(members[0]), Normal(0.5 * torch.tanh(policy.pairs[0].content.layers(state[node])),
                                                    math.exp(-1.0))
        largest = torch.stack(members).max(0).values
        together, best = (largest / largest.sum()).detach(), int(largest.argmax())
        value = 0.0
        for now, then in ((dist.log_prob(torch.tensor(node)), steps.node_log_prob[s]),
                          (own.log_prob(action).sum(), steps.action_log_prob[s])):
            ratio = torch.exp(now - then)
            value = value - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            kls.append(float(((ratio - 1) - (now - then)).detach()))
        value = value - 0.01 * dist.entropy() + 2.0 * (together * (together / members[0]).log()).sum()
        means = [0.5 * torch.tanh(p.content.layers(state[best])) for p in policy.pairs]
        mean = torch.stack(means).mean(0).detach()
        value = value + 0.1 * kl_divergence(Normal(means[0], math.exp(-1.0)), Normal(mean, math.exp(-1.0))).sum()
        total.append(value)
    plain = torch.stack(total).mean()
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert kl_d == pytest.approx(sum(kls[::2]) / 18, abs=1e-5) and kl_c == pytest.approx(sum(kls[1::2]) / 18, abs=1e-5)
    for one, two in zip(torch.autograd.grad(found, list(policy.pairs[0].parameters()), retain_graph=True),
                        torch.autograd.grad(plain, list(policy.pairs[0].parameters())), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    assert all(g is None for g in torch.autograd.grad(found, list(policy.pairs[1].parameters()), allow_unused=True))


def test_returns_are_of_each_episode() -> None:
    policy, critic = a_policy(), Critic("flat", 6, 5)
    steps = some_steps(policy)
    advantages, returns = PPO_.returns(steps, steps.reward, critic)
    at = 0
    for n in (2, 3, 4, 2, 3, 4):
        with torch.no_grad():
            padded = F.pad(steps.states[at:at + n], (0, 0, 0, 1)).flatten(1)  # zero rows up to five nodes
            values = critic.layers(padded)[:, 0]
        expected = gae(steps.reward[at:at + n], values, 0.9, 0.8)
        assert torch.allclose(advantages[at:at + n], expected, atol=1e-5)
        assert torch.allclose(returns[at:at + n], expected + values, atol=1e-5)
        at += n


def test_a_batch_of_no_more_than_a_minibatch_makes_no_update() -> None:
    policy, critic = a_policy(), Critic("pool", 6, 4)
    steps = some_steps(policy)

    def update(**options):
        ppo, one = dataclasses.replace(PPO_, **options), copy.deepcopy(policy)
        optimizer = torch.optim.Adam([*one.pairs[0].parameters(), *critic.parameters()], lr=0.01)
        count = ppo.update(one, 0, critic, optimizer, steps, steps.reward, entropy=0.01, log_std=-1.0,
                           generator=torch.Generator().manual_seed(0))
        changed = [not torch.equal(a, b) for a, b in zip(one.parameters(), policy.parameters(), strict=True)]
        half = len(changed) // 2
        assert not any(changed[half:])  # the other member stays as it is
        return count, any(changed[:half])

    assert update(minibatch_size=18) == (0, False)
    assert update(minibatch_size=8, kl_discrete=1e9, kl_content=1e9) == (3 * 2, True)  # passes, 18 // 8 updates each
    assert update(minibatch_size=8, kl_discrete=1e-12) == (2, True)  # stopped behind the first pass


def test_random_choices() -> None:
    network, batch = toy_batch()
    policy = a_policy(nodes="random", content="random")
    steps = [episode(policy, network, batch, Noise([torch.Generator().manual_seed(n)], 6))[0] for n in range(2)]
    assert not torch.equal(*steps)
    real = torch.arange(4)[None] < counts(batch)[:, None]
    uniform = policy.node_log_probs(torch.randn(6, 4, 6), real).exp()
    assert torch.allclose(uniform, real / counts(batch)[:, None], atol=1e-6)
    clipped = a_policy(clip=True)
    found, _ = episode(clipped, network, batch, Noise([torch.Generator().manual_seed(0)], 6), member=0, log_std=2.0)
    assert found.abs().max() <= 4 * 0.5 + 1e-6  # four steps at most


# ------------------------------------------------------------------------------------------ the frozen network
def test_no_prompt_is_the_network_itself_to_the_bit() -> None:
    network, batch = toy_batch()
    with torch.no_grad():
        plain = network.model(batch.x, batch.edge_index)
        assert torch.equal(network.embed(batch), plain)
        assert torch.equal(network.embed(batch, torch.zeros(18, 4)), plain)
        assert torch.equal(network.embed(batch, torch.zeros_like), plain)
        named = GraphNetwork(network.model, "first")
        assert torch.equal(named.embed(batch), plain)
        assert torch.equal(named.embed(batch, torch.zeros(18, 6)), plain)
        assert not torch.equal(named.embed(batch, torch.ones(18, 6)), plain)
    assert not any(m._forward_hooks for m in network.model.modules())


@pytest.mark.parametrize("method", [quick(), FineTuning(epochs=3, skip=1)])
def test_weights_and_batch_norm_buffers_stay_bit_identical(method) -> None:
    network = toy_network()
    network.model.train()  # with statistics that would drift, and dropout
    before = {n: t.clone() for n, t in network.model.state_dict().items()}
    method.optimize(toy_graphs(), network)
    assert all(torch.equal(t, before[n]) for n, t in network.model.state_dict().items())
    assert len(before) == 9 and any("running" in n for n in before)
    assert network.model.norm.training and network.fingerprint() == toy_network().fingerprint()
    assert fingerprint(network.model) == fingerprint(toy_network().model)


def test_a_graph_alone_is_prompted_as_in_a_batch() -> None:
    network, task = toy_network(), toy_graphs()
    predictor = quick().optimize(task, network).on(network)
    whole, prompts = predictor.scores(task.test), predictor.prompts(task.test)
    for n, example in enumerate(task.test):
        assert torch.allclose(predictor.scores([example])[0], whole[n], atol=1e-5)
        assert torch.allclose(predictor.prompts([example])[0], prompts[n], atol=1e-6)
    assert torch.allclose(predictor.scores(task.test[::-1]).flip(0), whole, atol=1e-5)


def test_coverage() -> None:
    prompts = [torch.tensor([[0.0, 0.0], [1.0, -3.0]]), torch.zeros(4, 2), torch.tensor([[0.5, 0.5]])]
    pcr, apm = coverage(prompts)
    assert pcr == pytest.approx((0.5 + 0 + 1) / 3) and apm == pytest.approx((2 + 0.5) / 2)
    assert coverage([torch.zeros(3, 2)]) == (0.0, 0.0)


def test_random_prompts_have_the_coverage_asked_for() -> None:
    task, network = planted(16)
    predictor = RandomPrompt(epochs=1, pcr=0.3, apm=0.2).optimize(task, network).on(network)
    assert coverage(predictor.prompts(task.test)) == pytest.approx((0.3, 0.2), abs=1e-5)


def test_a_head_alone_is_relief_without_a_prompt() -> None:
    """The same start of the head, the same passes: what differs is the prompt."""
    network, task = toy_network(), toy_graphs()
    probe, ours = LinearProbe(epochs=1, skip=0, head_epochs=0).optimize(task, network), quick(
        epochs=1, head_epochs=0).optimize(task, network)
    same = [n for n in probe.tensors if torch.equal(probe.tensors[n], ours.tensors[n])]
    assert same == [n for n in ours.tensors if n.startswith("head.")] and len(same) == 6


def test_specs_build_the_same_each_time() -> None:
    spec = LearnerSpec("relief", 4, 6, 2, 2, {"members": 2, "z_max": 0.1})
    state = torch.get_rng_state()
    one, two, other = spec.build(0), spec.build(0), spec.build(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.head[0].weight, other.head[0].weight)
    assert isinstance(some_steps(a_policy()), Transitions)
