"""No two runs look alike, however many there are, and a strategy keeps its colour."""

from hypothesis import given
from hypothesis import strategies as st

from sinkbench.results.looks import FREE, OWN, Look, looks_of

NAMES = st.text("abcdefgh_", min_size=1, max_size=6)


def test_four_strategies_have_colours_of_their_own_whatever_else_is_there():
    for others in ([], ["alpha"], [f"strategy{i}" for i in range(50)]):
        looks = looks_of({name: name for name in [*others, *OWN]})
        assert {name: looks[name].colour for name in OWN} == OWN
        assert all(not looks[name].marker for name in OWN)


def test_the_next_four_have_the_free_colours_in_the_order_of_their_names_and_further_ones_marks():
    names = [f"s{i}" for i in range(9)]
    looks = looks_of({name: name for name in [*reversed(names), *OWN]})
    assert [looks[name] for name in names[:4]] == [Look(colour) for colour in FREE]
    assert [looks[name].colour for name in names[4:8]] == list(OWN.values())
    assert len({looks[name].marker for name in names[4:]} - {""}) == 5


def test_a_colour_of_the_four_is_free_where_its_strategy_is_not_shown():
    names = [f"s{i}" for i in range(7)]
    looks = looks_of({name: name for name in [*names, "windowed"]})
    others = [colour for name, colour in OWN.items() if name != "windowed"]
    assert [looks[name] for name in names] == [Look(colour) for colour in (*FREE, *others)]


@given(st.dictionaries(NAMES, NAMES, max_size=60), st.lists(NAMES, max_size=40))
def test_no_two_runs_look_alike_and_all_of_a_strategy_have_its_colour(runs, elsewhere):
    looks = looks_of(runs, elsewhere)
    assert list(looks) == list(runs)
    assert len(set(looks.values())) == len(runs)
    for strategy in set(runs.values()):
        assert len({looks[name].colour for name in runs if runs[name] == strategy}) == 1


def test_hundreds_of_looks_are_different_in_matplotlib_and_in_text():
    looks = [Look("#000000", number) for number in range(300)]
    assert len({(look.marker, look.hollow) for look in looks}) == 300
    assert len({look.sign for look in looks}) == 300
    assert len({(look.symbol, look.dash) for look in looks[:17]}) == 17


@given(st.sets(NAMES, min_size=1, max_size=30), st.randoms())
def test_a_page_gives_a_strategy_one_look_in_all_its_sections(strategies, chance):
    listed = sorted(strategies)
    some = chance.sample(listed, chance.randint(1, len(listed)))
    whole = looks_of({name: name for name in listed})
    assert looks_of({name: name for name in some}, listed) == {name: whole[name] for name in some}
