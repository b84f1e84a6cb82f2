"""Hand templates in groups: the published lists, and a grouping for templates of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

GENERAL = (
    "{} texture.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a low resolution photo of the {}.", "a low resolution photo of a {}.", "a pixelated photo of the {}.",
    "a pixelated photo of a {}.",
    "a good photo of the {}.", "a good photo of a {}.")
"""Nine templates in the groups (1, 1, 1, 4, 2), from the official configurations."""
IMAGENET = (
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "itap of a {}.", "itap of the {}.",
    "a photo of the large {}.", "a photo of a large {}.",
    "art of the {}.", "a rendering of a {}.", "a rendering of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a low resolution photo of the {}.", "a low resolution photo of a {}.", "a pixelated photo of the {}.",
    "a pixelated photo of a {}.", "a jpeg corrupted photo of the {}.", "a blurry photo of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.", "a cropped photo of a {}.",
    "a bright photo of the {}.",
    "a good photo of the {}.", "a good photo of a {}.",
    "a close-up photo of the {}.",
    "a photo of the clean {}.",
    "a {} in a video game.",
    "a photo of the hard to see {}.",
    "a origami {}.",
    "{} texture.")
"""The 32 templates for ImageNet in 20 groups, from the official configurations."""
GROUPS = {GENERAL: (1, 1, 1, 4, 2), IMAGENET: (1, 1, 1, 1, 2, 2, 3, 1, 1, 1, 7, 2, 1, 2, 1, 1, 1, 1, 1, 1)}
"""Published list of templates -> sizes of its groups, which follow one another."""


def check_groups(templates: Sequence[str], groups: Sequence[int] | None, where: str) -> None:
    """Raise ValueError that begins with ``where`` unless these are templates, and groups of all of them."""
    if isinstance(templates, str) or not templates or not all(isinstance(t, str) for t in templates):
        raise ValueError(f"{where}.templates: expected a sequence of texts, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{where}.templates: expected text with one {{}} where the name goes, got {template!r}")
        if not template.replace("{}", "").strip(" ."):
            raise ValueError(f"{where}.templates: expected a word or more beside {{}}, whose embeddings an expert "
                             f"begins with, got {template!r}")
    if groups is not None and (min(groups, default=0) < 1 or sum(groups) != len(templates)):
        raise ValueError(f"{where}.groups: expected integers >= 1 that sum to {len(templates)}, the number of "
                         f"templates, got {list(groups)}")


def parts(templates: Sequence[str], groups: Sequence[int]) -> list[tuple[str, ...]]:
    """The templates of each group."""
    ends = list(accumulate(groups))
    return [tuple(templates[end - size:end]) for end, size in zip(ends, groups, strict=True)]


def group_templates(features: Tensor, count: int, rounds: int = 100) -> list[list[int]]:
    """Group templates by spherical k-means of their mean text features; no group is empty (the grouping is ours).

    It begins with template 0 and then the template farthest from those already taken, so that nothing is random.

    Args:
        features: (T, d), mean over the class names.
        count: of groups, in [1, T].
        rounds: most rounds.

    Returns:
        Template numbers of each group, ascending; groups in the order of their first template.

    Raises:
        ValueError: ``count`` out of range.
    """
    if not 1 <= count <= len(features):
        raise ValueError(f"count: expected an integer in [1, {len(features)}], the number of templates, got {count}")
    x = F.normalize(features.double(), dim=-1)
    chosen = [0]
    for _ in range(count - 1):
        nearest = (x @ x[chosen].T).amax(1)
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    centres, label = x[chosen], torch.full((len(x),), -1)
    for _ in range(rounds):
        cosines = x @ centres.T
        new = cosines.argmax(1)
        for group in range(count):  # an empty group takes the template that fits worst where it is not alone
            if not (new == group).any():
                own = cosines.gather(1, new[:, None])[:, 0].clone()
                own[torch.bincount(new, minlength=count)[new] < 2] = torch.inf
                new[own.argmin()] = group
        if torch.equal(new, label):
            break
        label = new
        centres = F.normalize(torch.stack([x[label == group].mean(0) for group in range(count)]), dim=-1)
    return sorted([n for n in range(len(x)) if int(label[n]) == group] for group in range(count))


__all__ = ["GENERAL", "GROUPS", "IMAGENET", "check_groups", "group_templates", "parts"]
