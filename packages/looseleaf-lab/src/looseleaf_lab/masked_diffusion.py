"""Masked diffusion language models: generating with any of them, training a small one, judging what came out.

A masked diffusion model sees the whole text at once, some tokens of it masked, and says what stands in each place
(Nie et al., LLaDA, arXiv 2502.09992). Any transformers model with bidirectional attention and logits for every
position will do; :func:`bidirectional` makes one of a decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from looseleaf.attention.attach import Attached
from looseleaf.files import cache_dir
from looseleaf.progress import track
from looseleaf_lab.training import fit, warmup_cosine

# --------------------------------------------------------------------------------------------------- generating

REMASKING = ("low_confidence", "random")


@torch.inference_mode()
def generate(model: Any, prompt_ids: Tensor, *, length: int, steps: int, mask_id: int, block_length: int | None = None,
             temperature: float = 0.0, remasking: str = "low_confidence", seed: int = 0,
             attention_mask: Tensor | None = None, shift: bool | None = None, attached: Attached | None = None,
             watch: Callable[[int, Tensor], None] | None = None, progress: bool | None = None) -> Tensor:
    """Prompt and response, (B, P + length) int64: masks are replaced step by step, the most confident first.

    The response is filled block by block; blocks to the right stay masked meanwhile (semi-autoregressive, LLaDA
    section 2.4). In each step every masked place of the block is predicted, and only some of the predictions stay.

    Args:
        model: a model with bidirectional attention whose output has ``logits``, (B, L, vocabulary).
        prompt_ids: (B, P) int64, without masks that should be filled.
        length: tokens of the response.
        steps: denoising steps for the whole response, the same number in every block.
        mask_id: id of the mask token; it is never generated.
        block_length: tokens of a block; None: one block.
        temperature: 0 takes the likeliest token.
        remasking: which predictions stay: those of the highest probability (``"low_confidence"``, LLaDA's default, by
            which a weak model writes little but its commonest token), or any (``"random"``, as in training).
        seed: of all draws.
        attention_mask: (B, P), 0 for padding of the prompt, on its left side.
        shift: whether the logits at a place are for the next one, as in Dream; None: what ``model.config.shift_logits``
            says, else no.
        attached: a backend at work in the model; its step and number of steps are set for it.
        watch: called before each step with its number and the tokens so far, (B, P + length).
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: length, block length and steps do not divide as needed, the temperature is negative, or an unknown
            remasking.
    """
    size = length if block_length is None else block_length
    if length < 1 or size < 1 or length % size:
        raise ValueError(f"length: expected an integer >= 1 and a multiple of block_length={block_length}, "
                         f"got {length}")
    blocks = length // size
    if steps < 1 or steps % blocks or steps > length:
        raise ValueError(f"steps: expected a multiple of {blocks} blocks of {size} tokens, at most {length}, so that "
                         f"every step has a token to fill in, got {steps}")
    if temperature < 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    if remasking not in REMASKING:
        raise ValueError(f"remasking: expected {' or '.join(map(repr, REMASKING))}, got {remasking!r}")
    batch, prompt = prompt_ids.shape
    ids = torch.cat([prompt_ids, prompt_ids.new_full((batch, length), mask_id)], 1)
    given = {} if attention_mask is None else {
        "attention_mask": torch.cat([attention_mask, attention_mask.new_ones(batch, length)], 1)}
    generator = torch.Generator(ids.device).manual_seed(seed)
    former = None if attached is None else (attached.step, attached.steps)
    try:
        for step in track(range(steps), "denoising", show=progress):
            if attached is not None:
                attached.step, attached.steps = step, steps
            if watch is not None:
                watch(step, ids.clone())
            block, turn = divmod(step, steps // blocks)
            place = slice(prompt + block * size, prompt + (block + 1) * size)
            logits = _logits(model, ids, given, shift)[:, place]
            logits[..., mask_id] = -torch.inf
            tokens, confidence = _predict(logits, temperature, generator)
            if remasking == "random":
                confidence = torch.rand(confidence.shape, generator=generator, device=ids.device)
            confidence = confidence.masked_fill(ids[:, place] != mask_id, -torch.inf)
            each, rest = divmod(size, steps // blocks)
            best = confidence.topk(each + (turn < rest), -1).indices
            ids[:, place] = ids[:, place].scatter(1, best, tokens.gather(1, best))
    finally:
        if attached is not None and former is not None:
            attached.step, attached.steps = former
    return ids


def _logits(model: Any, ids: Tensor, given: dict[str, Tensor], shift: bool | None) -> Tensor:
    logits: Tensor = model(input_ids=ids, **given).logits.float()
    if shift is None:
        shift = getattr(getattr(model, "config", None), "shift_logits", False)
    return torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits


def _predict(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities, (B, n) each."""
    probabilities = logits.softmax(-1)
    if temperature == 0:
        confidence, tokens = probabilities.max(-1)
        return tokens, confidence
    sharper = (logits / temperature).softmax(-1)
    tokens = torch.multinomial(sharper.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


# --------------------------------------------------------------------------------------------------- judging


@torch.inference_mode()
def nll(model: Any, ids: Tensor, *, mask_id: int, prompt_tokens: int = 0, draws: int = 8, seed: int = 0,
        shift: bool | None = None) -> Tensor:
    """Upper bound of the negative log-likelihood of each text given its prompt, (B,) float64, in nats a token.

    The bound of masked diffusion (LLaDA, equation 6), estimated with the same masks for every text: ``draws`` fractions
    of masked places, evenly spread over (0, 1].

    Args:
        model, mask_id, shift: as in :func:`generate`.
        ids: (B, L) int64 without masks.
        prompt_tokens: first tokens, which are given and not judged.
        draws: forward passes.
        seed: of the places.
    """
    length = ids.shape[1] - prompt_tokens
    if length < 1 or draws < 1:
        raise ValueError(f"nll: expected a token beyond the prompt and draws >= 1, got {ids.shape[1]} tokens with "
                         f"prompt_tokens={prompt_tokens} and draws={draws}")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for draw in range(draws):
        count = max(1, round((draw + 0.5) / draws * length))
        places = prompt_tokens + torch.randperm(length, generator=generator)[:count].to(ids.device)
        masked = ids.clone()
        masked[:, places] = mask_id
        logits = _logits(model, masked, {}, shift)[:, places]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, places], reduction="none")
        total += losses.double().mean(1)
    return total / draws


