"""What the pages say: links lead somewhere, options are the configuration's, commands and code run as written."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from golden import golden_options

from sinkbench.config import RunConfig, flag, options_of
from sinkbench.sweeps.experiment import read_experiments

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*/README.md"))]
DEMO = sorted((ROOT / "experiments" / "demo").glob("*.toml"))


def prose(page):
    """A page without its code, in which brackets are no links and `#` is no heading."""
    return re.sub(r"`[^`\n]*`", lambda code: "x" * len(code[0]), re.sub(r"```.*?```", "", page.read_text(), flags=re.S))


def anchors(page):
    """What GitHub makes of its headings; a second one of a name is `name-1`."""
    seen = Counter()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1


def broken(page):
    """Its links to files and headings that are not there, and references that nothing defines."""
    text = prose(page)
    defined = dict(re.findall(r"^\[([^\]]+)\]: *(\S+)", text, re.M))
    for name in re.findall(r"\]\[([^\]]+)\]", text):
        if name not in defined:
            yield f"[{name}]"
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *defined.values()]:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    found = list(broken(page))
    assert found == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n## One\n[a](page.md#a-b-c) [b](#one) [c](gone.md) ![d](e.png) [f](page.md#two) [g][g] [h][i]\n"
        "`[no](link)`\n```\n# Two\n[no](link)\n```\n[g]: gone.txt\n"
    )
    assert sorted(broken(page)) == ["[i]", "e.png", "gone.md", "gone.txt", "page.md#two"]


def test_the_index_names_every_page():
    named = set(re.findall(r"\]\(([\w.]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def default_of(name, option):
    value = RunConfig.model_fields[name].get_default(call_default_factory=True)
    if option.default or value is None:
        return option.default or "none"
    return str(value) if not isinstance(value, bool) else "on" if value else "off"


def test_the_page_of_options_says_what_the_configuration_declares():
    lines = [line for line in (ROOT / "docs" / "options.md").read_text().splitlines() if line.startswith("| `--")]
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][0] == "--config"
    declared = {
        flag(name) + (f", --no-{flag(name)[2:]}" if option.off else ""): [
            default_of(name, option),
            option.help.replace("`", ""),
        ]
        for name, option in options_of(RunConfig).items()
    }
    assert {name: rest for name, *rest in rows[1:]} == declared


def test_the_strategy_of_the_readme_runs_as_written(here, tmp_path, monkeypatch):
    section = README.read_text().partition("## A strategy of your own")[2]
    code, commands = re.findall(r"```(?:python|bash)\n(.*?)```", section, re.S)[:2]
    line = shlex.split(commands.splitlines()[0])
    assert len(code.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    shorter = ["--num-tokens", "96", "--window-size", "72"]
    status, _, error = here(*line[1:], *golden_options("llama"), *shorter)
    assert (status, error) == (0, "")
    (rows,) = Path("results").glob("heavy_hitters*.csv")
    assert len(pd.read_csv(rows)) == 96


def commands_of_demo():
    """The lines of `make demo`, as the Makefile has them."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    return [shlex.split(line)[1:] for line in recipe.splitlines()]


def test_the_demo_sweeps_each_of_its_files():
    swept = [line[1] for line in commands_of_demo() if line[0] == "sweep"]
    assert sorted(swept) == sorted(str(path.relative_to(ROOT)) for path in DEMO)
    assert {read_experiments(path).options.engine for path in DEMO} == {"parallel"}


@pytest.mark.heavy
@pytest.mark.timeout(900)  # twenty runs: a minute of one processor
def test_the_demo_runs_as_the_makefile_has_it_on_a_shorter_text(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in DEMO:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        smaller = {r"num_tokens = [\d_]+": "num_tokens = 160", "64, 128, 256": "40, 48, 64", "= 256": "= 64"}
        text = path.read_text()
        for pattern, value in smaller.items():
            text = re.sub(pattern, value, text)
        copy.write_text(text)
    printed = []
    for line in commands_of_demo():
        status, out, error = here(*line)
        assert status == 0, error
        printed.append(out)
    figures = {path.name for path in (tmp_path / "results").rglob("*.png")}
    assert figures == {"perplexity_vram.png", "recall.png", "frontier.png"}
    assert "On the frontier" in printed[-1]
