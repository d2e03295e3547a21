"""Where strategies come from, and one line for what is wrong with one."""

import hashlib
import json
import math
import os
from importlib.metadata import EntryPoint

import pytest

from sinkbench.errors import UserError
from sinkbench.results.files import json_text
from sinkbench.strategies import Eviction, LayerSizes, choose, find, registry
from sinkbench.strategies.pyramid import budgets
from sinkbench.strategies.registry import BUILTIN, parse_settings

SOURCE = '''
from sinkbench.strategies import Strategy, Policy

class LastHalf(Strategy):
    """Half of the window."""

    share: int = 2

    def policy(self, window, layer=0, layers=1):
        return Policy(window // self.share)

class NoStrategy:
    pass
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_class_in_a_file_is_named_by_path_and_class(file):
    chosen = choose(f"{file}:LastHalf", 16, parameters={"share": 4})
    assert (chosen.name, chosen.plan([LayerSizes("full", 1, 8)]).window) == ("last_half", 4)
    assert chosen.found.sha256


def test_an_edited_source_is_another_strategy(file):
    before = choose(f"{file}:LastHalf", 16).identity
    file.write_text(SOURCE.replace("Half of", "A part of"))
    assert choose(f"{file}:LastHalf", 16).identity != before


HELPED = SOURCE.replace(
    "from sinkbench", "import sys\nsys.path.insert(0, __file__.rpartition('/')[0])\n\nfrom sinkbench", 1
)


@pytest.mark.parametrize(
    ("line", "helper"),
    [
        ("import helper_a", "helper_a.py"),
        ("        from helper_b.inner import SHARE", "helper_b/inner.py"),  # when it is asked, not when it is read
        ("import helper_c", "helper_d.py"),  # which helper_c imports
        ("from helper_e import base", "helper_e/base.py"),
    ],
)
def test_so_is_one_whose_modules_were_edited(line, helper, tmp_path):
    keys = []
    for share in (2, 3):
        folder = tmp_path / str(share)
        (folder / helper).parent.mkdir(parents=True)
        (folder / "helper_c.py").write_text("import helper_d\n")
        (folder / helper).write_text(f"SHARE = {share}\n")
        before, within, after = HELPED.partition("        return Policy")
        lazy = line.startswith(" ")
        (folder / "mine.py").write_text(f"{before}{line}\n{within}{after}" if lazy else f"{HELPED}\n{line}\n")
        keys.append(key_in_a_process(folder / "mine.py", tmp_path / "key"))
    assert keys[0] != keys[1]


def key_in_a_process(file, answer):
    child = os.fork()
    if not child:
        answer.write_text(str(choose(f"{file}:LastHalf", 16).found.sha256))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return answer.read_text()


def test_two_classes_of_one_file_are_two_strategies(file):
    file.write_text(SOURCE + "\nclass Last_Half(LastHalf):\n    pass\n")
    first, second = choose(f"{file}:LastHalf", 16), choose(f"{file}:Last_Half", 16)
    assert first.name == second.name
    assert first.identity != second.identity


def test_parameters_that_are_no_numbers_differ_on_record_too(file):
    file.write_text(SOURCE.replace("share: int = 2", "share: int = 2\n    fade: float = 1.0"))
    values = [math.inf, -math.inf, math.nan, 1.0]
    found = [choose(f"{file}:LastHalf", 16, parameters={"fade": value}).identity for value in values]
    assert len({json_text(identity) for identity in found}) == 4
    assert [json.loads(json_text(identity)) for identity in found] == found


def test_modules_that_are_installed_do_not_count(file):
    before = choose(f"{file}:LastHalf", 16).found.sha256
    assert before == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text("import json\nimport torch\n" + SOURCE)
    assert choose(f"{file}:LastHalf", 16).found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_window_counts_where_a_layer_may_make_anything_of_it(tmp_path):
    path = tmp_path / "layered.py"
    path.write_text(SOURCE.replace("window // self.share", "window if layer else 8"))
    assert choose(f"{path}:LastHalf", 16).identity != choose(f"{path}:LastHalf", 32).identity


def test_an_entry_point_is_named_by_its_name(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    point = EntryPoint("half", "mine:LastHalf", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    assert choose("half", 16).plan([LayerSizes("full", 1, 8)]).window == 8
    assert "half" in [found.name for found in registry.available()]


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        ("windwed", "did you mean windowed?"),
        ("{file}:Nothing", "has no class 'Nothing'"),
        ("{file}:NoStrategy", "is no strategy"),
        ("nowhere/mine.py:LastHalf", "cannot be read: No such file"),
        ("{broken}:X", "cannot be imported: ZeroDivisionError: division by zero"),
        ("{folder}.py:X", "cannot be read"),
        ("", "is no strategy"),
    ],
)
def test_what_cannot_be_found_is_one_line(experiment, said, file, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "folder.py").mkdir()
    names = {"file": file, "broken": tmp_path / "broken.py", "folder": tmp_path / "folder"}
    with pytest.raises(UserError) as error:
        find(experiment.format(**names))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("experiment", "parameters", "said"),
    [
        ("random", {"seeds": 1}, "random has no parameter 'seeds'; did you mean seed?"),
        ("windowed", {"seed": 1}, "windowed has no parameter 'seed'; it has none"),
        ("random", {"seed": -1}, "--set seed: must be an integer of at least 0 (got -1)"),
        ("random", {"seed": 1.5}, "--set seed: must be an integer of at least 0 (got 1.5)"),
        ("pyramid", {"beta": 0}, "--set beta: "),
        ("h2o", {"recent": 12, "sinks": 4}, "must be larger than the 4 sinks and the 12 recent tokens"),
        ("attention_sinks", {"sinks": 16}, "must be larger than the 16 attention sinks"),
    ],
)
def test_parameters_that_cannot_be_are_one_line(experiment, parameters, said):
    with pytest.raises(UserError) as error:
        choose(experiment, 16, parameters=parameters)
    assert said in str(error.value)


def test_the_sink_option_sets_the_sinks_of_those_that_have_them_and_defaults_are_their_own():
    assert choose("h2o", 64).strategy.sinks == 0
    assert choose("attention_sinks", 64).strategy.sinks == 4
    assert choose("h2o", 64, sinks=3).strategy.sinks == 3
    assert choose("windowed", 64, sinks=3).strategy.model_dump() == {}
    with pytest.raises(UserError, match="exclude each other"):
        choose("h2o", 64, sinks=3, parameters={"sinks": 2})


def test_settings_are_read_as_toml_where_they_are_such():
    assert parse_settings(["a=1", "b=0.5", "c=true", "d=word", "e-f = 'x'"]) == {
        **{"a": 1, "b": 0.5, "c": True, "d": "word"},
        "e_f": "x",
    }
    for wrong in ("a", "=1", "1=2"):
        with pytest.raises(UserError, match="name=value"):
            parse_settings([wrong])


@pytest.mark.parametrize("window", [7, 64, 1024])
@pytest.mark.parametrize("layers", [1, 2, 3, 30, 32])
@pytest.mark.parametrize("beta", [1, 2, 20])
def test_the_budgets_of_a_pyramid_sum_up_and_lie_on_a_line(window, layers, beta):
    found = budgets(window, beta, layers)
    assert sum(found) == window * layers
    assert found == sorted(found, reverse=True)
    if layers > 1:
        top, bottom = window / beta, 2 * window - window / beta
        line = [bottom + (top - bottom) * i / (layers - 1) for i in range(layers)]
        assert all(abs(budget - exact) <= 1 for budget, exact in zip(found, line, strict=True))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_strategy_says_in_a_sentence_what_it_keeps(name):
    sentence = registry.sentence(find(name).kind) if hasattr(registry, "sentence") else find(name).kind.__doc__
    assert sentence.strip().split("\n")[0].endswith(".")


def test_a_stranger_needs_few_lines():
    import inspect

    from sinkbench.strategies import h2o, knorm, random, tova

    for module, most in ((tova, 25), (h2o, 40), (random, 20), (knorm, 20)):
        assert len(inspect.getsource(module).splitlines()) <= most
    assert issubclass(h2o.H2O, Eviction)


def test_a_model_that_keeps_no_keys_and_values_has_nothing_to_cut():
    state = LayerSizes("state", 2, 16)
    with pytest.raises(UserError, match="no layer of this model keeps keys and values"):
        choose("windowed", 8).plan([state, state])
