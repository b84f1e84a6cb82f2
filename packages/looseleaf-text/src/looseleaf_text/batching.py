"""What a batch means to a model: measured on the model itself, since neither its name nor its signature says.

Rows of a batch differ in length. Padding on the left, and between a shared beginning and the rest, is undone by most
decoders (given the positions), but not by models with recurrent states, with positions that they count themselves or
that do not begin at 0, and not within windows. Padding on the right, with nothing read after it, harms no causal model.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from looseleaf.errors import UnsupportedModelError
from looseleaf.modes import evaluating
from looseleaf.offload import execution_device
from looseleaf.unwrap import unwrapped

BEGINNING = 5
"""Positions that the rows of the trial share."""
# What the numbers of a configuration count, by their names: choices among tokens, distances between tokens (whatever
# is not known to count something else is taken for one), or neither.
_CHOICE = re.compile(r"index_topk|keep_window|top_?k_(block|token)|random_blocks|kv_budget", re.IGNORECASE)
_COUNT = re.compile(r"^num_|^n_|pattern|expert|moe|_id$|_ids$|_index$|_layers?$|head_dim|vocab", re.IGNORECASE)
_WINDOW = re.compile(r"window|chunk|block|local|band|span|stride|sparse", re.IGNORECASE)
_OTHER = re.compile(
    r"hidden|intermediate|embd|embed|d_model|d_ff|dff|d_kv|ffn|inner|dim|width|heads?($|_)|layers?($|_)|rank|token|group"
    r"|position|state|conv|kernel|version|factor|ratio|seed|bits|_tp$|expand|size$|topk|top_k|step|label|problem|beam"
    r"|length|seq_len|scal|theta|freq|mult|period|offset|depth|interval|_every|replace|channel|max_", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Batching:
    """How rows of a model may be batched without any changing what it gives for another.

    Attributes:
        left: padding on the left and between a shared beginning and the rest is undone, up to ``reach`` positions.
        right: padding on the right is without effect; False: one row at a time.
        shares: the cache of a beginning can be shared by several rows.
        continues: a row can go on from its own cache.
        longest: positions that the model's table of positions has; None: it has no such table.
        refused: why the model cannot be scored; None: it can.
    """

    left: bool = False
    right: bool = False
    shares: bool = False
    continues: bool = False
    longest: int | None = None
    refused: str | None = None


Forward = Callable[..., tuple[Tensor, Any, Tensor]]
"""(rows, cache, mask, keep=, use_cache=, left=) -> logits of the last ``keep`` positions, cache, mask of the cache."""

_measured: weakref.WeakKeyDictionary[nn.Module, dict[Any, Batching]] = weakref.WeakKeyDictionary()


def batching(model: nn.Module, key: Any, forward: Forward, tokenizer: Any, limit: int | None,
             window: int | None = None) -> Batching:
    """What :func:`measure` finds, kept for as long as the model lives.

    Args:
        model: without wrappers.
        key: of whatever else may change the answer, such as the attention in use.
        forward: runs the model.
        tokenizer: the model's; says which ids are no ordinary text.
        limit: most positions, as the configuration says; None: unknown.
        window: the answer is for rows longer than this; None: for short ones.
    """
    known = _measured.setdefault(model, {})
    if (key, window) not in known:
        # within a window, and with its cache full
        lengths = [BEGINNING] if window is None else [max(BEGINNING, window - 4), window + 3]
        if limit is not None:
            lengths = sorted({min(n, limit - 9) for n in lengths})
        parts = [measure(model, forward, ordinary_ids(model, tokenizer, 2 * n + 14), n, window is None) for n in lengths
                 if n >= BEGINNING] or [Batching()]
        known[key, window] = dataclasses.replace(
            parts[0], left=all(p.left for p in parts), right=all(p.right for p in parts),
            shares=all(p.shares for p in parts), continues=all(p.continues for p in parts))
    return known[key, window]


def measure(model: nn.Module, forward: Forward, ids: list[int], shared_length: int,
            anywhere: bool = True) -> Batching:
    """Compare a few short rows alone with the same rows in batches of every kind.

    Args:
        model, forward: see :func:`batching`.
        ids: ordinary ones, 14 more than twice ``shared_length``.
        shared_length: how many positions the rows share; they have up to 9 more.
        anywhere: also try padding before and within rows, which a window never undoes.

    Raises:
        UnsupportedModelError: the model does not run on token ids.
    """
    first, second, rest = ids[:shared_length], ids[shared_length:2 * shared_length], ids[2 * shared_length:]
    a, b, c = [*first, *rest[:7]], [*first, *rest[7:10]], [*second, *rest[10:14]]
    tails, keep = [rest[:2], rest[3:4], rest[5:6]], shared_length + 9
    try:
        with positions_table(model, len(a)) as tables:
            head = forward([a], keep=1, use_cache=False, left=False)[0][0, -1]
        longest = min(tables, default=None)
        alone = [forward([[*row, *tail]], keep=keep, use_cache=False, left=False)[0][0, -len(tail) - 1:]
                 for row, tail in zip((a, b, c), tails, strict=True)]
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError, KeyError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be run on token ids alone, as a causal language "
                                    f"model is: {type(error).__name__}: {error}") from error
    fine = tolerance(model)
    if not same(head, alone[0][0], min(50 * fine, 0.1)):
        again = forward([a], keep=1, use_cache=False, left=False)[0][0, -1]
        return Batching(longest=longest, refused="its logits at a token depend on the tokens after it, so it is not "
                        "causal (a masked language model goes into MaskedModel)" if same(head, again, fine) else
                        "it gives other logits each time, so no score of it means anything")

    def agrees(try_: Callable[[], list[Tensor]]) -> bool:
        try:
            return all(same(x, y, fine) for x, y in zip(try_(), alone, strict=True))
        except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, IndexError, KeyError,
                AssertionError):
            return False

    def right() -> list[Tensor]:
        rows = [[*row, *tail] for row, tail in zip((a, b, c), tails, strict=True)]
        return _ends(forward(rows, keep=keep, use_cache=False, left=False)[0], rows, tails)

    def continued() -> list[Tensor]:
        logits, cache, mask = forward([a], keep=1, left=False)
        found = [logits[0]]
        for token in tails[0]:
            logits, cache, mask = forward([[token]], cache, mask, keep=1, left=False)
            found.append(logits[0])
        return [torch.cat(found), *alone[1:]]

    def shared(left: bool, *starts: list[int]) -> list[Tensor]:
        _, cache, mask = forward(list(starts), keep=1, left=left)
        owner = [0, 0, 1]
        index = torch.tensor(owner, device=mask.device)
        bodies = [row[len(starts[n]):] for row, n in zip((a, b, c), owner, strict=True)]
        whole = bodies if left else [[*row, *tail] for row, tail in zip(bodies, tails, strict=True)]
        forward(whole[::-1], select(cache, index), mask[index], keep=1, left=left)  # must leave the cache as it is
        logits, cache, mask = forward(whole, select(cache, index), mask[index], keep=keep, left=left)
        if not left:
            return _ends(logits, whole, tails)
        after = forward(tails, select(cache, index.new_tensor([0, 1, 2])), mask, keep=2, left=True)[0]
        return [torch.cat([logits[r, -1:], after[r, -len(tail):]]) for r, tail in enumerate(tails)]

    def left() -> list[Tensor]:
        rows = [[*row, *tail] for row, tail in zip((a, b, c), tails, strict=True)]
        logits = forward(rows, keep=3, use_cache=False, left=True)[0]
        return [logits[r, -len(tail) - 1:] for r, tail in enumerate(tails)]

    harmless = agrees(right)
    return Batching(right=harmless, shares=harmless and agrees(lambda: shared(False, first, second)),
                    continues=agrees(continued), longest=longest,
                    left=anywhere and harmless and agrees(left) and agrees(lambda: shared(True, first, second[:-2])))


def _ends(logits: Tensor, rows: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of right-padded rows the logits from before the tail to the end."""
    width = max(map(len, rows))
    logits = logits[:, -width:]
    return [logits[r, len(row) - len(tail) - 1:len(row)] for r, (row, tail) in enumerate(zip(rows, tails, strict=True))]


