"""Pages and parts of pages that no notebook holds: the landing page, cards, figures to touch, the command line.

Everything is made from the published records, the notebooks and the parser when the site is built; what comes from a
record is escaped. HTML is put together from elements, Markdown only from words of the package itself.
"""

import argparse
import ast
import html
import json
import os
import re
import subprocess
from pathlib import Path

from markupsafe import Markup

from kimi_nb.lab import tag
from kimi_nb.report import CHAPTERS, LEVEL_NAMES, MARGIN, Advice, Evidence, advise, parts_seen
from kimi_nb.stats import in_two_words
from kimi_nb.study import Finding, metric_info

WORD_CLASS = {"yes": "yes", "no": "no"}  # answer -> class of its card; every other is `open`


def markdown_cell(name: str, source: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": str(source)}


def html_cell(name: str, source: Markup) -> dict:
    """A cell with raw HTML: one line, so that Markdown leaves it alone."""
    return markdown_cell(name, re.sub(r"\s*\n\s*", " ", str(source)))


# --- figures to touch ----------------------------------------------------------------------------------------------


def figure(data: dict, still: Markup | str = "") -> Markup:
    """A place that kimi_figures.js fills; `still` stands there without JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")
    script = Markup('<script type="application/json">{}</script>').format(Markup(text))
    return tag("div", script, tag("div", still, cls="knb-still") if still else None, cls="knb-figure")


def effects_data(sizes: dict[str, Evidence]) -> dict:
    """The effects of the parts at each published size: averaged over the others, and with each optimizer."""
    seen, metric = {name: parts_seen(evidence.store) for name, evidence in sizes.items()}, metric_info("test_bpb")
    levels = dict.fromkeys(level for parts in seen.values() for part in parts for level in part.inside)
    views = []
    for level in ("", *levels):
        found = []
        for name, parts in seen.items():
            effects = [_effect(part.inside.get(level, part.average)) for part in parts]
            found.append(dict(name=name, about=sizes[name].hardware, effects=effects))
        title = f"with {LEVEL_NAMES.get(level, level)}" if level else "averaged over the others"
        views.append(dict(name=title, sizes=found))
    names = [part.part for part in next(iter(seen.values()))]
    about = dict(label=metric.label, unit=metric.unit, better="lower", margin=MARGIN)
    return dict(kind="effects", parts=names, views=views) | about


def _effect(finding: Finding) -> dict | None:
    if finding.diff is None or finding.ci_low is None:
        return None
    numbers = [round(float(v), 6) for v in (finding.diff, finding.ci_low, finding.ci_high)]
    words = f"{in_two_words(finding)}, {finding.n} {finding.n_unit}"
    return dict(zip(("diff", "low", "high"), numbers, strict=True)) | dict(word=words)


def curves_data(evidence: Evidence, study: str, metric: str = "val_loss", most: int = 12) -> dict | None:
    """Mean, lowest and highest run of each arm over training; None where there is no such curve."""
    curves = evidence.store.curves(study)
    if metric not in curves or curves[metric].dropna().empty:
        return None
    about, blocks = metric_info(metric), []
    labels = {(arm.block, arm.name): arm.label or arm.name for arm in evidence.studies[study].arms}
    for block, part in curves.dropna(subset=[metric]).groupby("block", sort=False):
        arms = []
        for arm, mine in list(part.groupby("arm", sort=False))[:most]:
            at = mine.groupby("step")[metric].agg(["mean", "min", "max"])
            if len(at) > 1:
                kept = lambda column, at=at: [round(float(v), 4) for v in at[column]]
                steps = [int(step) for step in at.index]
                name = labels.get((block, arm), arm)
                arms.append(dict(name=name, step=steps, mean=kept("mean"), low=kept("min"), high=kept("max")))
        if arms:
            blocks.append(dict(name=block or "all runs", arms=arms))
    if not blocks:
        return None
    return dict(kind="curves", x="training step", y=f"{about.label} ({about.unit})", blocks=blocks)


# --- answers ---------------------------------------------------------------------------------------------------------


def advice_cards(advice: dict[str, list[Advice]]) -> Markup:
    """A card for each part: its answer at every size, why, and what else it changes."""
    parts = {}
    for size, answers in advice.items():
        for answer in answers:
            parts.setdefault(answer.part, []).append((size, answer))
    return tag("div", *(_advice_card(part, found) for part, found in parts.items()), cls="knb-cards")


def one_word(answers) -> str:
    """The answer of the largest size, which comes first; where it is one for each optimizer, that it depends."""
    first = next(iter(answers))
    return "it depends" if "," in first else first


def other_sizes(found: list[tuple[str, Advice]]) -> str:
    """What smaller sizes answer, where that is something else."""
    first = found[0][1].answer
    told = [f"{size}: {answer.answer}" for size, answer in found[1:] if answer.answer != first]
    return f"The largest size, {found[0][0]}, confirms; {'; '.join(told)}." if told else ""


def _advice_card(part: str, found: list[tuple[str, Advice]]) -> Markup:
    word = one_word(answer.answer for _, answer in found)
    head = tag(
        "div", tag("span", part, cls="knb-card-part"), tag("span", word, cls="knb-card-word"), cls="knb-card-head"
    )
    price = found[0][1].price
    changes = [tag("p", tag("em", f"It also changes ({found[0][0]}): "), price, ".")] if price else []
    reasons = [tag("p", tag("strong", f"{size}: {answer.answer}. "), answer.because) for size, answer in found]
    why = tag("details", tag("summary", "Why: the numbers at each size"), *reasons)
    apart = other_sizes(found)
    differs = tag("p", apart) if apart else None
    return tag("section", head, *changes, differs, why, cls=f"knb-card knb-{WORD_CLASS.get(word, 'open')}")


def largest_first(boxes: dict[str, Markup], shown: str) -> Markup:
    """The answers of a phase: the box of the first profile, those of the others folded; whose run is shown below."""
    first, *others = boxes
    folded = [tag("details", tag("summary", f"What profile {name} says"), boxes[name]) for name in others]
    below = tag("p", f"Below is the run of profile {shown}.", cls="knb-fine") if others else Markup()
    return boxes[first] + Markup().join(folded) + below


def landing(question: str, sizes: dict[str, Evidence], picture: str, links: Markup | None, ladder="") -> list[dict]:
    """The first page: one screen with the question, the figure, four lines of answer and three doors.

    `ladder` is the figure of effects against compute, where a ladder is published: it stands below that screen.
    """
    parts = {}
    for size, evidence in sizes.items():
        for seen in parts_seen(evidence.store):
            parts.setdefault(seen.part, []).append((size, seen))
    lines = []
    for part, found in parts.items():
        word = one_word(advise(seen).answer for _, seen in found)
        badge = tag("span", word, cls=f"knb-word knb-{WORD_CLASS.get(word, 'open')}")
        measured = [(size, seen.average.diff) for size, seen in found if seen.average.diff is not None]
        numbers = "; ".join(f"{diff:+.3f}".replace("-", "−") + f" at {size}" for size, diff in measured)
        lines.append(tag("li", tag("strong", part), " ", badge, " ", tag("span", numbers, cls="knb-numbers")))
    still = (
        tag("img", src=picture, alt="Main effects of the four parts on test bits per byte, with 95% intervals")
        if picture
        else ""
    )
    doors = [
        ("howto/get_started.html", "Try it", "Three commands: the plan, the workbench, your own question."),
        (
            "howto/decision_guide.html",
            "Should I use it?",
            "The answer for each part, at the sizes measured.",
        ),
        ("howto/course.html", "Learn it", "Every notebook is a lesson and the source of its module."),
    ]
    cards = [
        tag("a", tag("strong", title), tag("span", text), href=href, cls="knb-door") for href, title, text in doors
    ]
    unit = metric_info("test_bpb")
    below = f"Change of {unit.label} with the part, averaged over the other three; fewer are better."
    left = tag(
        "div",
        tag("p", question, cls="knb-question"),
        tag("ul", *lines, cls="knb-answers"),
        tag("p", below, cls="knb-fine"),
    )
    right = tag("div", figure(effects_data(sizes), still) if sizes else "")
    hero = tag("div", left, right, cls="knb-hero")
    climb = ""
    if ladder:
        words = "Effect of each part against compute, and the sealed forecast of the next size"
        climb = tag(
            "a", tag("img", src=ladder, alt=words), tag("p", f"{words}.", cls="knb-fine"), href="phases/18_ladder.html"
        )
    fine = "Models this small, trained this briefly, say nothing about large ones. "
    more = tag(
        "p",
        fine,
        tag("a", "What was found", href="howto/found.html"),
        " has every claim with its verdict.",
        cls="knb-fine",
    )
    body = tag("div", hero, tag("div", *cards, cls="knb-doors"), climb, more, links, cls="knb-landing")
    return [markdown_cell("title", "# kimi_nb"), html_cell("landing", body)]


# --- where things are --------------------------------------------------------------------------------------------


def repository(root: Path) -> str:
    """The address of the repository that the site is built from; '' where that is not known."""
    if os.environ.get("GITHUB_REPOSITORY"):
        return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{os.environ['GITHUB_REPOSITORY']}"
    asked = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.fullmatch(r"(?:https://(?:[^@/]*@)?|git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?", told)
    return f"https://{match[1]}/{match[2]}" if match else ""


def addressed(text: str, repository: str) -> str:
    """What is said of OWNER/NAME, said of the repository: a link where its host is GitHub; as it is where unknown."""
    if not repository:
        return text
    text = text.replace("git clone https://github.com/OWNER/NAME", f"git clone {repository}")
    on_github = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository)
    if not on_github:
        return text
    text = re.sub(r"`(https://[^`]*OWNER/NAME[^`]*)`", r"<\1>", text)
    return text.replace("OWNER/NAME is this repository, or your fork of it. ", "").replace("OWNER/NAME", on_github[1])


def folded_pages(tree: str) -> str:
    """The list of pages with each chapter folded; the chapter of the page that is read stays open."""
    parts = re.split(r'<p[^>]*class="caption"[^>]*><span class="caption-text">(.*?)</span></p>', tree)
    out = [parts[0]]
    for caption, pages in zip(parts[1::2], parts[2::2], strict=True):
        is_open = " open" if 'class="current' in pages or "current" in re.findall(r'<li class="([^"]*)"', pages) else ""
        is_open = is_open or (" open" if re.search(r'<li class="[^"]*\bcurrent\b', pages) else "")
        out.append(f'<details class="knb-chapter"{is_open}><summary>{caption}</summary>{pages}</details>')
    return "".join(out)


# --- the command line --------------------------------------------------------------------------------------------


def _sentence(text: str | None) -> str:
    """Help as one line in which no character is markup."""
    words = " ".join((text or "").split()).replace("%%", "%")
    return re.sub(r"([|*_`<>\[\]$#\\~])", r"\\\1", words)


def _option(action: argparse.Action, prog: str) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = action.nargs != 0 and action.option_strings
    value = f" {action.metavar or action.dest.upper()}" if takes else ""
    told = action.help if action.help and action.help is not argparse.SUPPRESS else ""
    if action.choices:
        told += f" (one of {', '.join(map(str, action.choices))})"
    known = action.default not in (None, False, "", [], (), argparse.SUPPRESS)
    if known and action.option_strings and "default" not in told:
        told += " (default: %(default)s)"
    told = told.replace("%(prog)s", prog)
    told = re.sub(r"%\(default\)\w", str(action.default), told)
    return f"| {names.replace('|', chr(92) + '|')}{_sentence(value)} | {_sentence(told)} |"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """The options of a command, those of each group in a table; long groups are folded."""
    lines = []
    for group in parser._action_groups:
        actions = [
            a for a in group._group_actions if not isinstance(a, argparse._SubParsersAction | argparse._HelpAction)
        ]
        actions = [a for a in actions if a.help is not argparse.SUPPRESS]
        if not actions:
            continue
        table = ["| option | what it does |", "|---|---|", *(_option(a, parser.prog) for a in actions)]
        title = (group.title or "options").capitalize()
        if len(actions) > 12:
            lines += [
                f"<details><summary>{html.escape(title)} ({len(actions)})</summary>",
                "",
                *table,
                "",
                "</details>",
                "",
            ]
        else:
            lines += [f"*{_sentence(title)}*", "", *table, ""]
    return lines


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Name -> (parser, help) of the commands below one."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            found |= {name: (sub, told.get(name, "")) for name, sub in action.choices.items()}
    return found


def _command(parser: argparse.ArgumentParser, about: str, level: int) -> list[str]:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    usage = usage if len(usage) < 300 else f"{parser.prog} [options]"
    lines = [
        f"{'#' * level} {parser.prog}",
        "",
        _sentence(parser.description or about).rstrip(".") + ".",
        "",
        "```text",
        usage,
        "```",
        "",
    ]
    lines += _options(parser)
    if parser.epilog:
        lines += [_sentence(parser.epilog), ""]
    for sub, told in _commands(parser).values():
        lines += _command(sub, told, min(level + 1, 4))
    return lines


def command_line() -> str:
    """Every command of `kimi-nb` with its options, from the parser itself."""
    from kimi_nb.cli import build_parser

    parser = build_parser()
    lines = ["## All commands", "", "| command | what it does |", "|---|---|"]
    for name, (sub, told) in _commands(parser).items():
        lines.append(f"| [`kimi-nb {name}`](#{sub.prog.replace(' ', '-')}) | {_sentence(told or sub.description)} |")
    lines += ["", "## Options of every command", "", *_options(parser)]
    for sub, told in _commands(parser).values():
        lines += _command(sub, told, 2)
    return "\n".join(lines)


# --- the API, wing by wing ---------------------------------------------------------------------------------------


def api_index(lessons_by_chapter: dict, exports, nbs: Path) -> str:
    """Every exported function and class: a heading for each wing, a folded table for each of its modules."""
    lines = []
    wings = {chapter: wing for wing, chapter in CHAPTERS.items()}
    for chapter, lessons in lessons_by_chapter.items():
        tables = [table for lesson in lessons if lesson.module for table in _module_table(lesson, exports, nbs)]
        if tables:
            lines += [f"## {chapter}: `kimi_nb.{wings[chapter]}`", "", *tables]
    return "\n".join(lines)


def _module_table(lesson, exports, nbs: Path) -> list[str]:
    parsed, exported, _ = exports(lesson.module)
    found = [n for n in parsed.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in exported]
    if not found:
        return []
    page = f"../{lesson.path.relative_to(nbs).as_posix()}"  # the page itself is in howto/
    lines = [
        f"<details><summary><code>{lesson.module}</code> ({len(found)})</summary>",
        "",
        f"[{lesson.title}]({page})",
        "",
    ]
    lines += ["| name | what it is |", "|---|---|"]
    for node in found:
        kind = "class" if isinstance(node, ast.ClassDef) else "func"
        about = (ast.get_docstring(node) or "").partition("\n")[0].replace("|", "\\|")
        lines.append(f"| {{py:{kind}}}`~kimi_nb.{lesson.module}.{node.name}` | {about} |")
    return [*lines, "", "</details>", ""]
