"""The conformance kit of probes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import torch

from looseleaf.probes.probe import Probe
from looseleaf.report import Report
from looseleaf.testing.models import tiny_llama
from looseleaf.testing.common import Findings, check_plugin


def check_probe(cls: type[Probe], make: Callable[[], Probe] | None = None, *, data: Any = None,
                model: Callable[[], Any] | None = None) -> None:
    """Everything a probe must do.

    Args:
        cls: the probe class.
        make: how to make one for the checks, such as one with few steps; None: the defaults.
        data: what to hand to ``run``; None: the probe's own example data.
        model: makes the model to probe; None: a random Llama of two layers with a tokenizer of single characters.

    Raises:
        AssertionError: with every check that failed, one a line.
    """
    make = make or cls
    build = model or tiny_text_llama
    findings = Findings(cls.__name__)
    check_plugin(findings, cls, Probe, make)
    if any(f.startswith(("is a dataclass", "constructs")) for f in findings.failures):
        findings.finish()
    tokenizer = tiny_tokenizer()

    def run(on: Any, seed: int = 0) -> Report:
        return make().run(on, data, tokenizer=tokenizer, seed=seed, progress=False)

    subject = build()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    first: Report | None = None
    noise = io.StringIO()
    with findings.check("runs and reports"):
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            first = run(subject)
        assert isinstance(first, Report), f"run returned {type(first).__name__}: allowed is a looseleaf.Report"
    if first is not None:
        with findings.check("the report says something"):
            assert first.title, "the report has no title"
            assert first.tables or first.figures or first.claims, "no table, figure or claim: say what was measured"
        with findings.check("the report is plain data"):
            again = Report.from_dict(json.loads(first.to_json()))
            assert again.to_json() == first.to_json(), "JSON and back gives another report"
            assert first.to_text()
        with findings.check("is silent where progress=False"):
            printed = noise.getvalue().strip()
            assert not printed, f"run printed {printed[:80]!r}: use looseleaf.progress and the report"
        with findings.check("same seed, same result"):
            torch.manual_seed(int(torch.randint(1 << 30, ())))  # what only the global generator decides must show
            assert _plain(run(build())) == _plain(first), "two runs with the same seed differ"
    with findings.check("the model is left as it was"):
        _untouched(subject, before)
    with findings.check("the model is left as it was after an exception"):
        broken = build().train()
        calls = 0

        def fail(module: Any, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt

        # a leaf that runs early: a probe may well call a part of the model only
        leaf = next(m for m in broken.modules() if not list(m.children()) and list(m.parameters()))
        handle = leaf.register_forward_hook(fail)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run(broken)
                assert calls < 2, "run goes on after KeyboardInterrupt: catch no more than Exception"
        finally:
            handle.remove()
        assert calls, "the probe never ran the model"
        _untouched(broken, before, training=True)
    findings.finish()


def _plain(report: Report) -> str:
    """The report without what time alone decides."""
    data = report.to_dict()
    data["facts"] = {k: v for k, v in data["facts"].items() if "second" not in k.lower()}
    return json.dumps(data, sort_keys=True)


def _untouched(model: Any, before: dict[str, torch.Tensor], training: bool = False) -> None:
    after = model.state_dict()
    assert list(after) == list(before), "parameters were added or removed"
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"weights changed: {', '.join(changed[:3])}"
    assert all(m.training == training for m in model.modules()), \
        f"the model was in {'training' if training else 'evaluation'} mode and was not left in it"
    hooked = [name or "the model" for name, m in model.named_modules()
              if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooked, f"hooks were left on {', '.join(hooked[:3])}"
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    assert not grads, f"gradients were left on {', '.join(grads[:3])}"
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not frozen, f"requires_grad was left off on {', '.join(frozen[:3])}"


def tiny_text_llama() -> Any:
    """A random Llama of two layers for :func:`tiny_tokenizer`."""
    return tiny_llama(vocabulary=128)


def tiny_tokenizer() -> Any:
    """A tokenizer made in memory: one token for each printable ASCII character, and three special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(c): c - 29 for c in range(32, 127)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
