"""A linear world in which the best representation of each objective, and what it knows of the state, is a closed form.

A latent state s and a nuisance z with dynamics of its own are mixed into the observation o; in each context c an expert
acts by a gain of that context, which nobody is told:

    s' = A s + B a + w,    z' = rho z + sqrt(1 - rho^2) v,    o = mixing [s; z],    a = K_c s + eta.

All of it is Gaussian within a context, so what a linear encoder of k features and linear heads can reach is a
regression:

- behaviour cloning sees only the mean of K_c: contexts that cancel leave nothing, few contexts leave a subspace;
- inverse dynamics sees B a in s' - A s whatever K_c: it keeps the state as far as the rows of B+ and B+ A span it,
  and none of the nuisance;
- forward dynamics explains all of o' and spends k features on the most variable parts that can be predicted.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from looseleaf.modes import own_random_state
from looseleaf.plugin import In, check_fields
from looseleaf_inverse_dynamics.demonstrations import Demonstrations


@dataclass
class LinearWorld:
    """Dynamics, contexts and noise; the defaults have contexts that cancel.

    Args:
        A, B: dynamics of the state, (d, d) and (d, m).
        gains: K of each context, (contexts, m, d).
        probabilities: of contexts; None: all the same.
        process: standard deviation of w.
        exploration: standard deviation of eta.
        nuisance: dimensions of z.
        nuisance_scale: standard deviation of each.
        persistence: rho.
        length: steps of a trajectory; it begins at a standard normal state.
        mixing_seed: of the mixing, a random rotation of [s; z].
    """

    A: Any = field(default_factory=lambda: (0.9 * torch.eye(2)).tolist())
    B: Any = field(default_factory=lambda: torch.eye(2).tolist())
    gains: Any = field(default_factory=lambda: [[[0.0, -0.4], [0.4, 0.0]], [[0.0, 0.4], [-0.4, 0.0]]])
    probabilities: Any = None
    process: Annotated[float, In(">= 0")] = 0.05
    exploration: Annotated[float, In(">= 0")] = 0.3
    nuisance: Annotated[int, In(">= 0")] = 30
    nuisance_scale: Annotated[float, In(">= 0")] = 1.0
    persistence: Annotated[float, In("[0, 1]")] = 0.9
    length: Annotated[int, In(">= 1")] = 8
    mixing_seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        self.A, self.B, self.gains = (torch.as_tensor(x, dtype=torch.float64) for x in (self.A, self.B, self.gains))
        count = len(self.gains) if self.gains.dim() == 3 else 0
        d, m = self.B.shape if self.B.dim() == 2 else (0, 0)
        if self.A.shape != (d, d) or self.gains.shape != (count, m, d) or not count:
            raise ValueError(f"LinearWorld: expected A (d, d), B (d, m) and gains (contexts, m, d), got "
                             f"{tuple(self.A.shape)}, {tuple(self.B.shape)} and {tuple(self.gains.shape)}")
        weights = torch.ones(count) if self.probabilities is None else torch.as_tensor(self.probabilities)
        if weights.shape != (count,) or not bool((weights >= 0).all()) or float(weights.sum()) <= 0:
            raise ValueError(f"probabilities: expected {count} numbers >= 0, one for each context, got "
                             f"{self.probabilities}")
        self.probabilities = weights.double() / weights.sum()
        size = d + self.nuisance
        noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(self.mixing_seed))
        self.mixing = torch.linalg.qr(noise)[0]

    @property
    def d(self) -> int:
        """Dimensions of the state."""
        return int(self.A.shape[0])

    def sample(self, trajectories: int, seed: int = 0, context: int | None = None) -> Demonstrations:
        """Demonstrations; contexts are labelled by their number, and the state is kept beside the observation.

        Args:
            trajectories: how many.
            seed: the only source of randomness.
            context: of all; None: drawn by their probabilities.
        """
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=draw)

        which = torch.full((trajectories,), context) if context is not None else torch.multinomial(
            self.probabilities, trajectories, replacement=True, generator=draw)
        gain = self.gains[which]
        s, z = normal(trajectories, self.d), self.nuisance_scale * normal(trajectories, self.nuisance)
        states, nuisances, actions = [s], [z], []
        for _ in range(self.length):
            a = (gain @ s[..., None])[..., 0] + self.exploration * normal(trajectories, self.B.shape[1])
            s = s @ self.A.T + a @ self.B.T + self.process * normal(trajectories, self.d)
            z = self.persistence * z + math.sqrt(1 - self.persistence ** 2) * self.nuisance_scale * normal(
                trajectories, self.nuisance)
            states.append(s)
            nuisances.append(z)
            actions.append(a)
        behind = torch.stack(states, 1)
        seen = torch.cat([behind, torch.stack(nuisances, 1)], -1) @ self.mixing.T
        return Demonstrations.from_arrays(list(seen), list(torch.stack(actions, 1)), discrete=False,
                                          contexts=[str(int(c)) for c in which], states=list(behind))

    def moments(self, n: int = 1) -> Moments:
        """Second moments of (o_t, a_t, o_{t+n}) over the pairs of all trajectories of all contexts, float64.

        Raises:
            ValueError: n is beyond the length.
        """
        if not 0 <= n <= self.length:
            raise ValueError(f"n: expected an integer in [0, {self.length}], the length of trajectories, got {n}")
        d, m = self.B.shape
        last = self.length - max(n, 1)
        total = torch.zeros(2 * d + m, 2 * d + m, dtype=torch.float64)
        sources = d + self.length * (m + d)  # the first state, then eta and w of each step
        scale = torch.cat([torch.ones(d), *([torch.full((m,), self.exploration), torch.full((d,), self.process)]
                                            * self.length)]).double()
        for weight, gain in zip(self.probabilities, self.gains, strict=True):
            s = torch.zeros(d, sources, dtype=torch.float64)
            s[:, :d] = torch.eye(d)
            states, actions = [s], []
            for step in range(self.length):
                eta = torch.zeros(m, sources, dtype=torch.float64)
                w = torch.zeros(d, sources, dtype=torch.float64)
                begin = d + step * (m + d)
                eta[:, begin:begin + m] = torch.eye(m)
                w[:, begin + m:begin + m + d] = torch.eye(d)
                actions.append(gain @ states[-1] + eta)
                states.append(self.A @ states[-1] + self.B @ actions[-1] + w)
            for t in range(last + 1):
                row = torch.cat([states[t], actions[t], states[t + n]]) * scale
                total += weight * row @ row.T / (last + 1)
        return Moments(self, n, total)


@dataclass
class Moments:
    """Second moments of pairs n steps apart, and what linear encoders make of them.

    Attributes:
        world, n: what they belong to.
        of_state: of [s_t; a_t; s_{t+n}].
    """

    world: LinearWorld
    n: int
    of_state: Tensor

    def __post_init__(self) -> None:
        world, d = self.world, self.world.d
        m, size = world.B.shape[1], d + world.nuisance
        whole = torch.zeros(2 * size + m, 2 * size + m, dtype=torch.float64)
        later = size + m
        place = torch.cat([torch.arange(d), size + torch.arange(m), later + torch.arange(d)])
        whole[place[:, None], place] = self.of_state
        unit = world.nuisance_scale ** 2 * torch.eye(world.nuisance, dtype=torch.float64)
        one, two = slice(d, size), slice(later + d, later + size)
        whole[one, one] = whole[two, two] = unit
        whole[one, two] = whole[two, one] = world.persistence ** self.n * unit
        mix = torch.block_diag(world.mixing, torch.eye(m, dtype=torch.float64), world.mixing)
        self.latent, self.of_observation = whole, mix @ whole @ mix.T
        self.o, self.a, self.next = slice(0, size), slice(size, later), slice(later, later + size)

    def best(self, objective: str, k: int) -> Representation:
        """What k linear features and linear heads can reach by ``"ID"``, ``"BC"`` or ``"FD-e"``, and such features.

        ID takes as many features as the two regressions on o_t and o_{t+n} need; its form is exact where that is k or
        fewer.

        Raises:
            ValueError: ID needs more than k features, or another objective.
        """
        c = self.of_observation
        o, a, later = self.o, self.a, self.next
        if objective == "BC":
            return self._reduced_rank(c[a, a], c[a, o], c[o, o], k)
        if objective == "FD-e":  # what the action explains needs no feature
            def without_action(rows: slice, columns: slice) -> Tensor:
                return c[rows, columns] - c[rows, a] @ _inverse(c[a, a]) @ c[a, columns]

            return self._reduced_rank(without_action(later, later), without_action(later, o), without_action(o, o), k)
        if objective != "ID":
            raise ValueError(f"objective: expected 'ID', 'BC' or 'FD-e', got {objective!r}")
        both = torch.cat([torch.arange(o.start, o.stop), torch.arange(later.start, later.stop)])
        from_both = c[a][:, both] @ _inverse(c[both[:, None], both])
        size = o.stop
        _, values, vectors = torch.linalg.svd(torch.cat([from_both[:, :size], from_both[:, size:]]))
        rank = int((values > 1e-6 * values[0]).sum())
        if rank > k:
            raise ValueError(f"k: expected {rank} or more for the closed form of inverse dynamics here, got {k}")
        loss = float(torch.trace(c[a, a] - from_both @ c[both][:, a]))
        return Representation(loss, vectors[:rank], self.state_r2(vectors[:rank]))

    def reached(self, objective: str, encoder: Tensor) -> float:
        """The loss of the features ``encoder @ o`` with the best linear heads.

        Args:
            objective: as for :meth:`best`.
            encoder: (k, dim(o)).
        """
        c, w = self.of_observation, encoder.double()
        action = torch.eye(len(self.world.B.T), dtype=torch.float64)
        empty = torch.zeros(0, self.o.stop, dtype=torch.float64)
        now, acted, later = {"ID": (w, action[:0], w), "BC": (w, action[:0], empty),
                             "FD-e": (w, action, empty)}[objective]
        inputs = torch.block_diag(now, acted, later)
        target = self.next if objective == "FD-e" else self.a
        cross = c[target] @ inputs.T
        return float(torch.trace(c[target, target] - cross @ _inverse(inputs @ c @ inputs.T) @ cross.T))

    def state_r2(self, encoder: Tensor) -> float:
        """Fraction of the state's variance that a linear map of the features ``encoder @ o`` explains.

        Args:
            encoder: (k, dim(o)); no rows: 0.
        """
        if not len(encoder):
            return 0.0
        world, o = self.world, self.o
        state = world.mixing[:, :world.d].T  # s = state @ o, as the mixing is a rotation
        c = self.of_observation[o, o]
        w = encoder.double()
        with_features = state @ c @ w.T
        explained = with_features @ _inverse(w @ c @ w.T) @ with_features.T
        return float(torch.trace(explained) / torch.trace(state @ c @ state.T))

    def _reduced_rank(self, target: Tensor, cross: Tensor, source: Tensor, k: int) -> Representation:
        """Regression of a target on a source through k features: the leading directions of what can be predicted."""
        coefficients = cross @ _inverse(source)
        values, vectors = torch.linalg.eigh(coefficients @ cross.T)
        keep = [i for i in reversed(range(len(values))) if values[i] > 1e-10 * max(1.0, float(torch.trace(target)))][:k]
        encoder = vectors[:, keep].T @ coefficients
        return Representation(float(torch.trace(target) - values[keep].sum()), encoder, self.state_r2(encoder))


@dataclass(frozen=True)
class Representation:
    """What an objective comes to in the linear world.

    Attributes:
        loss: the smallest it can be.
        encoder: (k or fewer, dim(o)), features that reach it; fewer where more would not help.
        state_r2: fraction of the state's variance in them.
    """

    loss: float
    encoder: Tensor
    state_r2: float


def double_integrator(step: float = 0.5, **options: Any) -> LinearWorld:
    """Position and velocity, of which the action moves the velocity alone: one step shows an action in the velocity
    only.

    Args:
        step: of time.
        options: for :class:`LinearWorld`; trajectories have length 2 unless it is among them.
    """
    settings: dict[str, Any] = {"A": [[1.0, step], [0.0, 1.0]], "B": [[0.0], [step]], "length": 2,
                                "gains": [[[0.8, 0.4]], [[-0.8, -0.4]]]}
    return LinearWorld(**{**settings, **options})


def linear_encoder(world: LinearWorld, k: int = 2, seed: int = 0) -> nn.Linear:
    """A linear map from observations to k features, to be pre-trained."""
    with own_random_state(seed):
        return nn.Linear(world.d + world.nuisance, k, bias=False)


def with_gains(world: LinearWorld, gains: Any, probabilities: Any = None) -> LinearWorld:
    """The same world with other contexts."""
    return dataclasses.replace(world, gains=gains, probabilities=probabilities)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, hermitian=True)


__all__ = ["LinearWorld", "Moments", "Representation", "double_integrator", "linear_encoder", "with_gains"]
