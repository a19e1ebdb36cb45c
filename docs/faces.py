"""What follows an export: `python docs/faces.py [FOLDER]`, as `make export` does.

Each wing gets its face, `kimi_nb/WING/__init__.py`: its public names, each loaded from its module when it is asked for;
a face's first line, what the wing is for, is written by hand and kept. And the lists of names that nbdev writes at the
top of a module are wrapped to the width that the rest of the code keeps.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
WIDTH = 120
LIST = re.compile(r"^__all__ = \[.*?\]$", re.M | re.S)


PASSED_ON = {("model", "network"): {"KimiConfig"}}  # names of another wing that programs look for in this one


def exported(text: str) -> list[str]:
    """The names of a module's `__all__`."""
    found = LIST.search(text)
    return ast.literal_eval(found[0].removeprefix("__all__ = ")) if found else []


def wrapped(text: str) -> str:
    """A module's text with its `__all__` inside the width."""
    names = str(exported(text))
    lines = textwrap.wrap(f"__all__ = {names}", WIDTH, subsequent_indent=" " * 11, break_long_words=False)
    return LIST.sub(lambda _: "\n".join(lines), text, count=1)


def face(root: Path, wing: str) -> str:
    """The text of a wing's face: modules in the order of their notebooks, names sorted; none that a module bears."""
    package = root / "kimi_nb" / wing
    rooms = [re.sub(r"^\d+_", "", p.stem) for p in sorted((root / "nbs" / wing).glob("[0-9]*.ipynb"))]
    about = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    lines = [f'"""{about}"""', "", "from kimi_nb import lazily", "", "__getattr__, __dir__, __all__ = lazily("]
    lines.append("    __name__,")
    for room in rooms:
        names = set(exported((package / f"{room}.py").read_text(encoding="utf-8"))) - set(rooms)
        names |= PASSED_ON.get((wing, room), set())
        if names:
            margin = " " * 8
            lines.append(f'    {room}="""')
            lines += textwrap.wrap(" ".join(sorted(names)), 100, initial_indent=margin, subsequent_indent=margin)
            lines.append('    """,')
    return "\n".join([*lines, ")", ""])


def write(path: Path, text: str):
    """Write what is not there already."""
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main(root: Path):
    for path in (root / "kimi_nb").glob("*/*.py"):
        if path.name != "__init__.py":
            write(path, wrapped(path.read_text(encoding="utf-8")))
    for folder in sorted((root / "nbs").iterdir()):
        target = root / "kimi_nb" / folder.name / "__init__.py"
        if target.is_file() and "lazily(" in target.read_text(encoding="utf-8"):
            write(target, face(root, folder.name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO)
