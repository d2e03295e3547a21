"""``sinkbench.run``: one strategy over one stream."""

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbench.config import RunConfig
from sinkbench.library.asking import asked, described, signature
from sinkbench.signals import handed_on

if TYPE_CHECKING:
    from sinkbench.results.run import Run


def run(*, tokenizer: Any = None, config: str | Path | None = None, progress: bool = False, **options: Any) -> "Run":
    """As ``sinkbench run``, whose options are the keywords, with its defaults.

    A signal closes the files, so that all complete rows are kept, and is then handed on: Ctrl-C raises
    ``KeyboardInterrupt``, and ``resume=True`` goes on where the run was cut.

    Args:
        {options}
        name: What its files are called; by default as the strategy, and what differs from its defaults.
        tokenizer: a tokenizer of transformers, or a name; by default that of the model.
        config: a TOML file of options, for all that the call does not say.
        progress: whether to show it, on standard error.

    ``model_name_or_path`` may be a model of transformers, ``experiment`` a strategy or its class, and ``dataset_name``
    a list of texts or of token ids, a tensor of those, or a ``datasets.Dataset``.

    Returns:
        The run, as :func:`sinkbench.read` reads it: its rows as a frame, and its record. Running out of memory is a
        result too, as ``exit_reason`` says.

    Raises:
        UserError: whatever can be mended, in the sentence of the command line.
    """
    wanted = asked(options, tokenizer, config)
    return handed_on(lambda: _carried_out(wanted, progress))


def _carried_out(wanted: RunConfig, shown: bool) -> "Run":
    from sinkbench.library.progress import Lines, Progress
    from sinkbench.models.given import as_loaded
    from sinkbench.results.reading import run_at
    from sinkbench.runs import run as runs  # torch and transformers take seconds to import

    with as_loaded(wanted.objects.model):
        if shown:
            with (Progress if sys.stderr.isatty() else Lines)(wanted) as progress:
                result = runs.run(wanted, progress.watch, note=progress.note)
        else:
            result = runs.run(wanted)
    return run_at(result.csv)


_own = [p for p in inspect.signature(run).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
run.__signature__ = signature(RunConfig, _own)  # type: ignore[attr-defined] # what help and notebooks show
run.__doc__ = (run.__doc__ or "").replace("{options}", described(RunConfig))