def tolerance(model: nn.Module) -> float:
    """How far logits of the same row may differ by rounding alone, relative to their spread."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return max(8 * torch.finfo(dtype).eps, 2e-5)


def same(x: Tensor, y: Tensor, tolerance: float) -> bool:
    """Whether two sets of logits are the same but for rounding; the difference counts relative to their spread."""
    x, y = torch.log_softmax(x.double(), -1), torch.log_softmax(y.double(), -1)
    if x.shape != y.shape or not torch.equal(x.isfinite(), y.isfinite()):
        return False
    x, y = x[x.isfinite()], y[y.isfinite()]
    if not x.numel():
        return True
    return bool((x - y).square().mean().sqrt() <= tolerance * (y - y.mean()).square().mean().sqrt() + 1e-7)


def select(cache: Any, index: Tensor) -> Any:
    """A cache of the rows ``index`` of ``cache``, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = []
    for layer in cache.layers:
        own = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, (dict, list)):  # states by number: changed in place below
                setattr(own, name, copy.copy(value))
        own.reorder_cache(index)
        selected.layers.append(own)
    return selected


def reach(config: Any) -> int | None:
    """The smallest number of a configuration that may be a window, a chunk or any other distance between tokens.

    Up to this length no window matters, whatever it is called. A number that is none costs speed only.
    """
    return min((v for name, values in _numbers(config) for v in values if _CHOICE.search(name) or (not _COUNT.search(
        name) and (_WINDOW.search(name) or (len(values) == 1 and not _OTHER.search(name))))), default=None)


