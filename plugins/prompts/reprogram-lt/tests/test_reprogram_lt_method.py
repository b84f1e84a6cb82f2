"""Label mapping, the canvas, and what is learned, to the precision that can be computed by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from looseleaf import Budget, Evaluation, Example, Prompt, Task, UnsupportedModelError
from looseleaf.statistics import expected_calibration_error
from looseleaf_reprogram_lt import LinearHead, ReprogramPrompt, VisualReprogram, frequency_mapping, label_counts
from looseleaf_reprogram_lt.optimizer import Program, head_input
from looseleaf_vision import ImageClassifier, PixelFrame, calibration_error
from looseleaf_vision.testing import toy_classifier, toy_pictures


def plain_mapping(counts):
    """The rule word for word: the largest entry, then its row and column are struck out."""
    left = np.array(counts, dtype=np.int64)
    found = [-1] * left.shape[1]
    while -1 in found:
        source, target = divmod(int(left.argmax()), left.shape[1])
        found[target] = source
        left[source] = left[:, target] = -1
    return found


def test_mapping_of_the_counts_that_hungarian_and_column_maxima_get_wrong():
    counts = [[5, 4, 0], [9, 8, 0], [0, 7, 6], [1, 0, 2], [0, 0, 0]]
    assert frequency_mapping(counts).tolist() == [1, 2, 3]
    assert torch.tensor(counts).argmax(0).tolist() == [1, 1, 2]
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    best = optimize.linear_sum_assignment(-np.array(counts).T)[1]  # [0, 1, 2] and [1, 0, 2] have the largest sum
    assert best.tolist() != [1, 2, 3] and sum(counts[s][t] for t, s in enumerate(best)) == 19


def test_mapping_of_ties_and_of_targets_that_are_never_predicted():
    assert frequency_mapping([[3, 3], [3, 3], [0, 0]]).tolist() == [0, 1]
    assert frequency_mapping([[4, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]).tolist() == [0, 1, 2]
    assert frequency_mapping(np.zeros((4, 3), dtype=int)).tolist() == [0, 1, 2]


def test_mapping_equals_the_rule_word_for_word():
    draw = np.random.default_rng(0)
    for _ in range(200):
        targets = int(draw.integers(1, 7))
        counts = draw.integers(0, 4, (targets + int(draw.integers(0, 6)), targets))
        found = frequency_mapping(torch.from_numpy(counts)).tolist()
        assert found == plain_mapping(counts) and len(set(found)) == targets


def test_mapping_refuses_what_it_cannot_map():
    with pytest.raises(ValueError, match="at least as many outputs of the model as there are classes"):
        frequency_mapping([[1, 2]])
    for wrong in ([[0.5]], [[-1]], [1, 2]):
        with pytest.raises(ValueError, match="expected integers >= 0"):
            frequency_mapping(wrong)


class Seen(nn.Module):
    """Keeps what it is given; its logits are means of the channels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.input = None

    def forward(self, pixels):
        self.input = pixels
        return pixels.mean((2, 3)) * self.scale


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def canvas(size, out=224):
    """What the network is given at the start for two random pictures of ``size``, and these pictures."""
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, size, size, generator=draw)
    task = Task("random", [Example({"image": p}, n) for n, p in enumerate(pictures)], classes=[0, 1])
    model = ImageClassifier(Seen().eval(), size=out, mean=MEAN, std=STD)
    prompt = VisualReprogram().untrained(task, model)
    prompt.on(model).scores(task.train)
    return model.model.input, pictures, prompt, model, task


def test_border_at_the_start_is_grey_and_the_inside_is_the_picture_bit_for_bit():
    given, pictures, prompt, model, _ = canvas(33)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    left, right = 96, 95
    assert prompt.inner == 33 and given.shape == (2, 3, 224, 224) and left + 33 + right == 224
    padded = nn.functional.pad(pictures, (left, right, left, right))
    inside = (slice(None), slice(None), slice(left, left + 33), slice(left, left + 33))
    assert torch.equal(given[inside], model.preprocess.normalize(padded)[inside])
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[left:left + 33, left:left + 33] = False
    grey = ((0.5 - mean) / std).expand_as(given)
    assert torch.allclose(given[..., outside], grey[..., outside], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "learned"), [(32, 147_456), (128, 101_376)])
