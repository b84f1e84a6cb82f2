"""Trajectories of observations and actions, from arrays or the formats of others, and the pairs that lie n steps
apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

OBSERVATIONS = ("observations", "obs", "states")
ACTIONS = ("actions", "acts")


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Trajectories, one behind the other; make them with :meth:`from_arrays` and its kin.

    A trajectory has as many observations as actions, or one more: that after the last action.

    Attributes:
        observations: (N, ...) float32, or uint8 for pictures (N, C, H, W).
        actions: (N, A) float32, or (N,) int64 where they are discrete; what stands beside an observation after the last
            action means nothing.
        trajectory: (N,) int64, the trajectory of each observation, from 0 on.
        acted: (N,) bool, whether an action was taken there.
        contexts: a label of each trajectory, such as its task, "" where it is unknown; no objective sees them.
        states: (N, S) float32, what is behind the observations where that is known; measured, never trained on.
        choices: number of choices where actions are discrete, else 0.
        history: how many frames each observation has, see :meth:`stacked`.
    """

    observations: Tensor
    actions: Tensor
    trajectory: Tensor
    acted: Tensor
    contexts: tuple[str, ...]
    states: Tensor | None = None
    choices: int = 0
    history: int = 1

    @classmethod
    def from_arrays(cls, observations: Sequence[Any], actions: Sequence[Any], *, contexts: Sequence[Any] | None = None,
                    states: Sequence[Any] | None = None, discrete: bool | None = None,
                    choices: int | None = None) -> Demonstrations:
        """Demonstrations from one array of observations and one of actions for each trajectory.

        Args:
            observations: of each trajectory (T, ...) or (T + 1, ...), numbers; uint8 is taken for pictures, (.., H, W,
                C) or (.., C, H, W).
            actions: of each trajectory (T, A) floats, or (T,) integers.
            contexts: a label of each trajectory.
            states: the true state at each observation.
            discrete: whether actions are choices; None: integers are, floats are not.
            choices: how many there are; None: the highest action and one. Give it where a task may not use all.

        Raises:
            ValueError: nothing, lengths or dimensions that do not agree, NaN or infinities, whole numbers given as
                floats without ``discrete``.
        """
        count = len(observations)
        for name, given in (("actions", actions), ("contexts", contexts), ("states", states)):
            if given is not None and len(given) != count:
                raise ValueError(f"{name}: expected one entry for each of {count} trajectories, got {len(given)}")
        if not count:
            raise ValueError("observations: expected one trajectory or more, got none")
        seen = [_numbers(o, f"observations of trajectory {i}") for i, o in enumerate(observations)]
        done = [_numbers(a, f"actions of trajectory {i}") for i, a in enumerate(actions)]
        behind = None if states is None else [_numbers(s, f"states of trajectory {i}") for i, s in enumerate(states)]
        named: dict[str, list[np.ndarray]] = {"observations": seen, "actions": done, "states": behind or []}
        for name, arrays in named.items():
            for i, array in enumerate(arrays):
                if array.shape[1:] != arrays[0].shape[1:]:
                    raise ValueError(f"{name} of trajectory {i}: expected the shape (T, *{arrays[0].shape[1:]}) of the "
                                     f"first trajectory, got {array.shape}: give demonstrations of one robot")
        for i, (o, a) in enumerate(zip(seen, done, strict=True)):
            if not len(a) or len(o) not in (len(a), len(a) + 1):
                raise ValueError(f"trajectory {i}: expected an action or more, and as many observations or one more, "
                                 f"got {len(o)} observations and {len(a)} actions")
            if behind is not None and len(behind[i]) != len(o):
                raise ValueError(f"states of trajectory {i}: expected {len(o)}, as observations, got {len(behind[i])}")
        kind = _kind_of_actions(done, discrete)
        rows = []
        for o, a in zip(seen, done, strict=True):
            rest = np.zeros((len(o) - len(a), *a.shape[1:]), a.dtype)
            rows.append(np.concatenate([a, rest]))
        all_actions = np.concatenate(rows)
        found = int(all_actions.max()) + 1 if kind else 0
        if choices is not None and (not kind or choices < found):
            raise ValueError(f"choices: expected a number above the highest action of discrete ones, got {choices} for "
                             f"{found or 'no'} choices")
        return cls(
            as_pictures(np.concatenate(seen)),
            torch.from_numpy(all_actions.reshape(len(all_actions)).astype(np.int64)) if kind else
            torch.from_numpy(all_actions.astype(np.float32)),
            torch.from_numpy(np.repeat(np.arange(count), [len(o) for o in seen])),
            torch.from_numpy(np.concatenate([np.arange(len(o)) < len(a) for o, a in zip(seen, done, strict=True)])),
            tuple(str(c) for c in contexts) if contexts is not None else ("",) * count,
            None if behind is None else torch.from_numpy(np.concatenate(behind).astype(np.float32)), choices or found)

    @classmethod
    def from_episodes(cls, episodes: Iterable[Any], *, observation: str | None = None, state: str | None = None,
                      context: str | None = None, **options: Any) -> Demonstrations:
        """Demonstrations from episodes: of minari (``MinariDataset.iterate_episodes()``), trajectories of
        ``imitation``, or any objects or dictionaries with observations and actions.

        Args:
            episodes: each has ``observations``, ``obs`` or ``states``, and ``actions`` or ``acts``.
            observation: key of the observation, where observations are dictionaries.
            state: key of the true state in them, or the name of an entry of the episode.
            context: name of the entry of an episode that labels it.
            options: for :meth:`from_arrays`.
        """
        seen: list[Any] = []
        done: list[Any] = []
        behind: list[Any] = []
        labels: list[Any] = []
        for number, episode in enumerate(episodes):
            whole = _entry(episode, OBSERVATIONS, number)
            if isinstance(whole, Mapping) and observation not in whole:
                raise ValueError(f"observation: expected one of {sorted(whole)}, as episode {number} has "
                                 f"dictionaries, got {observation!r}")
            seen.append(whole[observation] if isinstance(whole, Mapping) else whole)
            done.append(_entry(episode, ACTIONS, number))
            if state is not None:
                behind.append(whole[state] if isinstance(whole, Mapping) and state in whole else
                              _entry(episode, (state,), number))
            labels.append(_entry(episode, (context,), number) if context is not None else "")
        return cls.from_arrays(seen, done, contexts=labels, states=behind if state is not None else None, **options)

    @classmethod
    def from_frames(cls, frames: Mapping[str, Any] | Iterable[Mapping[str, Any]], *,
                    observation: str = "observation.state", action: str = "action", episode: str = "episode_index",
                    context: str | None = "task_index", state: str | None = None, **options: Any) -> Demonstrations:
        """Demonstrations from a table with a row for each frame, as LeRobot has them.

        Args:
            frames: column name -> values, or rows as dictionaries (an iterated ``LeRobotDataset``, rows of parquet
                files). The frames of an episode stand together and in order.
            observation, action, episode: columns.
            context: column that labels episodes; None, or a column that is not there: the labels are unknown.
            state: column of the true state.
            options: for :meth:`from_arrays`.
        """
        if not isinstance(frames, Mapping):
            rows = list(frames)
            frames = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        table = frames
        for name in (observation, action, episode, *([state] if state is not None else [])):
            if name not in table:
                raise ValueError(f"frames: expected a column {name!r}, got {', '.join(map(str, table)) or 'nothing'}")
        index = np.asarray([int(i) for i in table[episode]])
        if not len(index):
            raise ValueError("frames: expected one row or more, got none")
        starts = np.flatnonzero(np.diff(index, prepend=index[0] - 1))
        if len(np.unique(index)) != len(starts):
            raise ValueError(f"{episode}: expected the frames of an episode to stand together, got them scattered: "
                             f"sort the rows by episode and frame")

        def cut(column: str) -> list[Any]:
            values = table[column]
            ends = [*starts[1:], len(index)]
            return [np.stack([np.asarray(v) for v in values[a:b]]) for a, b in zip(starts, ends, strict=True)]

        labels = None
        if context is not None and context in table:
            labels = [np.asarray(table[context][a]).item() for a in starts]
        return cls.from_arrays(cut(observation), cut(action), contexts=labels,
                               states=cut(state) if state is not None else None, **options)

    # ------------------------------------------------------------------------------------------------ what is in them
    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def discrete(self) -> bool:
        """Whether actions are choices."""
        return self.choices > 0

    @property
    def action_size(self) -> int:
        """Dimensions of an action, or the number of choices."""
        return self.choices or self.actions.shape[1]

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of one observation."""
        return tuple(self.observations.shape[1:])

    def pairs(self, n: int) -> Tensor:
        """Rows t such that t + n is in the same trajectory and an action was taken at t, (P,) int64.

        Raises:
            ValueError: a trajectory is shorter than n + 1.
        """
        lengths = torch.bincount(self.trajectory)
        short = torch.nonzero(lengths < n + 1)[:, 0].tolist()
        if short:
            raise ValueError(f"trajectories: expected {n + 1} observations or more for pairs {n} steps apart, got "
                             f"{int(lengths[short[0]])} in trajectory {short[0]} ({len(short)} of {len(self)} are too "
                             f"short): leave them out with demonstrations.at_least({n + 1})")
        rows = torch.arange(len(self.trajectory) - n)
        return rows[(self.trajectory[rows] == self.trajectory[rows + n]) & self.acted[rows]]

    def inputs(self, rows: Tensor) -> Tensor:
        """Observations as an encoder takes them: pictures as floats in [0, 1], others as they are."""
        chosen = self.observations[rows]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen

    def actions_from(self, rows: Tensor, n: int) -> Tensor:
        """The n actions from each row on, (P, n, A) or (P, n)."""
        return self.actions[rows[:, None] + torch.arange(n)]

    # ------------------------------------------------------------------------------------------------------- subsets
    def take(self, trajectories: Sequence[int]) -> Demonstrations:
        """These trajectories, in this order.

        Raises:
            ValueError: none, or one that is not there.
        """
        wanted = [int(i) for i in trajectories]
        if not wanted or not all(0 <= i < len(self) for i in wanted):
            raise ValueError(f"trajectories: expected indices in [0, {len(self) - 1}] and at least one, got "
                             f"{wanted[:10]}")
        bounds = torch.searchsorted(self.trajectory, torch.arange(len(self) + 1)).tolist()
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in wanted])
        number = torch.repeat_interleave(torch.arange(len(wanted)),
                                         torch.tensor([bounds[i + 1] - bounds[i] for i in wanted]))
        return dataclasses.replace(
            self, observations=self.observations[rows], actions=self.actions[rows], trajectory=number,
            acted=self.acted[rows], contexts=tuple(self.contexts[i] for i in wanted),
            states=None if self.states is None else self.states[rows])

    @classmethod
    def joined(cls, several: Sequence[Demonstrations]) -> Demonstrations:
        """The trajectories of several, one behind the other.

        Raises:
            ValueError: none, or they differ in the shape of observations or in their actions.
        """
        kinds = {(d.observation_shape, d.observations.dtype, d.choices or d.actions.shape[1:], d.history,
                  d.states is None) for d in several}
        if len(kinds) != 1:
            raise ValueError("several: expected demonstrations of one kind of observations and actions, got "
                             f"{len(kinds)} kinds")
        begin = np.cumsum([0, *(len(d) for d in several)]).tolist()
        behind = [d.states for d in several if d.states is not None]
        return dataclasses.replace(
            several[0], observations=torch.cat([d.observations for d in several]),
            actions=torch.cat([d.actions for d in several]), acted=torch.cat([d.acted for d in several]),
            trajectory=torch.cat([d.trajectory + b for d, b in zip(several, begin, strict=False)]),
            contexts=tuple(c for d in several for c in d.contexts), states=torch.cat(behind) if behind else None)

    def at_least(self, length: int) -> Demonstrations:
        """The trajectories of ``length`` observations or more."""
        return self.take(torch.nonzero(torch.bincount(self.trajectory) >= length)[:, 0].tolist())

    def hold_out(self, contexts: Iterable[str]) -> tuple[Demonstrations, Demonstrations]:
        """All other contexts, and these: no trajectory of a new task may be in the corpus.

        Raises:
            ValueError: a context that does not occur, or nothing is left.
        """
        out = {str(c) for c in contexts}
        missing = sorted(out - set(self.contexts))
        if missing or not out or not set(self.contexts) - out:
            raise ValueError(f"contexts: expected some, but not all, of {', '.join(sorted(set(self.contexts))[:20])}, "
                             f"got {', '.join(missing or sorted(out)) or 'none'}")
        return (self.take([i for i, c in enumerate(self.contexts) if c not in out]),
                self.take([i for i, c in enumerate(self.contexts) if c in out]))

    def stacked(self, frames: int) -> Demonstrations:
        """Each observation with the ``frames - 1`` before it, oldest first, joined along the first axis.

        At the beginning of a trajectory its first observation is repeated: nothing comes from another trajectory.
        """
        if frames < 1 or self.history != 1:
            raise ValueError(f"frames: expected an integer >= 1 on demonstrations that are not stacked yet, got "
                             f"{frames} on a history of {self.history}")
        rows = torch.arange(len(self.trajectory))
        begin = torch.searchsorted(self.trajectory, self.trajectory)
        joined = [self.observations[torch.maximum(rows - back, begin)] for back in reversed(range(frames))]
        return dataclasses.replace(self, observations=torch.cat(joined, 1), history=frames)


def _entry(episode: Any, names: Sequence[str], number: int) -> Any:
    for name in names:
        if isinstance(episode, Mapping) and name in episode:
            return episode[name]
        if not isinstance(episode, Mapping) and hasattr(episode, name):
            return getattr(episode, name)
    got = sorted(episode) if isinstance(episode, Mapping) else type(episode).__name__
    raise ValueError(f"episode {number}: expected {' or '.join(names)} in it, got {got}")


def _numbers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if array.dtype.kind not in "fiub" or array.ndim < 1:
        raise ValueError(f"{what}: expected an array of numbers with a row for each step, got {array.dtype} of shape "
                         f"{array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what}: expected finite numbers, got NaN or infinity at step "
                         f"{int(np.argwhere(~np.isfinite(array))[0][0])}: drop the trajectory or fill the gap")
    if array.dtype == np.uint8:
        return array
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def _kind_of_actions(actions: Sequence[np.ndarray], discrete: bool | None) -> bool:
    """Whether actions are choices; refuses what could be either."""
    flat = actions[0].ndim == 1 or actions[0].shape[1:] == (1,)
    whole = all((a == np.rint(a)).all() and (a >= 0).all() for a in actions)
    some = any(bool(a.any()) for a in actions)
    if discrete is None and flat and actions[0].dtype.kind == "f" and whole and some:
        raise ValueError("actions: expected integers for choices, got whole numbers as floats: pass discrete=True if "
                         "they are choices, discrete=False if they are amounts")
    wanted = actions[0].dtype.kind in "iub" and flat if discrete is None else discrete
    if wanted and not (flat and whole):
        raise ValueError(f"actions: expected whole numbers >= 0, one at each step, for choices, got shape (T, "
                         f"*{actions[0].shape[1:]})")
    if not wanted and actions[0].ndim != 2:
        raise ValueError(f"actions: expected (T, A) floats, got shape {actions[0].shape}: use actions[:, None] for a "
                         f"single dimension")
    return wanted


def as_pictures(array: np.ndarray) -> Tensor:
    """Observations (N, ...) as they are kept: uint8 pictures with their channels first; others as float32.

    Raises:
        ValueError: uint8 of another shape than (N, H, W, C) or (N, C, H, W).
    """
    if array.dtype != np.uint8:
        return torch.from_numpy(array.astype(np.float32))
    if array.ndim == 4 and array.shape[-1] < array.shape[1]:
        array = np.ascontiguousarray(np.moveaxis(array, -1, 1))
    if array.ndim != 4:
        raise ValueError(f"observations: expected pictures (T, H, W, C) for uint8, got shape {array.shape}: convert "
                         f"other observations to float")
    return torch.from_numpy(array)


__all__ = ["Demonstrations", "as_pictures"]
