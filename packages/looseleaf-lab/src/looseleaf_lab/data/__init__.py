"""Real data that needs no network or comes through package clients; tasks made of it.

``rows(name)`` and ``pictures(name)`` give a set by its short name (``looseleaf data list`` shows them); ``prose``,
``sentences`` and ``task`` make text and tasks of what ships with Python and ``looseleaf-lab[data]``.
"""

from looseleaf_lab.data import made, seen, words
from looseleaf_lab.data.sets import (
    SETS,
    DataSet,
    MissingDataError,
    Pictures,
    find,
    get,
    key,
    pictures,
    register,
    rows,
    split,
    stand_in,
)
from looseleaf_lab.data.text import (
    PARTS,
    STYLES,
    Part,
    Prose,
    bos,
    check_task,
    classification_task,
    prose,
    prose_ids,
    same_as_nearest,
    sentences,
    task,
    tasks,
    token_ids,
)
