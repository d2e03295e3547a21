"""What is installed, what this machine has, what would run here, and the command that mends what is missing."""

import io
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlsplit

from sinkbench.errors import UserError
from sinkbench.models import embedded
from sinkbench.signals import check

OK, NOTE, MISSING = "ok", "note", "missing"
PATIENCE = 3.0  # seconds for the Hub
RUN, PLOT = "default run", "default plot"
DEFAULT_COMMANDS = {
    RUN: "sinkbench run --experiment attention_sinks",
    PLOT: "sinkbench plot --features perplexity vram",
}
MODULES = {RUN: ("sinkbench.runs.run", "datasets", "gguf"), PLOT: ("sinkbench.results.figures",)}
ROOM = 2 * 2**30  # bytes of memory and of disk that the default run is comfortable with
NEEDED = 2 * 2**20  # bytes that its rows and its record take, and the figure
GIB = 2**30
ABILITIES = "What would run"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        found: what was found.
        state: ``ok``, ``note`` (the default commands do without) or ``missing``.
        mend: a command, or a sentence, that would mend it.
    """

    what: str
    found: str
    state: str = OK
    mend: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks by section, and whether the two default commands would work."""

    sections: dict[str, list[Check]]

    @property
    def ready(self) -> bool:
        found = {check.what: check.state for check in self.sections[ABILITIES]}
        return all(found.get(command) == OK for command in DEFAULT_COMMANDS)

    @property
    def mends(self) -> list[str]:
        """What to do, each once, the necessary first."""
        found = [c for checks in self.sections.values() for c in checks if c.mend]
        return list(dict.fromkeys(c.mend for c in sorted(found, key=lambda c: c.state != MISSING) if c.mend))


def diagnose() -> Diagnosis:
    """Look at everything; nothing is changed, and the Hub is asked once, for three seconds at most."""
    looks = {
        "Packages": _packages,
        "Extras": _extras,
        "Devices": _devices,
        "Embedded": _embedded,
        "Hub": _hub,
        "Storage": _storage,
    }
    sections = {title: _guarded(title, look) for title, look in looks.items()}
    needed = [*sections["Embedded"], *sections["Storage"]]
    return Diagnosis({**sections, ABILITIES: _guarded(ABILITIES, lambda: _abilities(needed))})


def _guarded(title: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """The checks of one section, up to one that fails itself."""
    checks: list[Check] = []
    try:
        for found in look():
            check()
            checks.append(found)
    except Exception as error:
        checks.append(Check(title.lower(), f"cannot be said: {_reason(error)}", NOTE))
    return checks


def _packages() -> Iterator[Check]:
    old = sys.version_info < (3, 11)
    yield Check("Python", platform.python_version(), *((MISSING, "install Python 3.11 or newer") if old else ()))
    try:
        yield Check("sinkbench", version("sinkbench"))
        wanted = requires("sinkbench") or []
    except PackageNotFoundError:
        yield Check("sinkbench", "not installed", NOTE, "pip install .")
        return
    for name, found, fits, text in _requirements(wanted, ""):
        yield Check(name, found, *(() if fits else (MISSING, f"pip install '{text}'")))
    triton = _version("triton")
    found = triton or "none: kernels in Python, as without CUDA"
    yield Check("triton", found, *(() if triton or not _cuda() else (NOTE, "pip install triton")))


def _extras() -> Iterator[Check]:
    from importlib.metadata import metadata

    for extra in metadata("sinkbench").get_all("Provides-Extra") or []:
        parts = list(_requirements(requires("sinkbench") or [], extra))
        lacking = [name for name, _, fits, _ in parts if not fits]
        if lacking:
            yield Check(extra, f"without {', '.join(lacking)}", NOTE, f"pip install 'sinkbench[{extra}]'")
        else:
            yield Check(extra, ", ".join(f"{name} {found}" for name, found, _, _ in parts))


def _requirements(wanted: list[str], extra: str) -> Iterator[tuple[str, str, bool, str]]:
    """Name, version found, whether it fits, and the requirement itself, of an extra or of none."""
    from packaging.requirements import Requirement

    for line in wanted:
        requirement = Requirement(line)
        marker = requirement.marker
        if bool(extra) != (marker is not None and "extra" in str(marker)):
            continue
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        yield requirement.name, found or "not installed", fits, f"{requirement.name}{requirement.specifier}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> bool:
    try:
        import torch
    except Exception:
        return False
    return torch.cuda.is_available()


def _devices() -> Iterator[Check]:
    import psutil
    import torch

    build = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0] / GIB
        memory = f"{about.total_memory / GIB:.0f} GiB, {free:.0f} free"
        yield Check(f"cuda:{i}", f"{about.name}, {memory}, compute capability {about.major}.{about.minor}; {build}")
    if not torch.cuda.is_available():
        unused = shutil.which("nvidia-smi") is not None
        mend = "see https://pytorch.org/get-started for a build of torch for the driver of this GPU"
        yield Check("GPU", f"none that torch can use; {build}", NOTE, mend if unused else None)
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    threads = f"{torch.get_num_threads()} threads"
    low = memory.available < ROOM
    yield Check("memory", f"{found}; {threads}", *((NOTE, "close other programs: 2 GiB are wanted") if low else ()))


