"""The linear world: closed forms against sampled data, and against what a trained linear encoder comes to."""

import dataclasses

import pytest
import torch

from looseleaf_inverse_dynamics import (
    Cloning,
    ForwardExplicit,
    Inverse,
    LinearWorld,
    double_integrator,
    linear_encoder,
    pretrain,
)
from looseleaf_inverse_dynamics.linear import with_gains

ONE_SIDED = [[[-0.5, 0.0], [0.0, -0.3]], [[-0.3, 0.0], [0.0, -0.5]]]
KINDS = {"ID": Inverse(hidden=()), "BC": Cloning(hidden=()), "FD-e": ForwardExplicit(hidden=())}


@pytest.fixture(scope="module")
def world():
    return LinearWorld()


@pytest.fixture(scope="module")
def corpus(world):
    return world.sample(20_000, seed=1)


def test_moments_are_those_of_samples(world, corpus):
    for n in (1, 3):
        rows, moments = corpus.pairs(n), world.moments(n)
        pairs = torch.cat([corpus.observations[rows], corpus.actions[rows], corpus.observations[rows + n]], 1).double()
        assert (pairs.T @ pairs / len(pairs) - moments.of_observation).abs().max() < 0.03


@pytest.mark.parametrize(("name", "scale"), [("ID", 1.0), ("BC", 1.0), ("FD-e", 0.5), ("FD-e", 2.0)])
def test_a_trained_linear_encoder_comes_within_2_percent_of_the_closed_form(world, corpus, name, scale):
    objective = KINDS[name]
    if scale != 1:
        world = dataclasses.replace(world, nuisance_scale=scale)
        corpus = world.sample(20_000, seed=1)
    trained = pretrain(dataclasses.replace(corpus, states=None), objective, linear_encoder(world), steps=700, lr=4e-2,
                       progress=False)
    moments = world.moments(1)
    best = moments.best(name, 2)
    with torch.no_grad():
        batch = objective.batch(corpus, corpus.pairs(objective.n), torch.Generator())
        reached = float(objective.loss(trained.encoder, trained.heads, batch))
    assert reached == pytest.approx(best.loss, rel=0.02)
    # most of what forward dynamics cannot predict, nobody can: what the features take off the loss is what counts
    nothing = moments.reached(name, torch.zeros(1, 32))
    gain = nothing - moments.reached(name, trained.encoder.weight.detach())
    assert gain == pytest.approx(nothing - best.loss, rel=0.02, abs=1e-6)
    if name != "BC":  # its optimum has no feature at all
        assert moments.state_r2(trained.encoder.weight.detach()) == pytest.approx(best.state_r2, rel=0.02, abs=0.02)


def test_cancelling_contexts_leave_cloning_nothing_and_inverse_dynamics_everything(world):
    moments = world.moments(1)
    cloned, inverse = moments.best("BC", 2), moments.best("ID", 2)
    assert len(cloned.encoder) == 0 and cloned.state_r2 == 0
    assert cloned.loss == pytest.approx(float(moments.of_state[2:4, 2:4].trace()))  # the variance of the actions
    assert inverse.state_r2 == pytest.approx(1)
    rows = torch.cat([torch.linalg.pinv(world.B), torch.linalg.pinv(world.B) @ world.A]) @ world.mixing[:, :2].T
    inside = rows @ torch.linalg.pinv(inverse.encoder) @ inverse.encoder
    assert torch.allclose(inside, rows, atol=1e-6)  # rowspace of [B+; B+A], none of the nuisance


@pytest.mark.parametrize("name", KINDS)
def test_the_best_features_reach_the_best_loss_and_random_ones_do_not(world, name):
    moments = dataclasses.replace(with_gains(world, ONE_SIDED), nuisance_scale=0.3).moments(1)
    best = moments.best(name, 2)
    assert moments.reached(name, best.encoder) == pytest.approx(best.loss, rel=1e-6)
    losses = [moments.reached(name, w) for w in (torch.zeros(1, 32), linear_encoder(world).weight.detach())]
    assert losses[0] - losses[1] < 0.5 * (losses[0] - best.loss)


def test_with_little_noise_inverse_dynamics_reads_the_action_off_the_change_of_state(world):
    exact = dataclasses.replace(world, process=1e-4).moments(1).best("ID", 2)
    assert exact.loss == pytest.approx(2 * 1e-8, rel=0.01)


def test_one_context_leaves_cloning_the_subspace_of_its_gain(world):
    one = with_gains(world, [[[-0.5, 0.0], [0.0, 0.0]]]).moments(1).best("BC", 2)
    assert len(one.encoder) == 1 and 0.1 < one.state_r2 < 0.7


def test_cloning_is_as_good_where_contexts_are_on_one_side(world):
    moments = with_gains(world, ONE_SIDED).moments(1)
    assert moments.best("BC", 2).state_r2 == pytest.approx(1) == moments.best("ID", 2).state_r2


def test_forward_dynamics_spends_its_features_on_what_varies_most(world):
    r2 = [dataclasses.replace(world, nuisance_scale=scale).moments(1).best("FD-e", 2).state_r2 for scale in (0.5, 3.0)]
    assert r2[0] == pytest.approx(1) and r2[1] == pytest.approx(0, abs=1e-6)
    enough = dataclasses.replace(world, nuisance_scale=3.0).moments(1).best("FD-e", 32)
    assert enough.state_r2 == pytest.approx(1)


def test_of_a_double_integrator_one_step_shows_the_velocity_and_two_show_the_position():
    one = double_integrator(length=1).moments(1)
    velocity = one.world.mixing[:, 1]
    assert one.best("ID", 2).state_r2 == pytest.approx(0.5)
    direction = one.best("ID", 2).encoder[0]
    assert abs(float(direction @ velocity / direction.norm())) == pytest.approx(1, abs=1e-5)
    assert double_integrator(length=2).moments(2).best("ID", 2).state_r2 == pytest.approx(1)


def test_the_same_seed_gives_the_same_demonstrations(world):
    one, two, other = world.sample(3, 0), world.sample(3, 0), world.sample(3, 1)
    assert torch.equal(one.observations, two.observations) and not torch.equal(one.observations, other.observations)
    assert set(world.sample(5, 0, context=1).contexts) == {"1"}


@pytest.mark.parametrize(("options", "message"), [
    ({"B": [[1.0]]}, "expected A"), ({"probabilities": [1.0]}, "expected 2 numbers"), ({"process": -1.0}, "process")])
def test_a_world_that_does_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        LinearWorld(**options)


def test_moments_beyond_the_length_and_features_that_do_not_suffice(world):
    with pytest.raises(ValueError, match="length of trajectories"):
        world.moments(9)
    with pytest.raises(ValueError, match="k: expected 2 or more"):
        world.moments(1).best("ID", 1)
