"""A self-contained HTML page: headings, prose, tables and figures, nothing loaded from outside."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guardlens.results.files import write_text
from guardlens.results.tables import Frame


@dataclass(frozen=True, eq=False)
class Section:
    """One part of a report.

    Attributes:
        title: Its heading.
        prose: Paragraphs.
        figures: PNG files, shown inline, each with a caption.
        table: A data frame; its cells are shown as they are.
        notes: Paragraphs beneath the table.
    """

    title: str
    prose: Sequence[str] = ()
    figures: Sequence[tuple[Path, str]] = ()
    table: Frame | None = None
    notes: Sequence[str] = ()


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.lead { font-size: 1.08rem; } figure { margin: 1rem 0; } img { max-width: 100%; } figcaption, footer { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid #e6e6e6; text-align: left; white-space: nowrap; } th { background: #f6f6f6; }
"""


def write(path: str | Path, title: str, lead: Sequence[str], sections: Sequence[Section], footer: str) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        title: Its heading.
        lead: The first paragraphs: what was found.
        sections: The rest.
        footer: Where it comes from.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="lead">{html.escape(text)}</p>' for text in lead)]
    for section in sections:
        body += [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in section.prose)]
        body += [_figure(file, caption) for file, caption in section.figures]
        body += [] if section.table is None else [f'<div class="wide">{section.table.to_html(index=False, border=0, na_rep="")}</div>']
        body += [f"<p>{html.escape(text)}</p>" for text in section.notes]
    body.append(f"<footer><hr>{html.escape(footer)}</footer>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(body)}</body></html>')


def _figure(file: Path, caption: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
