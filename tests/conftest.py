"""Fixtures for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# CI judges a change, not its luck: there, the same examples each time; at home, new ones
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
# Small matrices: threads would only wait for each other, and for the other worker. Before torch is imported anywhere,
# and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests leave the user's own cache alone.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Python's own, whatever a test before or the shell that started pytest has left: a second one must not end the
    process that runs the tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def material() -> Callable[[str], Path]:
    """`material("alpaca/alpaca_5000.json")`: a path of the real material, or the test is skipped."""
    root = Path(os.environ.get("LITLORA_MATERIAL") or Path(__file__).parents[2] / "shared" / "material")

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real material is absent: {name} (looked in $LITLORA_MATERIAL or ../shared/material)")
        return path

    return find


@pytest.fixture
def smollm2() -> Path:
    """SmolLM2-135M's directory, from $LITLORA_SMOLLM2, or the test is skipped."""
    directory = os.environ.get("LITLORA_SMOLLM2")
    if not directory or not Path(directory).is_dir():
        pytest.skip("SmolLM2-135M is absent: set LITLORA_SMOLLM2 to its directory")
    return Path(directory)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITLORA_CACHE", str(tmp_path_factory.getbasetemp() / "litlora-cache"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`bases("qwen3")`: a random checkpoint of a family, made once. Not to be changed."""
    from tiny_models import make_family

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp("base") / family, family)
        return made[family]

    return get
