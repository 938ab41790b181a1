"""One self-contained HTML page: style, behaviour and pictures inside, nothing fetched from anywhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

STYLE, SCRIPT = ((files(__package__) / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what is seen, and HTML."""

    title: str
    lead: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def build_report(title: str, subtitle: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], footer: str = "") -> str:
    """The page. ``facts`` are (number, what it is) shown large at the top."""
    cards = "".join(f"<div><b>{escape(number)}</b><span>{escape(what)}</span></div>" for number, what in facts)
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2><p>{escape(s.lead)}</p>{s.body}</section>' for s in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><header><h1>{escape(title)}</h1>"
        f'<p class="subtitle">{escape(subtitle)}</p><nav>{links}</nav></header><div class="facts">{cards}</div>{body}'
        f"<footer>{escape(footer)}</footer></main><script>{SCRIPT}</script></body></html>\n"
    )


def viewer(data: dict) -> str:
    """Maps under a time slider, drawn by report.js.

    ``data``: ``{labels, aspect, start, variables: [{label, panels: [{title, low, high, gradient, frames, points}]}]}``; ``frames``
    are data URIs, ``points`` lists of (across, down, colour), one entry per label.
    """
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return (
        f'<div class="viewer"><script type="application/json">{payload}</script><div class="tabs"></div><div class="controls">'
        '<button>Play</button><input type="range" min="0" value="0" aria-label="time"><output></output></div><div class="maps"></div></div>'
    )


def table(header: Sequence[str], groups: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    """A table with group headings; cells are HTML."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    rows = []
    for name, lines in groups:
        rows.append(f'<tr class="group"><td colspan="{len(header)}">{escape(name)}</td></tr>' if name else "")
        rows += ["<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines]
    return f'<div class="tablebox"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def charts(figures: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def commands(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
