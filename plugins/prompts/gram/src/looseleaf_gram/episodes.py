"""Episodes from unlabelled pairs: captions are clustered into classes, the pictures of a class into domains.

That tasks come from a cross-modal hierarchical clustering is said in the abstract of the paper's extension; how it is
done is reconstructed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looseleaf import Report
from looseleaf.fingerprint import content_fingerprint
from looseleaf.tasks import Example, Task
from looseleaf_vision import as_image, picture_of, spaced

Namer = Callable[[Sequence[str]], str]
RESTARTS = 3
"""Runs of k-means from other starts, of which the best is taken (ours)."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture and its caption; ``key`` is a hash of the pixels."""

    example: Example
    caption: str
    key: str


def read_pairs(pairs: Sequence[Any]) -> list[Pair]:
    """Pairs in an order that does not depend on the one given.

    Args:
        pairs: ``(picture, caption)``, or examples with the inputs ``image`` and ``caption``; pictures as
            :func:`looseleaf_vision.as_image` reads them.

    Raises:
        ValueError: no pairs, a caption without words, or one picture several times.
    """
    out = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, Example):
            example, caption = pair, pair.inputs.get("caption")
        else:
            try:
                picture, caption = pair
            except (TypeError, ValueError):
                raise ValueError("pairs: expected (picture, caption), or examples with image and caption, got "
                                 f"{type(pair).__name__} at {number}") from None
            example = Example({"image": picture}, None)
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"pairs: expected a caption with words, got {caption!r} at {number}: leave such pairs out")
        out.append(Pair(example, " ".join(caption.split()), picture_key(example)))
    if not out:
        raise ValueError("pairs: expected pictures with captions, got none")
    out.sort(key=lambda pair: (pair.key, pair.caption))
    repeated = sum(a.key == b.key for a, b in itertools.pairwise(out))
    if repeated:
        raise ValueError(f"pairs: expected every picture once, got {repeated} again: keep one caption of each picture")
    return out


def picture_key(example: Example) -> str:
    """A hash of the pixels of an example's picture."""
    image = as_image(picture_of(example))
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def overlap(pairs: Sequence[Any], task: Task) -> tuple[list[str], int]:
    """What of a task is known from the pairs: names of its classes that are captions, and how many of its pictures.

    A figure on new classes means little unless both are empty.
    """
    known = read_pairs(pairs)
    captions, keys = {pair.caption.lower() for pair in known}, {pair.key for pair in known}
    names = [str(name) for name in task.classes or () if spaced(name).lower() in captions]
    return names, sum(picture_key(e) in keys for part in (task.train, task.dev, task.test) for e in part)


def shortened(model: Any, text: str, room: int) -> str:
    """The first words of a text that are ``room`` tokens at most."""
    words = text.split()
    while len(words) > 1 and model.count_tokens(" ".join(words)) > room:
        words.pop()
    return " ".join(words)


