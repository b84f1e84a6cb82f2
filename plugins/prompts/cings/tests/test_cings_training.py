"""Trainers, adapters that travel with the prompt, and models left as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from looseleaf import Budget, Example, Prompt, UnsupportedModelError
from looseleaf.testing.models import seeded, tiny_gemma3, tiny_llama, tiny_tokenizer
from looseleaf_cings import CInGS, CInGSTrainer, Collator, GroundedPrompt, Rows, packed, response_loss
from looseleaf_cings.trainer import adapter_in, lora_config, separates
from looseleaf_text import LocalModel, TextTask
from looseleaf_text.testing import ToyLanguageModel

torch.set_num_threads(1)
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")
EXAMPLE = {"instruction": "Capital of X?", "context": "It is Rome.", "response": "Rome"}
OTHER = {"instruction": "What now?", "context": "", "response": "Nothing much."}
ROWS = [EXAMPLE, OTHER, {**EXAMPLE, "response": "Rome is the capital."}, {**OTHER, "response": "No"}]
OPTIONS: dict[str, Any] = {"steps": 2, "batch_size": 2, "learning_rate": 0.05, "lora_rank": 2}


def chat_tokenizer(template: str | None = CHAT) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def local(**config: Any) -> LocalModel:
    return LocalModel(tiny_llama(vocabulary=128, **config), chat_tokenizer())


def task(**fields: Any) -> TextTask:
    examples = [Example({"instruction": f"{n}?", "context": f"It is {'ab'[n % 2]}."}, "ab"[n % 2]) for n in range(4)]
    return TextTask("letters", examples, examples[:2], template="{instruction}", **{
        "metric": "contains", "max_tokens": 3, **fields})


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
                             logging_strategy="no", lr_scheduler_type="constant", **{
                                 "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, **more})


def one_step_by_hand(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    batch = Collator()(rows)
    labels = batch.pop("labels")
    response_loss(model(**batch), labels).backward()
    return [p.detach() - 0.1 * p.grad for p in model.parameters()]


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 4}, {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_a_step_of_the_trainer_is_that_of_the_plain_loss_over_the_whole_batch(tmp_path: Path, options: Any) -> None:
    rows = Rows(chat_tokenizer()).all(ROWS)
    assert len({sum(n != -100 for n in row["labels"]) for row in rows}) > 2, "responses of several lengths"
    model = tiny_llama(vocabulary=128)
    expected = one_step_by_hand(copy.deepcopy(model), rows)
    CInGSTrainer(model=model, train_dataset=rows, args=arguments(tmp_path, **options)).train()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


def test_packed_rows_train_as_single_ones_and_models_that_mix_them_are_refused(tmp_path: Path) -> None:
    rows = Rows(chat_tokenizer()).all(ROWS)
    model = tiny_llama(vocabulary=128)
    expected = one_step_by_hand(copy.deepcopy(model), rows)
    CInGSTrainer(model=model, train_dataset=packed(rows, 500), args=arguments(tmp_path)).train()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-5)

    class Mixing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = tiny_llama(vocabulary=128), None

        def forward(self, input_ids: Any, position_ids: Any = None, **_: Any) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    with pytest.raises(UnsupportedModelError, match="see one another"):
        CInGSTrainer(model=Mixing(), train_dataset=packed(rows, 500), args=arguments(tmp_path)).train()
    batch = Collator()(packed(rows, 500))
    assert separates(tiny_gemma3(), batch["input_ids"] % 64, batch["position_ids"])


def test_trl_takes_the_same_rows(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = Rows(chat_tokenizer()).all(ROWS)
    model = tiny_llama(vocabulary=128)
    expected = one_step_by_hand(copy.deepcopy(model), rows)
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
                         logging_strategy="no", lr_scheduler_type="constant", max_steps=1, learning_rate=0.1,
                         optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=4, gradient_checkpointing=False,
                         bf16=False, max_length=None)
    trl.SFTTrainer(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows),
                   processing_class=chat_tokenizer()).train()
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:task 'copying'")  # that test examples are in train: there are but ten
def test_learns_to_copy_and_the_adapter_travels(tmp_path: Path) -> None:
    """Planted: values that no weight can know, so that only a model that reads its context is right."""
    model = local()
    letters = "abcdefghij"
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> list[Example]:
        chosen = torch.randint(10, (count,), generator=draw).tolist()
        return [Example({"instruction": "?", "context": letters[c]}, letters[c]) for c in chosen]

    copying = TextTask("copying", some(200), some(4), some(24), template="{instruction}", metric="contains",
                       max_tokens=2)
    scores = {}
    for arm in ("context", "no_context"):
        steps = 60 if arm == "context" else 10
        prompt = CInGS(arm=arm, steps=steps, batch_size=16, learning_rate=0.02).optimize(copying, model, progress=False)
        scores[arm] = copying.evaluate(prompt.on(model)).score
        if arm == "context":
            assert prompt.info["losses"][-1] < 0.5 * prompt.info["losses"][0]
            prompt.save(tmp_path / "prompt.json")
            again = Prompt.load(tmp_path / "prompt.json")
            prompt.save_adapter(tmp_path / "adapter")
            folder = GroundedPrompt.from_adapter(tmp_path / "adapter", max_tokens=2)
            for other in (again, folder):
                assert other.on(model).predict(copying.dev) == prompt.on(model).predict(copying.dev)
            import peft

            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model.model), str(tmp_path / "adapter")).eval()
            text = prompt.on(model).render(copying.test[:1])
            bare = LocalModel(wrapped, model.tokenizer).generate(text, 2, ["\n"])
            assert bare == prompt.on(model).predict(copying.test[:1])
    assert scores["context"] > 0.75 and scores["no_context"] < 0.4, scores
    assert copying.evaluate(GroundedPrompt(max_tokens=2).on(model)).score < 0.4, "the model itself is as it was"


@pytest.mark.parametrize("wrap", ["peft", "compiled"])
def test_wrapped_models_are_used_and_left_as_they_are(wrap: str) -> None:
    import peft

    model = local()
    inner = model.model
    if wrap == "peft":
        network = seeded(lambda: peft.get_peft_model(inner, peft.LoraConfig(
            r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))).eval()
        inner.model.layers[0].mlp.train()
    else:
        network = torch.compile(inner, backend="eager")
    model = LocalModel(network, model.tokenizer)

    def state() -> Any:
        return ([(n, type(m).__name__, m.training) for n, m in network.named_modules()],
                [(n, p.requires_grad, p.detach().clone()) for n, p in network.named_parameters()])

    torch.compiler.set_stance("force_eager")  # the wrapper is what matters here
    before, said = state(), model.generate(["<user>a<assistant>"], 4)
    names = lora_config(network, 2, 4.0)["target_modules"]
    assert len(names) == 14 and all(name.startswith("model.layers.") for name in names)
    prompt = CInGS(**OPTIONS).optimize(task(), model, progress=False)
    assert len(prompt.adapter) == 28 and all("cings" not in name for name in prompt.adapter)
    prompt.on(model).predict(task().dev)
    after = state()
    assert before[0] == after[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert old[:2] == new[:2] and torch.equal(old[2], new[2])
    assert model.generate(["<user>a<assistant>"], 4) == said
    torch.compiler.set_stance("default")
    if wrap == "peft":
        assert list(inner.peft_config) == ["default"] and inner.model.layers[0].self_attn.q_proj.active_adapters == [
            "default"]


@pytest.mark.parametrize("family", ["GPT2", "Gemma3", "Qwen3", "GPTNeoX"])
def test_families(family: str) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config, cls = {
        "GPT2": (transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=2), "GPT2LMHeadModel"),
        "Gemma3": (transformers.Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, intermediate_size=48),
                   "Gemma3ForCausalLM"),
        "Qwen3": (transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, intermediate_size=48),
                  "Qwen3ForCausalLM"),
        "GPTNeoX": (transformers.GPTNeoXConfig(**sizes, intermediate_size=48), "GPTNeoXForCausalLM")}[family]
    model = LocalModel(seeded(lambda: getattr(transformers, cls)(config)).eval(), chat_tokenizer())
    prompt = CInGS(**OPTIONS, layers=1 / 3).optimize(task(), model, progress=False)
    assert prompt.adapter and all(".2." in name for name in prompt.adapter), "the upper third of three layers"
    assert any(bool(t.any()) for n, t in prompt.adapter.items() if "lora_B" in n)
    assert len(prompt.on(model).predict(task().dev)) == 2


def test_labels_start_and_bfloat16() -> None:
    model = LocalModel(tiny_llama(vocabulary=128).to(torch.bfloat16), chat_tokenizer())
    labelled = task(labels={"a": " a", "b": " b"}, metric="accuracy")
    first = CInGS(**OPTIONS).optimize(labelled, model, progress=False)
    assert all(t.dtype == torch.float32 for t in first.adapter.values()) and first.labels == {"a": "a", "b": "b"}
    assert labelled.evaluate(first.on(model), "dev").class_scores is not None
    second = CInGS(**OPTIONS).optimize(labelled, model, start=first, progress=False)
    assert second.fingerprint() != first.fingerprint()


def test_bad_input(tmp_path: Path) -> None:
    model = local()
    for fields, message in (({"arm": "no_mask", "placement": "user"}, "arm"), ({"batch_size": 24}, "multiple"),
                            ({"layers": 0.0}, "layers"), ({"steps": 0}, "steps")):
        with pytest.raises(ValueError, match=message):
            CInGS(**fields)
    bad = task()
    bad.train = [*bad.train, Example({"instruction": "and?"}, "a")]
    with pytest.raises(ValueError, match="row 4: context"):
        CInGS(**OPTIONS).optimize(bad, model, progress=False)
    with pytest.raises(UnsupportedModelError, match="LocalModel"):
        CInGS(**OPTIONS).optimize(task(), ToyLanguageModel(), progress=False)
    with pytest.raises(UnsupportedModelError, match="save_adapter"):
        GroundedPrompt().on(ToyLanguageModel())
    with pytest.raises(ValueError, match="chat template"):
        CInGS(**OPTIONS).optimize(task(), LocalModel(tiny_llama(vocabulary=128), chat_tokenizer(None)), progress=False)
    with pytest.raises(ValueError, match="start"):
        CInGS(**OPTIONS).optimize(task(), model, start="x", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a folder of PEFT"):
        GroundedPrompt.from_adapter(tmp_path)
    with pytest.raises(ValueError, match="an adapter"):
        GroundedPrompt().save_adapter(tmp_path)
    with pytest.raises(ValueError, match="inputs"):
        GroundedPrompt().on(model).predict([Example({"question": "a"})])
    prompt = CInGS(**OPTIONS).optimize(task(), model, progress=False)
    with pytest.raises(ValueError, match="does not fit the model"):
        prompt.on(local(hidden_size=32)).predict(task().dev)
    with adapter_in(model.model, prompt.adapter_config, prompt.adapter):
        pass
    assert type(model.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_budget_stops_and_resumes_to_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {**OPTIONS, "steps": 4}
    whole = CInGS(**options).optimize(task(), local(), progress=False)
    short = CInGS(**options).optimize(task(), local(), budget=Budget(calls=5), state_dir=tmp_path, progress=False)
    assert short.info["stopped"] == "budget: calls" and len(short.info["losses"]) == 2
    resumed = CInGS(**options).optimize(task(), local(), state_dir=tmp_path, progress=False)
    assert resumed.fingerprint() == whole.fingerprint() and resumed.info["stopped"] == "done"
