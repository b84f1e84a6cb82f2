"""The method to the precision that it can be checked at: encoder, losses, batches, patterns, metrics, selection."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from looseleaf import Prompt
from looseleaf.resume import StateError
from looseleaf_anypattern import (
    PATTERNS,
    CopyIndex,
    CopyMetric,
    ImageStacker,
    Pattern,
    StackedEncoder,
    apply,
    copy_task,
    encode,
    keyed,
    micro_average_precision,
    stack,
    toy_copies,
    toy_encoder,
    train,
)
from looseleaf_anypattern.encoder import Encoded
from looseleaf_anypattern.retrieval import normalized, precision_recall, recall_at_1, recall_at_precision
from looseleaf_anypattern.training import Losses, learning_rate, margin_loss, sample

torch.set_num_threads(1)


def pictures(count=8, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((count, size // 4, size // 4, 3)) * 255).astype(np.uint8).repeat(4, 1).repeat(4, 2)


def small(init="zero", **fields):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(128, 12))
    return StackedEncoder(base, **{"n_patterns": 3, "descriptor": 8, "size": 16, "init": init, **fields}).eval(), base


# ---------------------------------------------------------------------------------------------------------- encoder
def test_zero_init_is_the_base_and_does_not_see_the_context():
    encoder, base = small()
    x, a, b = (torch.randn(4, 3, 16, 16) for _ in range(3))
    one, other = encoder(stack(x, a, b)), encoder(stack(x))
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.features, base(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.descriptor.norm(dim=1), torch.ones(4))
    assert base[0].in_channels == 3 and base[0].weight.shape[1] == 3  # the given model is left alone
    seeing, _ = small("random")
    assert (seeing(stack(x, a, b)).descriptor - seeing(stack(x)).descriptor).abs().max() > 1e-3


def test_widened_convolution_is_the_sum_of_three():
    encoder, _ = small("random")
    x, a, b = (torch.randn(2, 3, 16, 16) for _ in range(3))
    conv = encoder.base[0]
    parts = sum(F.conv2d(p, conv.weight[:, 3 * n:3 * n + 3], stride=4) for n, p in enumerate((x, a, b)))
    torch.testing.assert_close(conv(stack(x, a, b)), parts + conv.bias[:, None, None], atol=1e-5, rtol=1e-5)


def test_the_same_seed_makes_the_same_encoder_and_leaves_the_random_state():
    encoders = [StackedEncoder(small()[1], size=16, init="random", seed=s) for s in (3, 3, 4)]
    assert len({e.fingerprint() for e in encoders[:2]}) == 1 and encoders[2].fingerprint() != encoders[0].fingerprint()
    base, state = nn.Conv2d(3, 4, 4, 4), torch.get_rng_state()
    assert StackedEncoder(base, size=16).pattern_from == "pooled"
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------- losses
def test_each_term_of_the_loss_by_hand():
    torch.manual_seed(0)
    losses = Losses(4, 3, 2, margin=(0.35, 0.6), scale=64, pattern_weight=0.5).double()
    features, descriptor, logits = torch.randn(1, 4).double(), torch.randn(1, 3).double(), torch.randn(1, 5).double()
    terms = losses(Encoded(descriptor, features, features, logits), torch.tensor([1]),
                   torch.tensor([[1., 0., 1.]]).double())
    for term, given, weights, margin in ((terms[0], features, losses.features, 0.35),
                                         (terms[1], descriptor, losses.descriptors, 0.6)):
        cosine = [float((given[0] @ w) / (given.norm() * w.norm())) for w in weights.detach()]
        right, wrong = 64 * (cosine[1] - margin), 64 * cosine[0]
        torch.testing.assert_close(float(term), math.log(math.exp(right - right) + math.exp(wrong - right)), atol=1e-9,
                                   rtol=1e-9)
    p = [1 / (1 + math.exp(-v)) for v in logits[0, :3].tolist()]
    by_hand = 0.5 * -(math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])) / 3
    assert float(terms[2]) == pytest.approx(by_hand, abs=1e-9)
    cosines = torch.tensor([[0.2, 0.7]])
    torch.testing.assert_close(margin_loss(cosines, torch.tensor([1]), 0.0, 10.0),
                               F.cross_entropy(10 * cosines, torch.tensor([1])))


def test_learning_rate_warms_up_stays_and_falls():
    rates = [learning_rate(n, 100) for n in range(100)]
    assert rates[0] == pytest.approx(0.01) and rates[20:40] == [1.0] * 20
    assert rates[10] == pytest.approx(0.505) and rates[70] == pytest.approx(0.5) and rates[99] < 0.01
    assert all(b <= a for a, b in itertools.pairwise(rates[40:]))


# ---------------------------------------------------------------------------------------------------------- batches
def test_a_batch_has_originals_alone_and_replicas_beside_an_example_of_the_same_patterns():
    images = pictures(6)
    wanted = [keyed("colours", 0), keyed("colours", 1), PATTERNS["invert"]]
    drawn = sample(images, wanted, np.random.default_rng(0), batch=24, per_identity=4, most=2)
    assert drawn.pictures.shape == (24, 16, 16, 3) and (np.bincount(drawn.identities) == 4).all()
    for n in range(24):
        own = images[drawn.identities[n]]
        used = [p for p, label in zip(wanted, drawn.labels[n], strict=True) if label]
        if n % 4 == 0:
            assert not used and all((part[n] == own).all() for part in drawn[:3])
            continue
        assert 1 <= len(used) <= 2
        assert (drawn.originals[n] != own).any()  # never the sample's own original
        orders = ([used, used[::-1]] if len(used) == 2 else [used])
        fitting = [o for o in orders if (apply(o, own) == drawn.pictures[n]).all()]
        assert any((apply(o, drawn.originals[n]) == drawn.replicas[n]).all() for o in fitting)
    alone = sample(images, wanted, np.random.default_rng(0), batch=8, context="none")
    assert (alone.pictures == alone.replicas).all() and (alone.pictures == alone.originals).all()


def test_training_lowers_the_loss_resumes_and_repeats(tmp_path):
    images, wanted = pictures(12), ["invert", "channel-swap"]
    settings = {"steps": 30, "batch": 16, "lr": 3e-3, "progress": False}
    encoder, _ = small("random")
    encoder.base[2].train()
    modes, state = [m.training for m in encoder.modules()], np.random.get_state()[1].copy()
    curve = train(encoder, images, wanted, **settings)
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])
    assert [m.training for m in encoder.modules()] == modes and (np.random.get_state()[1] == state).all()
    stopped, _ = small("random")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, images, [_stopping(PATTERNS["invert"], 200), PATTERNS["channel-swap"]], state_dir=tmp_path,
              save_every=5, **settings)
    again, _ = small("random")
    assert train(again, images, wanted, state_dir=tmp_path, **settings) == curve
    assert again.fingerprint() == encoder.fingerprint()
    assert train(small("random")[0], images, wanted, state_dir=tmp_path, **settings) == curve
    with pytest.raises(StateError, match="seed"):
        train(small("random")[0], images, wanted, 1, state_dir=tmp_path, **settings)


def _stopping(pattern, calls):
    left = iter(range(calls))

    def function(picture, rng):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pattern.function(picture, rng)

    return Pattern(pattern.name, pattern.family, function)


def test_frozen_parts_stay():
    encoder, _ = small()
    encoder.base.requires_grad_(False)
    before = encoder.base[3].weight.clone()
    train(encoder, pictures(), ["invert"], steps=3, batch=8, progress=False)
    assert torch.equal(encoder.base[3].weight, before) and not encoder.base[3].weight.requires_grad


# --------------------------------------------------------------------------------------------------------- patterns
def test_every_pattern_depends_on_picture_and_seed_alone():
    assert len(PATTERNS) >= 60 and {p.family for p in PATTERNS.values()} >= {"geometry", "colour", "texture", "overlay",
                                                                              "removal"}
    picture = pictures(1, 32)[0]
    picture[:, :4] = 255
    picture[::3, ::3] = 90
    changed = []
    for name in PATTERNS:
        torch.manual_seed(0)
        np.random.seed(0)
        first = apply([name], picture, 5)
        torch.manual_seed(1)
        np.random.seed(1)
        assert (apply([name], picture, 5) == first).all(), name
        assert first.dtype == np.uint8 and first.shape == picture.shape
        changed.append((apply([name], picture, 6) != picture).any() or (first != picture).any())
    assert all(changed), [n for n, c in zip(PATTERNS, changed, strict=True) if not c]
    assert apply(list(PATTERNS)[:4], pictures(1, 32)[0, :19], 0).shape == (19, 32, 3)


@pytest.mark.parametrize("kind", ["colours", "blocks", "warp"])
def test_keyed_patterns_are_one_edit_each(kind):
    picture = pictures(1, 32)[0]
    assert (apply([keyed(kind, 3)], picture, 0) == apply([keyed(kind, 3)], picture, 1)).all()
    assert (apply([keyed(kind, 3)], picture) != apply([keyed(kind, 4)], picture)).any()


# ---------------------------------------------------------------------------------------------------------- metrics
def test_muap_takes_the_worst_case_of_ties_and_is_the_plain_sum():
    assert micro_average_precision(np.array([0.5, 0.5]), np.array([True, False]), 1) == 0.5
    assert micro_average_precision(np.array([0.5, 0.5]), np.array([False, True]), 1) == 0.5
    rng = np.random.default_rng(0)
    scores, correct = rng.integers(0, 9, 60) / 9, rng.random(60) < 0.3
    order = sorted(range(60), key=lambda n: (scores[n], not correct[n]), reverse=True)
    hits, area = 0, 0.0
    for rank, n in enumerate(order, 1):
        hits += correct[n]
        area += correct[n] * hits / rank / 25
    assert micro_average_precision(scores, correct, 25) == pytest.approx(area, abs=1e-12)
    precision, recall = precision_recall(scores, correct, 25)
    assert recall_at_precision(scores, correct, 25, 0.2) == recall[precision >= 0.2].max()
    assert recall_at_precision(np.array([1.0]), np.array([False]), 1) == 0
    assert recall_at_1(np.array([[1, 0], [1, 1], [0, 5.0]]), np.array([[1, 0], [1, 0], [0, 0]])) == 0.5


def test_scores_are_normalised_by_the_mean_of_the_largest():
    q, r, t = (F.normalize(torch.randn(n, 6), dim=1) for n in (3, 4, 15))
    expected = [[float(q[i] @ r[j]) - 2 * sum(sorted((float(q[i] @ b) for b in t), reverse=True)[:10]) / 10
                 for j in range(4)] for i in range(3)]
    torch.testing.assert_close(normalized(q @ r.T, q, t), torch.tensor(expected), atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="got 4: the mean is over all"):
        few = normalized(q @ r.T, q, t[:4])
    torch.testing.assert_close(few, q @ r.T - 2 * (q @ t[:4].T).mean(1, keepdim=True), atol=1e-5, rtol=0)


def test_the_index_finds_what_a_full_sort_finds(tmp_path):
    q, r, t = (F.normalize(torch.randn(n, 6), dim=1) for n in (3, 9, 12))
    index = CopyIndex(r, [f"r{n}" for n in range(9)], t, backend="matmul")
    found = index.search(q, 4)
    for row, scores in zip(found, normalized(q @ r.T, q, t), strict=True):
        order = scores.argsort(descending=True)[:4]
        assert [m.key for m in row] == [f"r{n}" for n in order] and row[0].score == pytest.approx(float(scores.max()))
    index.save(tmp_path / "index.safetensors")
    assert CopyIndex.load(tmp_path / "index.safetensors", backend="matmul").search(q, 4) == found


def test_faiss_finds_the_same():
    pytest.importorskip("faiss", reason="faiss is not installed")
    q, r = (F.normalize(torch.randn(n, 6), dim=1) for n in (3, 9))
    one, other = (CopyIndex(r, list(range(9)), backend=b).search(q, 4) for b in ("faiss", "matmul"))
    assert [[m.key for m in row] for row in one] == [[m.key for m in row] for row in other]


# ----------------------------------------------------------------------------------------------- prompt and retrieval
def test_queries_are_seen_with_the_most_similar_pair_and_references_alone(tmp_path):
    task, encoder = toy_copies(), toy_encoder()
    prompt = ImageStacker().optimize(task, encoder, progress=False)
    detector = prompt.on(encoder)
    asked = [e.inputs["image"] for e in task.test if e.inputs["role"] == "query"]
    keys = F.normalize(encode(encoder, [e.inputs["image"] for e in task.train]).pattern, dim=1)
    like = F.normalize(encode(encoder, asked).pattern, dim=1) @ keys.T
    chosen = detector.select(asked)
    assert [row[0].pair for row in chosen] == like.argmax(1).tolist() and len(chosen[0]) == 6
    by_hand = [encoder(stack(*(encoder.read([x]) for x in (
        q, task.train[c[0].pair].inputs["image"], task.train[c[0].pair].inputs["original"])))).descriptor
        for q, c in zip(asked, chosen, strict=True)]
    torch.testing.assert_close(detector.describe(asked), torch.cat(by_hand).detach(), atol=1e-6, rtol=0)
    # references do not depend on the support
    other = ImageStacker().optimize(copy_task([(e.inputs["image"], e.inputs["original"], e.target)
                                               for e in task.train[:1]]), encoder, progress=False)
    searched = [e for e in task.test if e.inputs["role"] == "reference"]
    assert np.array_equal(detector.predict(searched), other.on(encoder).predict(searched))
    evaluation = task.evaluate(detector)
    rows = {r: torch.tensor(np.array([p for p, e in zip(evaluation.predictions, task.test, strict=True)
                                      if e.inputs["role"] == r])) for r in ("query", "reference", "background")}
    correct = np.array([[q.target == r.target for r in searched] for q in task.test[:3]])
    assert evaluation.score == CopyMetric(normalize_top=4).of(*rows.values(), correct)
    index = CopyIndex.of(encoder, {e.target: e.inputs["image"] for e in searched}, backend="matmul")
    found = detector.search(asked, index)
    scores = rows["query"] @ rows["reference"].T
    assert [m[0].key for m in found] == [searched[n].target for n in scores.argmax(1)]
    prompt.save(tmp_path / "prompt.json")
    again = Prompt.load(tmp_path / "prompt.json").on(encoder)
    assert np.array_equal(again.predict(searched), detector.predict(searched))
    report = detector.report(asked, index, {e.target: e.inputs["image"] for e in searched})
    assert len(report.images) == len(asked) and report.tables[0].rows


def test_more_pairs_are_averaged_and_a_start_is_kept():
    task, encoder = toy_copies(), toy_encoder()
    prompt = ImageStacker(top=2).optimize(task, encoder, progress=False)
    detector, asked = prompt.on(encoder), [e.inputs["image"] for e in task.test[:3]]
    chosen = detector.select(asked, 2)
    both = [encode(encoder, asked, tuple(part[[c[n].pair for c in chosen]].numpy() for part in (
        prompt.replicas, prompt.originals))).descriptor for n in range(2)]
    torch.testing.assert_close(detector.describe(asked), F.normalize(sum(both) / 2, dim=1))
    more = ImageStacker().optimize(task, encoder, start=prompt, progress=False)
    assert more.patterns == prompt.patterns * 2 and torch.equal(more.keys, prompt.keys.repeat(2, 1))


def test_a_planted_encoder_needs_the_right_pair():
    """The answer is known: descriptors that undo the edit that the pair shows find every original, others do not."""

    class Undo(nn.Module):
        """Reads the order of the channels off the pair, and undoes it: (B, 9, H, W) -> features."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, x):
            if x.shape[1] != 9:
                return x.flatten(1)
            query, replica, original = x[:, :3], x[:, 3:6], x[:, 6:]
            apart = (replica[:, :, None] - original[:, None]).abs().mean((3, 4))  # (B, replica's, original's channel)
            return torch.stack([q[d.argmin(0)] for q, d in zip(query, apart, strict=True)]).flatten(1)

    encoder = StackedEncoder(Undo(), n_patterns=1, descriptor=16 * 16 * 3, size=16).eval()
    with torch.no_grad():
        encoder.to_descriptor.weight.copy_(torch.eye(768))
        encoder.to_descriptor.bias.zero_()
    images, other = pictures(12), pictures(2, seed=1)
    orders = [(1, 2, 0), (2, 0, 1)]
    queries = np.stack([p[..., list(orders[0])] for p in images])
    truth = encode(encoder, images).descriptor

    def score(order):
        context = None if order is None else (np.stack([other[0][..., list(order)]] * 12), np.stack([other[0]] * 12))
        return CopyMetric().of(encode(encoder, queries, context).descriptor, truth, None, np.eye(12, dtype=bool))

    assert score(orders[0]) == 1.0 and score(orders[1]) < 0.9 and score(None) < 0.9
