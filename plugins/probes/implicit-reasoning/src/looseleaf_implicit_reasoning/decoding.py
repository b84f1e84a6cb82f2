"""Soft Thinking: thoughts that are mixtures of tokens, without any training (Zhang et al. 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from looseleaf import progress as progress_
from looseleaf.modes import evaluating
from looseleaf.plugin import In, check_fields
from looseleaf.unwrap import unwrapped
from looseleaf_implicit_reasoning.states import begun
from looseleaf_text import LocalModel
from looseleaf_text.batching import positions as most_positions
from looseleaf_text.batching import text_config
from looseleaf_text.local import padded


@dataclasses.dataclass(frozen=True)
class SoftThought:
    """What came of one prompt.

    Attributes:
        text: generated after the thoughts; with tokens thought softly left out.
        thoughts: the likeliest token of each soft thought, as text.
        top: weight of that token in each soft thought; near 1 the thoughts are those of greedy decoding.
        ended: why thinking ended: "end of thought", "low entropy", "limit", or "end of text".
    """

    text: str
    thoughts: tuple[str, ...]
    top: tuple[float, ...]
    ended: str


@dataclasses.dataclass
class SoftThinking:
    """Each thought is the mean of the likeliest tokens' embeddings, weighted by their probabilities (2505.15778).

    Args:
        top: tokens in the mixture; 1 is greedy decoding.
        temperature: of the probabilities.
        top_k, top_p: filters before the mixture is taken.
        tau: entropy, in nats before the filters, below which the model is sure; 0 turns this off.
        patience: thoughts running with entropy below ``tau`` before thinking ends.
        max_thoughts: limit; 0 is ordinary decoding.
        end: token at which thinking ends, such as ``"</think>"``; None: the model has none.
        gumbel: temperature of Gumbel noise on the mixture (2508.03440 uses 0.5); 0 turns it off.
        answer_temperature: of the tokens after the thoughts; 0 takes the likeliest. The authors sample as in the
            thoughts, at 0.6.
    """

    top: Annotated[int, In(">= 1")] = 15
    temperature: Annotated[float, In("> 0")] = 0.6
    top_k: Annotated[int, In(">= 1")] = 30
    top_p: Annotated[float, In("(0, 1]")] = 0.95
    tau: Annotated[float, In(">= 0")] = 0.0
    patience: Annotated[int, In(">= 1")] = 256
    max_thoughts: Annotated[int, In(">= 0")] = 64
    end: str | None = None
    gumbel: Annotated[float, In(">= 0")] = 0.0
    answer_temperature: Annotated[float, In(">= 0")] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def mix(self, logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture of each row of logits (B, V).

        Returns:
            Token ids (B, top), their weights (B, top), which add up to 1, and the entropy before the filters (B,).
        """
        p = torch.softmax(logits.float() / self.temperature, -1)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
        kept, ids = p.topk(min(self.top_k, p.shape[-1]), -1)
        kept = torch.where(kept.cumsum(-1) - kept < self.top_p * kept.sum(-1, keepdim=True), kept, 0.0)
        kept, ids = kept[:, :self.top], ids[:, :self.top]
        weights = kept / kept.sum(-1, keepdim=True)
        if self.gumbel > 0:
            uniform = torch.rand(weights.shape, generator=generator).clamp(1e-20, 1 - 1e-7)
            noise = -(-uniform.log()).log()
            weights = torch.softmax((weights.log() + noise.to(weights)) / self.gumbel, -1)
        return ids, weights, entropy

    @torch.no_grad()
    def generate(self, model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int = 64,
                 seed: int = 0, batch: int = 16, progress: bool | None = None) -> list[SoftThought]:
        """Think softly, then answer in tokens.

        Args:
            model, tokenizer: a decoder of transformers, and its tokenizer.
            prompts: of any lengths.
            max_tokens: after the thoughts.
            seed: of the noise, and of the tokens where ``answer_temperature`` is above 0.
            batch: prompts at once.
            progress: show a progress bar; None: only on a terminal.

        Raises:
            ValueError: an end of thought that is not one known token, or more positions than the model has.
        """
        local = LocalModel(model, tokenizer)
        ends = known_token(tokenizer, self.end) if self.end is not None else None
        rows = begun(local, list(prompts))
        within(model, max(map(len, rows), default=0) + self.max_thoughts + max_tokens)
        draw = torch.Generator().manual_seed(seed)
        with evaluating(model):
            return [thought for at in progress_.track(range(0, len(rows), batch), "soft thinking", show=progress)
                    for thought in self._generate(model, local, rows[at:at + batch], ends, max_tokens, draw)]

    def _generate(self, model: nn.Module, local: LocalModel, rows: Sequence[Sequence[int]], ends: int | None,
                  max_tokens: int, draw: torch.Generator) -> list[SoftThought]:
        table = unwrapped(model).get_input_embeddings()
        stops = _stops(model, local.tokenizer)
        ids, mask = padded(rows, local.device, left=True)
        count = len(rows)
        thoughts: list[list[int]] = [[] for _ in rows]
        tops: list[list[float]] = [[] for _ in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        why = ["" if self.max_thoughts else "limit"] * count  # empty while a row is thinking
        sure, over = [0] * count, [False] * count
        embedded, cache = table(ids), None
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(self.max_thoughts + max_tokens + 1):
            out = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, past_key_values=cache,
                        use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            mixed, weights, entropy = self.mix(logits, draw)
            hard = self._token(logits, draw)
            steps = []
            for n in range(count):
                first = int(logits[n].argmax())
                if over[n]:
                    steps.append((mixed[n, :1], weights[n, :1] * 0 + 1))
                    continue
                if not why[n]:
                    sure[n] = sure[n] + 1 if float(entropy[n]) < self.tau else 0
                    why[n] = ("end of thought" if first == ends else "end of text" if first in stops else
                              "low entropy" if self.tau > 0 and sure[n] >= self.patience else
                              "limit" if len(thoughts[n]) == self.max_thoughts else "")
                    if not why[n]:
                        thoughts[n].append(int(mixed[n, weights[n].argmax()]))
                        tops[n].append(float(weights[n].max()))
                        steps.append((mixed[n], weights[n]))
                        continue
                    over[n] = why[n] == "end of text"
                    if ends is not None and not over[n]:  # the end of thought is said, whatever ended the thinking
                        steps.append((torch.full_like(mixed[n, :1], ends), weights[n, :1] * 0 + 1))
                        continue
                token = int(hard[n])
                over[n] = over[n] or token in stops or len(tokens[n]) == max_tokens
                if not over[n]:
                    tokens[n].append(token)
                    over[n] = len(tokens[n]) == max_tokens
                steps.append((torch.full_like(mixed[n, :1], token), weights[n, :1] * 0 + 1))
            if all(over):
                break
            embedded = torch.stack([(w[:, None] * table(i).to(w.dtype)).sum(0) for i, w in steps])[:, None].to(
                embedded.dtype)
            mask = torch.cat([mask, mask.new_ones(count, 1)], 1)
            positions = positions[:, -1:] + 1
        return [SoftThought(local.detokenize(tokens[n]), tuple(local.detokenize([t]) for t in thoughts[n]),
                            tuple(tops[n]), why[n]) for n in range(count)]

    def _token(self, logits: Tensor, draw: torch.Generator) -> Tensor:
        if self.answer_temperature == 0:
            return logits.argmax(-1)
        plain = dataclasses.replace(self, temperature=self.answer_temperature, top=self.top_k, gumbel=0.0)
        ids, weights, _ = plain.mix(logits)
        picked = torch.multinomial(weights.cpu(), 1, generator=draw).to(ids.device)
        return ids.gather(1, picked)[:, 0]


def _stops(model: nn.Module, tokenizer: Any) -> set[int]:
    config: Any = getattr(unwrapped(model), "generation_config", None)
    found: set[int] = set()
    for value in (getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return found


def known_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token of the vocabulary.

    Raises:
        ValueError: it is not.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) != 1 or (unknown is not None and ids[0] == unknown) or tokenizer.decode(ids).strip() != text.strip():
        near = [t for t in getattr(tokenizer, "all_special_tokens", [])][:5]
        raise ValueError(f"expected a text that is one token of the vocabulary, got {text!r}: special tokens are "
                         f"{', '.join(map(repr, near)) or 'none'}; add yours with tokenizer.add_tokens and "
                         "model.resize_token_embeddings")
    return int(ids[0])


def within(model: nn.Module, positions: int) -> None:
    """Raise ValueError for more positions than the model has."""
    limit = most_positions(text_config(unwrapped(model)))
    if limit is not None and positions > limit:
        raise ValueError(f"expected at most {limit} positions (the model's max_position_embeddings), got {positions}: "
                         "take fewer slots, pauses or tokens, or shorten the question")
