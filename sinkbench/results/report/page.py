"""The report as one HTML file that needs nothing else."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sinkbench.results.report.sections import Report


def html(report: Report) -> str:
    """``report`` as a page.

    Names come from files that others may have written, so they are text twice over: the template escapes them, and
    the page's policy runs no script but its own two, whose hashes it names, and loads nothing from anywhere.
    """
    environment = Environment(
        loader=PackageLoader("sinkbench.results.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), _asset("page.js")]
    return environment.get_template("page.html").render(
        report=report,
        policy=_policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup(_asset("page.css")),
        inert=inert,
    )


@cache
def _asset(name: str) -> str:
    return files("sinkbench.results.report").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    """A Content-Security-Policy by which ``scripts`` run and nothing is fetched."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def inert(json: str) -> Markup:
    """JSON for a ``<script>`` that it cannot close."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return Markup(json)
