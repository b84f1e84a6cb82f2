"""Training on puzzles with the trainers of trl: GRPO by rule-checked rewards, supervised, or one after the other."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from looseleaf.modes import frozen, own_random_state, training, with_gradients
from looseleaf.unwrap import unwrapped
from looseleaf_jigsaw_r1.puzzles import Jigsaw, Puzzle, Stages, dataset, pictures, puzzles, row, staged
from looseleaf_jigsaw_r1.verifiers import FORMAT_WEIGHT, accuracy, accuracy_reward, format_reward, is_right, well_formed
from looseleaf_text import ChatModel, LocalChat

Method = Literal["grpo", "sft", "sft+grpo"]
GRPO: dict[str, Any] = {
    "loss_type": "grpo", "beta": 0.04, "epsilon": 0.2, "num_iterations": 1, "num_generations": 8,
    "scale_rewards": "group", "reward_weights": [1.0, FORMAT_WEIGHT], "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "max_completion_length": 512, "learning_rate": 1e-6, "lr_scheduler_type": "linear", "optim": "adamw_torch"}
"""What trl is given for the paper's GRPO; several of its own defaults differ."""
PROMPTS = 64
"""Prompts in a step of GRPO."""
SFT: dict[str, Any] = {"learning_rate": 1e-6, "lr_scheduler_type": "linear", "optim": "adamw_torch", "max_length": None,
                       "completion_only_loss": True}
"""What trl is given for supervised training; the paper's learning rate there is not known, GRPO's is taken. [ours]"""
SFT_BATCH = 512
PAIRS = Jigsaw()
"""2 x 1 patches, which is above the other: where the authors begin."""


@dataclasses.dataclass
class Trained:
    """What training gave.

    Attributes:
        model: the model that was given, trained in place; wrapped by PEFT where ``peft`` was given.
        history: what trl logged, in order, with ``stage`` "sft" or "grpo"; for GRPO with ``reward``, the mean of each
            reward, and ``frac_reward_zero_std``: the fraction of groups whose rewards are all equal, from which
            nothing is learned.
    """

    model: Any
    history: list[dict[str, Any]]


def rejection_sample(chat: ChatModel, images: Any, jigsaw: Jigsaw, count: int, *, tries: int = 8, seed: int = 0,
                     max_tokens: int = 512, progress: Callable[[int], None] = lambda solved: None
                     ) -> list[tuple[Puzzle, str]]:
    """A model's own reasoning that led to right and well-formed answers, to train it on.

    Args:
        chat: drawn from at temperature 1.
        images: a folder or a list of pictures.
        jigsaw: the kind of puzzle.
        count: puzzles that are tried.
        tries: answers drawn for a puzzle, until one is right.
        seed: of the puzzles and of what is drawn.
        max_tokens: of an answer.
        progress: given the number of puzzles that are solved after each round.

    Returns:
        The puzzles that were solved, each with its output; perhaps none.
    """
    left = list(puzzles(images, jigsaw, count, seed))
    kept: list[tuple[Puzzle, str]] = []
    for attempt in range(tries):
        if not left:
            break
        outputs = chat.chat([p.messages for p in left], max_tokens, temperature=1.0, seed=seed * 1000 + attempt)
        wrong: list[tuple[Puzzle, str]] = []
        for puzzle, text in zip(left, outputs, strict=True):
            rule = (puzzle.question, puzzle.thinking, puzzle.m * puzzle.n)
            solved = is_right(accuracy(text, puzzle.solution, *rule), puzzle.question) and well_formed(text, *rule)
            (kept if solved else wrong).append((puzzle, text))
        left = [puzzle for puzzle, _ in wrong]
        progress(len(kept))
    return kept


def supervised(puzzle: Puzzle, output: str | None = None) -> dict[str, Any]:
    """A puzzle and its right output as trl's supervised trainer reads them."""
    asked = row(puzzle)
    return {"prompt": asked["prompt"], "image": puzzle.image,
            "completion": [{"role": "assistant", "content": output or puzzle.gold}]}


