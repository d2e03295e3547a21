"""The Hub: which commit a name stands for, patience with a server that does not answer, its errors in one line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, is_offline_mode, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import _http

from sinkbench.errors import UserError

Kind = Literal["model", "dataset"]
REVISION_OPTION: dict[Kind, str] = {"model": "--revision", "dataset": "--dataset-revision"}


class Unreachable(Exception):
    """The Hub has given no answer, or only server errors, for as long as it is waited for.

    Attributes:
        status: of the last server error; ``None`` for silence.
    """

    def __init__(self, status: int | None = None) -> None:
        super().__init__(f"status {status}" if status else "no answer")
        self.status = status


@dataclass(frozen=True)
class Pinned:
    """What a name and a revision stand for at this moment.

    Attributes:
        commit: the full commit id.
        files: paths in the repository; empty where the Hub was not asked.
        reachable: whether the Hub answered; otherwise the commit is what the cache remembers.
    """

    commit: str
    files: tuple[str, ...]
    reachable: bool


def pin(kind: Kind, name: str, revision: str | None) -> Pinned:
    """Ask the Hub, or the cache where the Hub is out of reach, for the commit of ``revision`` (``main`` by default).

    Raises:
        UserError: there is no such repository or revision, no access to it, or no answer and nothing in the cache.
    """
    wanted, api = revision or constants.DEFAULT_REVISION, HfApi()
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        raise UserError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address: it begins with https://")
    try:
        with patient():
            files = None if is_offline_mode() else _files(api, kind, name, wanted)
            reachable = files is not None
            commit = api.resolve_revision(name, repo_type=kind, revision=wanted, local_files_only=not reachable)
    except HFValidationError as error:
        raise UserError(f"no {kind} {name!r}: neither a local path nor a Hub id like owner/name") from error
    except Exception as error:
        raise UserError(explain(error, kind, name, wanted) or f"cannot ask the Hub for {name!r}: {error}") from error
    return Pinned(commit.resolved, files or (), reachable)


def _files(api: HfApi, kind: Kind, name: str, revision: str) -> tuple[str, ...] | None:
    """The paths in a repository; ``None`` when the Hub is out of reach, tried twice."""
    for last in (False, True):
        try:
            info = api.repo_info(name, repo_type=kind, revision=revision)
            return tuple(sibling.rfilename for sibling in info.siblings or ())
        except (httpx.TransportError, Unreachable, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            if last and not _remembered(api, kind, name, revision):
                raise
            time.sleep(0 if last else 1)
    return None


def _remembered(api: HfApi, kind: Kind, name: str, revision: str) -> bool:
    try:
        return bool(api.resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True))
    except RevisionResolutionError:
        return False


@contextmanager
def patient() -> Iterator[None]:
    """Within this context a Hub that does not answer is given up after two timeouts, with :class:`Unreachable`.

    The libraries' own retries would go on for minutes to half an hour. A timeout is ``$HF_HUB_ETAG_TIMEOUT`` or
    ``$HF_HUB_DOWNLOAD_TIMEOUT``, 10 seconds unless set.
    """
    before = _http._GLOBAL_CLIENT_FACTORY
    failing_since: dict[str, float] = {}

    def factory() -> httpx.Client:
        client = before()
        client.send = partial(_send, client.send, failing_since)  # type: ignore[method-assign] # a client of our own
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)


def _send(
    send: Callable[..., httpx.Response], failing_since: dict[str, float], request: httpx.Request, **kwargs: Any
) -> httpx.Response:
    """Send a request; ``failing_since`` holds when hosts that give no good answer first gave none."""
    longest = constants.HF_HUB_ETAG_TIMEOUT if request.method == "HEAD" else constants.HF_HUB_DOWNLOAD_TIMEOUT
    given = request.extensions.get("timeout", {})
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: min(given.get(phase) or longest, longest) for phase in phases}
    host = request.url.host
    try:
        response = send(request, **kwargs)
    except httpx.TransportError as error:
        if _failing(host, failing_since) >= longest:
            raise Unreachable from error
        raise
    if response.status_code < 500:
        failing_since.pop(host, None)
    elif _failing(host, failing_since) >= longest:
        raise Unreachable(response.status_code)
    return response


def _failing(host: str, failing_since: dict[str, float]) -> float:
    """Seconds since the first failure in a row."""
    now = time.monotonic()
    return now - failing_since.setdefault(host, now)


def explain(error: BaseException, kind: Kind, name: str, revision: str | None = None) -> str | None:
    """One line for a failure of the Hub anywhere in the chain of ``error``; ``None`` where the Hub is not at fault."""
    lines = (_line(link, kind, name, revision or constants.DEFAULT_REVISION) for link in _chain(error))
    return next((line for line in lines if line), None)


def gated(kind: Kind, name: str) -> str:
    """What to do about a gated repository."""
    return f"the {kind} {name!r} is gated: ask for access on its Hub page, then `hf auth login`"


def _line(error: BaseException, kind: Kind, name: str, revision: str) -> str | None:  # noqa: PLR0911
    where = f"the Hub ({urlsplit(constants.ENDPOINT).netloc})"
    the = f"the {kind} {name!r}"
    if isinstance(error, GatedRepoError):
        return gated(kind, name)
    if isinstance(error, RevisionNotFoundError):
        return f"{the} has no revision {revision!r}: give a branch, tag or commit with {REVISION_OPTION[kind]}"
    if isinstance(error, RepositoryNotFoundError):
        return f"no {kind} {name!r} on {where}: check the name; if it is private, ask for access, then `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled) or (is_offline_mode() and isinstance(error, RevisionResolutionError)):
        return f"{the} at {revision!r} is not in the cache and HF_HUB_OFFLINE is set: unset it, or download it first"
    if isinstance(error, HfHubHTTPError):
        return _status(error.response.status_code, the, where)
    if isinstance(error, Unreachable) and error.status:
        return _status(error.status, the, where)
    if isinstance(error, httpx.ConnectError | httpx.TimeoutException | httpx.ProxyError | Unreachable):
        return f"no answer from {where}, asked for {the}: check the network and HF_ENDPOINT, or try again later"
    if isinstance(error, httpx.TransportError):
        return f"the connection to {where} broke off while it sent {the}: try again"
    return None


def _status(status: int, the: str, where: str) -> str | None:
    if status in (401, 403):
        return f"no access to {the} ({status}): ask for access on its Hub page, then `hf auth login` with that account"
    if status == 429:
        return f"{where} refuses further requests for {the} (429): `hf auth login` or try again later"
    if status >= 500:
        return f"{where} failed ({status}) when asked for {the}: try again later"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
