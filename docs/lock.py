"""requirements.lock: the versions of constraints.txt that set-up installs, with the hashes of all their files.

`python docs/lock.py write` asks an index for the hashes, `python docs/lock.py audit` asks for known vulnerabilities of
what constraints.txt pins. Both run their tool in an environment of its own, which is thrown away.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TOOLS = {"uv": "uv==0.13.9", "pip-audit": "pip-audit==2.10.1"}
BUILDS = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # differ by machine and index: pinned by version alone
SYSTEMS = ("linux", "darwin")
HEAD = """\
# Made by `make lock` from pyproject.toml (extra dev) and constraints.txt. Do not edit: change constraints.txt, make it
# again. A release has the hashes of all its files, so one lock serves every platform. torch and the CUDA packages that
# it brings are not here: their build depends on the machine and the index, so constraints.txt pins them by version.
"""


class Unavailable(Exception):
    """A tool that cannot be had, or cannot reach what it asks."""


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Raises: Unavailable where the tool cannot be installed."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_ = Path(folder) / "bin"
        done = subprocess.run(
            [bin_ / "pip", "install", "-qq", "--disable-pip-version-check", TOOLS[name]],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"{TOOLS[name]} cannot be installed: {last_line(done.stderr)}")
        return subprocess.run([bin_ / name, *arguments], cwd=REPO, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1][:300]


def entries(text: str) -> dict[str, str]:
    """Name -> its entry of a lock: the pin, its marker, its hashes."""
    blocks = re.findall(r"^[A-Za-z0-9].*?(?<!\\)$", text, re.M | re.S)
    return {re.match(r"[A-Za-z0-9._-]+", block)[0]: block for block in blocks}


def wanted(name: str, entry: str) -> bool:
    """Whether set-up installs it somewhere, by hash."""
    from packaging.markers import Marker

    marker = re.search(r";\s*(.*?)\s*\\?$", entry.splitlines()[0])
    machines = [
        dict(
            sys_platform=system,
            os_name="posix",
            platform_system=system.capitalize(),
            python_version=f"3.{minor}",
            python_full_version=f"3.{minor}.9",
        )
        for system in SYSTEMS
        for minor in range(11, 20)
    ]
    return not BUILDS.fullmatch(name) and (marker is None or any(Marker(marker[1]).evaluate(m) for m in machines))


def write() -> int:
    """Writes requirements.lock; refuses a package that constraints.txt does not pin."""
    what = "--extra dev -c constraints.txt --universal --python-version 3.11"
    how = "--generate-hashes --no-header --no-annotate --quiet"
    done = run_tool("uv", "pip", "compile", "pyproject.toml", *what.split(), *how.split())
    if done.returncode:
        raise Unavailable(done.stderr.strip())
    found = {name: entry for name, entry in entries(done.stdout).items() if wanted(name, entry)}
    pinned = set(re.findall(r"^[^#\s]+", (REPO / "constraints.txt").read_text(encoding="utf-8"), re.M))
    if free := sorted({entry.split()[0] for entry in found.values()} - pinned):
        print(
            f"constraints.txt does not pin {', '.join(free)}: add what is missing, then make the lock again",
            file=sys.stderr,
        )
        return 1
    file, text = REPO / "requirements.lock", HEAD + "\n".join(found.values()) + "\n"
    if (
        not file.exists() or file.read_text(encoding="utf-8") != text
    ):  # a file that is touched sets every environment up again
        file.write_text(text, encoding="utf-8")
    print(f"requirements.lock: {len(found)} packages")
    return 0


def audit(*arguments: str) -> int:
    """1 for a known vulnerability; what cannot be asked is a warning."""
    done = run_tool(
        "pip-audit",
        "-r",
        "constraints.txt",
        "--disable-pip",
        "--no-deps",
        "-f",
        "json",
        "--progress-spinner",
        "off",
        *arguments,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise Unavailable(last_line(done.stderr)) from None
    bad = [p for p in packages if p.get("vulns")]
    for p in bad:
        for v in p["vulns"]:
            print(
                f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version yet'}",
                file=sys.stderr,
            )
    unknown = [p["name"] for p in packages if "skip_reason" in p]
    if unknown:
        which = f"{len(unknown)} of {len(packages)} packages, which are not audited: {', '.join(unknown[:3])} …"
        print(f"warning: the index says nothing about {which}", file=sys.stderr)
    print(f"audit: {len(packages) - len(unknown)} packages asked about, {len(bad)} with known vulnerabilities")
    return 1 if bad else 0


def main(order: str = "", *rest: str) -> int:
    """What is offline is no fault of the pins: an audit that cannot be made is a warning."""
    try:
        return {"write": write, "audit": audit}[order](*rest)
    except Unavailable as e:
        print(f"{'warning: not audited' if order == 'audit' else 'no lock'}: {e}", file=sys.stderr)
        return 0 if order == "audit" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:2] in (["write"], ["audit"]) else __doc__)
