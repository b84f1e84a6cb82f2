"""The paper's claims on a real DINOv2-S that finds salient objects: what masks keep, what is lost, what it costs."""

from __future__ import annotations

import base64
import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf import AttentionBackend, AttentionCall, Claim, Report, attach
from looseleaf.attention.call import Phase
from looseleaf.statistics import Interval, auroc, bootstrap, paired
from looseleaf_lab import data, models
from looseleaf_lab.image_models import IMAGE_MODELS, SaliencyViT
from looseleaf_lab.study import Results, Study, above, add_table, below, curve, every
from looseleaf_lab.timing import interleave
from looseleaf_sparsifiner.backend import RowKeys, Sparsifiner
from looseleaf_sparsifiner.baselines import LowRank, Nearest, RandomKeys, TrueTop
from looseleaf_sparsifiner.pictures import draw_keys
from looseleaf_sparsifiner.training import Outputs, distill

SIDE, GRID = 224, (16, 16)
KINDS = ("animals", "food", "plants", "vehicles", "household")
GROUNDS = ("grass", "gravel", "brick", "ihc", "moon", "retina", "starry_night", "rubberwhale1", "hubble_deep_field")
RATES = (0.5, 0.25, 0.1, 0.05)
"""At which the attention in kept keys is measured."""
LOOKED = (0.25, 0.05)
"""At which pictures go through the model."""
METHODS: dict[str, type[RowKeys]] = {"learned": Sparsifiner, "nearest": Nearest, "random": RandomKeys,
                                     "true top": TrueTop}
RIVALS = ("nearest", "random")
MEASURES = ("feature error", "IoU", "AUC")
OURS = "what counts as working here, fixed before measuring"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        train, test: pictures, of different stamps.
        epochs, batch, lr, warmup: of the first stage; the paper has far more pictures, so the rate here is larger, and
            was chosen with the number of steps on another draw of pictures.
        steps, tune_batch, tune_lr: of the second stage; with so few steps the 8e-5 of the paper spoils the model.
        lengths: tokens of timed calls, and the fraction of keys kept in each.
        rounds: of the timing.
        stand_in: made-up pictures and a small random model, for tests.
    """

    train: int = 96
    test: int = 16
    epochs: int = 40
    batch: int = 1
    lr: tuple[float, float] = (1e-3, 3e-4)
    warmup: float = 0.2
    steps: int = 16
    tune_batch: int = 4
    tune_lr: tuple[float, float] = (3e-5, 3e-6)
    lengths: tuple[tuple[int, float], ...] = ((257, 0.25), (257, 0.05), (1370, 0.05), (4097, 0.01))
    rounds: int = 7
    stand_in: bool = False


# ------------------------------------------------------------------------------------------------ pictures and model
def composites(seed: int, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Photos of things on textures, uint8 (train + test, 224, 224, 3), and the things' masks, bool (n, 224, 224)."""
    from PIL import Image

    stamps = data.stand_in("stamps", 40) if scale.stand_in else data.pictures("stamps")
    photos = data.stand_in("photos", 4) if scale.stand_in else data.pictures("photos")
    assert isinstance(stamps, data.Pictures) and isinstance(photos, data.Pictures)
    rows = [n for n, row in enumerate(stamps.rows) if scale.stand_in or (
        row["label"] in KINDS and "cartoon" not in row["sublabel"])]
    grounds = [n for n, row in enumerate(photos.rows) if scale.stand_in or row["name"] in GROUNDS]
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for row in rng.permutation(rows)[:scale.train + scale.test]:
        top, left = rng.integers(0, photos.images.shape[1] - SIDE + 1, 2)
        image = photos.images[rng.choice(grounds)][top:top + SIDE, left:left + SIDE].astype(np.float32)
        size = int(rng.integers(90, 171))
        stamp: Any = Image.fromarray(np.asarray(stamps.images[row])).convert("RGBa").resize((size, size))
        pixels = np.asarray(stamp.convert("RGBA"), dtype=np.float32)
        top, left = rng.integers(0, SIDE - size, 2)
        alpha, mask = pixels[..., 3:] / 255, np.zeros((SIDE, SIDE), dtype=bool)
        here = image[top:top + size, left:left + size]
        here[:] = alpha * pixels[..., :3] + (1 - alpha) * here
        mask[top:top + size, left:left + size] = alpha[..., 0] > 0.5
        images.append(image.round().astype(np.uint8))
        masks.append(mask)
    return np.stack(images), np.stack(masks)


