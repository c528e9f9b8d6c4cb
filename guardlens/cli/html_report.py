"""A self-contained HTML page of headings, prose, tables and figures, which loads nothing from elsewhere."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from guardlens.results.files import write_text
from guardlens.results.tables import Frame


@dataclass(frozen=True, eq=False)
class Section:
    """One part of a report.

    Attributes:
        title: The heading.
        prose: Paragraphs.
        figures: PNG files, each with a caption; they are shown inline.
        table: A data frame, whose cells are shown as they are.
        notes: Paragraphs beneath the table.
    """

    title: str
    prose: Sequence[str] = ()
    figures: Sequence[tuple[Path, str]] = ()
    table: Frame | None = None
    notes: Sequence[str] = ()


def write(path: str | Path, title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> None:
    """Write the page from the template `report.html.jinja`, which escapes every text.

    Args:
        path: The HTML file.
        title: The heading.
        lead: The first paragraphs, which tell the findings.
        sections: The parts that follow.
        footer: The last line, which tells where the report comes from.
    """
    environment = Environment(loader=PackageLoader("guardlens.cli", ""), autoescape=True, trim_blocks=True)
    environment.filters |= {"data_uri": _data_uri, "table_html": _table_html}
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(title=title, lead=lead, sections=sections, footer=footer))


def _data_uri(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _table_html(frame: Frame) -> Markup:
    return Markup(frame.to_html(index=False, border=0, na_rep=""))  # pandas escapes the cells
