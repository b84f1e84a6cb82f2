"""The items as tasks of lm-evaluation-harness: one YAML and one JSON-lines file each.

Plain files; the harness itself is not needed to write them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from looseleaf.files import write_text
from looseleaf_abstract_reasoning.items import Item, check_items, to_json_lines

GROUP = "looseleaf_abstract_reasoning"


def export_harness(items: Sequence[Item], folder: str | os.PathLike[str], *, group: str = GROUP) -> list[str]:
    """Write ``items`` as multiple-choice tasks, one for each category and kind of remapping, and a group of all.

    The harness scores the same continuations of the same prompts as this package and takes the likeliest; so
    ``lm_eval --include_path FOLDER --tasks GROUP`` gives the same accuracies. The files name the folder in full: where
    it is moved, export again.

    Args:
        items: see :meth:`AbstractReasoningProbe.items` and :func:`suite`.
        folder: where the files go; made if need be.
        group: name of the group, and beginning of the tasks' names.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: no items, items twice, or a group name that is no name.
    """
    if not re.fullmatch(r"\w+", group):
        raise ValueError(f"group={group!r}: allowed are letters, digits and underscores")
    check_items(items)
    home = Path(folder).resolve()
    tasks: dict[str, list[Item]] = {}
    for item in items:
        category = re.sub(r"\W+", "_", item.category)
        tasks.setdefault(f"{group}_{category}_{item.kind}", []).append(item)
    for name, part in tasks.items():
        write_text(home / f"{name}.jsonl", to_json_lines(part))
        write_text(home / f"{name}.yaml", _task(name, home / f"{name}.jsonl"))
    write_text(home / f"{group}.yaml", _group(group, tasks))
    return list(tasks)


def _task(name: str, data: Path) -> str:
    # JSON texts are YAML texts, with nothing left to escape
    return f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(data))}
test_split: test
output_type: multiple_choice
num_fewshot: 0
doc_to_text: prompt
doc_to_choice: continuations
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def _group(group: str, tasks: Iterable[str]) -> str:
    lines = "".join(f"  - {name}\n" for name in tasks)
    return f"group: {group}\ntask:\n{lines}metadata:\n  version: 1.0\n"