def choice(config: Any) -> int | None:
    """The smallest number of tokens that a model chooses among all: which they are may hang on how ties are broken.

    Up to this length there is no choice.
    """
    return min((v for name, values in _numbers(config) for v in values if _CHOICE.search(name)), default=None)


def _numbers(config: Any) -> Iterator[tuple[str, list[int]]]:
    for name, value in vars(config).items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if not name.startswith("_") and all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            yield name, [v for v in values if v > 1]


@contextmanager
def positions_table(model: nn.Module, length: int) -> Iterator[list[int]]:
    """How many positions the tables hold that are read at consecutive places while rows of ``length`` are run."""
    found: list[int] = []

    def watch(module: nn.Module, arguments: tuple[Any, ...], _: Any) -> None:
        ids = arguments[0] if arguments else None
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.numel() == length > 1:
            flat = ids.flatten()
            if bool((flat.diff() == 1).all()):  # rows that begin at 2, as RoBERTa's do, leave two places unused
                found.append(int(module.num_embeddings) - int(flat[0]))  # type: ignore[arg-type]

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def ordinary_ids(model: Any, tokenizer: Any, count: int) -> list[int]:
    """Token ids of text: none that stands for a picture, for padding or for the end of a text."""
    special: set[int] = set(getattr(tokenizer, "all_special_ids", None) or ())
    for config in (model.config, text_config(model)):
        for name, value in vars(config).items():
            if name.endswith(("_id", "_ids", "_index", "_token")):
                special.update(v for v in (value if isinstance(value, (list, tuple)) else [value])
                               if isinstance(v, int))
    sizes = [getattr(text_config(model), "vocab_size", None)]
    if hasattr(tokenizer, "__len__"):
        sizes.append(len(tokenizer))
    try:
        sizes.append(model.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):  # a model of somebody's own
        sizes += [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)][:1]
    size = min((n for n in sizes if isinstance(n, int) and n > 0), default=256)
    usable = [n for n in range(min(size, 4096)) if n not in special] or [0]
    return [usable[(7 + 5 * n + n * n) % len(usable)] for n in range(count)]


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text; that of the whole where there are several."""
    try:
        return model.config.get_text_config()
    except (AttributeError, ValueError):
        return model.config


def positions(config: Any) -> int | None:
    """Most positions of a row, as a configuration says; None: it does not."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def expect_eval(model: Any) -> None:
    """Raise ValueError for a model in training mode."""
    if unwrapped(model).training:
        raise ValueError("the model is in training mode, where dropout makes every score different: "
                         "call model.eval() first")


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Parts of a model that are in training mode, such as adapters put in later, are in evaluation mode for a while."""
    with evaluating(model) if any(module.training for module in model.modules()) else nullcontext():
        yield


def device_of(model: Any) -> torch.device:
    """Where a model's input goes; where its weights are offloaded, the device that it is run on."""
    for module in model.modules():
        if (at := execution_device(module)) is not None:
            return torch.device(at)
    device: torch.device = next(model.parameters()).device
    return device