def test_learned_numbers_are_those_of_the_authors(size, learned):
    assert PixelFrame(224, inner=size).trained == learned


def test_gradient_of_the_pixels_is_zero_inside():
    _, pictures, prompt, model, _ = canvas(33, 64)
    module = prompt.module(model)
    module(model, pictures).sum().backward()
    inside = module.frame.delta.grad[:, module.frame.mask[0] == 0]
    assert inside.numel() == 3 * 33 ** 2 and not inside.any()
    assert module.frame.delta.grad[:2, module.frame.mask[0] == 1].abs().min() > 0  # two logits


def test_target_logit_is_that_of_its_source():
    _, pictures, prompt, model, _ = canvas(8, 16)
    module = dataclasses.replace(prompt, mapping=torch.tensor([2, 0])).module(model)
    assert torch.equal(module(model, pictures), model.logits(module.frame(pictures))[:, [2, 0]])


def test_added_frame_leaves_its_input_and_the_middle_alone():
    task, model = toy_pictures(), toy_classifier()
    prompt = VisualReprogram(prompt="add", pad=3, epochs=3, lr=0.1).optimize(task, model, progress=False)
    assert prompt.program.abs().max() > 0.05 and not prompt.program[:, 3:13, 3:13].any()
    pixels = model.read(task.test)
    before = pixels.clone()
    framed = prompt.module(model).frame(pixels)
    assert torch.equal(pixels, before) and torch.equal(framed[..., 3:13, 3:13], before[..., 3:13, 3:13])


def test_calibration_error_is_of_probabilities_over_the_whole_set():
    first, labels = [.9, .92, .61, .3, .55, .19], [0, 1, 0, 1, 1, 1]
    scores = [[float(np.log(p)), float(np.log(1 - p))] for p in first]
    found = Evaluation(0.0, None, [], scores)
    examples = [Example({"image": n}, label) for n, label in enumerate(labels)]
    assert calibration_error(found, examples, [0, 1], 15) == pytest.approx(0.375, abs=1e-12)
    right = [float((p < 0.5) == bool(label)) for p, label in zip(first, labels, strict=True)]
    assert expected_calibration_error([max(p, 1 - p) for p in first], right, 15) == pytest.approx(0.375, abs=1e-12)


class Coloured(nn.Module):
    """A planted case: outputs 4, 7 and 1 are how red, green and blue the middle is; the rest say nothing."""

    ORDER = (4, 7, 1)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, pixels):
        middle = pixels[..., 4:12, 4:12].mean((2, 3))
        out = torch.full((len(pixels), 9), -9.0)
        out[:, list(self.ORDER)] = self.scale * middle
        return out


