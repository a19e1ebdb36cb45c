"""A newcomer's path, timed: `python docs/newcomer.py` goes from a clone to a verdict in the workbench.

The checkout is cloned into an empty folder, set up without what pip has kept, and its lab is opened in Chromium, where
five clicks lead to a verdict. Seconds on the clock and of the processors go to data/records/newcomer.json, which the
page "Get started" shows, with the load that the machine had from other work.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
KEPT = REPO / "data" / "records" / "newcomer.json"
PATIENCE = 1_800  # seconds for the set-up, and for the lab


def cpu_seconds() -> float:
    """Of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Way:
    """Steps with their seconds, told as they end."""

    def __init__(self):
        self.steps = []

    @contextlib.contextmanager
    def step(self, name: str):
        start, used = time.monotonic(), cpu_seconds()
        yield
        seconds, cpu = round(time.monotonic() - start, 1), round(cpu_seconds() - used, 1)
        self.steps.append(dict(step=name, seconds=seconds, cpu_seconds=cpu or None))
        print(f"{seconds:7.1f} s  {name}", flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def lab(home: Path):
    """The clone's own `kimi-nb lab`; gives the address of the workbench."""
    port = free_port()
    options = ["--no-browser", "--port", str(port), "--", "--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1"]
    options += ["--allow-root"] if os.getuid() == 0 else []
    server = subprocess.Popen([home / ".venv/bin/kimi-nb", "lab", *options], cwd=home, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/lab/tree/lab/workbench.ipynb"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def open_page(page, address: str) -> None:
    """The page, as soon as the server has it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            page.goto(address)
            return page.wait_for_function("document.body.innerText.includes('| Idle')")
        time.sleep(0.5)
    raise TimeoutError(f"{address} does not answer")


def ask(page) -> str:
    """Three of the five clicks: two parts, and the question."""
    for button in (".knb-part-mla", ".knb-part-muon", ".knb-judge"):
        page.click(button)
    verdict = page.locator(".knb-workbench .knb-verdict .verdict b")
    verdict.wait_for()
    return verdict.inner_text()


def walk(home: Path) -> dict:
    """From the clone to the verdict."""
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(REPO / "tests"))
    from test_workbench import SHOWN, chromium, run_all

    way, load = Way(), os.getloadavg()[0]
    head = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(head, cwd=REPO, capture_output=True, text=True, check=True).stdout
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("KIMI_NB_", "PYTHON"))}
    with way.step("git clone"):
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", REPO, home], check=True)
    with way.step("make setup"):
        command = ["make", "-s", "setup"]
        subprocess.run(command, cwd=home, check=True, timeout=PATIENCE, env=clean | dict(PIP_NO_CACHE_DIR="1"))
    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"]).new_page()
        page.set_default_timeout(1000 * PATIENCE / 10)
        with contextlib.ExitStack() as open_lab:
            with way.step("kimi-nb lab: the notebook is open"):
                open_page(page, open_lab.enter_context(lab(home)))
            with way.step("two clicks, Run All Cells: the workbench, and its first picture"):
                run_all(page)
                page.wait_for_selector(SHOWN)
                page.locator(".knb-diagram svg").first.wait_for()
            with way.step("three more: MLA, Muon, judge it: the verdict"):
                said = ask(page)
    about = dict(date=f"{datetime.now(UTC):%Y-%m-%d}", commit=commit[:10], cores=os.cpu_count())
    return about | dict(load=[round(load, 1), round(os.getloadavg()[0], 1)], steps=way.steps, verdict=said)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = walk(Path(folder) / "kimi_nb")
        KEPT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    whole = sum(step["seconds"] for step in found["steps"])
    print(f"{whole:7.1f} s  in all; load {found['load']} on {found['cores']} cores")