def unigram_entropy(ids: Tensor, vocabulary: int) -> float:
    """Nats a token of the best model that does not look at the context."""
    p = torch.bincount(ids.flatten(), minlength=vocabulary).double() / ids.numel()
    return float(-(p * p.clamp(min=1e-300).log()).sum())


# --------------------------------------------------------------------------------------------------- training


def masked_loss(model: Any, ids: Tensor, mask_id: int, generator: torch.Generator) -> Tensor:
    """The training loss of masked diffusion, a scalar, nats a token (LLaDA, equation 3).

    A fraction t of each text is masked, uniform over (0, 1], and its loss is weighted by 1 / t. The fractions of a
    batch are spread evenly, which makes the loss less noisy and leaves each of them uniform.
    """
    batch = len(ids)
    first = 1 - torch.rand(1, generator=generator)
    fractions = (torch.arange(batch) + first) / batch
    masked = torch.rand(ids.shape, generator=generator) < fractions[:, None]
    logits = _logits(model, ids.masked_fill(masked, mask_id), {}, None)
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return (losses * masked / fractions[:, None]).sum() / ids.numel()


def train(model: Any, ids: Tensor, *, mask_id: int, steps: int, batch: int = 2, length: int = 512, rate: float = 2e-3,
          seed: int = 0, progress: bool | None = None) -> list[float]:
    """Train ``model`` in place as a masked diffusion model; gives the loss of each step, nats a token.

    AdamW, a short warm-up, then a cosine to zero.

    Args:
        model: a transformers model with bidirectional attention, left in evaluation mode.
        ids: (n,) int64, one long text, of which windows are drawn.
        mask_id: id of the mask token.
        steps, batch, length: optimiser steps, windows in each, tokens of a window.
        rate: highest learning rate.
        seed: of windows and masks.
        progress: show a progress bar; None: only on a terminal.

    Raises:
        ValueError: the text is shorter than a window.
    """
    if len(ids) < length:
        raise ValueError(f"ids: expected one window of length={length} tokens or more, got {len(ids)}")
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        starts = torch.randint(0, len(ids) - length + 1, (batch,), generator=generator).tolist()
        return masked_loss(model, torch.stack([ids[s:s + length] for s in starts]), mask_id, generator)

    losses = fit(model, loss, steps=steps, clip=1.0, progress=progress,
                 optimizer=lambda p: torch.optim.AdamW(p, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
                 schedule=lambda optimizer: warmup_cosine(optimizer, steps))
    model.eval()
    return losses


# --------------------------------------------------------------------------------------------------- models


class Characters:
    """A tokenizer of one token a character: printable ASCII and the line feed; all else is a question mark."""

    mask_id = 96
    vocabulary = 97

    def encode(self, text: str) -> Tensor:
        """(n,) int64."""
        return torch.tensor([95 if c == "\n" else ord(c) - 32 if " " <= c <= "~" else 31 for c in text])

    def decode(self, ids: Tensor) -> str:
        """The text; masks are shown as an underlined space."""
        return "".join("\u2423" if i == 96 else "\n" if i == 95 else chr(i + 32) for i in ids.tolist())


SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
                         "num_attention_heads": 6, "num_key_value_heads": 6, "initializer_range": 0.05}
