"""Every mutant's place and tests are there, so that the list of mutants stays true while code moves."""

import ast
from collections import Counter
from functools import cache

import pytest

from tests.mutants import MUTANTS, ROOT, planted


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.means)
def test_a_mutant_can_be_planted_in_one_place_and_has_tests(mutant):
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    wrong = planted(mutant, text)
    assert wrong != text
    compile(wrong, str(mutant.path), "exec")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in names_in(file), test


def test_no_two_mutants_have_one_description():
    assert not [means for means, count in Counter(mutant.means for mutant in MUTANTS).items() if count > 1]


def test_a_place_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="expected the text of .* once, found it 0 times"):
        planted(MUTANTS[0], "another text")
    with pytest.raises(ValueError, match="found it 2 times"):
        planted(MUTANTS[0], 2 * MUTANTS[0].old)
