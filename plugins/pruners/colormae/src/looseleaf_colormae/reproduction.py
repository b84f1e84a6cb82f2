"""The paper's claims on small masked autoencoders of clip art and emoji: masks, what is hard, what is learned, cost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from looseleaf import Claim, Report
from looseleaf.modes import evaluating
from looseleaf.statistics import Interval, bootstrap, paired
from looseleaf_colormae.masking import attach_masking
from looseleaf_colormae.pictures import mask_statistics, rings, spectrum
from looseleaf_colormae.pictures import show as show_masks
from looseleaf_colormae.pruner import COLORS, ColorMAE, color_gain
from looseleaf_lab import data
from looseleaf_lab.study import Results, Study, above, add_table, every
from looseleaf_lab.timing import interleave
from looseleaf_lab.training import fit, warmup_cosine

LEARNED = ("white", "green", "red")
"""Colors of masks that models are trained on."""
PROBES = {"linear": "linear probe of classes", "knn": "20 nearest neighbours", "miou": "mIoU of alpha masks"}
SIDE, PATCH = 64, 8
GRID = (SIDE // PATCH, SIDE // PATCH)
SIZES: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 384,
         "image_size": SIDE, "patch_size": PATCH, "decoder_hidden_size": 48, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 3, "decoder_intermediate_size": 192, "norm_pix_loss": True}
OURS = "what counts as working here, fixed before measuring"
NOTES = "public notes on the paper, ablation"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        steps, batch, lr: of each pre-training; AdamW and weight decay as in the paper, a twentieth of steps warm-up.
        draws: masks of each color for each test picture.
        masks: of each color, for their statistics.
        rounds: of the timing.
        stand_in: made-up pictures, for tests.
    """

    steps: int = 600
    batch: int = 128
    lr: float = 2e-3
    draws: int = 2
    masks: int = 1000
    rounds: int = 300
    stand_in: bool = False


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures (n, 3, 64, 64) uint8, their classes, whether they are for testing, and alpha masks (n, 64, 64) bool of
    those that have one."""

    images: Tensor
    classes: Tensor
    test: Tensor
    alpha: Tensor
    has_alpha: Tensor


@functools.cache
def pictures(stand_in: bool) -> Pictures:
    """Clip art, and emoji of two styles at a random place and size on a plain ground; a fifth is for tests."""
    rng = np.random.default_rng(0)
    images: list[np.ndarray] = []
    alphas: list[np.ndarray] = []
    labels: list[str] = []
    keys: list[Row] = []
    for name in ("emoji", "emoji-other-style", "clip-art"):
        found = data.stand_in(name, 40) if stand_in else data.pictures(name)
        assert isinstance(found, data.Pictures)
        for picture in found.images:
            image, alpha = placed(picture, rng) if picture.shape[-1] == 4 else (picture, None)
            images.append(image)
            alphas.append(np.zeros((SIDE, SIDE), bool) if alpha is None else alpha)
        labels += found.column("label")
        keys += [{"key": key} for key in found.column("key")]
    names = sorted(set(labels))
    test = torch.zeros(len(images), dtype=torch.bool)
    test[data.split(keys, "colormae", test=0.2)["test"]] = True
    masks = torch.from_numpy(np.stack(alphas))
    return Pictures(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
                    torch.tensor([names.index(label) for label in labels]), test, masks, masks.flatten(1).any(1))


def placed(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture with alpha at a random place, in half its size or more, on a plain ground, and its alpha mask: so
    neither place nor ground tells what belongs to it."""
    side = int(rng.integers(SIDE // 2, SIDE + 1))
    top, left = rng.integers(0, SIDE - side + 1, 2)
    rgba = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None] / 255
    rgba[:, :3] *= rgba[:, 3:]  # what is transparent has no color of its own
    small = F.interpolate(rgba, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    image, alpha = np.ones((SIDE, SIDE, 3)) * rng.random(3), np.zeros((SIDE, SIDE), bool)
    here = np.s_[top:top + side, left:left + side]
    image[here] = small[..., :3] + (1 - small[..., 3:]) * image[here]
    alpha[here] = small[..., 3] > 0.5
    return (image * 255).round().clip(0, 255).astype(np.uint8), alpha


def normal(images: Tensor) -> Tensor:
    """What models read."""
    return (images.float() / 255 - 0.5) / 0.25


def crops(images: Tensor, draw: torch.Generator) -> Tensor:
    """Random crops of 0.2 to 1 of the area, scaled to the whole, and flips. [recipe; squares alone]"""
    count = len(images)
    side = (0.2 + 0.8 * torch.rand(count, generator=draw)).sqrt()
    flip = 1 - 2 * torch.randint(2, (count,), generator=draw)
    shift = (2 * torch.rand(count, 2, generator=draw) - 1) * (1 - side[:, None])
    theta = torch.cat([torch.diag_embed(torch.stack([side * flip, side], 1)), shift[..., None]], 2)
    grid = F.affine_grid(theta, [count, 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def autoencoder(seed: int) -> ViTMAEForPreTraining:
    """A small untrained ViTMAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTMAEForPreTraining(ViTMAEConfig(**SIZES))


def trained(color: str, seed: int, scale: Scale) -> ViTMAEForPreTraining:
    """A model trained on masks of a color; start, pictures and crops depend on the seed alone."""
    model, found, draw = autoencoder(seed), pictures(scale.stand_in), torch.Generator().manual_seed(seed)
    rows = (~found.test).nonzero().flatten()

    def loss(step: int) -> Tensor:
        batch = rows[torch.randint(len(rows), (scale.batch,), generator=draw)]
        return model(pixel_values=crops(normal(found.images[batch]), draw)).loss

    with attach_masking(model, ColorMAE(color, seed=seed)):
        fit(model, loss, steps=scale.steps, schedule=lambda o: warmup_cosine(o, scale.steps), label=color,
            optimizer=lambda p: torch.optim.AdamW(p, scale.lr, betas=(0.9, 0.95), weight_decay=0.05))
    return model


def measure(seed: int, scale: Scale) -> Row:
    """What probes find in the features of each model, and how hard masks of each color are for that of white masks."""
    found = pictures(scale.stand_in)
    row: Row = {"features": {"untrained": probes(autoencoder(seed), found)}}
    for color in LEARNED:
        model = trained(color, seed, scale)
        row["features"][color] = probes(model, found)
        if color == "white":
            row["losses"] = {c: losses(model, found.images[found.test], ColorMAE(c, seed=seed), scale.draws)
                             for c in COLORS}
    return row


@torch.no_grad()
def losses(model: ViTMAEForPreTraining, images: Tensor, method: ColorMAE, draws: int) -> list[float]:
    """Mean squared error of the masked patches of each picture, the mean of several masks."""
    out = []
    with evaluating(model):
        for part in images.split(256):
            pixels, errors = normal(part), torch.zeros(len(part))
            target = model.patchify(pixels)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            for _ in range(draws):
                found = model(pixel_values=pixels, noise=method.mae_noise(len(part), GRID))
                squared = (found.logits - target).square().mean(-1)
                errors += (squared * found.mask).sum(1) / found.mask.sum(1) / draws
            out += errors.tolist()
    return out


@torch.no_grad()
def features(model: ViTMAEForPreTraining, images: Tensor) -> Tensor:
    """What the encoder says of each patch of whole pictures, (n, patches, width)."""
    encoder = ViTMAEModel(ViTMAEConfig(**SIZES, mask_ratio=0.0)).eval()
    encoder.load_state_dict(model.vit.state_dict())
    order = torch.arange(GRID[0] * GRID[1], dtype=torch.float32)
    return torch.cat([encoder(normal(part), noise=order.expand(len(part), -1)).last_hidden_state[:, 1:]
                      for part in images.split(256)])


def probes(model: ViTMAEForPreTraining, found: Pictures) -> dict[str, float]:
    """Accuracy of classes by a linear probe and by neighbours of mean features; mIoU of a linear probe of patches."""
    patches, test = features(model, found.images), found.test
    whole = patches.mean(1)
    classes = F.one_hot(found.classes).float()
    linear = ridge(whole[~test], classes[~test], whole[test]).argmax(1)
    unit = F.normalize(whole - whole[~test].mean(0), dim=1)
    near, rows = (unit[test] @ unit[~test].T).topk(min(20, int((~test).sum())), dim=1)
    votes = (classes[~test][rows] * near.sub(1).mul(10).exp()[..., None]).sum(1).argmax(1)
    pixels = F.unfold(found.alpha[:, None].float(), PATCH, stride=PATCH).transpose(1, 2)  # (n, patches, pixels)
    first, second = ~test & found.has_alpha, test & found.has_alpha
    guess = ridge(patches[first].flatten(0, 1), pixels[first].flatten(0, 1), patches[second].flatten(0, 1)) > 0.5
    true = pixels[second].flatten(0, 1) > 0.5
    overlap = [float((a & b).sum() / (a | b).sum()) for a, b in ((guess, true), (~guess, ~true))]
    return {"linear": float((linear == found.classes[test]).float().mean()),
            "knn": float((votes == found.classes[test]).float().mean()), "miou": sum(overlap) / 2}


def ridge(x: Tensor, y: Tensor, at: Tensor, penalty: float = 1e-3) -> Tensor:
    """Ridge regression of ``y`` (n, k) on standardised ``x`` (n, d), read at ``at``; the penalty is relative to n."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    inputs, centre = ((x - mean) / scale).double(), y.double().mean(0)
    gram = inputs.T @ inputs + penalty * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ (y.double() - centre))
    return (((at - mean) / scale).double() @ weights + centre).float()


def once(scale: Scale) -> Row:
    """Spectra and statistics of masks, their cost, and the operations of a training step."""
    row: Row = {"spectra": {}, "masks": {}, "flops": {}}
    images = normal(pictures(scale.stand_in).images[:4])
    for color in COLORS:
        method = ColorMAE(color)
        keep = method.keep_mask(scale.masks, (14, 14))
        row["masks"][color] = {name: v.tolist() for name, v in mask_statistics(keep, (14, 14)).items()}
        row["spectra"][color] = [spectrum(method.patterns()).tolist(),
                                 rings(color_gain(color, method.size).square()).tolist()]
        model = autoencoder(0).train()
        with attach_masking(model, method), FlopCounterMode(display=False) as counter:
            model(pixel_values=images).loss.backward()
        row["flops"][color] = counter.get_total_flops()
    method = ColorMAE()
    row["bank"] = 2 * method.patterns().numel() * 4  # with the mirror images
    for count in (64, 256, 1024):
        rounds = max(2, scale.rounds * 64 // count)
        functions: dict[str, Callable[[], Any]] = {
            "noise": functools.partial(method.noise, count, (14, 14)),
            "torch.rand": functools.partial(torch.rand, count, 196),
            "masks": functools.partial(method.ids, count, (14, 14)),
            "MAE's masks": functools.partial(random_masking, count, 196)}
        timing = interleave(functions, rounds=rounds, warmup=2)
        row[f"cost {count}"] = {"seconds": {name: timing.median(name) for name in functions},
                                "noise": timing.ratio("noise", "torch.rand"),
                                "masks": timing.ratio("masks", "MAE's masks")}
    return row


def random_masking(batch: int, patches: int, ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers' ViTMAE does for its masks, but for taking the tokens."""
    kept = int(patches * (1 - ratio))
    shuffled = torch.rand(batch, patches).argsort(dim=1)
    restore = shuffled.argsort(dim=1)
    mask = torch.ones(batch, patches)
    mask[:, :kept] = 0
    return shuffled[:, :kept], restore, mask.gather(1, restore)


def show(report: Report, results: Results) -> None:
    """What was measured, and the pictures of masks and spectra."""
    found = pictures(results.scale.stand_in)
    example = int((found.test & found.has_alpha).nonzero()[0])
    shown = show_masks(ColorMAE(), found.images[example].permute(1, 2, 0).float() / 255, grid=GRID)
    report.tables += shown.tables
    report.images += shown.images
    report.figures += shown.figures
    add_table(report, "Features, by the masks of pre-training", (
        {"masks": name, **{words: results.interval("features", name, probe) for probe, words in PROBES.items()}}
        for name in ("untrained", *LEARNED)), "mean over seeds, 95 % bootstrap")
    add_table(report, "Loss of a model trained on white masks", (
        {"test masks": color, "loss": bootstrap(by_picture(results, color))} for color in COLORS),
        "mean over test pictures, 95 % bootstrap")
    add_table(report, "Cost", (
        {"pictures of 14 x 14 patches": count, **{f"{name}, microseconds": 1e6 * seconds for name, seconds in
                                                  results.once[f"cost {count}"]["seconds"].items()},
         "torch.rand / noise": Interval(*results.once[f"cost {count}"]["noise"]),
         "MAE's masks / masks": Interval(*results.once[f"cost {count}"]["masks"])} for count in (64, 256, 1024)),
        "medians; ratios of neighbouring rounds, above 1: ours is faster")
    report.facts |= {"bank, MiB": results.once["bank"] / 2 ** 20, "training pictures": int((~found.test).sum()),
                     "test pictures": int(found.test.sum()), "classes": len(found.classes.unique()),
                     "commonest class": float(F.one_hot(found.classes[found.test]).float().mean(0).max())}


def by_picture(results: Results, color: str) -> list[float]:
    """Loss of each test picture, the mean over seeds."""
    return [float(v) for v in np.mean(results.values("losses", color), 0)]


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper."""
    claim, once = results.claim, results.once
    worst = max(abs(a - b) / b for pair in once["spectra"].values() for a, b in zip(*pair, strict=True) if b > 1e-6)
    empty = max(a for pair in once["spectra"].values() for a, b in zip(*pair, strict=True) if b <= 1e-6)
    yield claim("The spectra of the banks are those of the filters", OURS, "not a figure of the paper",
                "mean power at each frequency within 10 % of the filter's; below 1e-5 where that is below 1e-6",
                worst < 0.1 and empty < 1e-5, f"at most {worst:.1%} off; at most {empty:.1g} where nothing passes",
                any_scale=True)
    order = ("blue", "white", "green", "red")
    for name, words in (("adjacency", "Kept patches lie more and more side by side"),
                        ("cluster", "Clusters of kept patches grow"),
                        ("distance", "Masked patches lie farther and farther from kept ones")):
        gaps = [paired(once["masks"][b][name], once["masks"][a][name]) for a, b in itertools.pairwise(order)]
        yield claim(f"{words} from blue to white, green and red", "paper, section 3", "shown as pictures",
                    "the interval of each of the three differences over masks lies above 0",
                    every(*map(above, gaps)), ", ".join(f"{c} {np.mean(once['masks'][c][name]):.2f}" for c in order),
                    any_scale=True)
    loss = {color: by_picture(results, color) for color in COLORS}
    gaps = [paired(loss[a], loss[b]) for a, b in (("red", "green"), ("green", "white"))]
    easy = paired(loss["white"], loss["blue"])
    yield claim("For one model, masks are the harder the redder: red, green, white, and blue at most as white", NOTES,
                "red hardest, blue lowest loss [notes]", "the intervals of red - green and green - white over test "
                "pictures lie above 0, that of white - blue not below",
                every(*map(above, gaps), above(easy) is not False),
                "loss " + ", ".join(f"{c} {np.mean(loss[c]):.3f}" for c in ("red", "green", "white", "purple", "blue"))
                + f"; white - blue {easy:+.3f}", count="seeds")
    over = "the interval of the difference over seeds lies above 0; does not hold where it lies below"

    def compared(ours: str, theirs: str, probe: str) -> tuple[bool | None, str]:
        one, other = (results.mean("features", name, probe) for name in (ours, theirs))
        gap = results.interval("features", ours, probe, minus=("features", theirs, probe))
        return above(gap), f"{one:.3f} against {other:.3f}, {gap:+.4f}"

    for probe, words in PROBES.items():
        yield claim(f"Pre-training on white masks is better than none: {words}", OURS, "not a figure of the paper",
                    over, *compared("white", "untrained", probe), count="seeds")
    figures = {"linear": ("logs and notes", "ImageNet top-1 82.82 -> 82.98, 300 epochs [logs; notes], fine-tuned"),
               "knn": ("logs and notes", "no figure"),
               "miou": ("repository's table and notes", "ADE20K mIoU 44.51 -> 45.80, 300 epochs [repo table; notes]")}
    for probe, words in PROBES.items():
        source, paper = figures[probe]
        yield claim(f"Pre-training on green masks is better than on white ones: {words}", source, paper, over,
                    *compared("green", "white", probe), count="seeds")
    for probe, words in PROBES.items():
        yield claim(f"Pre-training on red masks is worse than on white ones: {words}", NOTES, "red worst [notes]", over,
                    *compared("white", "red", probe), count="seeds")
    cost, rule = once["cost 256"], "256 pictures of 14 x 14 patches: the interval of the median ratio lies above 1"
    for ours, theirs, words in (("noise", "torch.rand", "Filtered noise takes no longer than torch.rand"),
                                ("masks", "MAE's masks", "Masks take no longer than MAE's own, ranking included")):
        yield claim(words, "abstract", "no cost [abstract]", rule, above(cost[ours], 1.0),
                    f"{1e6 * cost['seconds'][ours]:.0f} against {1e6 * cost['seconds'][theirs]:.0f} microseconds, "
                    f"ratio {Interval(*cost[ours]):.2f}", any_scale=True)
    yield claim("A training step takes the same operations", "abstract", "no cost [abstract]",
                "equal counts of floating-point operations for all colors", len(set(once["flops"].values())) == 1,
                f"{once['flops']['green'] / 4e6:.1f} million a picture", any_scale=True)
    yield from results.unmeasured("repository's table and notes", "in the paper's tables", {
        "ImageNet top-1 83.17 -> 83.57 (800 epochs), 83.43 -> 83.77 (1,600)": "ImageNet and hundreds of GPU hours",
        "ADE20K mIoU 46.46 -> 49.18 (800 epochs), 47.46 -> 49.26 (1,600)": "ImageNet, ADE20K and hundreds of GPU hours",
        "COCO box AP 48.50 -> 48.70, 49.15 -> 49.50, 49.60 -> 50.10": "ImageNet, COCO and hundreds of GPU hours",
        "Pre-training on purple masks is second worst": "two more pre-trainings a seed"})


study = Study("ColorMAE: masks of filtered noise for small masked autoencoders", measure, claims, show, once,
              full=Scale(), quick=Scale(steps=30, batch=64, draws=1, masks=200, rounds=100), quick_seeds=1)
