"""Jigsaw-R1: puzzles of one's own pictures, for looking at vision-language models and training them (2505.23590)."""

from looseleaf_jigsaw_r1.baselines import PlantedSolver, SeamBaseline
from looseleaf_jigsaw_r1.judging import Consistency, consistency
from looseleaf_jigsaw_r1.probe import JigsawProbe
from looseleaf_jigsaw_r1.puzzles import Jigsaw, Puzzle, dataset, example_pictures, puzzles, reassemble, split
from looseleaf_jigsaw_r1.training import Trained, rejection_sample, train
from looseleaf_jigsaw_r1.verifiers import accuracy_reward, advantages, binary_reward, format_reward, grpo_loss

__all__ = ["Consistency", "Jigsaw", "JigsawProbe", "PlantedSolver", "Puzzle", "SeamBaseline", "Trained",
           "accuracy_reward", "advantages", "binary_reward", "consistency", "dataset", "example_pictures",
           "format_reward", "grpo_loss", "puzzles", "reassemble", "rejection_sample", "split", "train"]
