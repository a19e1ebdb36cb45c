"""Write the face of each wing, `kimi_nb/WING/__init__.py`: its public names, each loaded from its module when asked.

`python docs/faces.py` after an export; a face's first line, what the wing is for, is written by hand and kept.
"""

import ast
import re
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def exported(module: Path) -> list[str]:
    """The names of a module's `__all__`."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def face(wing: str) -> str:
    """The text of a wing's face: modules in the order of their notebooks, names sorted; none that a module bears."""
    package = REPO / "kimi_nb" / wing
    rooms = [re.sub(r"^\d+_", "", p.stem) for p in sorted((REPO / "nbs" / wing).glob("[0-9]*.ipynb"))]
    about = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    lines = [f'"""{about}"""', "", "from kimi_nb import lazily", "", "__getattr__, __dir__, __all__ = lazily("]
    lines.append("    __name__,")
    for room in rooms:
        names = sorted(set(exported(package / f"{room}.py")) - set(rooms))
        if names:
            lines += [
                f'    {room}="""',
                *textwrap.wrap(" ".join(names), 100, initial_indent=" " * 8, subsequent_indent=" " * 8),
            ]
            lines.append('    """,')
    return "\n".join([*lines, ")", ""])


if __name__ == "__main__":
    for folder in sorted((REPO / "nbs").iterdir()):
        target = REPO / "kimi_nb" / folder.name / "__init__.py"
        if target.is_file() and "lazily(" in target.read_text(encoding="utf-8"):
            target.write_text(face(folder.name), encoding="utf-8")
