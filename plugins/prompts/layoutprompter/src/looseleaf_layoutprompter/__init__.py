"""LayoutPrompter: layouts from types, sizes, relations, a partial or noisy layout, saliency or text."""

from looseleaf_layoutprompter.answers import Parsed, layout_schema, parse
from looseleaf_layoutprompter.layout import CANVASES, Canvas, Layout, draw, saliency_boxes
from looseleaf_layoutprompter.optimizer import (
    GeneratedLayout,
    LayoutPrompt,
    LayoutPrompter,
    layout_task,
    rank,
    select,
)
from looseleaf_layoutprompter.serializer import LayoutSerializer, layout_example

__version__ = "0.1.0"
__all__ = ["CANVASES", "Canvas", "GeneratedLayout", "Layout", "LayoutPrompt", "LayoutPrompter",
           "LayoutSerializer", "Parsed", "__version__", "draw", "layout_example", "layout_schema", "layout_task",
           "parse", "rank", "saliency_boxes", "select"]
