"""The workbench as a film: `python docs/film.py` opens it over the published run and writes figures/workbench.gif.

JupyterLab and Chromium are those of the browser tests (tests/test_workbench.py). After each step a picture is taken, a
line below says what was done, and the pictures become a small GIF; the third one is also kept as figures/workbench.png.
"""

import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageDraw, ImageFont

REPO = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, BAR = 960, 620, 44  # pixels of a picture, and of the line below it
COLOURS, SECONDS = 96, 2.6
LIMIT = 1_500_000  # bytes


def framed(picture: bytes | Path, words: str) -> Image.Image:
    """A picture with a line of words below it."""
    shot = Image.open(picture).convert("RGB")
    shot.thumbnail((WIDTH, HEIGHT))
    frame = Image.new("RGB", (WIDTH, HEIGHT + BAR), "white")
    frame.paste(shot, ((WIDTH - shot.width) // 2, 0))
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, HEIGHT, WIDTH, HEIGHT + BAR), fill="#1f2933")
    font = ImageFont.load_default(size=20)
    draw.text((16, HEIGHT + 10), textwrap.shorten(words, 90), fill="white", font=font)
    return frame


def film(frames: list[Image.Image], target: Path, colours: int = COLOURS) -> Path:
    """A GIF of the frames that stays below the limit."""
    small = [frame.quantize(colours, dither=Image.Dither.NONE) for frame in frames]
    times = [int(1000 * SECONDS)] * (len(small) - 1) + [int(2500 * SECONDS)]
    small[0].save(target, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)
    return film(frames, target, colours // 2) if target.stat().st_size > LIMIT and colours > 8 else target


def walk(page, take, results: Path) -> None:
    """From the open workbench to a verdict, a comparison and a look inside."""
    tab = lambda title: page.click(f'.knb-workbench .lm-TabBar-tabLabel:text-is("{title}")')
    page.locator(".knb-workbench [data-cost=total_parameters]").wait_for()
    take("The workbench over the published run: the parts of Kimi K2 are switches.")
    verdict = page.locator(".knb-workbench .knb-verdict .verdict")
    page.click(".knb-part-muon")
    page.wait_for_timeout(1500)
    take("Muon on: its runs are there already, nothing has to be trained.")
    page.click(".knb-judge")
    verdict.wait_for()
    page.wait_for_timeout(500)
    take("One click judges the pairs, seed by seed.")
    before = verdict.inner_text()
    page.click(".knb-part-mla")
    page.wait_for_timeout(1500)
    take("MLA on, too: parameters, compute and cache follow at once.")
    page.click(".knb-judge")
    changed = "before => document.querySelector('.knb-workbench .knb-verdict .verdict')?.innerText !== before"
    page.wait_for_function(changed, arg=before)
    verdict.wait_for()
    page.wait_for_timeout(500)
    take("The same question for both together.")
    tab("Compare")
    chart = page.locator(".knb-compare .panels svg[data-axes]").first
    chart.wait_for()
    chart.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    take("Compare: a line and a band for all seeds of a configuration.")


def main() -> None:
    sys.path.insert(0, str(REPO / "tests"))
    from test_workbench import workbench_in_a_browser

    from kimi_nb.plan import open_published

    with tempfile.TemporaryDirectory() as folder:
        place, frames = Path(folder), []
        results = open_published("quick", place / "results").path
        request = SimpleNamespace(addfinalizer=lambda _: None)
        with workbench_in_a_browser(place, request, REPO / "settings.ini", results) as (page, problems):
            page.set_viewport_size(dict(width=1240, height=800))
            page.set_default_timeout(180_000)

            def take(words):
                file = place / f"{len(frames)}.png"
                page.screenshot(path=str(file))
                frames.append(framed(file, words))
                frames[-1].save(place / f"frame{len(frames)}.png")

            walk(page, take, results)
        print(*problems, sep="\n")
    made = film(frames, REPO / "figures" / "workbench.gif")
    frames[2].save(REPO / "figures" / "workbench.png", optimize=True)
    print(f"{made}: {len(frames)} pictures, {made.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
