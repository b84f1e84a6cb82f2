"""Demonstrations: the formats they come in, pairs within trajectories, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from looseleaf_inverse_dynamics import Demonstrations

RNG = np.random.default_rng(0)


def walks(lengths=(5, 3, 7), final=True, **options):
    """Trajectories whose observations say their trajectory and step: (trajectory, step)."""
    seen = [np.stack([np.full(t + final, i), np.arange(t + final)], 1) for i, t in enumerate(lengths)]
    done = [np.stack([np.arange(t) / 10, np.full(t, i) / 10], 1) for i, t in enumerate(lengths)]
    return Demonstrations.from_arrays(seen, done, **options)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_pairs_are_n_steps_apart_and_never_cross_trajectories(final, n):
    demonstrations = walks(final=final)
    rows = demonstrations.pairs(n)
    first, later = demonstrations.inputs(rows), demonstrations.inputs(rows + n)
    assert torch.equal(first[:, 0], later[:, 0]) and torch.equal(first[:, 1] + n, later[:, 1])
    assert len(rows) == sum(t + final - max(n, final) for t in (5, 3, 7))
    actions = demonstrations.actions_from(rows, max(1, n))
    for step in range(max(1, n)):
        assert torch.allclose(actions[:, step, 0] * 10, first[:, 1] + step)  # action t + step, not another
        assert torch.allclose(actions[:, step, 1] * 10, first[:, 0])


def test_subsets_keep_what_belongs_together():
    demonstrations = walks(contexts=["a", "b", "a"], states=[RNG.normal(size=(t + 1, 3)) for t in (5, 3, 7)])
    part = demonstrations.take([2, 1])
    assert part.contexts == ("a", "b") and part.observations[:, 0].tolist() == [2] * 8 + [1] * 4
    assert torch.equal(part.states[:8], demonstrations.states[10:])
    corpus, new = demonstrations.hold_out(["b"])
    assert set(corpus.contexts) == {"a"} and set(new.contexts) == {"b"}
    assert len(demonstrations.at_least(6)) == 2


def test_stacked_frames_come_from_their_own_trajectory():
    stacked = walks().stacked(3)
    assert stacked.observation_shape == (6,) and stacked.history == 3
    assert all(row[0] == row[2] == row[4] for row in stacked.observations.tolist())
    assert stacked.observations[6].tolist() == [1, 0, 1, 0, 1, 0]  # the beginning of the second trajectory
    assert stacked.observations[3].tolist() == [0, 1, 0, 2, 0, 3]
    with pytest.raises(ValueError, match="not stacked yet"):
        stacked.stacked(2)


def test_pictures_get_their_channels_first_and_stay_bytes():
    pictures = [RNG.integers(0, 255, (4, 10, 12, 3), np.uint8)] * 2
    demonstrations = Demonstrations.from_arrays(pictures, [np.arange(4)] * 2)
    assert demonstrations.observation_shape == (3, 10, 12) and demonstrations.observations.dtype == torch.uint8
    seen = demonstrations.inputs(torch.tensor([1]))
    assert torch.allclose(seen[0], torch.from_numpy(pictures[0][1]).permute(2, 0, 1).float() / 255)
    assert demonstrations.discrete and demonstrations.action_size == 4
    assert demonstrations.take([0]).stacked(2).observation_shape == (6, 10, 12)


def test_episodes_as_minari_gymnasium_and_imitation_have_them():
    seen, done = RNG.normal(size=(6, 4)).astype(np.float32), RNG.uniform(-1, 1, (5, 2))
    minari = SimpleNamespace(observations={"observation": seen, "desired_goal": seen[:, :2]}, actions=done, id=3)
    imitation = SimpleNamespace(obs=seen, acts=done)
    plain = Demonstrations.from_episodes([{"observations": seen, "actions": done, "task": "x"}], context="task")
    one = Demonstrations.from_episodes([minari], observation="observation", state="desired_goal", context="id")
    two = Demonstrations.from_episodes([imitation])
    assert torch.equal(one.observations, two.observations) and torch.equal(one.actions, plain.actions)
    assert one.states.shape == (6, 2) and one.contexts == ("3",) and plain.contexts == ("x",) and two.contexts == ("",)
    with pytest.raises(ValueError, match="expected one of"):
        Demonstrations.from_episodes([minari])
    with pytest.raises(ValueError, match="expected observations or obs"):
        Demonstrations.from_episodes([{"actions": done}])


@pytest.mark.parametrize("rows", [True, False])
def test_frames_as_lerobot_has_them(rows):
    table = {"observation.state": torch.randn(7, 3), "action": torch.randn(7, 2),
             "episode_index": torch.tensor([4] * 3 + [5] * 4), "task_index": torch.tensor([1] * 3 + [0] * 4)}
    frames = [{name: values[i] for name, values in table.items()} for i in range(7)] if rows else table
    demonstrations = Demonstrations.from_frames(frames)
    assert len(demonstrations) == 2 and demonstrations.contexts == ("1", "0")
    assert torch.equal(demonstrations.observations, table["observation.state"]) and bool(demonstrations.acted.all())
    assert len(demonstrations.pairs(1)) == 2 + 3
    with pytest.raises(ValueError, match="expected a column"):
        Demonstrations.from_frames(frames, observation="observation.image")
    with pytest.raises(ValueError, match="stand together"):
        Demonstrations.from_frames({**table, "episode_index": [0, 1, 0, 1, 0, 1, 0]})


STATES, ACTIONS = [np.zeros((4, 2))] * 2, [np.ones((4, 2))] * 2


@pytest.mark.parametrize(("seen", "done", "options", "message"), [
    ([], [], {}, "got none"),
    (STATES, ACTIONS[:1], {}, "one entry for each of 2 trajectories, got 1"),
    (STATES, [np.ones((4, 2)), np.ones((4, 3))], {}, "actions of trajectory 1: expected the shape"),
    ([np.zeros((4, 2)), np.zeros((4, 3))], ACTIONS, {}, "observations of trajectory 1: expected the shape"),
    (STATES, [np.ones((4, 2)), np.ones((2, 2))], {}, "trajectory 1: expected an action or more"),
    (STATES, [np.ones((4, 2)), np.full((4, 2), np.nan)], {}, "actions of trajectory 1: expected finite"),
    ([np.full((4, 2), np.inf)] * 2, ACTIONS, {}, "NaN or infinity at step 0"),
    (STATES, [np.array([0., 1., 2., 1.])] * 2, {}, "pass discrete=True"),
    (STATES, [np.array([0.5, 1., 2., 1.])] * 2, {}, "actions\\[:, None\\]"),
    (STATES, [np.array([0.5, 1., 2., 1.])] * 2, {"discrete": True}, "whole numbers >= 0"),
    (STATES, [np.arange(4)] * 2, {"choices": 3}, "choices: expected"),
    (STATES, ACTIONS, {"states": [np.zeros((3, 1))] * 2}, "states of trajectory 0: expected 4"),
    ([np.zeros((4, 2), np.uint8)] * 2, ACTIONS, {}, "expected pictures"),
    ([["a", "b"]], ACTIONS[:1], {}, "array of numbers"),
])
def test_what_is_no_demonstration(seen, done, options, message):
    with pytest.raises(ValueError, match=message):
        Demonstrations.from_arrays(seen, done, **options)


def test_discrete_actions_as_floats_are_taken_once_said_so():
    given = Demonstrations.from_arrays(STATES, [np.array([0., 1., 2., 1.])] * 2, discrete=True, choices=5)
    assert given.discrete and given.action_size == 5 and given.take([0]).action_size == 5


def test_trajectories_too_short_and_subsets_that_are_not_there():
    demonstrations = walks((1, 5), final=False, contexts=["a", "b"])
    with pytest.raises(ValueError, match=r"expected 2 observations or more .*at_least\(2\)"):
        demonstrations.pairs(1)
    assert len(demonstrations.at_least(2).pairs(1)) == 4
    for call, message in ((lambda: demonstrations.take([2]), "indices in"),
                          (lambda: demonstrations.hold_out(["c"]), "got c"),
                          (lambda: demonstrations.hold_out(["a", "b"]), "but not all")):
        with pytest.raises(ValueError, match=message):
            call()
