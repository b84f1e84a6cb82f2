"""Two hops inside: is the bridge recalled on the way, and does recalling it help (Yang et al. 2024)?"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from looseleaf import progress as progress_
from looseleaf.modes import evaluating, frozen, with_gradients
from looseleaf.probes.hooks import intervene, uncompiled
from looseleaf.statistics import Interval, bootstrap
from looseleaf_implicit_reasoning.data import TooLittleDataError, TwoHop
from looseleaf_implicit_reasoning.states import SIGNIFICANT, begun, sign_test
from looseleaf_text import LocalModel, LogitLens
from looseleaf_text.local import padded

COMPARISONS = ("other entity", "other relation", "last word alone", "other bridge (control)")


class Recall(NamedTuple):
    """What the lens shows of the bridges; the last layer is the model's own output.

    Attributes:
        recall: (layers, facts) log-probability, in nats, of the bridge's first token at the end of the mention.
        wins: comparison (see :data:`COMPARISONS`) -> (layers, facts), 1 where the recall is above that of the
            comparison, 0.5 where it is the same, NaN where there is none. The last one is the control: the recall of
            another fact's bridge under the same exchange of entities, which is above as often as below.
        consistency: (facts,) of the next-token distributions after the two-hop and the one-hop prompt; 0 or less.
        slope: (layers - 1, facts) derivative of the consistency as the stream at the end of the mention moves along
            the gradient of the recall; at the last layer nothing comes after it.
        facts: that were measured.
        left_out: fact -> why not.
    """

    recall: np.ndarray
    wins: dict[str, np.ndarray]
    consistency: np.ndarray
    slope: np.ndarray
    facts: list[TwoHop]
    left_out: dict[str, str]

    def fraction(self, comparison: str, layer: int, seed: int = 0) -> Interval | None:
        """Fraction of facts in which the bridge is recalled more than in the comparison, over facts; chance 0.5."""
        row = self.wins[comparison][layer]
        row = row[~np.isnan(row)]
        return bootstrap(row.tolist(), seed) if len(row) else None

    def positive(self, layer: int, seed: int = 0) -> Interval:
        """Fraction of facts in which more recall makes the answer more consistent; chance 0.5."""
        return bootstrap((self.slope[layer] > 0).astype(float).tolist(), seed)

    def first_layer(self) -> int | None:
        """The first layer at which the bridge is recalled; None: at none of them.

        It must beat all of the entity, the relation and the last word (sign tests, times the number of layers), and
        the control must not.
        """
        layers = len(self.recall)
        for layer in range(layers):
            rows = [self.wins[name][layer] for name in COMPARISONS]
            chances = [layers * sign_test(row[~np.isnan(row)], np.full(int((~np.isnan(row)).sum()), 0.5))
                       for row in rows]
            if max(chances[:-1]) < SIGNIFICANT <= chances[-1]:
                return layer
        return None


def consistency(p: Tensor, q: Tensor) -> Tensor:
    """-(CE(p, q) + CE(q, p)) / 2 of distributions given as log-probabilities (..., V), in nats.

    It is 0 only for a certain token, the same in both; for ``p = q`` it is minus the entropy.
    """
    return 0.5 * ((p.exp() * q).sum(-1) + (q.exp() * p).sum(-1))


@dataclasses.dataclass
class BridgeRecall:
    """Whether "the R2 of the R1 of E1" makes a model think of the bridge, the R1 of E1 (2402.16837).

    At the last token of the mention, the lens of every layer gives the bridge's first token a log-probability. It is
    compared with the prompts in which E1, or R1, is another, and with the last word alone; and with what another
    bridge gains from the same exchange, a control.

    Args:
        slope: also measure whether more recall makes the two-hop answer more like the one-hop answer.
    """

    slope: bool = True

    def measure(self, model: nn.Module, tokenizer: Any, facts: Sequence[TwoHop], *, seed: int = 0,
                progress: bool | None = None) -> Recall:
        """Facts whose bridge shares its first token with the bridge of the entity they are compared with, or with a
        token of the prompt, are left out, as the comparison would say nothing.

        Raises:
            TooLittleDataError: fewer than two facts can be compared.
        """
        local, lens = LocalModel(model, tokenizer), LogitLens(model)
        draw = random.Random(seed)
        firsts = [first_token(local, fact) for fact in facts]
        used, left_out = [], {}
        pairs: list[tuple[int, int, int]] = []  # fact, the one whose entity it is given, the one whose bridge controls
        for n, fact in enumerate(facts):
            head = begun(local, [fact.split()[0]])[0]
            others = [m for m, other in enumerate(facts) if firsts[m] != firsts[n] and other.e1 != fact.e1]
            same = [m for m in others if facts[m].r1 == fact.r1 and facts[m].mention == fact.mention]
            if firsts[n] in head:
                left_out[fact.two_hop] = "the bridge's first token is in the prompt"
            elif not same:
                left_out[fact.two_hop] = "no other fact of its first relation whose bridge has another first token"
            else:
                other = draw.choice(same)
                thirds = [m for m in others if firsts[m] != firsts[other]]
                pairs.append((n, other, draw.choice(thirds) if thirds else -1))
                used.append(fact)
        if len(used) < 2:
            raise TooLittleDataError(
                "facts: expected two or more of one first relation whose bridges have different first tokens, got "
                f"{len(used)} of {len(facts)} ({next(iter(left_out.values()), 'none given')})")
        rows: list[np.ndarray] = []
        consistent, slopes = [], []
        with evaluating(model):
            for n, other, third in progress_.track(pairs, "facts", show=progress):
                rows.append(self._compare(local, lens, facts, n, other, [firsts[n], firsts[third]], draw))
                value, slope = self._consistency(model, local, lens, facts[n], firsts[n])
                consistent.append(value)
                slopes.append(slope)
                if third < 0:
                    rows[-1][-1] = np.nan
        table = np.stack(rows, -1)  # recall and comparisons, layers, facts
        return Recall(table[0], dict(zip(COMPARISONS, table[1:], strict=True)), np.array(consistent),
                      np.array(slopes).T, used, left_out)

    def _compare(self, local: LocalModel, lens: LogitLens, facts: Sequence[TwoHop], n: int, other: int,
                 tokens: list[int], draw: random.Random) -> np.ndarray:
        """Recall and comparisons of one fact, (1 + comparisons, layers)."""
        fact = facts[n]
        relations = [f.r1 for f in facts if f.r1 != fact.r1]
        r1 = fact.other_r1 or (draw.choice(relations) if relations else "")
        whole = begun(local, [fact.split()[0]])[0]
        last = fact.split()[0].split()[-1]
        prompts = [whole, *begun(local, [fact.split(e1=facts[other].e1)[0], fact.split(r1=r1)[0], last])]
        ids, mask = padded(prompts, local.device, left=False)
        ends = torch.tensor([[len(p) - 1] * 2 for p in prompts], device=ids.device)
        wanted = torch.tensor([tokens] * len(prompts), device=ids.device)
        found = lens.log_probs({"input_ids": ids, "attention_mask": mask}, ends, wanted).double().cpu().numpy()
        own, control = found[..., 0], found[..., 1]  # layers, prompts
        lines = [own[:, 0], *(_above(own[:, 0], own[:, k]) for k in (1, 2, 3)), _above(control[:, 0], control[:, 1])]
        if not r1:
            lines[2] = np.full_like(lines[2], np.nan)
        return np.stack(lines)

    def _consistency(self, model: nn.Module, local: LocalModel, lens: LogitLens, fact: TwoHop,
                     token: int) -> tuple[float, list[float]]:
        """The consistency of a fact, and its derivative at each layer but the last."""
        head, tail = fact.split()
        [begin], [rest] = local.encode_pairs([head], [[tail] if tail.strip() else []])
        prompt = [*begin, *(rest[0] if rest else [])]
        device = local.device
        with torch.no_grad():
            one = torch.tensor(begun(local, [fact.bridge_prompt]), device=device)
            q = torch.log_softmax(model(input_ids=one, use_cache=False).logits[0, -1].float(), -1)
        place = len(begin) - 1
        moves: dict[str, Tensor] = {}
        streams: dict[str, Tensor] = {}

        def movable(name: str) -> Any:
            def add(hidden: Tensor) -> Tensor:
                streams[name] = hidden[0, place].detach()
                moves[name] = torch.zeros_like(streams[name], requires_grad=True)
                at = torch.arange(hidden.shape[1], device=hidden.device)[None, :, None] == place
                return hidden + at * moves[name]
            return add

        names = lens.names[:-1] if self.slope else []
        with with_gradients(), frozen(model), ExitStack() as stack:
            stack.enter_context(uncompiled(model))
            if names:
                stack.enter_context(intervene(model, {name: movable(name) for name in names}))
            ids = torch.tensor([prompt], device=device)
            out = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            value = consistency(torch.log_softmax(out, -1), q)
            slopes: list[float] = []
            if names:
                ahead = torch.autograd.grad(value, [moves[name] for name in names])
                hidden = torch.stack([streams[name].to(out.device) for name in names]).requires_grad_(True)
                recall = torch.log_softmax(lens(hidden[None]).float(), -1)[0, :, token].sum()
                [along] = torch.autograd.grad(recall, hidden)
                slopes = [float((step.double() * gradient.double().to(step.device)).sum())
                          for step, gradient in zip(along, ahead, strict=True)]
        return float(value.detach()), slopes


def first_token(local: LocalModel, fact: TwoHop) -> int:
    """The first token of the bridge, spaces aside, where the prompt goes on with it."""
    ids = local.encode_pairs([fact.split()[0]], [[f" {fact.e2}"]])[1][0][0]
    return next((n for n in ids if local.detokenize([n]).strip()), ids[0])


def _above(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.where(ours > theirs, 1.0, np.where(ours < theirs, 0.0, 0.5))
