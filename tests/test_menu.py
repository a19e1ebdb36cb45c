"""The menu: the same commands, chosen from a list, in a terminal and with buttons."""

import io
import sys

import pytest

from kimi_nb.cli import build_parser, main
from kimi_nb.config import KimiError
from kimi_nb.lab import MENU, MenuView, command_of, possible_answers, talk
from kimi_nb.study import Store


def talked(said, status=0):
    """What the menu ran when these answers were given, and its exit status."""
    ran, lines = [], iter(said)

    def read(question):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return talk(lambda words: ran.append(words) or status, "there", read), ran


@pytest.mark.parametrize("choice", MENU, ids=lambda choice: choice.title)
def test_every_choice_is_a_command_that_there_is(choice):
    answers = {}
    for question in choice.asks:
        answers[question] = possible_answers(question, answers)[0]
    args = build_parser().parse_args(command_of(choice, answers, "somewhere"))
    assert args.results == "somewhere" and (args.command or "") == (choice.words or ("",))[0]
    assert args.command is None or callable(args.function)


def test_answers_are_numbers_names_beginnings_or_what_is_usual(capsys):
    titles = [choice.title for choice in MENU]
    for said in ("3", titles[2], "run a pre"):
        assert talked([said, "", "norm", "q"]) == (0, [["--results", "there", "run", "norm", "--profile", "quick"]])
    assert talked(["establish baselines", "smoke"])[1] == [
        ["--results", "there", "plan", "--only", "baseline", "--profile", "smoke"]
    ]
    assert talked(["report", "9", "run", "", "q"]) == (0, [])  # unknown, or the beginning of several: asked again
    assert talked(["1", "generate"], status=3) == (3, [["--results", "there"], ["--results", "there", "report"]])
    assert "$ kimi-nb --results there report" in capsys.readouterr().out


def test_the_command_shows_what_is_there_and_comes_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\ngenerate the report\nq\n"))
    assert main(["--results", str(tmp_path), "menu"]) in (0, 1, 2)
    out = capsys.readouterr().out
    assert out.count("establish baselines") == 3 and f"$ kimi-nb --results {tmp_path}\n" in out


def test_what_nobody_declares_is_refused():
    with pytest.raises(KimiError, match="study 'nrom' is unknown: did you mean norm"):
        command_of(MENU[2], dict(profile="quick", study="nrom"))


def test_a_button_starts_the_command_apart_and_shows_what_it_says(tmp_path):
    view = MenuView(Store(tmp_path), "smoke")
    view.profile.value = "quick"
    assert "norm" in view.study.options
    words = view.choose(MENU[0])
    with pytest.raises(KimiError, match="is running"):
        view.choose(MENU[0])
    view.apart._child.wait(120)
    view.look()
    assert words == ["--results", str(tmp_path.resolve())] and "kimi-nb" in view.said.value
    assert "ended" in view.said.value and "<pre" in view.said.value
