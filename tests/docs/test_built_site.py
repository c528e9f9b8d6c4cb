"""The built documentation, page by page. Looks at `site/`, which `make docs` writes: `make site` does both."""

import importlib
import inspect
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

import guardlens
from analyses.tutorials.__main__ import SCRIPTS, found

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data"}
OUTSIDE = re.compile(r"^(https?:)?//")
HINTS = ("preconnect", "dns-prefetch", "stylesheet", "icon", "preload", "modulepreload", "manifest", "prefetch")
TEX = re.compile(r"\$\$|\\\(|\\\[|\\(frac|alpha|mathbb|top|text)\b")


@pytest.fixture(scope="module")
def pages():
    """Every page by its path, but the one for addresses that don't exist."""
    found = {path: BeautifulSoup(path.read_text(), "html.parser") for path in SITE.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 30, "no site: run `make docs` first"
    return found


def article(page):
    return page.find("article") or page


def target(page: Path, link: str) -> tuple[Path, str]:
    """The file that a link of a page leads to, opened from the disk, and the anchor there."""
    parts = urlsplit(link)
    return (page.parent / unquote(parts.path)).resolve() if parts.path else page, unquote(parts.fragment)


def test_every_link_leads_somewhere(pages):
    ids = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    dead = []
    for path, page in pages.items():
        for tag in page.find_all(["a", "link", *LOADS]):
            for link in (tag.get("href"), tag.get("src")):
                if not link or re.match(r"^([a-z]+:|//)", link):
                    continue
                file, anchor = target(path, link)
                if not file.is_file() or (anchor and file in ids and anchor not in ids[file]):
                    dead.append(f"{path.relative_to(SITE)}: {link}")
    assert not dead, dead


def test_nothing_is_loaded_from_outside(pages):
    loaded = [tag[LOADS[tag.name]] for page in pages.values() for tag in page.find_all(list(LOADS)) if tag.get(LOADS[tag.name])]
    loaded += [tag["href"] for page in pages.values() for tag in page.find_all("link", href=True) if set(tag.get("rel", ())) & set(HINTS)]
    styles = "".join(path.read_text() for path in SITE.rglob("*.css")) + "".join(
        str(tag) for page in pages.values() for tag in page("style")
    )
    loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", styles) + re.findall(r"@import\s+[\"']([^\"']+)", styles)
    assert len(loaded) > 100
    assert not [address for address in loaded if OUTSIDE.match(address)]
    assert not [path for path, page in pages.items() if page.find(class_="mermaid")], "Zensical would fetch what draws these diagrams"


def test_every_page_of_the_navigation_is_there_and_can_be_searched(pages):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    sources = re.findall(r"[\w./-]+\.md", json.dumps(config["nav"]))
    built = [source.replace(".md", ".html") for source in sources]
    searchable = {entry["location"].split("#")[0] for entry in json.loads((SITE / "search.json").read_text())["items"]}
    assert len(built) > 30 and {SITE / page for page in built} <= set(pages)
    assert set(built) <= searchable


@pytest.mark.parametrize("name", guardlens.__all__)
def test_every_public_name_has_an_entry(pages, name):
    value = getattr(guardlens, name)
    path = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
    entries = [tag for file, page in pages.items() if file.is_relative_to(SITE / "api") for tag in page.find_all(id=path)]
    assert entries, f"no page of docs/api has an entry for {path}"
    heading = next((tag for tag in entries if tag.name in ("h1", "h2", "h3", "h4")), None)
    assert heading and heading.parent.find(class_="doc-contents"), path
    said = " ".join(heading.parent.find(class_="doc-contents").get_text().split())
    first = inspect.getdoc(value).split("\n")[0]
    assert re.sub(r"\W", "", re.sub(r"`", "", first))[:30] in re.sub(r"\W", "", said), said[:200]


@pytest.mark.parametrize("script", found(SCRIPTS, None), ids=lambda path: path.stem)
def test_tutorials_show_their_figures_and_can_be_downloaded(pages, script):
    path = SITE / "tutorials" / f"{script.stem}.html"
    pictures = [target(path, tag["src"])[0] for tag in article(pages[path]).find_all("img")]
    assert len(pictures) >= 2 and pictures[0].name == "end.png" and pictures[0].read_bytes() == pictures[-1].read_bytes()
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            low, high = image.convert("L").getextrema()
            assert image.format == "PNG" and image.width > 800 and high - low > 100, picture
    link = next(tag for tag in article(pages[path]).find_all("a", download=True))
    notebook = nbformat.read(target(path, link["href"])[0], as_version=4)
    nbformat.validate(notebook)
    written = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in written if output.output_type == "error" or output.get("name") == "stderr"]


def test_every_picture_has_words_beside_it(pages):
    assert not [f"{path}: {tag['src']}" for path, page in pages.items() for tag in article(page).find_all("img") if not tag.get("alt")]


def test_formulae_are_mathml(pages):
    formulae = [tag for page in pages.values() for tag in page.find_all(class_="arithmatex")]
    assert len(formulae) > 20
    assert all(len(tag.find("math").find_all(True)) > 1 and not TEX.search(tag.get_text()) for tag in formulae)
    for path, page in pages.items():
        for text in article(page).find_all(string=TEX):
            assert text.find_parent(["code", "pre"]), f"{path}: {text}"


def test_a_formula_that_cannot_be_translated_fails_the_build():
    from analyses.mathml import mathml  # needs the group docs

    assert mathml(r"\lVert h \rVert_2", "inline").tag == "math"
    with pytest.raises(ValueError, match="leaves '&' of the formula"):
        mathml(r"\begin{aligned} a &= b \end{aligned}", "block")
    with pytest.raises(ValueError, match=r"leaves '\\\\nosuch'"):
        mathml(r"\nosuch{x}", "inline")


def takes_axes(draw) -> bool:
    return not {"ax", "axes"}.isdisjoint(inspect.signature(draw).parameters)


def test_every_figure_of_the_library_is_in_the_gallery(pages):
    shown = {urlsplit(tag["href"]).fragment for tag in article(pages[SITE / "tutorials/9_gallery.html"]).find_all("a", href=True)}
    drawn = set()
    for module in map(importlib.import_module, ("guardlens.results.plots", "guardlens.results.plots.components")):
        functions = inspect.getmembers(module, inspect.isfunction)
        drawn |= {
            f"{module.__name__}.{name}"
            for name, value in functions
            if not name.startswith("_") and value.__module__ != "guardlens.results.plots.panels" and takes_axes(value)
        }
    assert len(drawn) >= 7 and drawn <= shown, drawn - shown


def test_the_entries_to_cite_say_what_the_citation_file_says():
    cited, page = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "docs/cite.md").read_text()
    paper = cited["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for said in (authors, str(paper["year"]), paper["journal"], paper["url"], cited["license"], f"{{{cited['version']}}}", cited["title"]):
        assert said in page, said
    assert paper["title"] in page.replace("{VLM-Guard}", "VLM-Guard") and cited["version"] == guardlens.__version__
