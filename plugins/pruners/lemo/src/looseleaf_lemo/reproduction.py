"""The paper's claims: memory of SmolLM2 by what is kept, and perplexity of a small Llama after LoRA on long mails."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import Claim, Report, Series
from looseleaf.modes import evaluating, own_random_state
from looseleaf.statistics import Interval, bootstrap
from looseleaf_lab import data, models
from looseleaf_lab.memory import in_fresh_process, step_memory
from looseleaf_lab.study import Results, Study, above, add_table, below
from looseleaf_lab.timing import interleave
from looseleaf_lab.training import fit
from looseleaf_lemo.elimination import Rows, choose
from looseleaf_lemo.predictor import recall
from looseleaf_lemo.pruner import LeMo

ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"rho": 1.0, "mlp_sparsity": 0.0, "recompute_norms": False, "loss_chunk": 0},
    "+ chunked loss": {"rho": 1.0, "mlp_sparsity": 0.0, "recompute_norms": False},
    "fair: + norms again": {"rho": 1.0, "mlp_sparsity": 0.0},
    "fair + blocks left out": {"mlp_sparsity": 0.0},
    "fair + columns left out": {"rho": 1.0},
    "LeMo: fair + both": {}}
"""What is measured: hyper-parameters of LeMo that differ from its defaults, which are those of the official code."""
LORA, FAIR, LEMO = "LoRA", "fair: + norms again", "LeMo: fair + both"
CHUNK = 256
"""Tokens of the chunked loss of all arms: few, so that logits hide nothing. [ours; official code: 2048]"""
WAYS = ("LoRA", "LeMo", "random blocks", "first and last blocks")
OURS = "what counts as working here, fixed before measuring"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured. Sizes and rates were fixed beforehand, without a search.

    Attributes:
        lengths: tokens of a step of SmolLM2.
        checkpointing: whether it is measured as well, at the last length.
        rounds: of the timing.
        width, layers, heads, words: of the small Llama and its vocabulary.
        pretrain, short, batch: its training steps on Wikipedia and Brown, tokens of a text in it, and texts.
        extend: steps after that on texts of ``length``.
        steps, length, block: of LoRA on mails; half the paper's block, so that a text of 1,024 tokens has 32 of them.
        rate, pretrain_rate: learning rates; 20 steps of warm-up, then constant, as in the paper.
        test: held-out texts of ``length``.
        predictor_steps, predictor_rate, predictor_width, calibrate: of LeMo, and texts.
        stand_in: made-up texts and models, for tests.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    checkpointing: bool = True
    rounds: int = 3
    width: int = 96
    layers: int = 8
    heads: int = 3
    words: int = 2048
    pretrain: int = 400
    short: int = 256
    batch: int = 8
    extend: int = 30
    steps: int = 150
    length: int = 1024
    block: int = 32
    rate: float = 2e-3
    pretrain_rate: float = 2e-3
    test: int = 16
    predictor_steps: int = 400
    predictor_rate: float = 1e-3
    predictor_width: int = 16
    calibrate: int = 8
    stand_in: bool = False


# ------------------------------------------------------------------------------------------------------ memory
def adapters(model: nn.Module, seed: int = 0) -> Any:
    """LoRA on the attention: r=8, alpha=16 [paper]."""
    from peft import LoraConfig, get_peft_model

    with own_random_state(seed):
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj",  # type: ignore[arg-type]
                                                                                    "o_proj"]))


def subject(stand_in: bool) -> tuple[Any, Callable[[int], Tensor]]:
    """SmolLM2 in bfloat16 with adapters, and what makes a text (1, n) of it."""
    if stand_in:
        from looseleaf.testing.models import tiny_llama

        model: Any = tiny_llama(num_hidden_layers=4)
        return adapters(model).train(), lambda n: torch.arange(n)[None] * 7 % 61
    model, tokenizer = models.load("smollm2", "bfloat16")
    text = "\n\n".join(row["text"] for row in data.rows("wikipedia-excerpts")[:20])
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=8192).input_ids
    return adapters(model).train(), lambda n: ids[:, :n]


def method_of(arm: str, model: Any, text: Tensor) -> LeMo:
    """LeMo as an arm has it, with predictors that were hardly trained: their quality costs no memory."""
    method = LeMo(**{"loss_chunk": CHUNK, "predictor_steps": 1, "elastic": False, **ARMS[arm]})
    if method.rho != 1:
        method.calibrate(model, [{"input_ids": text}], progress=False)
    return method


def memory_of(arm: str, length: int, checkpointing: bool, stand_in: bool) -> Row:
    """Memory of one step; meant for a process of its own."""
    model, texts = subject(stand_in)
    method = method_of(arm, model, texts(256))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    predictors = method.calibration.predictors.values() if method.calibration else ()
    size = next(model.parameters()).element_size()
    with method.training(model) as run:
        def loss(n: int) -> Tensor:
            ids = texts(n)
            return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

        loss(256).backward()  # type: ignore[no-untyped-call]
        found = step_memory(model, lambda: loss(length))
    return {**dataclasses.asdict(found), "fallbacks": dict(run.fallbacks),
            "predictors": size * sum(p.numel() for each in predictors for p in each.parameters())}


def timing(scale: Scale) -> dict[str, list[float]]:
    """Seconds of a step by arm, in turns, and the ratios to LoRA."""
    model, texts = subject(scale.stand_in)
    ids = texts(scale.lengths[min(1, len(scale.lengths) - 1)])
    methods = {arm: method_of(arm, model, texts(256)) for arm in (LORA, FAIR, LEMO)}

    def step(arm: str) -> None:
        with methods[arm].training(model):
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    found = interleave({arm: functools.partial(step, arm) for arm in methods}, rounds=scale.rounds)
    return {arm: [found.median(arm), *found.ratio(arm, LORA)] for arm in methods}


def conditions(scale: Scale) -> list[tuple[bool, int]]:
    """Whether there is checkpointing, and tokens."""
    return [(False, n) for n in scale.lengths] + [(True, n) for n in scale.lengths[-1:] if scale.checkpointing]


def once(scale: Scale) -> Row:
    """Memory of each arm, each in a fresh process, and time of a step."""
    memory = {f"{arm} {length}{' checkpointing' * again}": in_fresh_process(memory_of, arm, length, again,
                                                                            scale.stand_in)
              for again, length in conditions(scale) for arm in ARMS}
    return {"memory": memory, "time": in_fresh_process(timing, scale)}


# ------------------------------------------------------------------------------------------------------ perplexity
@functools.cache
def corpora(scale: Scale) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A tokenizer of the prose; its tokens; tokens of mails by part, mails divided by content."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    mails: Any
    if scale.stand_in:
        rows: Any = data.stand_in("mails", 400)
        prose, mails = [row["text"] for row in rows[:200]], rows[200:]
    else:
        brown: dict[str, list[str]] = {}
        for row in data.rows("brown"):
            brown.setdefault(row["file"], []).append(" ".join(row["words"]))
        prose = [row["text"] for row in data.rows("wikipedia-excerpts")] + ["\n".join(v) for v in brown.values()]
        mails = [row for row in data.rows("mails") if row["text"]]
    random.Random(0).shuffle(prose)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    tokenizer.train_from_iterator(prose[:400], BpeTrainer(vocab_size=scale.words, special_tokens=["<s>"],  # type: ignore[call-arg]
                                                          show_progress=False, initial_alphabet=ByteLevel.alphabet()))
    parts = data.split(mails, "lemo", train=0.7, dev=0.1, test=0.2)

    def tokens(texts: Sequence[str]) -> Tensor:
        return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in (0, *e.ids)])

    letters = {}
    for name, numbers in parts.items():
        random.Random(1).shuffle(numbers)
        letters[name] = tokens([mails[n]["text"] for n in numbers])
    return tokenizer, tokens(prose), letters


def windows(tokens: Tensor, length: int) -> Tensor:
    """(n, length), one behind the other."""
    return tokens[:len(tokens) // length * length].view(-1, length)


@functools.cache
def pretrained(scale: Scale) -> Any:
    """A small Llama that was trained on Wikipedia and Brown; the same for all seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, prose, _ = corpora(scale)
    config = LlamaConfig(vocab_size=scale.words, hidden_size=scale.width, intermediate_size=scale.width * 11 // 4,
                         num_hidden_layers=scale.layers, num_attention_heads=scale.heads,
                         num_key_value_heads=scale.heads, max_position_embeddings=scale.length,
                         tie_word_embeddings=True, use_cache=False)
    with own_random_state(0):
        model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    for length, batch, steps in ((scale.short, scale.batch, scale.pretrain),
                                 (scale.length, max(1, scale.batch * scale.short // scale.length), scale.extend)):
        texts = windows(prose, length)

        def loss(step: int, texts: Tensor = texts, batch: int = batch) -> Tensor:
            ids = texts[torch.randint(len(texts), (batch,), generator=draw)]
            return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

        def factor(step: int, steps: int = steps) -> float:
            return min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)

        fit(model, loss, steps=steps, optimizer=lambda p: torch.optim.AdamW(p, scale.pretrain_rate, betas=(0.9, 0.95)),
            factor=factor, clip=1.0, label="Wikipedia and Brown")
    return model


@torch.no_grad()
def perplexity(model: nn.Module, texts: Tensor) -> float:
    """Of dense evaluation."""
    with evaluating(model):
        return float(np.exp(np.mean([float(model(input_ids=row[None], labels=row[None]).loss) for row in texts])))


def ends(n: int, x: Tensor, rows: Rows) -> Tensor:
    """Scores of blocks by how near they are to an end of the text: the first, the last, the second, ..."""
    places = torch.arange(rows.blocks, device=x.device)
    return -torch.minimum(2 * places, 2 * (rows.blocks - 1 - places) + 1).float().expand(len(x), -1)


def blind(n: int, x: Tensor, rows: Rows) -> Tensor:
    """Random scores, drawn anew each time."""
    return torch.rand(len(x), rows.blocks)


def measure(seed: int, scale: Scale) -> Row:
    """Perplexity on held-out mails after each way of fine-tuning, and how well predictors find the best blocks."""
    base, (_, _, mails) = pretrained(scale), corpora(scale)
    train, test = windows(mails["train"], scale.length), windows(mails["test"], scale.length)[:scale.test]
    kwargs: Row = {"predictor_steps": scale.predictor_steps, "predictor_rate": scale.predictor_rate, "seed": seed,
                   "predictor_width": scale.predictor_width, "block": scale.block}
    lemo = LeMo(**kwargs)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    lemo.calibrate(base, [{"input_ids": row[None]} for row in train[order[:scale.calibrate]]], progress=False)
    contexts: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
        "LoRA": nullcontext, "LeMo": lambda m: lemo.training(m),
        "random blocks": lambda m: lemo.training(m, rank=blind),
        "first and last blocks": lambda m: lemo.training(m, rank=ends)}
    row: Row = {"perplexity": {"untuned": perplexity(base, test)}, "recall": found_blocks(base, lemo, test, seed)}
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for way in WAYS:
        base.load_state_dict(start)
        model = adapters(base, seed)
        rows = train[torch.randint(len(train), (scale.steps,), generator=torch.Generator().manual_seed(seed + 100))]

        def loss(step: int, model: Any = model, rows: Tensor = rows) -> Tensor:
            ids = rows[step][None]
            return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

        with own_random_state(seed), contexts[way](model):
            fit(model, loss, steps=scale.steps, factor=lambda step: min(1.0, (step + 1) / 20), label=way,
                optimizer=lambda p: torch.optim.AdamW([q for q in p if q.requires_grad], scale.rate))
        row["perplexity"][way] = perplexity(model, test)
        model.unload()  # the adapters are off the base model again
    return row


@torch.no_grad()
def found_blocks(model: nn.Module, lemo: LeMo, texts: Tensor, seed: int) -> Row:
    """Fraction of the truly best blocks that predictors, chance and the most recent blocks find, by layer."""
    out: dict[str, dict[str, list[float]]] = {}
    draw = torch.Generator().manual_seed(seed)
    for text in texts[:12]:
        for n, scores in lemo.block_scores(model, {"input_ids": text[None]}).items():
            assert scores.predicted is not None
            ways = {"predicted": scores.predicted, "random": torch.rand(scores.true.shape, generator=draw),
                    "most recent": torch.arange(scores.true.shape[1])[None].float()}
            rho = lemo.cut_layers(len(model.get_submodule("model.layers")))[n]  # type: ignore[arg-type]
            best = list(choose(scores.true, scores.real, rho))
            for way, values in ways.items():
                out.setdefault(way, {}).setdefault(str(n), []).append(
                    recall(list(choose(values, scores.real, rho)), best))
    return {way: {n: float(np.mean(v)) for n, v in layers.items()} for way, layers in out.items()}


# ------------------------------------------------------------------------------------------------------ the report
def show(report: Report, results: Results) -> None:
    """Tables of memory, time, perplexity and recall; a picture of memory."""
    scale, memory = results.scale, results.once["memory"]
    for again, length in conditions(scale):
        rows = {arm: memory[f"{arm} {length}{' checkpointing' * again}"] for arm in ARMS}
        add_table(report, f"Memory of a step on {length} tokens{', with checkpointing' * again}", (
            {"arm": arm, "live, MB": row["live"] / 1e6, "LoRA / arm": rows[LORA]["live"] / row["live"],
             "fair / arm": rows[FAIR]["live"] / row["live"], "saved, MB": row["saved"] / 1e6,
             "resident, MB": row["resident"] / 1e6, "predictors, MB": row["predictors"] / 1e6}
            for arm, row in rows.items()), "live: highest sum of tensors that the step made, forward and backward; "
            "saved: kept for the backward at the end of the forward; resident: of the process")
    add_table(report, "Time of a step", (
        {"arm": arm, "seconds": seconds, "LoRA / arm": Interval(*ratio)}
        for arm, (seconds, *ratio) in results.once["time"].items()), "medians of rounds in turns, one core")
    add_table(report, "Perplexity on held-out mails", (
        {"trained by": way, "perplexity": results.interval("perplexity", way)} for way in ("untuned", *WAYS)),
        "mean over seeds, 95 % bootstrap")
    add_table(report, "Recall of the best blocks", (
        {"layer": n, **{way: results.mean("recall", way, n) for way in ("predicted", "random", "most recent")}}
        for n in results.rows[0]["recall"]["predicted"]), "mean over seeds and held-out mails")
    lengths = [float(n) for n in scale.lengths]
    figure = report.figure("Memory of a step", x_label="tokens", y_label="live MB")
    for arm in ARMS:
        figure.series.append(Series(arm, lengths, [memory[f"{arm} {n}"]["live"] / 1e6 for n in scale.lengths]))


def claims(results: Results) -> Iterator[Claim]:
    """Each claim of the paper."""
    claim, memory, longest = results.claim, results.once["memory"], results.scale.lengths[-1]

    def live(arm: str, again: bool = False) -> float:
        return float(memory[f"{arm} {longest}{' checkpointing' * again}"]["live"])

    table = "repository's logs"
    for arm, limit, words, paper in ((LORA, 1.5, "than LoRA", "78,701 -> 42,097 MB, 1.87x (Llama3-8B, 8k)"),
                                     (FAIR, 1.2, "than LoRA with chunked loss and norms computed again", "no figure")):
        ratio = live(arm) / live(LEMO)
        yield claim(f"LeMo takes less memory {words}", table if arm == LORA else OURS, paper,
                    f"highest sum of live tensors at {longest} tokens: {limit} times less or better", ratio >= limit,
                    f"{live(arm) / 1e6:,.0f} -> {live(LEMO) / 1e6:,.0f} MB, {ratio:.2f}x")
    for arm, words, paper in (("fair + blocks left out", "blocks", "38 % of attention's activations"),
                              ("fair + columns left out", "columns", "51 % of MLPs' activations")):
        fair, own = (memory[f"{a} {longest}"]["saved"] for a in (FAIR, arm))
        yield claim(f"Leaving out {words} alone keeps less for the backward", "paper", paper,
                    f"saved bytes at {longest} tokens are fewer than those of the fair arm", own < fair,
                    f"{fair / 1e6:,.0f} -> {own / 1e6:,.0f} MB, {1 - own / fair:.0%} of all that is saved")
    if results.scale.checkpointing:
        yield claim("With checkpointing, LeMo takes less memory than the fair arm", OURS, "no figure", "none set", None,
                    f"{live(FAIR, True) / 1e6:,.0f} -> {live(LEMO, True) / 1e6:,.0f} MB, "
                    f"{live(FAIR, True) / live(LEMO, True):.2f}x")
    seconds, *ratio = results.once["time"][LEMO]
    yield claim("A step takes less time than LoRA's", "abstract, logs", "up to 1.36x [abstract]; 1.12x (7B, 8k) [logs]",
                "the interval of the ratio of seconds lies above 1", above(ratio, 1.0),
                f"{results.once['time'][LORA][0]:.1f} -> {seconds:.1f} s, {Interval(*ratio):.2f}x")
    tuned = results.interval("perplexity", "untuned", minus=("perplexity", "LoRA"))
    yield claim("LoRA has something to learn here", OURS, "not a figure of the paper",
                "the interval of untuned - LoRA over seeds lies above 0", above(tuned),
                f"perplexity {results.mean('perplexity', 'untuned'):.2f} -> {results.mean('perplexity', 'LoRA'):.2f}",
                count="seeds")
    worse = relative(results, "LeMo", "LoRA")
    yield claim("LeMo is within 3 % of LoRA's perplexity", table,
                "8k 6.95 -> 7.11, 16k 6.87 -> 7.09 on PG19: 2 to 3 % [logs]",
                "the interval of the relative difference lies below 3 %; does not hold where it lies above",
                below(worse, 0.03), f"{worse:+.2%}", count="seeds")
    for way in ("random blocks", "first and last blocks"):
        gap = relative(results, way, "LeMo")
        yield claim(f"LeMo is better than {way}, as many", OURS, "no figure", "the interval of the relative difference "
                    "over seeds lies above 0; does not hold where it lies below", above(gap), f"{gap:+.2%}",
                    count="seeds")
    hits = _mean_recall(results, "predicted")
    yield claim("Predictors find more than 90 % of the best blocks", "paper", "95.13 %",
                "the interval over seeds of the mean over layers and held-out mails lies above 90 %", above(hits, 0.9),
                f"{hits:.1%}; random {_mean_recall(results, 'random').value:.1%}, most recent "
                f"{_mean_recall(results, 'most recent').value:.1%}", count="seeds")
    yield from results.unmeasured("abstract and logs", "in the paper's tables", {
        "Llama2-7B, 8k: 72,507 -> 43,962 MB, 1.65x; OPT-350m, 32k: 51,945 -> 27,565 MB, 1.88x": "such models and texts",
        "Perplexity of 7B models on PG19": "such models and texts"})


def relative(results: Results, way: str, other: str) -> Interval:
    """Perplexity of one way over that of another less 1, seed by seed."""
    pairs = zip(results.values("perplexity", way), results.values("perplexity", other), strict=True)
    return bootstrap([a / b - 1 for a, b in pairs])


def _mean_recall(results: Results, way: str) -> Interval:
    return bootstrap([float(np.mean(list(layers.values()))) for layers in results.values("recall", way)])


study = Study("LeMo: memory of SmolLM2, and a small Llama fine-tuned on long mails", measure, claims, show, once,
              full=Scale(), quick=Scale(lengths=(512,), checkpointing=False, rounds=1, pretrain=20, extend=2, steps=4,
                                        length=512, block=16, test=2, predictor_steps=20, calibrate=2), quick_seeds=1)
