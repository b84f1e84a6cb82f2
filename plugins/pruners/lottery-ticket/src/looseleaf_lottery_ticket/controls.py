"""The controls of the claim: is it the initial weights, or the structure alone, that make a ticket win?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from looseleaf import Masks
from looseleaf.modes import own_random_state
from looseleaf_tickets import Ticket
from looseleaf_tickets.tickets import snapshot


def random_reinit(ticket: Ticket, model: nn.Module, seed: int,
                  init: Callable[[nn.Module], Any] | None = None) -> Ticket:
    """The same masks on new initial weights. [section 1: "randomly reinitialised"]

    Args:
        ticket: whose masks are kept.
        model: the architecture; not changed.
        seed: of the new weights; torch's global generator has its former state afterwards.
        init: draws new weights for a model in place, as it was made first; None: ``reset_parameters()`` of every
            layer, which is right for models whose layers are initialised as torch does it. For a model of transformers:
            ``lambda m: m.apply(m._init_weights)``.

    Returns:
        A ticket that begins at step 0, without metrics.

    Raises:
        ValueError: a layer with weights has no ``reset_parameters``, or a pruned weight has kept its values; give
            ``init``. The ticket is for another model.
    """
    fresh = copy.deepcopy(model)
    ticket.apply(fresh)  # an error when it is for another model
    ticket.masks.remove(fresh)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    with own_random_state(seed):
        if init is not None:
            init(fresh)
        else:
            _reset(fresh)
    for name, parameter in fresh.named_parameters():
        if name in ticket.masks and torch.equal(parameter, before[name]):
            raise ValueError(f"the new initialisation leaves {name!r} as it was: give init=, a function that draws new "
                             "weights for the whole model in place")
    return Ticket(ticket.masks, snapshot(fresh), ticket.round)


def random_mask(ticket: Ticket, seed: int) -> Ticket:
    """Random masks that keep as many weights of every parameter as the ticket does, on the same initial weights.

    Returns:
        A ticket with the ``start`` of the given one, without metrics.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, mask in ticket.masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.reshape(-1)[order].view(mask.shape)
    return Ticket(Masks(shuffled, {**ticket.masks.metadata, "control": "random mask"}), ticket.start, ticket.round,
                  ticket.step)


def _reset(model: nn.Module) -> None:
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif module._parameters:
            raise ValueError(f"{name or 'the model'!r} ({type(module).__name__}) has weights and no "
                             "reset_parameters(): give init=, a function that draws new weights for the whole model in "
                             "place")