def embed(pairs: Sequence[Pair], model: Any) -> tuple[Tensor, Tensor]:
    """Features (n, d) of pictures and captions; a caption is cut to what the model reads (ours)."""
    room = model.max_length - 2
    return model.all_images([pair.example for pair in pairs]), model.texts(
        [shortened(model, pair.caption, room) for pair in pairs])


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A class that was found: its name, and the places of its pictures domain by domain."""

    name: str
    domains: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Episode:
    """A small task: places of pictures to learn from and to be asked about, both among the same names.

    Attributes:
        names: of the classes.
        support, query: (ways * shots,) places in the pairs.
        targets: (ways * shots,) numbers of the names, the same for both.
        domains: of each class the number of the support's and of the query's domain.
    """

    names: list[str]
    support: Tensor
    query: Tensor
    targets: Tensor
    domains: list[tuple[int, int]]


class Episodes:
    """Episodes without end; ``episodes[n]`` is the same each time.

    Args:
        pairs: as :func:`read_pairs` gives them.
        images, texts: (n, d) L2-normalised features of pictures and captions.
        classes: how many clusters of captions; at most as many as there are different captions.
        domains: how many clusters of pictures in each; those with fewer than 2 * shots are merged with the nearest.
        ways: classes of an episode.
        shots: pictures of each class in the support, and in the query.
        shifted: the query is from another domain of each class than the support; else both are from one.
        namer: the captions of a class -> its name; None: the caption nearest to the centroid.
        fits: whether a caption can be a name; those that are too long for the model cannot.
        seed: of clusters and draws.

    Attributes:
        clusters: all that were found.
        usable: those with two domains or more.

    Raises:
        ValueError: features that are not finite, a namer that gives no name, or fewer usable classes than ``ways``.
    """

    def __init__(self, pairs: Sequence[Pair], images: Tensor, texts: Tensor, *, classes: int, domains: int, ways: int,
                 shots: int, shifted: bool = True, namer: Namer | None = None,
                 fits: Callable[[str], bool] = lambda caption: True, seed: int = 0) -> None:
        self.pairs, self.images, self.ways, self.shots = list(pairs), images, ways, shots
        self.shifted, self.seed = shifted, seed
        for what, features in (("pictures", images), ("captions", texts)):
            bad = (~torch.isfinite(features).all(-1)).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"features of {what}: expected finite numbers, got NaN or infinity for {len(bad)}, "
                                 f"the first with the caption {self.pairs[bad[0]].caption!r}: a model in half "
                                 "precision may overflow, load it as float32")
        seen, said = (f.detach().cpu().double().numpy() for f in (images, texts))
        self.clusters = [Cluster(name, self._domains(seen, places, domains))
                         for name, places in self._classes(said, classes, namer, fits).items()]
        self.usable = [cluster for cluster in self.clusters if len(cluster.domains) > 1]
        if len(self.usable) < ways:
            raise ValueError(f"episodes: expected {ways} classes or more with two domains of {2 * shots} pictures, got "
                             f"{len(self.usable)} of {len(self.clusters)} classes in {len(self.pairs)} pairs: give "
                             "more pairs, or lower classes, shots or ways")

    def _classes(self, texts: np.ndarray, classes: int, namer: Namer | None,
                 fits: Callable[[str], bool]) -> dict[str, list[int]]:
        """Name -> places; classes of one name are one (ours)."""
        captions = [pair.caption for pair in self.pairs]
        labels, centres = kmeans(texts, min(classes, len(set(captions))), self.seed)
        out: dict[str, list[int]] = {}
        for number, centre in enumerate(centres):
            places = np.flatnonzero(labels == number)
            if not len(places):
                continue
            # the nearest first; of equals the first in the alphabet
            order = sorted(places.tolist(), key=lambda n: (-round(float(texts[n] @ centre), 9), captions[n]))
            if namer is not None:
                name = namer([captions[n] for n in order])
                if not isinstance(name, str) or not name.strip():
                    raise ValueError(f"namer: expected a name for {captions[order[0]]!r} and {len(order) - 1} more "
                                     f"captions, got {name!r}")
            else:
                name = next((captions[n] for n in order if fits(captions[n])), "")
                if not name:
                    raise ValueError("episodes: expected a caption in each class that the model reads with the "
                                     f"context before it, got {captions[order[0]]!r} and {len(order) - 1} more that "
                                     "are all too long: give namer=, or a smaller n_ctx")
            out.setdefault(name.strip().lower(), []).extend(sorted(places.tolist()))
        return out

    def _domains(self, images: np.ndarray, places: list[int], domains: int) -> list[list[int]]:
        """Clusters of the pictures of a class; the smallest is merged with the nearest until all are large enough."""
        own = images[places]
        labels, _ = kmeans(own, min(domains, len(places)), self.seed)
        groups = [np.flatnonzero(labels == n) for n in range(int(labels.max()) + 1)]
        groups = [group for group in groups if len(group)]
        while len(groups) > 1 and min(map(len, groups)) < 2 * self.shots:
            small = groups.pop(min(range(len(groups)), key=lambda n: len(groups[n])))
            centre = own[small].mean(0)
            near = max(range(len(groups)), key=lambda n: _cosine(own[groups[n]].mean(0), centre))
            groups[near] = np.concatenate([groups[near], small])
        return [sorted(places[n] for n in group) for group in groups]

    def __getitem__(self, number: int) -> Episode:
        draw = random.Random(f"{self.seed} {number}")
        names, support, query, chosen = [], [], [], []
        for cluster in draw.sample(self.usable, self.ways):
            first, second = draw.sample(range(len(cluster.domains)), 2)
            second = second if self.shifted else first
            one = draw.sample(cluster.domains[first], self.shots)
            left = [place for place in cluster.domains[second] if place not in one]
            names.append(cluster.name)
            support += one
            query += draw.sample(left, self.shots)
            chosen.append((first, second))
        targets = torch.arange(self.ways).repeat_interleave(self.shots)
        return Episode(names, torch.tensor(support), torch.tensor(query), targets, chosen)

    def __iter__(self) -> Iterator[Episode]:
        number = 0
        while True:
            yield self[number]
            number += 1

    def fingerprint(self) -> str:
        """A short hash of pairs, clusters and draws."""
        return content_fingerprint([[[p.key, p.caption] for p in self.pairs], [[c.name, c.domains] for c in
                                    self.clusters], self.ways, self.shots, self.shifted, self.seed])

    def report(self, count: int = 2) -> Report:
        """The clusters as a table, and the pictures of some episodes: support above query."""
        report = Report("Episodes", {"pairs": len(self.pairs), "classes": len(self.clusters),
                                     "with two domains or more": len(self.usable), "ways": self.ways,
                                     "shots": self.shots, "query from another domain": self.shifted})
        table = report.table("Classes", ["name", "pictures", "domains"])
        for cluster in sorted(self.clusters, key=lambda c: -sum(map(len, c.domains))):
            table.add(cluster.name, sum(map(len, cluster.domains)), " + ".join(str(len(d)) for d in cluster.domains))
        for number in range(count):
            episode = self[number]
            for part, places in (("support", episode.support), ("query", episode.query)):
                shown = [np.asarray(as_image(picture_of(self.pairs[n].example)).resize((64, 64)))
                         for n in places.tolist()]
                report.image(f"Episode {number}, {part}", shown,
                             captions=[episode.names[t] for t in episode.targets.tolist()])
        return report


def kmeans(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each L2-normalised point, and the centroids, by scikit-learn's k-means with its k-means++ start.

    The squared distance of unit vectors is 2 - 2 cos, so that the nearest is the one of the largest cosine.
    """
    from sklearn.cluster import KMeans

    clusters = min(clusters, len(np.unique(points.round(9), axis=0)))
    found = KMeans(clusters, n_init=RESTARTS, random_state=seed).fit(points)
    return found.labels_, found.cluster_centers_


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12))


__all__ = ["Cluster", "Episode", "Episodes", "Namer", "Pair", "embed", "kmeans", "overlap", "picture_key",
           "read_pairs", "shortened"]
