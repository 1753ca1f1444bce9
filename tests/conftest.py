"""What every test may ask for: one saved model and one text, and threads that do not spin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import warm_python

# Before any test imports torch. Two workers share two cores: threads that spin while they wait take them from each
# other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure(config: pytest.Config) -> None:
    # The workers, and the pytests that tests start, use the server of the first.
    if warm_python.ADDRESS not in os.environ:
        server = ExitStack()
        server.enter_context(warm_python.server())
        config.add_cleanup(server.close)


@pytest.fixture(scope="session", autouse=True)
def random_weights_are_no_fault(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models have random weights: their runs go on, though they are no better than guessing."""
    with pytest.MonkeyPatch.context() as patch:
        if any("kernels" not in item.path.parts for item in request.session.items):
            patch.setattr("fbn_prune.runs.stages.GUESSING", float("inf"))
        yield


@pytest.fixture(scope="session", autouse=True)
def figures_are_data(request: pytest.FixtureRequest) -> Iterator[None]:
    with ExitStack() as stack:
        if any("kernels" not in item.path.parts for item in request.session.items):
            from figures_as_data import not_drawn

            stack.enter_context(not_drawn())
        yield


@pytest.fixture(scope="session", autouse=True)
def the_machine_is_described_once() -> Iterator[None]:
    """The harness asks programs, pip among them, to describe the machine in every evaluation."""
    from torch.utils import collect_env

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_env_info", cache(collect_env.get_env_info))
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Figures are drawn, as users get them."""
    import figures_as_data

    with figures_as_data.drawn():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama to read; a test that changes it works on a copy."""
    from tiny_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some 14,000 tokens to read."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"{i} apples cost {i * 3} pence, and {i % 7} pears. " for i in range(400))
    )
    return path
