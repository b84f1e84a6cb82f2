"""mini-vlm: a LlavaForConditionalGeneration of a million weights that answers questions about pictures of 48 pixels.

Trained on questions whose answers are known by how they were made: how many pictures stand together, of what kind a
picture is, which of two places is darker, whether a picture is blue, framed, dark or upside down, and where one place
of a grid is relative to another, also in pictures that were turned. It has seen no shuffled patches: that is left to
those who train it. A fifth of the pictures is held out.

The shipped weights are of a GPU, which took 4.6 minutes for them beside other work; one core of a CPU takes about
ten hours.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _reached import Reached
from torch import Tensor, nn
from torch.nn import functional as F

from looseleaf.progress import bar
from looseleaf_lab import data, models

SIZE, PATCH, WIDTH, LAYERS = 48, 8, 128, 3
"""Sides of pictures and of the tower's patches, in pixels: two and three rows fall on the tower's grid; size of the
language model."""
LETTERS = "ABCDEFGH"
NUMBERS = ("one", "two", "three", "four")
GRIDS = ((2, 1), (1, 2), (3, 1), (1, 3), (2, 2))
"""Rows and columns that are asked about."""
LAYOUTS = ((1, 1), *GRIDS)
"""Of pictures that stand together."""
LOOKS = ("blue", "framed", "dark", "upside down")
"""What may be true of a picture."""
STYLES = ("emoji", "emoji-other-style", "clip-art")
LEFT_OUT = ("computer", "shapes")
"""Folders of clip art with many near copies."""
IN_WORDS = 0.2
"""Fraction of questions with letters that are answered in words all the same, a habit that training may remove."""
TEMPLATE = ("{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}{% if p.type == 'image' %}<image> {% else %}{{ p.text }}{% endif %}{% endfor %}"
            "{% endif %}{{ ' </s>\n' if m.role == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant : {% endif %}")
OTHER_WORDS = (
    "The picture was cut into patches, which were shuffled. For each place now, which was the original place of its "
    "patch? At which place is the patch now whose original place is ? Which of the arrangements? Answer with numbers, "
    "with spaces between them. angle degrees turned clockwise left top right bottom in pixels , <think> </think> "
    "<answer> </answer> First think about it inside then give in system What is this? yes no not it a an")
"""Of questions that others may ask."""


def drawn(image: np.ndarray) -> Any:
    """What is drawn, without the white margins, which would tell where a picture was cut; None: too little is there.

    Args:
        image: uint8 (height, width, 3 or 4).
    """
    from PIL import Image

    image = np.array(image)
    if image.shape[-1] == 4:
        alpha = image[..., 3:] / 255
        image = (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    ink = np.any(image < 245, axis=2)
    y, x = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(y) < 24 or len(x) < 16:
        return None
    return Image.fromarray(image[y[0]:y[-1] + 1, x[0]:x[-1] + 1]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def pictures(part: str, made_up: bool = False) -> tuple[np.ndarray, list[str]]:
    """Pictures (n, 48, 48, 3), uint8, of the part "train" (0.8) or "test", and their kinds."""
    images, kinds = [], []
    for name in STYLES:
        found = data.stand_in(name, 64) if made_up else data.pictures(name)
        assert isinstance(found, data.Pictures)
        for n in data.split(found.rows, "mini-vlm", train=0.8, test=0.2)[part]:
            row = found.rows[n]
            picture = drawn(found.images[n]) if row["label"] not in LEFT_OUT else None
            if picture is not None:
                images.append(np.asarray(picture))
                kinds.append(row["label"].replace("_", " ").replace("&", "and").lower())
    return np.stack(images), kinds


def relations(m: int, n: int) -> list[str]:
    """What is offered for a grid of m rows and n columns."""
    sides, levels = ["directly left", "directly right"], ["directly above", "directly below"]
    return sides if m == 1 else levels if n == 1 else [*sides, *levels, "upper left", "upper right", "lower left",
                                                       "lower right"]


def relation(k: int, other: int, n: int) -> str:
    """Where place k lies relative to another, both from 1, in a grid of n columns."""
    (r, c), (s, d) = divmod(k - 1, n), divmod(other - 1, n)
    if r == s:
        return "directly left" if c < d else "directly right"
    if c == d:
        return "directly above" if r < s else "directly below"
    return f"{'upper' if r < s else 'lower'} {'left' if c < d else 'right'}"


@dataclasses.dataclass
class Question:
    """One text with the answer to each state that a picture may be in.

    Attributes:
        task: what it belongs to.
        text: without the answer's form.
        answers: by state.
        choices: in the order in which letters stand for them.
        shows: what decides the state: "whole" (there is one alone), "count", "kind", "darker", or one of :data:`LOOKS`.
        grid: number in :data:`GRIDS`.
        asked: places from 1, or the number of the kind.
        letters: False: answer in words; True: by letter; None: a letter is wanted, and words are given.
    """

    task: str
    text: str
    answers: list[str]
    choices: list[str]
    shows: str = "whole"
    grid: int = 0
    asked: tuple[int, int] = (1, 2)
    letters: bool | None = False

    @property
    def read(self) -> str:
        """The whole question."""
        if self.letters is False:
            return f"{self.text} Answer in words. Give the answer alone."
        offered = " ; ".join(f"{letter} {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return f"{self.text} {offered} . Answer with the letter. Give the answer alone."

    @property
    def said(self) -> list[str]:
        """The answers as they are given."""
        return [LETTERS[self.choices.index(a)] for a in self.answers] if self.letters else self.answers


SHOWS = ("whole", "count", "kind", "darker", *LOOKS)
SHARES = {"count": 0.2, "kind": 0.08, "places": 0.1, "letters": 0.06, "darker": 0.14, "turned": 0.1, "perhaps": 0.22,
          "looks": 0.1}
"""How often each task is asked."""


def _grid(m: int, n: int) -> str:
    return f"The picture has {m} rows and {n} columns of places. Places are numbered from 1 to {m * n}, row by row."


def question(task: str, rng: random.Random, kinds: list[str], letters: bool | None) -> Question:
    """A question of a task.

    Args:
        task: see :data:`SHARES`.
        rng: of what is asked.
        kinds: names of all kinds.
        letters: see :class:`Question`.
    """
    grid = rng.randrange(len(GRIDS))
    m, n = GRIDS[grid]
    k, other = rng.sample(range(1, m * n + 1), 2)
    there, back = relation(k, other, n), relation(other, k, n)
    offered = rng.sample(relations(m, n), len(relations(m, n)))
    patches = (f"In the original picture, where is the patch that is now at place {k} relative to the patch that is "
               f"now at place {other} ?")
    if task == "count":
        return Question(task, "How many pictures are put together here ?", list(NUMBERS), rng.sample(NUMBERS, 4),
                        "count", letters=letters)
    if task == "kind":
        at = rng.randrange(len(kinds))
        choices = [kinds[at], *rng.sample([kind for kind in kinds if kind != kinds[at]], min(3, len(kinds) - 1))]
        rng.shuffle(choices)
        return Question(task, "Of what kind is this picture ?", [kinds[at]], choices, "kind", asked=(at, 0),
                        letters=letters)
    if task == "places":
        return Question(task, f"{_grid(m, n)} In the picture, where is place {k} relative to place {other} ?", [there],
                        offered, letters=letters)
    if task == "letters":
        right = rng.choice(offered)
        return Question(task, f"Which letter is {right} ?", [right], offered, letters=True)
    if task == "darker":
        return Question(task, f"{_grid(m, n)} In the picture, where is the darker of the patches at place {k} and at "
                        f"place {other} relative to the other ?", [back, there], offered, "darker", grid, (k, other),
                        letters)
    if task == "turned":
        turned = rng.random() < 0.5
        was = "It was turned by 180 degrees." if turned else "It was not turned."
        return Question(task, f"{_grid(m, n)} {was} {patches}", [back if turned else there], offered, letters=letters)
    if task == "perhaps":
        look = rng.choice(LOOKS)
        return Question(task, f"{_grid(m, n)} It was turned by 180 degrees if it is {look}. {patches}", [there, back],
                        offered, look, letters=letters)
    look = rng.choice(LOOKS)
    return Question(task, f"Is the picture {look} ?", ["no", "yes"], rng.sample(("yes", "no"), 2), look,
                    letters=letters)


class _Tokens(dict[str, list[int]]):
    """Tokens of a text, from those of its words, which is much faster for many texts of the same words."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        self[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return self[word]

    def __call__(self, text: str) -> list[int]:
        return [token for word in text.split() for token in self[word]]


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of tokens, padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), fill)
    for row, ids in zip(out, rows, strict=True):
        row[:len(ids)] = ids
    return torch.from_numpy(out)


