#!/usr/bin/env python3
"""Check the built documentation: every public name is there, nothing comes from elsewhere, and,
where chromium is, every page fits a phone.

usage: scripts/check_site.py SITE [--shots FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHONE = (390, 844)  # CSS pixels of a common phone
PUBLIC = {
    "usp": "usp/__init__.py",
    "usp.masks": "usp/masks.py",
    "usp.dsp": "usp/dsp.py",
    "usp.testing": "usp/testing/__init__.py",
    "usp.rng": "usp/rng.py",
}
# a browser cannot be told to be narrower than 500 pixels, a frame in it can
FRAMES = """<!doctype html><body><script>
const pages = PAGES, found = {};
async function look() {
  for (const page of pages) {
    const frame = document.createElement("iframe");
    frame.width = WIDTH; frame.height = HEIGHT; frame.style.border = 0;
    frame.src = page;
    const loaded = new Promise(done => { frame.onload = done; });
    document.body.append(frame);
    await loaded;
    const page_ = frame.contentDocument, scrolls = new Set(["auto", "scroll"]);
    let reach = 0;
    for (const part of page_.querySelectorAll("article *")) {
      let inside = part.parentElement;
      while (inside && !scrolls.has(frame.contentWindow.getComputedStyle(inside).overflowX))
        inside = inside.parentElement;
      if (!inside || inside.contains(page_.querySelector("article")))
        reach = Math.max(reach, part.getBoundingClientRect().right);
    }
    const pictures = [...page_.images].filter(one => one.loading != "lazy");
    found[page] = [Math.ceil(reach), pictures.filter(one => !one.naturalWidth).length];
    frame.remove();
  }
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
}
look();
</script>"""


def public_names(file: Path) -> list[str]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{file} has no __all__")


def missing_names(site: Path) -> list[str]:
    text = "".join(page.read_text() for page in sorted((site / "api").glob("*.html")))
    described = {*re.findall(r'id="([\w.]+)"', text), *PUBLIC, "usp.__version__"}
    wanted = [
        f"{module}.{name}" for module, file in PUBLIC.items() for name in public_names(ROOT / file)
    ]
    return [name for name in wanted if name not in described]


def foreign_parts(site: Path) -> list[str]:
    """What a page would load from elsewhere; links that a reader follows are none."""
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//|<link[^>]*href=\"(?:https?:)?//"
    )
    sheets = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")
    found = [page for page in site.rglob("*.html") if loads.search(page.read_text())]
    found += [sheet for sheet in site.rglob("*.css") if sheets.search(sheet.read_text())]
    return [f"{file.relative_to(site)} loads something from elsewhere" for file in found]


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def browse(program: str, *options: str) -> str:
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


def too_wide(site: Path, program: str) -> list[str]:
    """Pages that a phone would have to move sideways, and pages that lack a picture."""
    pages = [page.resolve().as_uri() for page in sorted(site.rglob("*.html"))]
    text = FRAMES.replace("PAGES", json.dumps(pages))
    text = text.replace("WIDTH", str(PHONE[0])).replace("HEIGHT", str(PHONE[1]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frames.html"
        file.write_text(text)
        said = browse(program, "--dump-dom", "--virtual-time-budget=100000", file.as_uri())
    match = re.search(r"FOUND(\{.*\})END", said)
    if match is None:
        return [f"{program} did not look at the pages: {said[-500:]}"]
    found = json.loads(match[1])
    wrong = [
        f"{page}: {width} pixels on {PHONE[0]}"
        for page, (width, _) in found.items()
        if width > PHONE[0]
    ]
    wrong += [f"{page}: {lost} pictures missing" for page, (_, lost) in found.items() if lost]
    print(f"{len(found)} pages looked at, {PHONE[0]} pixels wide")
    return wrong


def shoot(site: Path, program: str, folder: Path) -> None:
    """Pictures of the pages as a phone shows them, to be looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(site.glob("*.html")):
        frame = folder / "frame.html"
        size = f'width="{PHONE[0]}" height="{2 * PHONE[1]}" style="border:0"'
        address = page.resolve().as_uri()
        frame.write_text(f'<body style="margin:0"><iframe {size} src="{address}">')
        window = f"--window-size=500,{2 * PHONE[1]}"
        browse(program, window, f"--screenshot={folder / page.stem}.png", frame.resolve().as_uri())
        frame.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--shots", type=Path, help="write a picture of each page, as on a phone")
    arguments = parser.parse_args()
    wrong = [f"{name} is on no API page" for name in missing_names(arguments.site)]
    wrong += foreign_parts(arguments.site)
    program = browser()
    if program is None:
        print("no chromium here: nobody has looked whether the pages fit a phone")
    else:
        wrong += too_wide(arguments.site, program)
        if arguments.shots is not None:
            shoot(arguments.site, program, arguments.shots)
    print("\n".join(wrong) or "the site is whole")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
