"""Tables of scores: flat records in files, and the same for people."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from appa_lite.core.errors import UserError
from appa_lite.verification.views import viewed

COLUMNS = ("system", "variable", "metric", "lead_time", "value", "low", "high", "count")
SHOWN = ("rmse", "crps_fair", "spread_skill", "bias", "rank_slope", "rank_u")
SHOWN_OF_VIEWS = ("crps_fair", "spread_skill", "rank_u")
COMPARED = ("rmse_minus_", "crps_fair_minus_")
Record = dict[str, object]


def check_table_path(path: str | Path) -> None:
    """Raise UserError unless the name ends in .json or .csv."""
    if Path(path).suffix not in (".json", ".csv"):
        raise UserError(f"cannot write scores to {path}: expected a name that ends in .json or .csv")


def dumps(records: list[Record], suffix: str) -> str:
    """Records as a JSON list or as CSV, by the ending; columns are the keys of the first, what is not a number is null."""
    records = [{key: None if value != value else value for key, value in r.items()} for r in records]
    if suffix == ".json":
        return "[\n" + ",\n".join(json.dumps(r, allow_nan=False) for r in records) + "\n]\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]) if records else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def duration(seconds: float | None) -> str:
    """'6 h', '2.5 d'; empty for analyses."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 * size if unit == "d" and seconds % size else size):
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.4g} s"


def leads(records: Iterable[Record], most: int) -> list[float | None]:
    """At most so many lead times, evenly chosen from those after zero."""
    every = sorted({r["lead_time"] for r in records if r["lead_time"]})
    if not every:
        return sorted({r["lead_time"] for r in records}, key=lambda v: v or 0.0)[:1]
    if len(every) <= most:
        return every
    return [every[round((k + 1) * len(every) / most) - 1] for k in range(most)]


def format_number(value: object) -> str:
    """Three digits; a count as it is."""
    if isinstance(value, int):
        return str(value)
    return "" if value is None else f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def format_table(records: list[Record], most_leads: int = 5) -> str:
    """Readable tables: of the fields, of views of them, of extremes; a block per variable and lead, a row per system."""
    chosen = leads(records, most_leads)
    plain = [r for r in records if not viewed(str(r["variable"]))[1]]
    views = [r for r in records if viewed(str(r["variable"]))[1]]
    lines = _table(plain, chosen, SHOWN)
    if views:
        lines += ["", "means over neighbours, energy, gradients", *_table(views, chosen[-1:], SHOWN_OF_VIEWS)]
    labels = dict.fromkeys(str(r["metric"]).removeprefix("events_") for r in records if str(r["metric"]).startswith("events_"))
    for label in labels:
        columns = [f"{name}_{label}" for name in ("twcrps", "brier", "rev", "events", "independent_events")]
        lines += ["", f"exceedances of the {label[1:]} % quantile of the training climatology", *_table(records, chosen, columns)]
    differences = [r for r in plain if str(r["metric"]).startswith(COMPARED) and r["lead_time"] in chosen and r["low"] is not None]
    if differences:
        lines += ["", "paired differences, negative where the first is better"]
    for r in differences:
        lead = f", {duration(r['lead_time'])}" if r["lead_time"] is not None else ""
        metric, other = str(r["metric"]).split("_minus_")
        lines.append(f"  {r['variable']}{lead}: {metric} of {r['system']} minus {other}: {_cell(r)}")
    return "\n".join(lines)


def _table(records: list[Record], chosen: list[float | None], shown: Sequence[str]) -> list[str]:
    """A row per variable, lead and system that has one of the metrics; metrics that nobody has are left out."""
    lookup = {(r["variable"], r["lead_time"], r["system"], r["metric"]): r for r in records}
    systems = list(dict.fromkeys(r["system"] for r in records))
    found = {r["metric"] for r in records}
    columns, lines = [m for m in shown if m in found], []
    rows = [["", "", *columns]]
    for variable in dict.fromkeys(r["variable"] for r in records):
        for lead in chosen:
            title = variable + (f", {duration(lead)}" if lead is not None else "")
            for system in systems:
                cells = [lookup.get((variable, lead, system, m)) for m in columns]
                if any(cells):
                    rows.append([title, system, *map(_cell, cells)])
                    title = ""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        lines += [""] if row[0] else []
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", f"{row[1]:<{widths[1]}}", *map(str.rjust, row[2:], widths[2:])]))
    return lines


def _cell(record: Record | None) -> str:
    if record is None or record["value"] is None:
        return "-"
    interval = "" if record["low"] is None else f" [{format_number(record['low'])}, {format_number(record['high'])}]"
    return format_number(record["value"]) + interval
