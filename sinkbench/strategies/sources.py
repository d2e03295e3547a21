"""The source of a strategy that is not built in, with that of the modules it imports: what decides what it does."""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple({Path(sysconfig.get_path(place)).resolve() for place in PLACES})
SITES = {"site-packages", "dist-packages"}
KNOWN = {*sys.stdlib_module_names, "sinkbench", "pydantic"}


def digest(source: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(source).hexdigest()


@lru_cache(maxsize=256)  # a process never imports a module twice, whatever becomes of its file
def digest_of(path: Path, source: bytes, kind: type) -> str:
    """SHA-256 over ``source``, the text of the file ``path``, and over all that it imports and that is not installed.

    Of ``kind``, a class in it, the package counts, and the modules of the classes that it is derived from, also where
    they are installed. What code reads by other means than ``import``, and which versions are installed, does not show.

    Raises:
        OSError: a module cannot be read.
    """
    own = {path.resolve()}
    files = (_imported(source, path.parent, own) | _of_classes(kind)) - own
    lines = sorted(f"{file.name} {digest(file.read_bytes())}\n" for file in files)
    return digest("".join([digest(source), "\n", *lines]).encode(errors="surrogateescape")) if lines else digest(source)


def source_digest(kind: type) -> str | None:
    """As :func:`digest_of`, of the file in which a class is written; ``None`` where there is none, as in a notebook."""
    try:
        inspect.findsource(kind)  # a module may have a file, and the class have come to it in another way
        file = inspect.getsourcefile(kind)
        return digest_of(Path(file), Path(file).read_bytes(), kind) if file else None
    except (TypeError, OSError):
        return None


def _of_classes(kind: type) -> set[Path]:
    """The files of the package of ``kind``, and of the modules of those that it is derived from."""
    own, dot, _ = kind.__module__.partition(".")
    found = _sources(sys.modules[own]) if dot else set()
    for each in inspect.getmro(kind)[1:]:
        module = sys.modules.get(each.__module__)
        if module is not None and each.__module__ != kind.__module__ and _top(each.__module__) not in KNOWN:
            found |= _file(module)
    return found


def _imported(source: bytes, folder: Path, known: set[Path]) -> set[Path]:
    """The files of all modules that ``source`` imports, and that these do, beside those that are ``known``."""
    found: set[Path] = set()
    for name in sorted(_names(source) - KNOWN):
        for file in _files(name, folder) - known - found:
            found |= {file} | _imported(file.read_bytes(), folder, known | found | {file})
    return found


def _names(source: bytes) -> set[str]:
    """The modules that ``source`` imports, anywhere in it, without their submodules."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # then it cannot be imported either
        return set()
    plain = {_top(alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        _top(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def _files(name: str, folder: Path) -> set[Path]:
    """The sources of a module: the one that was imported, or else the one that would be; none of one installed."""
    if name in sys.modules:
        return _sources(sys.modules[name], installed=False)
    beside = [folder / f"{name}.py"] if (folder / f"{name}.py").is_file() else list((folder / name).rglob("*.py"))
    if beside:
        return {file.resolve() for file in beside}
    with suppress(ImportError, ValueError, AttributeError):
        spec = find_spec(name)
        if spec is not None:
            return _below(spec.submodule_search_locations or (), spec.origin, installed=False)
    return set()


def _sources(module: ModuleType, installed: bool = True) -> set[Path]:
    """The files of a module, or of all modules of a package; none of one that is installed, unless it is to count."""
    return _below(getattr(module, "__path__", ()), getattr(module, "__file__", None), installed)


def _file(module: ModuleType) -> set[Path]:
    return _below((), getattr(module, "__file__", None), installed=True)


def _below(places: Iterable[str], file: str | None, installed: bool) -> set[Path]:
    folders = [Path(place).resolve() for place in places]
    found = [each for folder in folders if installed or not _installed(folder) for each in folder.rglob("*.py")]
    if not folders and file and file.endswith(".py"):
        found = [each for each in [Path(file).resolve()] if each.is_file() and (installed or not _installed(each))]
    return set(found)


def _installed(file: Path) -> bool:
    return any(file.is_relative_to(place) for place in INSTALLED) or not SITES.isdisjoint(file.parts)


def _top(name: str) -> str:
    return name.partition(".")[0]
