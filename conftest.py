"""Tests that need a model or data which is fetched are skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import functools

import pytest


@functools.lru_cache
def missing(kind: str, name: str) -> str:
    """Why a model or a data set cannot be had here; nothing where it can (it is fetched if need be)."""
    try:
        from looseleaf_lab import data, models
        from looseleaf_lab.cache import FetchError
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    try:
        models.resolve(name) if kind == "model" else data.get(name)
    except (models.MissingModelError, data.MissingDataError, FetchError) as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [("model", "smollm2") for _ in item.iter_markers("smollm2")]
    wanted += [("data", name) for mark in item.iter_markers("data") for name in mark.args]
    for kind, name in wanted:
        if why := missing(kind, name):
            pytest.skip(why)
