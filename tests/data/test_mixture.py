"""A mixture deals out its members' pairs by their weights, all items once before any again, from any place."""

from collections import Counter

import yaml

from tests.data.test_loader import Toy, assert_same, first, reader  # noqa: F401
from tests.data.test_sources import error_of
from tinyclip.data.loader import PairLoader
from tinyclip.data.mixture import Mixture
from tinyclip.data.sources import left_out, open_source
from tinyclip.data.spec import DataSpec


class Named(Toy):
    def __init__(self, name, size):
        super().__init__(size)
        self.name = name

    def key(self, index):
        return f"{self.name} {index}"


def mixed(*weights, sizes=(30, 500, 70)):
    return Mixture([Named(name, size) for name, size in zip("abc", sizes, strict=False)], weights)


def dealt(mixture, start, stop):
    """(member, item, visit) at positions counted over all epochs."""
    found = []
    for position in range(start, stop):
        epoch, place = divmod(position, len(mixture))
        [(index, visit)] = mixture.visits(7, epoch, place, place + 1)
        found.append((*mixture.key(index).split(), visit))
    return found


def test_shares_are_exact():
    mixture = mixed(2, 1, 1)
    assert len(mixture) == 600
    assert Counter(name for name, *_ in dealt(mixture, 0, 4000)) == {"1/a": 2000, "2/b": 1000, "3/c": 1000}
    thirds = Counter(name for name, *_ in dealt(mixed(1, 1, 1), 0, 5000))
    assert all(abs(count - 5000 / 3) < 1 for count in thirds.values())


def test_a_member_shows_all_its_items_once_before_it_shows_any_again():
    found = dealt(mixed(2, 1, 1), 0, 1200)
    for name, size in (("a", 30), ("b", 500), ("c", 70)):
        own = [(item, visit) for member, item, visit in found if member == name]
        for start in range(0, len(own), size):
            part = own[start : start + size]
            assert len({item for item, _ in part}) == len(part) and {visit for _, visit in part} == {start // size}


def test_slices_agree_with_single_positions():
    mixture = mixed(2, 1, 1)
    whole = mixture.visits(7, 1, 0, 600)
    assert [mixture.visits(7, 1, place, place + 1)[0] for place in range(600)] == whole
    assert mixture.visits(7, 1, 390, 410) == whole[390:410]  # over the end of block 0
    assert mixture.visits(8, 1, 0, 600) != whole


def test_items_are_those_of_the_members():
    mixture = mixed(1, 1, sizes=(3, 4))
    assert [mixture.key(index) for index in range(7)] == [
        *("1/a 0", "1/a 1", "1/a 2"),
        *("2/b 0", "2/b 1", "2/b 2", "2/b 3"),
    ]
    assert mixture.captions(4) == ("number 1",) and mixture.image(5).getpixel((0, 0)) == (2, 2, 2)


def test_specs_say_the_same_in_three_forms(tmp_path):
    members = [{"data": "scenes?split=train&count=30", "weight": 2}, {"data": "scenes?split=classes&count=20"}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"mixture": members}))
    forms = [
        DataSpec.parse({"mixture": members}),
        DataSpec.parse(str(tmp_path / "mix.yaml")),
        DataSpec.parse("mixture?2=scenes?split=train%26count=30&1=scenes?split=classes%26count=20"),
    ]
    forms += [DataSpec.parse(str(forms[0])), DataSpec.parse(forms[0].model_dump(mode="json"))]
    assert all(form == forms[0] for form in forms)
    source = open_source(forms[0])
    assert len(source) == 50 and source.name == "mixture of 0.667 scenes train, 0.333 scenes classes"
    assert source.label(0) is None and source.label(30) is not None and left_out(source) == {}


def test_wrong_mixtures_are_one_line(tmp_path):
    (tmp_path / "list.yaml").write_text("- scenes\n")
    (tmp_path / "broken.yaml").write_text("mixture: [\n")
    (tmp_path / "own.yaml").write_text(f"mixture: [data: {tmp_path}/own.yaml, data: scenes]\n")
    (tmp_path / "field.yaml").write_text(f"mixture: [data: {{path: {tmp_path}/field.yaml}}, data: scenes]\n")
    for spec, expected in {
        "mixture": "a mixture has members: mixture?WEIGHT=SPEC",
        "mixture?0=scenes": "weight: Input should be greater than 0",
        "mixture?two=scenes": "weight: Input should be a valid number",
        "mixture?1=scenes&1=mixture?1=scenes": "a mixture inside a mixture",
        "mixture?1=scenes&0.001=scenes": "scenes train has 0.100% of the weight, expected at least 0.2%",
        str(tmp_path / "list.yaml"): "expected mixture: and a list of data and weight",
        str(tmp_path / "broken.yaml"): "not YAML",
        str(tmp_path / "own.yaml"): "own.yaml: a mixture inside a mixture",
        str(tmp_path / "field.yaml"): "field.yaml: a mixture inside a mixture",
        "scenes?mixture=1": "key 'mixture'|mixture: Input should be",
    }.items():
        message = error_of(spec)
        assert any(part in message for part in expected.split("|")), message
    error_of(str(tmp_path / "no.yaml"), FileNotFoundError)


def test_batches_are_a_function_of_seed_and_step(reader):  # noqa: F811
    source = open_source("mixture?2=scenes?split=train%26count=10&1=scenes?split=classes%26count=6")
    settings = dict(source=source, readers=[reader], batch_size=4, seed=5)
    batches = first(PairLoader(**settings), 9)
    assert_same(first(PairLoader(**settings, workers=2), 9), batches)
    assert_same(first(PairLoader(**settings, start_step=5), 4), batches[5:])