STEPS, TEXT = 1400, 600_000
STAGES = ((6 / 7, 16, 64, 3e-3), (1 / 7, 3, 384, 1.5e-3))
"""Fraction of the steps, windows, tokens of a window, learning rate: what is near is learned first, and cheaply."""


def small_model(*, steps: int | None = None, progress: bool | None = None) -> tuple[Any, Characters]:
    """A masked diffusion model of 1.8 million parameters and its tokenizer; trained on the first call, then kept.

    Trained on the calibration part of :func:`looseleaf_lab.data.prose`, at last in windows of 384 characters: a few
    minutes of one core. Its logits are for the next place, as Dream's are: a small model learns sooner from the token
    before a mask than from the mask. Kept as safetensors in the cache, see :func:`looseleaf_lab.models.cache_dir`.

    Args:
        steps: of the training; None: as many as are good for it.
        progress: show a progress bar while it trains; None: only on a terminal.
    """
    from looseleaf.resume import digest
    from looseleaf_lab import cache, data, models

    text = data.prose(TEXT, "calibration")
    steps = STEPS if steps is None else steps
    key = {"text": text, "sizes": SIZES, "steps": steps, "stages": STAGES}

    def build(folder: Path) -> None:
        tokenizer = Characters()
        model = new_model(tokenizer.vocabulary, **SIZES)
        model.config.shift_logits = True
        for seed, (fraction, batch, length, rate) in enumerate(STAGES):
            train(model, tokenizer.encode(text), mask_id=tokenizer.mask_id, steps=max(1, round(fraction * steps)),
                  batch=batch, length=length, rate=rate, seed=seed, progress=progress)
        model.save_pretrained(folder)

    folder = cache.build_once(cache_dir() / "models" / f"masked-diffusion-{digest(key)}", build)
    from transformers import LlamaForCausalLM

    with models._quiet(models._transformers()):
        model: Any = LlamaForCausalLM.from_pretrained(folder)
    return bidirectional(model).eval(), Characters()


def new_model(vocabulary: int, *, seed: int = 0, length: int = 8192, **sizes: Any) -> Any:
    """A Llama with random weights and bidirectional attention, the shape of LLaDA.

    Args:
        vocabulary: tokens, the mask among them.
        seed: of the weights.
        length: tokens that it is made for.
        sizes: of ``transformers.LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return bidirectional(LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=length, **sizes))).eval()


def bidirectional(model: Any) -> Any:
    """``model``, a transformers decoder, changed in place so that every token sees every other one."""
    model.config.is_causal = False  # the mask
    model.config.use_cache = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # what attention does where there is no mask
    return model


_LLADA = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.(\d+)\.(q|k|v)_proj\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_out\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.up_proj\.", r"model.layers.\1.mlp.up_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_out\.", r"model.layers.\1.mlp.down_proj."),
    (r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
)


def llama_name(name: str) -> str:
    """The name in transformers' Llama of a weight of LLaDA's published files; other names stay, as Dream's do.

    LLaDA's own modelling code cannot exchange its attention; its weights run in a :func:`bidirectional` Llama of the
    same sizes, and Dream's in a bidirectional Qwen2.
    """
    for pattern, new in _LLADA:
        made, found = re.subn(pattern, new, name)
        if found:
            return made
    return name