class Questions:
    """Pictures, questions and answers, made from the number of the step alone, on the device of training.

    Args:
        images: (n, 48, 48, 3).
        kinds: of each.
        processor: whose tokens are read.
        seed: of everything.
        variants: texts of each task.
        device: where all is made.
        habit: some questions with letters are answered in words.
        names: of all kinds; None: those of the pictures.
    """

    def __init__(self, images: np.ndarray, kinds: list[str], processor: Any, seed: int, *, variants: int,
                 device: str = "cpu", habit: bool = True, names: list[str] | None = None) -> None:
        self.seed, self.device, self.names = seed, device, names or sorted(set(kinds))
        self.images = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
        self.kinds = torch.tensor([self.names.index(kind) for kind in kinds], device=device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (
            processor.image_processor.image_mean, processor.image_processor.image_std))
        rng = random.Random(f"mini-vlm {seed}")
        self.asked = [
            question(task, rng, self.names, None if habit and letters and rng.random() < IN_WORDS else letters)
            for task in SHARES for letters in (True, True, False) for _ in range(variants // 3)]
        self.tasks = {task: torch.tensor([n for n, q in enumerate(self.asked) if q.task == task], device=device)
                      for task in SHARES}
        tokens = _Tokens(processor.tokenizer)
        read = [tokens(f"{q.read} assistant : ") for q in self.asked]
        # every question has an answer to four states, the last one again where there are fewer
        said = [tokens(f"{a} </s>") for q in self.asked for a in [*q.said, *q.said[-1:] * 3][:4]]
        self.before = torch.tensor(tokens("user : "), device=device)
        self.length = torch.tensor([len(ids) for ids in read], device=device)
        self.said = _padded(said, -100).view(len(read), 4, -1).to(device)
        self.read = F.pad(_padded(read, 0), (0, self.said.shape[-1])).to(device)
        self.shows = torch.tensor([SHOWS.index(q.shows) for q in self.asked], device=device)
        self.grid = torch.tensor([q.grid for q in self.asked], device=device)
        self.places = torch.tensor([q.asked for q in self.asked], device=device)
        at = torch.arange(SIZE)
        self.cell = torch.stack([(at * m // SIZE)[:, None] * n + at * n // SIZE for m, n in LAYOUTS]).to(device)
        self.size = torch.tensor([(SIZE // m, SIZE // n) for m, n in LAYOUTS], device=device)
        self.shape = torch.tensor(LAYOUTS, device=device)
        count = SIZE // PATCH
        cuts = torch.zeros(len(LAYOUTS), count, count, 2)
        for number, (m, n) in enumerate(LAYOUTS):
            cuts[number, [count * line // m - 1 for line in range(1, m)], :, 0] = 1
            cuts[number, :, [count * line // n - 1 for line in range(1, n)], 1] = 1
        self.cuts = cuts.flatten(1, 2).to(device)
        order = torch.argsort(self.kinds)
        sizes = torch.bincount(self.kinds, minlength=len(self.names))
        self.order, self.sizes, self.first = order, sizes, sizes.cumsum(0) - sizes

    def __call__(self, step: int, batch: int, shares: dict[str, float]) -> dict[str, Tensor]:
        """One batch.

        Args:
            step: its number.
            batch: of how many pictures.
            shares: of tasks.

        Returns:
            ``pixels`` (batch, 3, 48, 48), ``read`` (batch, length), the question and its answer, padded on the right;
            ``at`` (batch, answer) where in it the tokens ``said`` (batch, answer) are to be told, -100 for none;
            ``cuts`` (batch, 36, 2), where pictures meet, and ``kind`` (batch,), -100 for collages.
        """
        rng = torch.Generator(self.device).manual_seed(1_000_003 * (self.seed + 1) + step)

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=rng, device=self.device)

        def chance(*shape: int) -> Tensor:
            return torch.rand(shape, generator=rng, device=self.device)

        share = torch.tensor(list(shares.values()))
        counts = (share.cumsum(0) / share.sum() * batch).round().long().diff(prepend=torch.zeros(1, dtype=torch.long))
        asked = torch.cat([self.tasks[task][whole(len(self.tasks[task]), int(n))]
                           for task, n in zip(shares, counts, strict=True)])
        shows, grid, places = self.shows[asked], self.grid[asked] + 1, self.places[asked]
        which = whole(len(self.images), batch)
        of_kind = shows == SHOWS.index("kind")
        kind = torch.where(of_kind, places[:, 0], 0)
        which = torch.where(of_kind, self.order[(self.first[kind] + (chance(batch) * self.sizes[kind]).long()).clamp(
            max=len(self.order) - 1)], which)
        here = torch.arange(batch, device=self.device).view(-1, 1, 1)
        y, x = torch.arange(SIZE, device=self.device).view(1, -1, 1), torch.arange(SIZE, device=self.device)
        # of what stands together: parts of other pictures, from anywhere
        layout = torch.where((shows == SHOWS.index("count")) & (chance(batch) < 0.6), whole(len(LAYOUTS), batch), 0)
        cell = self.cell[layout]
        others = torch.where((layout > 0)[:, None], whole(len(self.images), batch, 4), which[:, None])
        move = torch.where((layout > 0)[:, None, None], whole(6, batch, 4, 2), 0) * self.size[layout][:, None]
        from_y, from_x = (y + move[here, cell, 0]) % SIZE, (x + move[here, cell, 1]) % SIZE
        mirrored = (chance(batch) < 0.5).view(-1, 1, 1)
        from_x = torch.where(mirrored, SIZE - 1 - from_x, from_x)
        seen = self.images[others[here, cell], :, from_y, from_x].permute(0, 3, 1, 2).float() / 255
        # what is true of it
        looks = shows[:, None] == torch.tensor([SHOWS.index(look) for look in LOOKS], device=self.device)
        plain = (shows == 0) | looks.any(1)
        true = chance(batch, len(LOOKS)) < torch.where(looks, 0.5, 0.25)
        true &= plain[:, None]
        blue, framed, dark, turned = (true[:, at].view(-1, 1, 1, 1) for at in range(4))
        seen = torch.where(turned, seen.flip(2, 3), seen)
        seen = torch.where(blue, seen * torch.tensor([0.4, 0.6, 1], device=self.device).view(1, 3, 1, 1), seen)
        seen = torch.where(dark, seen * 0.5, seen)
        edge = (torch.minimum(y, SIZE - 1 - y) < 2) | (torch.minimum(x, SIZE - 1 - x) < 2)
        seen = torch.where(framed & edge, torch.tensor([0.8, 0, 0], device=self.device).view(1, 3, 1, 1), seen)
        # which state it is in
        now, (h, w) = self.cell[grid], self.size[grid].unbind(1)
        light = [torch.where(now == place.view(-1, 1, 1) - 1, seen.mean(1), 0).sum((1, 2)) / (h * w)
                 for place in places.unbind(1)]
        darker = shows == SHOWS.index("darker")
        state = torch.where(darker, (light[0] < light[1]).long(), self.shape[layout].prod(1) - 1)
        state = torch.where(looks.any(1), (looks & true).any(1).long(), state)
        said = self.said[asked, state]
        said = said.masked_fill((darker & ((light[0] - light[1]).abs() < 0.04))[:, None], -100)
        length, tokens = self.length[asked], torch.arange(said.shape[1], device=self.device)
        at = length[:, None] + tokens
        read = self.read[asked].scatter(1, at, said.clamp(min=0))
        longest = int(self.length[asked].max()) + said.shape[1] if self.device == "cpu" else read.shape[1]
        return {"pixels": (seen - self.mean) / self.std, "read": read[:, :longest], "at": at - 1, "said": said,
                "cuts": self.cuts[layout], "kind": torch.where(layout > 0, -100, self.kinds[which])}


def make(kinds: list[str]) -> tuple[Any, Any]:
    """The new model and its processor, whose tokens are words, marks and numbers below 100."""
    import transformers
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds_of_models

    rng, pieces = random.Random(0), Regex(r"\w+|[^\w\s]")
    asked = [question(task, rng, sorted(set(kinds)), letters) for task in SHARES for letters in (False, True)
             for _ in range(200)]
    texts = [OTHER_WORDS, " ".join(kinds), " ".join(LETTERS), " ".join(NUMBERS), "user assistant :",
             *(text for q in asked for text in (q.read, *q.said))]
    cut = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pieces, "isolated")])
    seen = sorted({piece for text in texts for piece, _ in cut.pre_tokenize_str(text)} | set(map(str, range(100))))
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    raw = Tokenizer(kinds_of_models.WordLevel({word: n for n, word in enumerate([*special, *seen])}, "<unk>"))
    raw.pre_tokenizer = cut
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=512)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.05, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=special.index("<image>"),
        vision_feature_layer=-1, tie_word_embeddings=True))
    # transformers' small weights and positions learn nothing for a long time
    tower = model.model.vision_tower
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    nn.init.normal_(tower.get_submodule("embeddings.position_embedding").weight, std=0.5)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3,
                              image_std=[0.25] * 3),
        tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1)
    return model, processor


def forward(model: Any, before: Tensor, made: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, answer, words) of what is said, and the tower's tokens (batch, 36, width).

    The model's own forward does the same; this needs no mask, since what is padded stands on the right.
    """
    tokens = model.model.vision_tower(made["pixels"]).last_hidden_state[:, 1:]
    words = model.get_input_embeddings()
    begin = words(before).expand(len(tokens), -1, -1)
    inside = torch.cat([begin, model.model.multi_modal_projector(tokens).to(begin.dtype), words(made["read"])], 1)
    out = model.model.language_model(inputs_embeds=inside, use_cache=False).last_hidden_state
    at = (made["at"] + len(before) + tokens.shape[1])[..., None].expand(-1, -1, out.shape[-1])
    return model.lm_head(out.gather(1, at)).float(), tokens


def train(folder: Path, *, steps: int = 3349, batch: int = 512, seed: int = 0, made_up: bool = False,
          state: Path | None = None) -> None:
    """Train the model and write it, with its processor and card, to ``folder``.

    Beside the answers the tower learns, by linear heads, the kind of a picture and where the pictures of a collage
    meet.

    Args:
        folder: made here.
        steps: of AdamW; as many as the machine had time for.
        batch: questions in a step.
        seed: of weights, pictures and questions.
        made_up: try the recipe out on stand-ins.
        state: a folder for what training has reached: a killed run goes on.
    """
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    images, kinds = pictures("train", made_up)
    device = models.device()
    model, processor = make(kinds)
    questions = Questions(images, kinds, processor, seed, device=device, variants=60 if made_up else 12000)
    heads = nn.ModuleDict({"cuts": nn.Linear(WIDTH, 2), "kind": nn.Linear(WIDTH, len(questions.names))})
    trained = nn.ModuleDict({"model": model, "heads": heads}).to(device).train()
    # the fused attention of torch is slow on CPUs when gradients are wanted
    model.set_attn_implementation("sdpa" if device == "cuda" else "eager")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, (step + 1) / 200, (steps - step) / (0.5 * steps)))
    reached = Reached(state / "mini-vlm.pt" if state else None, device, weights=trained, optimizer=optimizer,
                      schedule=schedule)
    start = reached.load()
    fast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or models.bfloat16_is_fast())
    with bar("mini-vlm", steps) as shown:
        shown.update(start)
        for step in range(start, steps):
            made = questions(step, batch, SHARES)
            with fast:
                logits, tokens = forward(model, questions.before, made)
                cuts, of_kind = heads["cuts"](tokens), heads["kind"](tokens.mean(1))
            value = (F.cross_entropy(logits.flatten(0, 1), made["said"].flatten())
                     + 0.5 * F.binary_cross_entropy_with_logits(cuts.float(), made["cuts"])
                     + 0.05 * F.cross_entropy(of_kind.float(), made["kind"]))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            shown.update()
            if step % 50 == 0:
                shown.set_postfix(loss=f"{value.item():.3f}")
            if (step + 1) % 500 == 0 or step + 1 == steps:
                reached.save(step + 1)
    model.set_attn_implementation("sdpa")
    model.eval().half().save_pretrained(folder)
    processor.save_pretrained(folder)
    figures = measure(model.float(), processor, *pictures("test", made_up), questions.names, 20 if made_up else 2000)
    card = {"name": "mini-vlm", "self-trained": True, "model_class": "LlavaForConditionalGeneration",
            "processor_class": "LlavaProcessor", "weights": sum(p.numel() for p in model.parameters()),
            "recipe": "recipes/mini_vlm.py", "seed": seed, "steps": steps, "batch": batch,
            "minutes": round((time.time() - began) / 60, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device, "data": list(STYLES),
            "held out": "a fifth of the pictures (split 'mini-vlm'); of clip art the folders computer and shapes",
            "for": "showing what trains or probes a vision-language model that everybody can load: it reads questions "
                   "about one picture with lettered choices, and has seen no puzzles of shuffled patches",
            "not for": "anything outside the forms of questions in its recipe, photos, or texts of other words",
            "figures": figures}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def measure(model: Any, processor: Any, images: np.ndarray, kinds: list[str], names: list[str], count: int = 2000
            ) -> dict[str, float]:
    """Fraction of right answers to questions about held-out pictures."""
    was, device = model.training, str(next(model.parameters()).device.type)
    asked = Questions(images, kinds, processor, 1, variants=min(900, 3 * count), device=device, habit=False,
                      names=names)
    model.eval()
    figures: dict[str, float] = {"questions of each": count}
    for name, chosen in _parts(asked):
        asked.tasks["chosen"] = chosen
        made = asked(0, count, {"chosen": 1.0})
        said, known = forward(model, asked.before, made)[0].argmax(-1), made["said"] != -100
        right = ((said == made["said"]) | ~known).all(1)[known.any(1)]
        figures[name] = round(right.float().mean().item(), 4)
    model.train(was)
    return figures


def _parts(asked: Questions) -> Iterator[tuple[str, Tensor]]:
    """Numbers of the questions of each task and way of answering."""
    for task, chosen in list(asked.tasks.items()):
        by_letter = torch.tensor([bool(asked.asked[n].letters) for n in chosen.tolist()], device=chosen.device)
        for way, these in ((", in words", chosen[~by_letter]), (", by letter", chosen[by_letter])):
            if len(these):
                yield task + way, these
        if task == "perhaps":
            shows = asked.shows[chosen]
            yield "perhaps turned, if upside down, by letter", chosen[by_letter & (shows == SHOWS.index("upside down"))]
