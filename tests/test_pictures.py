"""The pictures of the README and of the site can be made again, are small, and ask nobody else for anything."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[1] / "docs"
KEPT = DOCS / "pictures"
LARGEST = 100_000  # bytes


def test_the_script_makes_them(tmp_path: Path) -> None:
    found = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(found)
    found.loader.exec_module(pictures)
    pictures.make(tmp_path, ("lora",), texts=8)

    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made.keys() == {path.name for path in KEPT.glob("*.svg")}
    for name, text in made.items():
        assert "http" not in re.sub(r'http://(www\.w3\.org|purl\.org|creativecommons\.org)|https://matplotlib\.org', "", text), name
        ElementTree.fromstring(text)
    for name in ("plan", "diagnostic", "spectrum"):  # the same, in other colours
        light, dark = made[f"{name}.svg"], made[f"{name}-dark.svg"]
        assert light != dark and re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    for name in ("plan", "diagnostic"):  # what is kept says what the program says today; estimates follow every program
        assert said(made[f"{name}.svg"]) == said((KEPT / f"{name}.svg").read_text(encoding="utf-8")), name
    assert ">error[unknown-argument]</text>" in made["diagnostic.svg"] and str(DOCS.parent) not in made["plan.svg"]


def said(picture: str) -> list[str]:
    """The words of a picture, but for what the cost model says."""
    texts = (text for each in ElementTree.fromstring(picture).iter() for text in [each.text or ""] if text.strip())
    return re.sub(r"[\d.]+\s+x", "", " ".join(texts)).split()


def test_what_is_kept_is_small_and_shown() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS.parent / "README.md", *DOCS.glob("*.md")))
    for path in KEPT.iterdir():
        assert path.stat().st_size < LARGEST and f"pictures/{path.name}" in pages, path.name
