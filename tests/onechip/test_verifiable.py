"""verifiable: what a grade pays for, that nothing held out is trained on, problems from the Hub."""

import re

import pytest

from onechip.errors import UserError
from onechip.verifiable import (
    RULES,
    Problem,
    ProblemSet,
    by_places,
    draw_problem,
    equals,
    is_for_questions,
    open_problems,
)


@pytest.mark.parametrize("name", RULES)
def test_no_problem_is_on_both_sides(name):
    """What 400 training problems are about and what 100 held-out ones are about have nothing in common; the same number
    is the same problem; both sides have many."""
    sides = [
        {p.about or p.prompt for p in (draw_problem(RULES[name], n, held) for n in range(count))}
        for held, count in ((False, 400), (True, 100))
    ]
    assert not sides[0] & sides[1] and len(sides[0]) > 250 and len(sides[1]) > 60
    assert draw_problem(RULES[name], 7).prompt == draw_problem(RULES[name], 7).prompt


def test_a_sum_in_other_words_is_on_the_same_side():
    one, other = Problem("What is 1 + 2?", None, "1 + 2"), Problem("1 + 2 = ?", None, "1 + 2")
    assert is_for_questions(one) == is_for_questions(other)


def test_sums_are_graded_by_python():
    """Products before sums; the right number gets 1, also with blanks around it, its neighbour gets 0."""
    for number in range(60):
        problem = draw_problem(RULES["arithmetic"], number)
        assert re.fullmatch(r"\d+( [-+*] \d+){2,3}", problem.about) and problem.about in problem.prompt
        right = eval(problem.about)  # of the pattern above
        assert problem.grade(f" {right}") == 1 and problem.grade(str(right + 1)) == 0


def test_what_only_has_the_answer_in_it_is_not_paid():
    """Naming many numbers, the question with the answer, nothing: the ways to please a checker that looks anywhere."""
    grade = equals("42")
    assert [grade(said) for said in ("42", "41 42 43", "it is 42", "42 42", "")] == [1, 0, 0, 0, 0]


def test_a_share_of_places_does_not_pay_for_more_words():
    grade = by_places(["1", "2", "3"])
    assert [grade(s) for s in ("1 2 3", "1 2", "1 3 2", "1 2 3 4 5 6", "3 2 1", "")] == [
        1,
        2 / 3,
        1 / 3,
        1 / 2,
        1 / 3,
        0,
    ]


def test_letters_and_order():
    """Held to a count and a sort of their own, from the prompt's words alone."""
    for number in range(30):
        problem = draw_problem(RULES["counting"], number)
        a, b, word = re.findall(r'"([a-z]+)"', problem.prompt)
        assert a != b and problem.grade(str(sum(letter in (a, b) for letter in word))) == 1
        problem = draw_problem(RULES["sorting"], number)
        numbers = sorted(map(int, re.findall(r"\d+", problem.prompt)))
        assert problem.grade(" ".join(map(str, numbers))) == 1
        problem = draw_problem(RULES["spelling"], number)
        assert problem.grade(" ".join(re.search('"(.*)"', problem.prompt)[1])) == 1


def test_several_kinds_come_in_turn_and_unknown_ones_are_refused():
    problem, commits = open_problems(["sorting", "spelling"])
    assert commits == {} and [problem(n).prompt.split()[0] for n in range(4)] == ["Sort:", "Spell"] * 2
    for names in (["sums"], []):
        with pytest.raises(UserError, match="problems=.*gsm8k, arithmetic"):
            open_problems(names)
    with pytest.raises(UserError, match="problems='one': made a thousand prompts"):
        one = ProblemSet("one", lambda rng: Problem("a", equals("a")))
        [draw_problem(one, 0, held_out) for held_out in (True, False)]
