r"""Translate LaTeX in the docs to MathML while the site is built, so that the browser has nothing to load or to run.

An extension of Python-Markdown, and so of Zensical and of MkDocs alike (`mkdocs.yml` names it). pymdownx.arithmatex finds the formulae
(`$...$` in a line, `$$...$$` on lines of its own), latex2mathml translates them.
"""

import html
import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.treeprocessors import Treeprocessor
from pymdownx.arithmatex import ArithmatexExtension

AFTER_INLINE = 15  # Python-Markdown's own "inline" has 20: it makes the elements that hold the formulae
LEFT_OVER = re.compile(r"\\[A-Za-z]+|&")
BARS = ("‖", "|")


class MathMLExtension(ArithmatexExtension):
    """arithmatex whose elements contain MathML instead of LaTeX."""

    def __init__(self) -> None:
        super().__init__(generic=True, inline_syntax=["dollar"], block_syntax=["dollar"])

    def extendMarkdown(self, md: Markdown) -> None:
        super().extendMarkdown(md)
        md.treeprocessors.register(Translator(md), "mathml", AFTER_INLINE)


class Translator(Treeprocessor):
    def run(self, root: Element) -> None:
        for element in root.iter():
            if element.get("class") == "arithmatex":
                translate(element)


def translate(element: Element) -> None:
    r"""Replace the text of an element, `\(latex\)` or `\[latex\]`, by MathML."""
    text = html.unescape(element.text or "").strip()
    element.text = None
    element.append(mathml(text[2:-2].strip(), "block" if text.startswith(r"\[") else "inline"))


def mathml(latex: str, display: str) -> Element:
    r"""A formula as MathML.

    Args:
        latex: The formula without its dollar signs.
        display: `"inline"`, or `"block"` for a formula on lines of its own.

    Raises:
        ValueError: latex2mathml does not know a command in it (such as `aligned`, for which `align*` works). The build then fails.
    """
    formula = convert_to_element(latex, display=display)
    for part in formula.iter():
        text = html.unescape(part.text or "")
        if part.tag != "mtext" and LEFT_OVER.fullmatch(text):
            raise ValueError(f"latex2mathml leaves {text!r} of the formula {latex!r} as it is; use other commands")
        if part.tag == "mo" and text in BARS:
            part.attrib.setdefault("stretchy", "false")  # browsers drop a stretched bar below the line if it has an index
    return formula


def makeExtension(**_: object) -> MathMLExtension:
    """Entry point of Python-Markdown for the extension `analyses.mathml`."""
    return MathMLExtension()