@functools.cache
def saliency(stand_in: bool) -> Any:
    """DINOv2-S with its decoder of saliency; or one of two layers with random weights."""
    if not stand_in:
        model: Any = models.load("vit-saliency")[0]
        return model.requires_grad_(False)
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = SaliencyViT()
    model.backbone = Dinov2Model(Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, mlp_ratio=1,
                                              image_size=SIDE, patch_size=14))
    return model.eval().requires_grad_(False)


class Recorded(nn.Module):
    """Attention layers that repeat what the layers of a model were given, by the numbers of pictures: predictors learn
    from it as from the model, which then runs once and not once an epoch."""

    class Layer(nn.Module):
        """One of them."""

        def __init__(self, query: Tensor, key: Tensor) -> None:
            super().__init__()
            self.query, self.key = query, key

        def forward(self, numbers: Tensor) -> Tensor:
            query, key = self.query[numbers].float(), self.key[numbers].float()
            return F.scaled_dot_product_attention(query, key, key)

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(*layer) for layer in layers)

    def forward(self, numbers: Tensor) -> None:
        for layer in self.layers:
            layer(numbers)


@dataclasses.dataclass
class Look(AttentionBackend):
    """Exact attention that keeps queries and keys in half precision, or how much of it lies in kept keys.

    Args:
        chosen: name -> what chooses keys; None: queries and keys are kept.
    """

    chosen: Any = None
    phases: ClassVar[frozenset[Phase]] = frozenset({"bidirectional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.held: dict[str, dict[int, list[Tensor]]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """Exact attention, (B, H, L, D)."""
        if self.chosen is None:
            self.seen.setdefault(call.layer, []).append((call.query.half(), call.key.half()))
            return call.dense()
        true = torch.softmax(call.query[:, :, 1:] @ call.key.mT * call.scale, -1)
        for name, backend in self.chosen.items():
            kept = torch.cat(list(backend.kept(call, None, backend.count(call.shape[3], None))), 2)
            self.held.setdefault(name, {}).setdefault(call.layer, []).append((true * kept).sum(-1).mean((1, 2)))
        return call.dense()

    def recorded(self) -> Recorded:
        """The layers that were seen."""
        return Recorded([(torch.cat([q for q, _ in parts]), torch.cat([k for _, k in parts]))
                         for _, parts in sorted(self.seen.items())])


# ---------------------------------------------------------------------------------------------------------- one seed
def measure(seed: int, scale: Scale) -> Row:
    """Predictors learned on composites; what they keep, and what the model makes of new composites before and after
    equal fine-tuning."""
    torch.manual_seed(seed)
    model = saliency(scale.stand_in)
    images, masks = composites(seed, scale)
    pixels = IMAGE_MODELS["vit-saliency"].preprocessor(images)
    train, test = pixels[:scale.train], pixels[scale.train:]
    truth = torch.from_numpy(masks)
    learned, features = first_stage(model, train, seed, scale)
    methods = {(name, rate): with_predictors(METHODS[name](keep_rate=rate), learned)
               for name in METHODS for rate in RATES}
    look = Look({f"{name} {rate}": method for (name, rate), method in methods.items()})
    exact, outs = run(model, test, look), {}
    parts = np.array_split(learned.losses, min(20, len(learned.losses)))
    out: Row = {"losses": [float(part.mean()) for part in parts],
                "dense": compare(exact, exact, truth[scale.train:]),
                "recall": {name: torch.stack([torch.cat(some) for _, some in sorted(layers.items())]).tolist()
                           for name, layers in look.held.items()}, "stage 1": {}, "stage 2": {}, "macs": {}}
    low = with_predictors(LowRank(), learned)
    for rate in LOOKED:
        for name in METHODS:
            outs[name, rate] = run(model, test, methods[name, rate])
            out["stage 1"][f"{name} {rate}"] = compare(outs[name, rate], exact, truth[scale.train:])
        out["macs"][str(rate)] = counted(model, test[:1], methods["learned", rate])
    out["stage 1"]["guess"] = compare(run(model, test, low), exact, truth[scale.train:])
    out["blocks"] = {str(rate): coverage(methods["learned", rate].masks(model.backbone, test[:2])) for rate in LOOKED}
    for name in ("learned", *RIVALS):
        tuned = second_stage(model, methods[name, LOOKED[-1]], train, features, truth[:scale.train], scale)
        out["stage 2"][name] = compare(run(tuned, test, methods[name, LOOKED[-1]]), exact, truth[scale.train:])
    if seed == 0:
        out["drawn"] = drawn(model, methods["learned", 0.1], images[scale.train:], test)
    return out


def with_predictors(backend: RowKeys, learned: Sparsifiner) -> RowKeys:
    """The backend with the predictors of another where it wants any."""
    if isinstance(backend, Sparsifiner):
        backend.modules = learned.modules
    return backend


@torch.no_grad()
def run(model: Any, pixels: Tensor, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
    """Saliency (n, 224, 224) and last features of the patches (n, 256, 384) under a backend."""
    maps, features = [], []
    with attach(model.backbone, backend):
        for some in pixels.split(4):
            hidden = model.backbone(some).last_hidden_state[:, 1:]
            features.append(hidden)
            maps.append(model.decoder(hidden.mT.unflatten(2, GRID), (SIDE, SIDE))[:, 0])
    return torch.cat(maps), torch.cat(features)


def first_stage(model: Any, pixels: Tensor, seed: int, scale: Scale) -> tuple[Sparsifiner, Tensor]:
    """Predictors learned from the model's attention on pictures, and the dense features of these."""
    look, learned = Look(), Sparsifiner()
    _, features = run(model, pixels, look)
    order = torch.Generator().manual_seed(seed)
    batches = [n for _ in range(scale.epochs) for n in torch.randperm(len(pixels), generator=order).split(scale.batch)]
    learned.calibrate(look.recorded(), batches, layers="layers.*", epochs=1, lr=scale.lr, warmup=scale.warmup,
                      seed=seed)
    return learned, features


def second_stage(model: Any, backend: RowKeys, pixels: Tensor, features: Tensor, truth: Tensor, scale: Scale) -> Any:
    """The backbone fine-tuned under masks, with the features of the dense one as teacher; the decoder stays."""
    tuned = copy.deepcopy(model)
    tuned.backbone.requires_grad_(True)
    numbers = torch.arange(scale.steps * scale.tune_batch) % len(pixels)
    batches = [(pixels[some], features[some], truth[some].float()) for some in numbers.split(scale.tune_batch)]

    def outputs(backbone: Any, batch: Any) -> Outputs:
        images, dense, masks = batch
        if backbone is model.backbone:  # the teacher, who has answered before
            return Outputs(features=dense)
        hidden = backbone(images).last_hidden_state[:, 1:]
        found = tuned.decoder(hidden.mT.unflatten(2, GRID), (SIDE, SIDE))[:, 0]
        return Outputs(F.binary_cross_entropy(found, masks), features=hidden)

    distill(tuned.backbone, backend, batches, model.backbone, outputs=outputs, epochs=1, lr=scale.tune_lr)
    return tuned.requires_grad_(False)


def compare(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], truth: Tensor) -> dict[str, list[float]]:
    """Of each picture: relative error of the features, IoU of the map over a half with the truth, AUC of the map."""
    (maps, features), (_, theirs) = ours, exact
    found = maps > 0.5
    return {"feature error": ((features - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).tolist(),
            "IoU": ((found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)).tolist(),
            "AUC": [auroc(m[::4, ::4][t[::4, ::4]].tolist(), m[::4, ::4][~t[::4, ::4]].tolist())
                    if 0 < t[::4, ::4].sum() < t[::4, ::4].numel() else 0.5
                    for m, t in zip(maps, truth, strict=True)]}


@torch.no_grad()
def counted(model: Any, pixels: Tensor, backend: RowKeys) -> dict[str, float]:
    """Millions of multiply-adds of attention for a picture, as recorded, and the density of the basis."""
    with attach(model.backbone, backend) as attached:
        model.backbone(pixels)
    found = [(m.basis(0.02) > 0).float().mean().item() for m in backend.modules.values()]  # type: ignore[operator]
    return {"ours": sum(r["mega_macs"] for r in attached.records), "basis": sum(found) / len(found),
            "dense": sum(r["dense_mega_macs"] for r in attached.records)}


def coverage(masks: dict[int, Tensor]) -> dict[str, float]:
    """Fraction of the blocks of 16, 32 and 64 tokens in which a kept pair lies, mean over layers and heads."""
    shares = {}
    for block in (16, 32, 64):
        touched = [F.max_pool2d(mask.float(), block, ceil_mode=True).mean().item() for mask in masks.values()]
        shares[str(block)] = sum(touched) / len(touched)
    return shares


def drawn(model: Any, backend: RowKeys, images: np.ndarray, pixels: Tensor) -> Row:
    """Keys of the patch in the middle of each of three pictures, for the report; bytes of half the size as text."""
    masks = backend.masks(model.backbone, pixels[:3])
    layers = [min(masks), sorted(masks)[len(masks) // 2], max(masks)]
    found = [np.stack([image, *((draw_keys(image / 255, masks[layer][n], GRID, 8 * 16 + 8) * 255).round()
                                for layer in layers)]) for n, image in enumerate(images[:3])]
    small = np.stack(found)[:, :, ::2, ::2].astype(np.uint8)
    return {"layers": layers, "shape": list(small.shape), "pixels": base64.b64encode(small.tobytes()).decode()}


# -------------------------------------------------------------------------------------------------------------- time
def once(scale: Scale) -> Row:
    """Seconds of one layer's attention, six heads of 64: dense, ours under a mask, ours gathered, guess included."""
    rows = []
    for tokens, rate in scale.lengths:
        g = torch.Generator().manual_seed(tokens)
        query, key, value = (torch.randn(1, 6, tokens, 64, generator=g) for _ in range(3))
        call = AttentionCall(query, key, value, 64 ** -0.5, False, phase="bidirectional")
        torch.manual_seed(0)
        masked = Sparsifiner(rate, compute_with="masked")
        masked.modules = {0: masked.predictor(64, tokens, 6)}
        nn.init.trunc_normal_(masked.modules[0].up, std=0.05)  # type: ignore[arg-type]
        gather = with_predictors(Sparsifiner(rate, compute_with="gather"), masked)
        functions: dict[str, Any] = {"dense": call.dense, "masked": functools.partial(masked.attend, call),
                     "gathered": functools.partial(gather.attend, call),
                     "choosing keys": lambda backend=masked, call=call: list(
                         backend.kept(call, None, backend.count(call.shape[3], None)))}
        with torch.inference_mode():
            timing = interleave(functions, scale.rounds if tokens < 2000 else 3)
        rows.append({"tokens": tokens, "rate": rate, **{name: timing.median(name) for name in functions},
                     "ratio": timing.ratio("masked", "dense"), "gathered ratio": timing.ratio("gathered", "dense")})
    return {"times": rows}


# ------------------------------------------------------------------------------------------------------------ claims
def held(results: Results, name: str) -> list[float]:
    """Attention in kept keys of each test picture of all seeds, mean over layers."""
    return [v for seed in results.values("recall", name) for v in np.asarray(seed).mean(0).tolist()]


def picture_values(results: Results, stage: str, name: str, measure: str) -> list[float]:
    """A measure of each test picture of all seeds."""
    return [float(v) for v in results.joined(stage, name, measure)]


def claims(results: Results) -> Iterator[Claim]:
    """The claims of the paper and of this project."""
    claim, rate = results.claim, LOOKED[-1]
    for rival in RIVALS:
        gains = [paired(held(results, f"learned {r}"), held(results, f"{rival} {r}")) for r in RATES]
        yield claim(f"Keys that are guessed hold more attention than {rival} ones", OURS, "learned masks, as pictures",
                    "paired difference above 0 with its 95 % interval, over pictures, at all rates",
                    every(*map(above, gains)), "; ".join(
                        f"{r:.0%} of the keys: {bootstrap(held(results, f'learned {r}')).value:.3f}, {g:+.3f}"
                        for r, g in zip(RATES, gains, strict=True)), count="seeds")
    drop = paired(picture_values(results, "stage 1", "learned 0.25", "IoU"), results.joined("dense", "IoU"))
    yield claim("A quarter of the keys keeps the accuracy", "abstract, on ImageNet after fine-tuning; here: IoU of "
                "saliency, first stage alone", "top-1 falls by at most 0.4 %",
                "95 % interval of the difference over pictures above -0.02", above(drop, -0.02),
                f"IoU {bootstrap(picture_values(results, 'stage 1', 'learned 0.25', 'IoU')).value:.3f} against "
                f"{bootstrap(results.joined('dense', 'IoU')).value:.3f}, {drop:+.3f}", count="seeds")
    for stage, title, names in (("stage 1", "Without fine-tuning", [f"{r} {rate}" for r in RIVALS] + ["guess"]),
                                ("stage 2", "After equal fine-tuning", list(RIVALS))):
        own = f"learned {rate}" if stage == "stage 1" else "learned"
        for name in names:
            ours, theirs = (picture_values(results, stage, n, "feature error") for n in (own, name))
            gap, figures = paired(ours, theirs), f"{np.mean(ours):.3f} against {np.mean(theirs):.3f}"
            seen = paired(picture_values(results, stage, own, "IoU"), picture_values(results, stage, name, "IoU"))
            other = "the guess itself as attention" if name == "guess" else f"{name.split()[0]} keys of equal number"
            yield claim(f"{title} {rate:.0%} of the keys change features less than {other}", OURS, "no figure",
                        "paired difference of relative errors below 0 with its 95 % interval, over pictures",
                        below(gap), f"{figures}, {gap:+.3f}; IoU {seen:+.3f}", count="seeds")
    saved = {r: 1 - results.mean("macs", str(r), "ours") / results.mean("macs", str(r), "dense") for r in LOOKED}
    yield claim("Multiply-adds of attention fall", "abstract", "by 48 to 69 %",
                "at a quarter of the keys by at least 48 %, density of the basis as learned", saved[0.25] >= 0.48,
                "; ".join(f"{r:.0%} of the keys: by {s:.1%}" for r, s in saved.items())
                + f"; density of the basis {results.mean('macs', '0.25', 'basis'):.2f}", count="seeds")
    times = results.once["times"]
    ratio, gathered = (Interval(*times[0][name]) for name in ("ratio", "gathered ratio"))
    yield claim("A layer of a vision transformer is faster", OURS, "no figure",
                "median time of dense over ours above 1 with its 95 % interval, a quarter of the keys of "
                f"{times[0]['tokens']}, one core", above(ratio, 1.0), f"{ratio:.2f} masked, {gathered:.2f} gathered")
    yield from results.unmeasured("abstract", "as stated", {
        "With token sparsity FLOPs of a ViT fall by more than 60 % at equal accuracy": "ImageNet",
        "Accuracy per FLOP is better than of token sparsity alone (DynamicViT, EViT)": "ImageNet and their training",
        "Top-1 on ImageNet falls by at most 0.4 %": "ImageNet and 50 epochs on 8 GPUs"})


def show(report: Report, results: Results) -> None:
    """Attention in kept keys, quality, costs and pictures."""
    report.figure("Attention in kept keys", x_label="fraction of keys kept", y_label="fraction of attention", series=[
        curve(name, RATES, [bootstrap(held(results, f"{name} {r}")) for r in RATES]) for name in METHODS],
        note="mean over patches, heads and layers; intervals over test pictures")
    losses = np.asarray(results.values("losses"))
    report.figure("Loss of the first stage", x_label="part of the steps", y_label="loss of a picture", series=[
        curve("mean over seeds", np.linspace(0, 1, losses.shape[1]), losses.mean(0).tolist())])
    by_layer = {f"{name} {r:.0%}": np.asarray(results.values("recall", f"{name} {r}")).mean((0, 2))
                for r in LOOKED for name in METHODS}
    add_table(report, "Attention in kept keys by layer", (
        {"layer": layer, **{name: float(values[layer]) for name, values in by_layer.items()}}
        for layer in range(len(by_layer["learned 25%"]))))
    quality: list[dict[str, str | Interval]] = [
        {"keys": "all", "fine-tuned": "no", **{m: bootstrap(results.joined("dense", m)) for m in MEASURES}}]
    for stage, tuned in (("stage 1", "no"), ("stage 2", "yes")):
        quality += [{"keys": name if stage == "stage 1" else f"{name} {LOOKED[-1]}", "fine-tuned": tuned,
                     **{m: bootstrap(picture_values(results, stage, name, m)) for m in MEASURES}}
                    for name in results.rows[0][stage]]
    add_table(report, "Pictures", quality,
              "feature error: relative, against the dense model; IoU and AUC of saliency against the pasted thing; "
              "guess: the guessed maps themselves as attention; 95 % bootstrap over pictures")
    add_table(report, "Multiply-adds of attention for a picture, millions", (
        {"keys kept": r, "dense": results.mean("macs", str(r), "dense"), "ours": results.mean("macs", str(r), "ours"),
         "density of the basis": results.mean("macs", str(r), "basis"),
         **{f"blocks of {b} touched": results.mean("blocks", str(r), b) for b in ("16", "32", "64")}} for r in LOOKED),
        "all layers; projections of the layers not counted")
    add_table(report, "Milliseconds of one layer's attention", (
        {"tokens": row["tokens"], "keys kept": row["rate"],
         **{name: 1000 * row[name] for name in ("dense", "masked", "gathered", "choosing keys")}}
        for row in results.once["times"]), "six heads of 64, float32, one item; guess included; interleaved medians")
    pictures = results.rows[0]["drawn"]  # seed 0
    pixels = np.frombuffer(base64.b64decode(pictures["pixels"]), np.uint8).reshape(pictures["shape"])
    for number, row in enumerate(pixels):
        report.image(f"Keys of a patch, picture {number}", list(row),
                     "10 % of the keys; the brighter a patch, the more heads keep it for the framed one",
                     captions=["picture", *(f"layer {n}" for n in pictures["layers"])])


study = Study("Sparsifiner on DINOv2-S for saliency", measure, claims, show=show, once=once, full=Scale(),
              quick=Scale(train=8, test=4, epochs=4, steps=1, lengths=((257, 0.25), (257, 0.05)), rounds=3),
              quick_seeds=1, facts=lambda results: {
                  "model": "vit-saliency, 12 layers of 6 heads, 257 tokens", "test pictures": len(
                      results.joined("dense", "IoU")), "threads": torch.get_num_threads()})
