"""Training by trl on a small LLaVA: the paper's settings, and what is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from looseleaf_jigsaw_r1 import Jigsaw, example_pictures, rejection_sample, train
from looseleaf_jigsaw_r1.training import GRPO, PROMPTS
from looseleaf_text import LocalChat
from looseleaf_text.testing.models import toy_llava

SMALL: dict[str, Any] = {"steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
                         "learning_rate": 1e-2, "max_completion_length": 4, "gradient_checkpointing": False}


def test_settings_of_the_paper() -> None:
    assert PROMPTS == 64 and GRPO["num_generations"] == 8 and GRPO["loss_type"] == "grpo" and GRPO["beta"] == 0.04
    assert (GRPO["epsilon"], GRPO["num_iterations"], GRPO["scale_rewards"]) == (0.2, 1, "group")
    assert (GRPO["reward_weights"], GRPO["temperature"], GRPO["top_k"]) == ([1.0, 0.5], 1.0, 50)
    assert (GRPO["learning_rate"], GRPO["lr_scheduler_type"], GRPO["max_completion_length"]) == (1e-6, "linear", 512)


def test_cold_start_then_grpo() -> None:
    pytest.importorskip("trl", reason="needs looseleaf-jigsaw-r1[train]")
    model, processor = toy_llava()
    model.model.multi_modal_projector.train()
    modes = [module.training for module in model.modules()]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    trained = train(model, processor, example_pictures(4, 32), "sft+grpo", freeze_vision=True,
                    jigsaw=[(Jigsaw(2, 1), 2), (Jigsaw(3, 1), 2)], **SMALL)
    assert trained.model is model and [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and all(p.requires_grad for p in model.parameters())
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("language_model" in name for name in changed) and not any("vision_tower" in name for name in changed)
    assert model.config._name_or_path == ""
    steps = [entry for entry in trained.history if entry["stage"] == "grpo" and "reward" in entry]
    assert len(steps) == 2 and "frac_reward_zero_std" in steps[0]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6), "the reference is the model after the supervised stage"


def test_rejection_sampling_keeps_right_answers_alone() -> None:
    model, processor = toy_llava()
    kept = rejection_sample(LocalChat(model, processor), example_pictures(2, 32), Jigsaw(), 6, tries=3, max_tokens=2)
    assert len(kept) <= 6 and all(text.count(puzzle.solution) == 1 for puzzle, text in kept)


def test_bad_input() -> None:
    pytest.importorskip("trl", reason="needs looseleaf-jigsaw-r1[train]")
    model, processor = toy_llava()
    with pytest.raises(ValueError, match="expected 'grpo', 'sft' or 'sft\\+grpo', got 'ppo'"):
        train(model, processor, example_pictures(2), "ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected settings of GRPOConfig, got learning"):
        train(model, processor, example_pictures(2), learning=1)