def train(model: Any, processor: Any, images: Any, method: Method = "grpo", *, jigsaw: Stages = PAIRS,
          steps: int | None = None, peft: Any = None, freeze_vision: bool = False, seed: int = 0,
          rewards: Sequence[Callable[..., Any]] = (accuracy_reward, format_reward),
          output_dir: str | Path | None = None, **config: Any) -> Trained:
    """Train a vision-language model on puzzles of pictures, with the paper's settings.

    Args:
        model: of ``AutoModelForImageTextToText``, changed in place.
        processor: its processor, with a chat template.
        images: a folder, or a list of pictures; keep those for testing out (:func:`looseleaf_jigsaw_r1.split`).
        method: ``grpo``, ``sft``, or one after the other, which is the paper's cold start.
        jigsaw: the kind of puzzle, or a curriculum of ``(kind, how many puzzles)`` counted over the whole training.
        steps: of each stage; None: the paper's 2,000 of GRPO without reasoning and 1,000 otherwise.
        peft: a configuration of PEFT, such as ``LoraConfig``; the authors trained every weight.
        freeze_vision: leave the vision tower as it is.
        seed: of puzzles and of what is drawn.
        rewards: in trl's signature; give ``reward_weights`` where there are not two.
        output_dir: where trl writes; None: a temporary folder that is removed. A copy of the weights is written there
            as well, which is the reference of GRPO.
        **config: for ``GRPOConfig`` or ``SFTConfig`` over the paper's settings (``per_device_train_batch_size``,
            ``max_completion_length`` ...); those that one stage of two does not know are left to the other.

    Raises:
        ModuleNotFoundError: trl is not installed.
        ValueError: another method, no pictures, a model without a vision tower where it is to be frozen, or reasoning
            with ``sft``, for which outputs are needed that :func:`rejection_sample` gives.
    """
    try:
        import trl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("train: expected the package trl, got none: "
                                  "pip install 'looseleaf-jigsaw-r1[train]'") from error
    from transformers.trainer_callback import PrinterCallback

    if method not in ("grpo", "sft", "sft+grpo"):
        raise ValueError(f"method: expected 'grpo', 'sft' or 'sft+grpo', got {method!r}")
    stages = method.split("+")
    found = pictures(images)
    thinking = staged(jigsaw, 0).thinking
    settings = {"grpo": trl.GRPOConfig, "sft": trl.SFTConfig}
    known = {stage: {f.name for f in dataclasses.fields(settings[stage])} for stage in stages}
    strange = sorted(set(config) - set().union(*known.values()))
    if strange:
        raise ValueError(f"config: expected settings of {' or '.join(settings[s].__name__ for s in stages)}, got "
                         f"{', '.join(strange)}")
    history: list[dict[str, Any]] = []
    with ExitStack() as undo:
        undo.enter_context(own_random_state(seed))
        undo.enter_context(with_gradients())
        undo.enter_context(training(model))
        if freeze_vision:
            undo.enter_context(frozen(vision_tower(model)))
        folder = Path(output_dir) if output_dir is not None else Path(
            undo.enter_context(tempfile.TemporaryDirectory(prefix="jigsaw-r1-")))
        for stage in stages:
            count = steps or (2000 if stage == "grpo" and not thinking else 1000)
            own = {k: v for k, v in config.items() if k in known[stage]}
            common: dict[str, Any] = {"output_dir": str(folder / stage), "max_steps": count, "seed": seed,
                                      "report_to": "none", "save_strategy": "no", "logging_steps": 1,
                                      "remove_unused_columns": False, "bf16": False,
                                      "disable_tqdm": not sys.stderr.isatty()}
            if stage == "grpo":
                trainer = _grpo(model, processor, found, jigsaw, {**common, **GRPO, **own}, rewards, peft, folder,
                                seed)
            else:
                trainer = _sft(model, processor, found, jigsaw, {**common, **SFT, **own}, peft, seed)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            model, peft = trainer.model, None  # a second stage goes on with the same adapter
            history += [{"stage": stage, **entry} for entry in trainer.state.log_history]
    return Trained(model, history)


def vision_tower(model: Any) -> Any:
    """The part of a model that reads pictures.

    Raises:
        ValueError: there is none by a name that transformers uses.
    """
    for name, module in unwrapped(model).named_modules():
        if name.rpartition(".")[2] in ("vision_tower", "visual", "vision_model", "vision_encoder"):
            return module
    raise ValueError(f"freeze_vision: expected a model with a vision tower, got {type(unwrapped(model)).__name__}: "
                     "freeze the parameters yourself, and leave freeze_vision out")


def _grpo(model: Any, processor: Any, found: list[Any], jigsaw: Stages, settings: dict[str, Any],
          rewards: Sequence[Any], peft: Any, folder: Path, seed: int) -> Any:
    import trl

    samples = settings["num_generations"]
    if "per_device_train_batch_size" not in settings:
        settings["per_device_train_batch_size"] = samples
        settings.setdefault("gradient_accumulation_steps", PROMPTS)
    # puzzles are read in order, so that a curriculum counts steps and not what one worker has seen
    settings.setdefault("shuffle_dataset", False)
    args = trl.GRPOConfig(**settings)
    prompts = max(1, args.generation_batch_size // samples)
    puzzles_ = dataset(found, jigsaw, prompts * args.max_steps * max(1, args.world_size), seed)
    reference = folder / "reference"
    inner = unwrapped(model)
    former = inner.config._name_or_path
    if settings["beta"] and peft is None and not hasattr(model, "peft_config"):
        # trl loads the reference by the name of the model: that must be the model as it is now, not as it once was
        inner.save_pretrained(reference)
        inner.config._name_or_path = str(reference)
    try:
        return trl.GRPOTrainer(model=model, reward_funcs=list(rewards), args=args, train_dataset=puzzles_,
                               processing_class=processor, peft_config=peft)
    finally:
        inner.config._name_or_path = former


def _sft(model: Any, processor: Any, found: list[Any], jigsaw: Stages, settings: dict[str, Any], peft: Any,
         seed: int) -> Any:
    import datasets
    import trl

    if "per_device_train_batch_size" not in settings:
        settings["per_device_train_batch_size"] = 8
        settings.setdefault("gradient_accumulation_steps", SFT_BATCH // 8)
    args = trl.SFTConfig(**settings)
    count = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    first = staged(jigsaw, 0)
    if first.thinking:
        tries = max(8, min(count, 8 * len(found)))
        kept = rejection_sample(LocalChat(model.eval(), processor), found, first, tries, seed=seed)
        model.train()
        if not kept:
            raise ValueError(f"sft: expected the model to solve some of {tries} puzzles by its own reasoning, got "
                             "none: train it without thinking first, or on a smaller size")
        own = [supervised(puzzle, text) for puzzle, text in kept]
        data = datasets.Dataset.from_dict({"number": list(range(len(own)))}).with_transform(
            lambda batch: {k: [own[n][k] for n in batch["number"]] for k in own[0]})
    else:
        data = dataset(found, jigsaw, count * max(1, args.world_size), seed, make=supervised)
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor, peft_config=peft)


__all__ = ["GRPO", "PROMPTS", "SFT", "SFT_BATCH", "Method", "Trained", "rejection_sample", "supervised", "train",
           "vision_tower"]