def _embedded() -> Iterator[Check]:
    for name, file, install in (
        (f"model {embedded.MODEL}", embedded.model_file, embedded.MODEL_INSTALL),
        (f"text {embedded.TEXT}", embedded.text_file, embedded.TEXT_INSTALL),
    ):
        try:
            path = file()
            if path.suffix == ".gguf" and _version("gguf"):
                from sinkbench.models.gguf import check_whole

                check_whole(path)
            yield Check(name, f"{path.stat().st_size / 2**20:.1f} MiB")
        except UserError as error:
            again = install.replace("install", "install --force-reinstall", 1)
            damaged = "not installed" not in str(error)
            yield Check(name, "damaged" if damaged else "not installed", MISSING, again if damaged else install)


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token, is_offline_mode

    host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
    if is_offline_mode():
        yield Check(
            "reachable", "not asked: HF_HUB_OFFLINE is set, only the cache is used", NOTE, "unset HF_HUB_OFFLINE"
        )
    elif _answers(constants.ENDPOINT):
        yield Check("reachable", f"{host} answers")
    else:
        yield Check(
            "reachable", f"no answer from {host}", NOTE, "check the network and HF_ENDPOINT (for Hub models only)"
        )
    if get_token():
        yield Check("token", "present")
    else:
        yield Check("token", "none: gated models are out of reach", NOTE, "hf auth login")


def _answers(endpoint: str) -> bool:
    """Whether a server answers within :data:`PATIENCE`, the look-up of its name included."""
    import httpx

    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(httpx.head(endpoint, timeout=PATIENCE).status_code)
        except Exception:  # whatever it is, it is no answer
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers) and answers[0] < 500


def _storage() -> Iterator[Check]:
    from sinkbench.models.gguf import cache_folder

    yield _folder("cache", cache_folder(), NOTE, "SINKBENCH_CACHE")
    from huggingface_hub import constants

    yield _folder("Hub cache", Path(constants.HF_HUB_CACHE), NOTE, "HF_HOME")
    yield _folder("results", Path("results").absolute(), MISSING, "--output-dir")


def _folder(what: str, path: Path, state: str, elsewhere: str) -> Check:
    """Whether a folder, or the one it would be made in, can be written, and the room there."""
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            room = shutil.disk_usage(there).free
    except OSError as error:
        found = f"{path} cannot be written: {error.strerror}"
        return Check(what, found, state, f"give another folder for {what}: {elsewhere}")
    mend = () if room >= ROOM else (state if room < NEEDED else NOTE, f"make room in {there}")
    return Check(what, f"{path}, {room / GIB:.1f} GiB free", *mend)


def _abilities(needed: list[Check]) -> Iterator[Check]:
    for what, command in DEFAULT_COMMANDS.items():
        lacking = next((reason for module in MODULES[what] if (reason := _unimportable(module))), None)
        if what == RUN and lacking is None:
            lacking = next((f"{part.what}: {part.found}" for part in needed if part.state == MISSING), None)
        yield Check(what, f"no: {lacking}" if lacking else f"yes: {command}", MISSING if lacking else OK)
    import torch

    cuda = torch.cuda.is_available()
    yield Check("CUDA graphs", "yes" if cuda else "no: they need a CUDA device", OK if cuda else NOTE)
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    slow = "yes, without hardware for it: slow" if cuda else "yes, on the CPU"
    yield Check("bfloat16", "yes" if fast else slow, OK if fast else NOTE)
    bits = _unimportable("bitsandbytes")
    yield Check("4-bit weights", f"no: {bits}" if bits else "yes", NOTE if bits else OK)


def _unimportable(module: str) -> str | None:
    """Why a module cannot be imported; ``None`` where it can."""
    try:
        with redirect_stderr(io.StringIO()):  # what a library has to say of itself is not for the table
            import_module(module)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
