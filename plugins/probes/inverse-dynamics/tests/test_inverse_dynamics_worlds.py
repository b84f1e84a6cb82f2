"""The worlds of the reproduction, and the reproduction itself at the smallest scale."""

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf_inverse_dynamics import Demonstrations, rollout, transfer
from looseleaf_inverse_dynamics.worlds import Clutter, Manipulation, PointMass, baby_ai, point_mass_demonstrations


def test_the_expert_of_the_point_mass_solves_it_and_pictures_show_where_it_is():
    rng, goal, solved = np.random.default_rng(0), (0.4, -0.5), []
    for seed in range(20):
        env = PointMass(goal)
        picture, _ = env.reset(seed=seed)
        row, column, _ = np.unravel_index(picture.argmax(), picture.shape)
        assert np.abs(np.linspace(-1.2, 1.2, 32)[[column, row]] - env.position).max() < 0.1
        done = False
        while not done:
            _, _, _, cut, info = env.step(env.expert(rng))
            done = info["success"] or cut
        solved.append(info["success"])
    assert np.mean(solved) > 0.9


def test_demonstrations_of_the_point_mass_have_goals_of_their_own_and_two_frames():
    many, one = point_mass_demonstrations(3), point_mass_demonstrations(2, goal=(0.1, 0.2))
    assert len(set(many.contexts)) == 3 and set(one.contexts) == {"goal [0.1, 0.2]"}
    assert many.observation_shape == (2, 32, 32) and many.history == 2 and many.states.shape[1] == 4
    assert torch.equal(many.observations[1, 0], many.observations[0, 1])


def test_clutter_is_a_function_of_state_and_distractors():
    states = np.random.default_rng(0).normal(size=(50, 5))
    one, two, other = Clutter(states), Clutter(states), Clutter(states, seed=1)
    walk = one.begin(np.random.default_rng(0))
    assert np.array_equal(one.mix(states, np.tile(walk, (50, 1)))[3], two.mix(states[3], walk))
    assert not np.array_equal(one.mix(states[3], walk), other.mix(states[3], walk))


def test_meta_world_hides_its_goal():
    pytest.importorskip("metaworld", reason="needs looseleaf-inverse-dynamics[metaworld]")
    env = Manipulation("reach-v3", Clutter(np.random.default_rng(0).normal(size=(50, 36))), steps=3)
    first, again, other = (env.reset(seed=seed)[0] for seed in (0, 0, 1))
    assert first.shape == (128,) and np.array_equal(first, again) and not np.array_equal(first, other)
    assert [env.step(np.zeros(4))[3] for _ in range(3)] == [False, False, True]


def test_a_policy_of_choices_runs_in_baby_ai():
    pytest.importorskip("minigrid", reason="needs looseleaf-inverse-dynamics[minigrid]")
    env = baby_ai("BabyAI-GoToRedBall-v0", steps=5)
    seen, _ = env.reset(seed=0)
    assert seen.shape == (56, 56, 3)
    demonstrations = Demonstrations.from_arrays([np.stack([seen] * 4)] * 2, [np.arange(4)] * 2, choices=7)
    policy = transfer(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), demonstrations, steps=2, progress=False)
    assert len(rollout(policy, env, rollouts=2)) == 2


def test_the_reproduction_runs_and_decides_nothing_without_its_worlds():
    pytest.importorskip("looseleaf_lab")
    from looseleaf_inverse_dynamics import reproduction
    from looseleaf_lab.study import Results

    scale = reproduction.Scale(20, 2, 2, 2, 2, 2, 1, 4, False)
    row = {"linear": reproduction.linear(0, scale), "points": reproduction.points(0, scale),
           "manipulation": {"missing": "metaworld"}, "babyai": {"missing": "minigrid"}}
    report = reproduction.study.report(Results([row, row], {}, [0, 1], scale, False))
    verdicts = {claim.statement: claim.verdict for claim in report.claims}
    assert len(verdicts) == 13 and verdicts["Inverse dynamics works"] != "holds"
    assert all(verdicts[name] == "not shown at this scale" for name in verdicts if name.startswith(("Meta", "BabyAI")))
    assert report.to_text()
