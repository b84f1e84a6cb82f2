"""The objectives, pre-training, transfer, rollouts and the probe."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf.modes import own_random_state
from looseleaf_inverse_dynamics import (
    Cloning,
    Contrastive,
    Demonstrations,
    ForwardExplicit,
    ForwardImplicit,
    Inverse,
    InverseDynamics,
    Objective,
    PictureEncoder,
    VectorEncoder,
    action_error,
    check_objective,
    info_nce,
    pretrain,
    rollout,
    spatial_softmax,
    transfer,
)
from looseleaf_inverse_dynamics.networks import default_encoder, mlp, random_crop, represent
from looseleaf_inverse_dynamics.probe import split
from looseleaf_inverse_dynamics.training import agreement, features
from looseleaf_inverse_dynamics.worlds import PointMass, point_mass_demonstrations

KINDS = (Inverse(), Inverse(n=3, all_actions=True), Cloning(), ForwardExplicit(), ForwardImplicit(), Contrastive())


def vectors(trajectories=12, steps=9, discrete=False, seed=0, context="a", noise=2):
    """The action is what the state changes by: a tenth of it, or its direction."""
    rng = np.random.default_rng(seed)
    actions = [rng.uniform(-1, 1, (steps, 2)) for _ in range(trajectories)]
    states = [np.concatenate([np.zeros((1, 2)), np.cumsum(a, 0)]) + rng.normal(size=2) for a in actions]
    if discrete:
        actions = [(a[:, 0] > 0).astype(int) + 2 * (a[:, 1] > 0) for a in actions]
    seen = [np.concatenate([s, rng.normal(size=(len(s), noise))], 1) for s in states]
    return Demonstrations.from_arrays(seen, actions, states=states, contexts=[context] * trajectories)


def pictures(trajectories=4):
    """Two frames of the point mass."""
    return point_mass_demonstrations(trajectories)


def encoder(inputs=4, seed=0):
    with own_random_state(seed):
        return VectorEncoder(inputs, 8, (32,))


def small_pictures_encoder():
    with own_random_state(0):
        return PictureEncoder(2, 8, (4, 4), (2, 2), 4)


# -------------------------------------------------------------------------------------------------------- objectives
def test_info_nce_of_equal_vectors_is_the_logarithm_of_how_many():
    same = torch.randn(1, 8).expand(7, 8)
    assert float(info_nce(same, same)) == pytest.approx(math.log(7))
    right = float(info_nce(torch.eye(7), 5 * torch.eye(7), 0.1))
    assert right == pytest.approx(math.log(1 + 6 * math.exp(-10)), rel=1e-3)
    assert float(info_nce(torch.eye(7), torch.eye(7).flip(0), 0.1)) > 8  # which of the second belongs to each first


@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 2), (2, 6)])
def test_spatial_softmax_of_one_peak_is_its_coordinates(row, column):
    maps = torch.full((1, 2, 5, 7), -1e4)
    maps[0, 0, row, column] = maps[0, 1, 2, 3] = 0
    found = spatial_softmax(maps)[0].tolist()
    assert found == pytest.approx([column / 3 - 1, 0, row / 2 - 1, 0], abs=1e-6)  # x of all maps, then y


@pytest.mark.parametrize("objective", KINDS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("kind", ["amounts", "choices", "pictures"])
def test_every_objective_is_one(objective, kind):
    demonstrations = pictures(2) if kind == "pictures" else vectors(discrete=kind == "choices")
    check_objective(objective, demonstrations, small_pictures_encoder() if kind == "pictures" else encoder(), 8)


def test_losses_are_those_of_the_formulas():
    demonstrations, net = vectors(), encoder()
    rows = demonstrations.pairs(2)[:5]
    for objective in (Inverse(n=2), Cloning(n=2), ForwardExplicit(n=2), ForwardImplicit(n=2)):
        with own_random_state(0):
            heads = objective.heads(8, demonstrations)
        batch = objective.batch(demonstrations, rows, torch.Generator())
        now, later, action = net(demonstrations.observations[rows]), net(demonstrations.observations[rows + 2]), \
            demonstrations.actions[rows]
        if isinstance(objective, Inverse):
            value = (heads["action"](torch.cat([now, later], 1)) - action).norm(dim=1).square().mean()
        elif isinstance(objective, Cloning):
            value = (heads["action"](now) - action).norm(dim=1).square().mean()
        elif isinstance(objective, ForwardExplicit):
            guess = heads["decode"](torch.cat([now, heads["embed"](action)], 1))
            value = (guess - demonstrations.observations[rows + 2]).norm(dim=1).square().mean()
        else:
            one, two = heads["now"](torch.cat([now, heads["embed"](action)], 1)), heads["later"](later)
            similarity = torch.nn.functional.cosine_similarity(one[:, None], two[None], dim=-1)
            value = -similarity.log_softmax(1).diagonal().mean()
        assert objective.loss(net, heads, batch).item() == pytest.approx(value.item(), rel=1e-5)


def test_stop_gradient_holds_the_later_observation():
    demonstrations = vectors()
    for stop, reaches in ((False, True), (True, False)):
        objective = Inverse(stop_gradient=stop)
        heads = objective.heads(2, demonstrations)
        batch = objective.batch(demonstrations, demonstrations.pairs(1)[:4], torch.Generator())
        batch = batch._replace(later=batch.later.clone().requires_grad_())
        objective.loss(lambda x: x[:, :2] * 1.0, heads, batch).backward()
        assert (batch.later.grad is not None and bool(batch.later.grad.any())) == reaches


def test_crops_are_drawn_separately_unless_asked_otherwise():
    demonstrations = pictures(2)
    rows = torch.tensor([5, 6, 7])
    still = dataclasses.replace(demonstrations, observations=demonstrations.observations[:1].expand(
        len(demonstrations.observations), -1, -1, -1))
    for same in (True, False):
        batch = Inverse(crop=4, same_crop=same).batch(still, rows, torch.Generator().manual_seed(0))
        assert torch.equal(batch.first, batch.later) == same
    assert torch.equal(random_crop(torch.ones(2, 1, 6, 6), 2, torch.Generator()), torch.ones(2, 1, 6, 6))


@dataclasses.dataclass
class Nothing(Objective):
    """An objective that ignores the encoder."""

    def heads(self, k, demonstrations):
        return nn.ModuleDict({"head": mlp(1, 1)})

    def loss(self, encode, heads, batch):
        return heads["head"](batch.action[:, :1].float()).square().mean()


def test_an_objective_that_does_not_train_the_encoder_is_found_out():
    with pytest.raises(AssertionError, match="gradient of the encoder"):
        check_objective(Nothing(), vectors(), encoder(), 8)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Inverse(n=0), "n: expected an integer >= 1"), (lambda: Contrastive(n=1), "n: expected"),
    (lambda: ForwardImplicit(temperature=0.0), "temperature"),
    (lambda: pretrain(vectors(), "IDM", steps=1), "expected one of ID, BC")])
def test_bad_objectives(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------- pre-training and transfer
def test_inverse_dynamics_finds_the_state_that_cloning_cannot():
    demonstrations = vectors(60, noise=12)
    r2 = {}
    for name in ("ID", "BC"):
        result = pretrain(demonstrations, name, encoder(14), steps=150, batch=64, lr=2e-2, progress=False)
        r2[name] = 1 - np.mean(result.state_losses[-20:])
        assert name == "BC" or np.mean(result.losses[-20:]) < 0.5 * result.losses[0]
    assert r2["ID"] > 0.7 > r2["BC"] + 0.2, r2


def test_the_same_seed_gives_the_same_encoder_and_the_given_one_is_left_alone():
    demonstrations, given = vectors(), encoder()
    before = copy.deepcopy(given.state_dict())
    one, two, other = (pretrain(demonstrations, "ID", given, steps=3, batch=16, seed=seed, progress=False).encoder
                       for seed in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same) and not torch.equal(next(one.parameters()), next(other.parameters()))
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    assert not torch.equal(next(one.parameters()), next(given.parameters()))


def test_states_are_measured_and_never_trained_on():
    demonstrations = vectors()
    with_states, without = (pretrain(d, "ID", encoder(), steps=4, batch=16, progress=False) for d in (
        demonstrations, dataclasses.replace(demonstrations, states=None)))
    assert all(torch.equal(a, b) for a, b in zip(with_states.encoder.parameters(), without.encoder.parameters(),
                                                 strict=True))
    assert len(with_states.state_losses) == 4 and not without.state_losses


def test_frozen_parts_stay_and_their_batch_norm_does_not_drift():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    for parameter in net[:2].parameters():
        parameter.requires_grad_(False)
    trained = pretrain(vectors(), "ID", net, steps=3, batch=16, progress=False).encoder
    assert torch.equal(trained[1].running_mean, torch.zeros(8)) and torch.equal(trained[0].weight, net[0].weight)
    assert not torch.equal(trained[2].weight, net[2].weight)


def test_a_frozen_encoder_is_unchanged_after_transfer_and_a_tuned_one_is_a_copy():
    net, demonstrations = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), vectors()
    net.train()
    before = copy.deepcopy(net.state_dict())
    policy = transfer(net, demonstrations, steps=5, progress=False)
    assert policy.encoder is net and net.training and net[2].training
    tuned = transfer(net, demonstrations, tune=True, steps=5, progress=False)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not torch.equal(tuned.encoder[0].weight, net[0].weight)
    assert np.array_equal(policy.act(demonstrations.observations[:3]), policy.act(demonstrations.observations[:3]))


def test_an_identity_encoder_is_the_state():
    demonstrations = vectors(discrete=True)
    assert torch.equal(features(nn.Identity(), demonstrations), demonstrations.observations)
    policy = transfer(nn.Identity(), demonstrations, steps=2, progress=False)
    assert policy.act(demonstrations.observations[:5]).dtype == np.int64
    assert 0 <= action_error(policy, demonstrations) <= 1


def test_what_encoders_give():
    x = torch.randn(3, 2, 32, 32)
    assert represent(nn.Conv2d(2, 5, 3), x).shape == (3, 5)
    assert represent(default_encoder((2, 32, 32), 16), x).shape == (3, 16)
    for bad in (nn.Flatten(0), nn.Unflatten(1, (1, 2))):
        with pytest.raises(TypeError, match="expected a float tensor"):
            represent(bad, x)
    with pytest.raises(ValueError, match="an encoder of your own"):
        default_encoder((2, 3))


def test_a_transformers_encoder_of_pictures():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                       patch_size=14, mlp_ratio=1, num_channels=2)
    with own_random_state(0):
        net = transformers.Dinov2Model(config)
    result = pretrain(pictures(2), "ID", net, steps=2, batch=4, progress=False)
    assert features(result.encoder, pictures(1)).shape == (31, 16)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: (d.take([0]), encoder()), "two trajectories or more"),
    (lambda d: (dataclasses.replace(d, actions=torch.ones_like(d.actions)), encoder()), "actions that vary"),
    (lambda d: (d, encoder().requires_grad_(False)), "unfreeze the part to train"),
    (lambda d: (dataclasses.replace(d, actions=d.actions * 1e30), encoder()), "expected a finite loss"),
])
def test_what_cannot_be_pretrained_on(change, message):
    demonstrations, net = change(vectors())
    with pytest.raises(ValueError, match=message):
        pretrain(demonstrations, "ID", net, steps=2, batch=8, progress=False)


def test_actions_beyond_the_bounds_of_a_policy():
    demonstrations = dataclasses.replace(vectors(), actions=3 * vectors().actions)
    with pytest.raises(ValueError, match="pass bounded=False"):
        transfer(encoder(), demonstrations, steps=1, progress=False)
    assert not transfer(encoder(), demonstrations, steps=1, bounded=False, progress=False).bounded


class Expert(nn.Module):
    """Acts as the expert of the point mass would that sees through the last picture."""

    def __init__(self, goal):
        super().__init__()
        self.goal, self.weight = torch.tensor(goal), nn.Parameter(torch.zeros(1))

    def forward(self, frames):
        grid = torch.linspace(-1.2, 1.2, 32)
        place = torch.stack([(f.sum(d) * grid).sum(-1) / f.sum((-2, -1)) for f in [frames[:, 1]] for d in (-2, -1)], 1)
        return 3 * (self.goal - place)


def test_rollouts_side_by_side_are_those_of_one_environment():
    goal = (0.3, -0.2)
    demonstrations = point_mass_demonstrations(3, goal=goal)
    policy = transfer(nn.Flatten(), demonstrations, steps=1, progress=False)
    policy.encoder, policy.head = Expert(goal), nn.Identity()
    alone = rollout(policy, PointMass(goal), rollouts=6)
    assert alone == rollout(policy, [PointMass(goal) for _ in range(4)], rollouts=6) and np.mean(alone) > 0.6
    policy.encoder = Expert((-0.9, 0.9))
    assert not any(rollout(policy, PointMass(goal), rollouts=3))


def test_agreement_is_one_with_oneself_and_none_with_noise():
    with own_random_state(0):
        base = torch.randn(600, 3)
        known = {"a": base, "turned": base @ torch.randn(3, 3), "noise": torch.randn(600, 3)}
    found = agreement(known, torch.arange(400), torch.arange(400, 600), steps=200)
    assert found["a"]["turned"] > 0.9 and found["turned"]["a"] > 0.9 and found["a"]["noise"] < 0.1


# ------------------------------------------------------------------------------------------------------------ the probe
def small(**options):
    return InverseDynamics(**{"objectives": ("ID",), "demonstrations": (2,), "repeats": 2, "steps": 3, "batch": 8,
                              "policy_steps": 3, "rollouts": 2, **options})


def test_the_report_has_every_method_size_and_number_of_demonstrations(tmp_path):
    probe = small(objectives=("ID", Inverse(n=2)), sizes=(4, 8), demonstrations=(1, 2), state_dir=str(tmp_path))
    data = vectors(8), vectors(5, seed=1, context="b")
    report = probe.run(encoder(), data, progress=False)
    rows = {tuple(row[:3]) for row in report.tables[0].rows}
    assert {(name, size, count) for name in ("ID", "Inverse(n=2)") for size in (4, 8) for count in (1, 2)} < rows
    assert {("as given, frozen", 0, 1), ("as given, trained with the policy", 0, 2), ("true state", 0, 1)} < rows
    assert report.tables[1].columns == ["from", "ID", "Inverse(n=2)", "as given, frozen", "true state"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    again = probe.run(encoder(), data, progress=False)
    assert again.tables[0].rows == report.tables[0].rows  # from what was kept


def test_success_is_measured_where_there_is_an_environment():
    goal = (0.3, -0.2)
    new = point_mass_demonstrations(3, 1, goal)
    report = small(rollouts=2).run((small_pictures_encoder(), {new.contexts[0]: PointMass(goal)}), (pictures(3), new),
                                   progress=False)
    success = {row[0]: row[6] for row in report.tables[0].rows}
    assert 0 <= success["ID"] <= 1 and success["true state"] is None


def test_labelled_demonstrations_alone_are_split_by_context():
    parts = [vectors(4, seed=i, context=str(i)) for i in range(11)]
    corpus, new = split(Demonstrations.joined(parts), 0, 3)
    assert len(set(new.contexts)) == 1 and len(set(corpus.contexts)) == 10
    assert not set(new.contexts) & set(corpus.contexts)


@pytest.mark.parametrize(("data", "kind", "message"), [
    (vectors(), ValueError, "two contexts or more"), ("demonstrations", TypeError, "expected Demonstrations"),
    ((vectors(), vectors()), ValueError, "contexts that are not in the corpus, got a in both"),
    ((vectors(), vectors(2, context="b")), ValueError, "expected 3 trajectories or more"),
    ((vectors(), vectors(discrete=True, context="b")), ValueError, "expected the discrete False"),
])
def test_data_that_cannot_be_compared_on(data, kind, message):
    with pytest.raises(kind, match=message):
        small().run(encoder(), data, progress=False)


@pytest.mark.parametrize(("subject", "message"), [
    (nn.Linear(5, 3), r"takes a batch of observations of shape \(4,\)"),
    (nn.Embedding(4, 3), "got Embedding, which says"),
    ((encoder(), "tokenizer"), r"step\(action\), got str"),
])
def test_subjects_that_do_not_fit_the_data(subject, message):
    with pytest.raises(TypeError, match=message):
        small().run(subject, (vectors(), vectors(3, context="b")), progress=False)


def test_an_environment_for_each_new_task():
    with pytest.raises(ValueError, match="expected one for each of b, got c"):
        small().run((encoder(), {"c": PointMass((0, 0))}), (vectors(), vectors(3, context="b")), progress=False)


@pytest.mark.parametrize(("options", "message"), [
    ({"objectives": ("IDM",)}, "objectives: expected some of ID"), ({"objectives": ()}, "objectives"),
    ({"sizes": (1,)}, "sizes: expected integers >= 2"), ({"demonstrations": (0,)}, "demonstrations")])
def test_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        InverseDynamics(**options)
