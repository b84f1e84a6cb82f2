"""Three kinds of worlds with hidden contexts: a point mass in pictures, Meta-World's states in clutter, BabyAI.

Each is an environment in the form of gymnasium's (``reset(seed=...)``, ``step(action)``), to collect demonstrations in
and to run policies in. The point mass needs numpy alone, the others the package's extras ``metaworld`` and
``minigrid``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from looseleaf_inverse_dynamics.demonstrations import Demonstrations

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class PointMass:
    """A point that is pushed to a goal nobody sees: pictures (32, 32, 1), actions in [-1, 1]^2.

    The velocity is ``0.6 v + 0.4 a``, the position moves by 0.12 of it, in [-1, 1]^2 (this project's). The expert is
    the paper's, ``clip(10 (goal - position) - v + noise)``. Solved: within 0.15 of the goal at a speed below 0.3. One
    picture does not show the velocity: use ``Demonstrations.stacked(2)``.

    Args:
        goal: (2,) in [-1, 1].
        size: of the pictures.
        steps: of an episode.
    """

    def __init__(self, goal: Sequence[float] | np.ndarray, size: int = 32, steps: int = 30) -> None:
        self.goal, self.size, self.steps = np.asarray(goal, np.float64), size, steps
        self.position = self.velocity = np.zeros(2)
        self.count = 0

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A random position at rest."""
        self.position, self.velocity = np.random.default_rng(seed).uniform(-0.9, 0.9, 2), np.zeros(2)
        self.count = 0
        return self.picture(), {}

    def step(self, action: np.ndarray) -> Step:
        """Push."""
        self.velocity = 0.6 * self.velocity + 0.4 * np.clip(action, -1, 1)
        self.position = np.clip(self.position + 0.12 * self.velocity, -1, 1)
        self.count += 1
        solved = bool(np.abs(self.position - self.goal).max() < 0.15 and np.abs(self.velocity).max() < 0.3)
        return self.picture(), float(solved), False, self.count >= self.steps, {"success": solved}

    @property
    def state(self) -> np.ndarray:
        """Position and velocity, (4,)."""
        return np.concatenate([self.position, self.velocity])

    def picture(self) -> np.ndarray:
        """A soft disc, so that less than a pixel shows."""
        grid = np.linspace(-1.2, 1.2, self.size)
        near = np.exp(-((grid[None] - self.position[0]) ** 2 + (grid[:, None] - self.position[1]) ** 2) / 0.03)
        return (255 * near).astype(np.uint8)[..., None]

    def expert(self, rng: np.random.Generator, noise: float = 0.2) -> np.ndarray:
        """What the scripted expert does now."""
        push: np.ndarray = 10 * (self.goal - self.position) - self.velocity + noise * rng.normal(size=2)
        return np.clip(push, -1, 1)


def point_mass_demonstrations(trajectories: int, seed: int = 0,
                              goal: Sequence[float] | np.ndarray | None = None) -> Demonstrations:
    """Demonstrations of the point mass, two frames each; every trajectory has a goal of its own unless one is given.

    Args:
        trajectories: how many.
        seed: of goals, beginnings and the expert's noise.
        goal: of all; its label is the goal.
    """
    rng = np.random.default_rng(seed)
    seen, done, states, labels = [], [], [], []
    for number in range(trajectories):
        place = np.asarray(goal) if goal is not None else rng.uniform(-0.9, 0.9, 2)
        env = PointMass(place)
        pictures, actions, behind = [env.reset(seed=int(rng.integers(2 ** 31)))[0]], [], [env.state]
        for _ in range(env.steps):
            actions.append(env.expert(rng))
            pictures.append(env.step(actions[-1])[0])
            behind.append(env.state)
        seen.append(np.stack(pictures))
        done.append(np.stack(actions))
        states.append(np.stack(behind))
        labels.append(f"goal {place.round(3).tolist()}" if goal is not None else f"{seed}:{number}")
    return Demonstrations.from_arrays(seen, done, contexts=labels, states=states).stacked(2)


class Clutter:
    """A random nonlinear mixing of states with distractors that have dynamics of their own.

    ``tanh(W [standardised state; distractors])``, the distractors a slow random walk (correlation 0.95 from step to
    step).

    Args:
        states: (N, S) to take means and standard deviations from.
        distractors: how many.
        outputs: numbers of an observation.
        seed: of W.
    """

    def __init__(self, states: np.ndarray, distractors: int = 36, outputs: int = 128, seed: int = 0) -> None:
        self.mean, self.scale = states.mean(0), states.std(0) + 1e-3
        self.distractors, inputs = distractors, states.shape[1] + distractors
        self.weights = np.random.default_rng(seed).normal(size=(inputs, outputs)) / np.sqrt(inputs)

    def begin(self, rng: np.random.Generator) -> np.ndarray:
        """Distractors at the beginning of an episode."""
        return rng.normal(size=self.distractors)

    def next(self, distractors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distractors a step later."""
        return 0.95 * distractors + np.sqrt(1 - 0.95 ** 2) * rng.normal(size=self.distractors)

    def mix(self, state: np.ndarray, distractors: np.ndarray) -> np.ndarray:
        """The observation, float32."""
        inputs = np.concatenate([((state - self.mean) / self.scale).clip(-5, 5), distractors], -1)
        return np.tanh(inputs @ self.weights).astype(np.float32)


class Manipulation:
    """A task of Meta-World whose goal is hidden, its state (36 numbers) in a :class:`Clutter`.

    Args:
        task: such as ``"drawer-open-v3"``.
        clutter: of the observations.
        steps: of an episode.
        first: goals of the task from this one on are taken, in turn, by the seed of ``reset``.
    """

    def __init__(self, task: str, clutter: Clutter, steps: int = 200, first: int = 20) -> None:
        metaworld: Any = importlib.import_module("metaworld")
        benchmark = metaworld.MT1(task, seed=0)
        self.env, self.tasks = benchmark.train_classes[task](), benchmark.train_tasks[first:]
        self.clutter, self.steps, self.count = clutter, steps, 0
        self.rng, self.walk = np.random.default_rng(0), np.zeros(clutter.distractors)

    def reset(self, *, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
        """A goal by the seed."""
        self.rng, self.count = np.random.default_rng(seed), 0
        self.env.set_task(self.tasks[seed % len(self.tasks)])
        state, _ = self.env.reset()
        self.walk = self.clutter.begin(self.rng)
        return self.clutter.mix(np.asarray(state)[:36], self.walk), {}

    def step(self, action: np.ndarray) -> Step:
        """One step of the arm."""
        state, reward, _, _, info = self.env.step(np.clip(action, -1, 1))
        self.count += 1
        self.walk = self.clutter.next(self.walk, self.rng)
        seen = self.clutter.mix(np.asarray(state)[:36], self.walk)
        return seen, float(reward), False, self.count >= self.steps, {"success": bool(info["success"])}


def baby_ai(task: str, steps: int = 64) -> Any:
    """A BabyAI environment with its 56 x 56 view alone; the mission is withheld.

    Args:
        task: such as ``"BabyAI-GoToRedBall-v0"``.
        steps: of an episode.
    """
    importlib.import_module("minigrid")  # which registers the environments
    gymnasium: Any = importlib.import_module("gymnasium")
    wrappers: Any = importlib.import_module("minigrid.wrappers")

    class View(gymnasium.ObservationWrapper):  # type: ignore[misc]
        def observation(self, observation: Any) -> np.ndarray:
            return np.asarray(observation["image"])

    view = View(wrappers.RGBImgPartialObsWrapper(gymnasium.make(task), tile_size=8))
    return gymnasium.wrappers.TimeLimit(view, steps)


__all__ = ["Clutter", "Manipulation", "PointMass", "Step", "baby_ai", "point_mass_demonstrations"]
