"""One stand-in for the Hub, and one process that carries out command lines, for all tests of a worker."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, serving
from hub_runs import dataset, model, shelling


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _healthy(hub: Hub) -> Iterator[None]:
    hub.faults.clear()
    hub.requests.clear()
    yield
    hub.faults.clear()


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def shell(hub: Hub, home: Path) -> Iterator[Callable[..., list]]:
    with shelling(hub.url, home) as call:
        yield call


@pytest.fixture
def names(hub: Hub, request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model and a dataset that no other test has in its cache."""
    own = re.sub("[^a-z]+", "-", request.node.name)[-60:].strip("-")
    model(hub, f"models/{own}")
    dataset(hub, f"rows/{own}")
    return f"models/{own}", f"rows/{own}"