def coloured():
    return ImageClassifier(Coloured().eval(), size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def test_mapping_finds_the_outputs_of_a_planted_case():
    model, task = coloured(), toy_pictures(3, 6, size=8)
    # the picture is 8 of 16 pixels wide, so that its squares are in the middle
    for mapping in ("ilm", "flm"):
        prompt = VisualReprogram(mapping=mapping, epochs=2).optimize(task, model, progress=False)
        assert prompt.mapping.tolist() == list(Coloured.ORDER) and prompt.info["sources"] == ["4", "7", "1"]
        assert task.evaluate(prompt.on(model)).score == 1.0
    by_chance = VisualReprogram(mapping="random", epochs=2).optimize(task, model, progress=False)
    assert len(set(by_chance.mapping.tolist())) == 3
    assert task.evaluate(by_chance.on(model)).score < 1.0


class Border(nn.Module):
    """A planted case of the pixels: the target is decided by the middle only where the border is bright."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, pixels):
        border = pixels[..., :4, :].mean((1, 2, 3))[:, None]
        return self.scale * (pixels[..., 4:12, 4:12].mean((2, 3)) * border.sigmoid() + (1 - border.sigmoid())
                             * torch.tensor([3.0, 0.0, 0.0]))


def test_training_finds_the_pixels_of_a_planted_case():
    model = ImageClassifier(Border().eval(), size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    task = toy_pictures(3, 6, size=8)
    optimizer = VisualReprogram(epochs=60, lr=0.2)
    start = optimizer.untrained(task, model)
    prompt = optimizer.optimize(task, model, progress=False)
    bright = prompt.program[:, :4].mean()
    assert bright > 1 and task.evaluate(prompt.on(model)).score > task.evaluate(start.on(model)).score + 0.2


def test_mapping_comes_from_training_pictures_only():
    task, model = toy_pictures(), toy_classifier()
    optimizer = VisualReprogram(epochs=2, batch_size=8)
    other = dataclasses.replace(task, dev=toy_pictures(seed=5).dev, test=toy_pictures(seed=6).test)
    assert optimizer.optimize(task, model, progress=False).fingerprint() == \
        optimizer.optimize(other, model, progress=False).fingerprint()


def test_mapping_is_that_of_the_last_epoch_and_flm_that_of_the_first():
    task, model = toy_pictures(), toy_classifier()
    for mapping, interval in (("flm", 1), ("ilm", 100)):
        optimizer = VisualReprogram(mapping=mapping, mapping_interval=interval, epochs=3, lr=0.3)
        start = optimizer.untrained(task, model)
        module = start.module(model)
        counts = label_counts(lambda x: model.logits(module.frame(x)), model, task.train, task.classes,  # noqa: B023
                              start.inner)
        assert counts.shape == (12, 4) and int(counts.sum()) == len(task.train)
        assert optimizer.optimize(task, model, progress=False).mapping.tolist() == plain_mapping(counts)
    again = VisualReprogram(epochs=2, lr=0.3).optimize(task, model, progress=False)
    one = VisualReprogram(epochs=1, lr=0.3).optimize(task, model, progress=False)
    module = one.module(model)
    counts = label_counts(lambda x: model.logits(module.frame(x)), model, task.train, task.classes, one.inner)
    assert again.mapping.tolist() == plain_mapping(counts)


def test_calls_are_those_of_training_and_mapping():
    task, model = toy_pictures(), toy_classifier()  # 16 training pictures
    for options, calls in (({"mapping": "ilm"}, 3 * 32), ({"mapping": "flm"}, 3 * 16 + 16),
                           ({"mapping": "random"}, 3 * 16 + 1), ({"mapping_interval": 2}, 3 * 16 + 2 * 16)):
        budget = Budget()
        VisualReprogram(epochs=3, batch_size=8, **options).optimize(task, model, budget=budget, progress=False)
        assert budget.used["calls"] == calls
    budget = Budget()
    LinearHead(epochs=3, batch_size=8).optimize(task, model, budget=budget, progress=False)
    assert budget.used["calls"] == 16


def test_linear_head_is_that_of_training_the_last_layer_in_place():
    task, model = toy_pictures(), toy_classifier()
    prompt = LinearHead(epochs=5, batch_size=16, lr=0.05).optimize(task, model, progress=False, seed=3)
    assert prompt.head == "last" and prompt.weight.shape == (4, 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = nn.Linear(128, 4)
    network = toy_classifier().model
    network.last = layer
    network.requires_grad_(False)
    layer.requires_grad_(True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    targets = torch.tensor([task.classes.index(e.target) for e in task.train])
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1 ** ((epoch >= 2) + (epoch >= 3))
        loss = nn.functional.cross_entropy(network(model.preprocess.normalize(model.read(task.train, 16))), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(prompt.weight, layer.weight, atol=1e-5)
    scores = prompt.on(model).scores(task.test)
    expected = network(model.preprocess.normalize(model.read(task.test, 16))).log_softmax(-1)
    assert torch.allclose(scores, expected, atol=1e-4)


def test_a_prompt_is_saved_loaded_trained_further_and_shown(tmp_path):
    task, model = toy_pictures(), toy_classifier()
    prompt = VisualReprogram(epochs=2, in_size=8).optimize(task, model, progress=False)
    prompt.save(tmp_path / "prompt.json")
    again = Prompt.load(tmp_path / "prompt.json")
    assert isinstance(again, ReprogramPrompt)
    assert torch.equal(again.on(model).scores(task.test), prompt.on(model).scores(task.test))
    further = VisualReprogram(epochs=2, in_size=8).optimize(task, model, start=again, progress=False)
    assert not torch.equal(further.program, again.program)
    shown = prompt.canvas(model, task.test[:2])
    assert shown.shape == (2, 3, 16, 16) and 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert torch.equal(shown[:, :, 4:12, 4:12], model.read(task.test[:2], 8))
    head = LinearHead(epochs=2).optimize(task, model, progress=False)
    assert LinearHead(epochs=2).optimize(task, model, start=head, progress=False).info["pictures"] == 16


def test_batch_norm_stays_frozen_though_the_model_is_in_training_mode():
    task, model = toy_pictures(), toy_classifier()
    model.model.train()
    before = model.model.norm.running_mean.clone()
    prompt = VisualReprogram(epochs=2).optimize(task, model, progress=False)
    assert model.model.training and torch.equal(model.model.norm.running_mean, before)
    again = VisualReprogram(epochs=2).optimize(task, toy_classifier(), progress=False)
    assert prompt.fingerprint() == again.fingerprint()


def test_pictures_of_any_mode_and_size_and_labels_of_any_kind():
    from PIL import Image

    model, draw = toy_classifier(), np.random.default_rng(0)
    pictures = [draw.integers(0, 255, (9, 7), np.uint8), draw.integers(0, 255, (6, 10, 4), np.uint8),
                Image.new("LA", (5, 8)), torch.rand(3, 4, 4)]
    task = Task("mixed", [Example({"image": p}, (7, "x")[n % 2]) for n, p in enumerate(pictures)], classes=[7, "x"])
    prompt = VisualReprogram(epochs=2).optimize(task, model, progress=False)
    assert prompt.inner == 10 and task.evaluate(prompt.on(model), "train").class_scores is not None


def test_bad_input():
    task, model = toy_pictures(6), toy_classifier()
    with pytest.raises(ValueError, match=r"expected at least as many outputs .* got 4 for 6"):
        VisualReprogram().optimize(task, toy_classifier(4), progress=False)
    with pytest.raises(ValueError, match=r"got 4 for 6"):
        VisualReprogram(mapping="random").optimize(task, toy_classifier(4), progress=False)
    with pytest.raises(ValueError, match=r"in_size: expected at most 14.*got 16"):
        VisualReprogram(in_size=16).optimize(task, model, progress=False)
    assert VisualReprogram().untrained(task, model).inner == 14
    with pytest.raises(ValueError, match=r"expected a training picture of every class, got none of 'pink'"):
        VisualReprogram().optimize(dataclasses.replace(task, classes=[*task.classes, "pink"]), model, progress=False)
    with pytest.raises(ValueError, match="pink"):
        odd = dataclasses.replace(task, train=[*task.train, Example(task.train[0].inputs, "pink")])
        VisualReprogram().optimize(odd, model, progress=False)
    with pytest.raises(ValueError, match="None where prompt='add'"):
        VisualReprogram(prompt="add", in_size=8)
    with pytest.raises(ValueError, match="pad: expected an integer in"):
        VisualReprogram(prompt="add", pad=9).optimize(task, model, progress=False)
    with pytest.raises(UnsupportedModelError, match="ImageClassifier"):
        VisualReprogram().optimize(task, model.model, progress=False)
    prompt = VisualReprogram(epochs=1).optimize(task, model, progress=False)
    with pytest.raises(UnsupportedModelError, match="learned for another model"):
        dataclasses.replace(prompt, mapping=torch.arange(6) + 6).on(toy_classifier(7)).scores(task.test)
    with pytest.raises(ValueError, match="start: expected pixels of the shape"):
        VisualReprogram(in_size=8).optimize(task, model, start=prompt, progress=False)
    with pytest.raises(ValueError, match="linear layer"):
        LinearHead(head="fc").optimize(task, model, progress=False)


def test_shots_are_of_each_class():
    task, model = toy_pictures(4, 5), toy_classifier()
    prompt = VisualReprogram(shots=2, epochs=1).optimize(task, model, progress=False)
    assert prompt.info["pictures"] == 8 and prompt.info["learned"] == 3 * (16 ** 2 - 14 ** 2)
    assert isinstance(prompt.module(model), Program)
    assert head_input(model, "last", model.read(task.test[:2])).shape == (2, 128)
