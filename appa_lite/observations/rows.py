"""Rows of a table by what they say, never by where they stand: duplicates, digests, which are withheld, what kind they are."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from appa_lite.core.errors import UserError
from appa_lite.core.random import derive

#: what makes a report the report it is, whatever value it carries
IDENTITY = ("time", "latitude", "longitude", "y", "x", "level", "variable", "station", "type", "source")


def drop_duplicates(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The table without rows that repeat another in every column, and how many there were."""
    kept = table[~table.duplicated()].reset_index(drop=True)
    return kept, len(table) - len(kept)


def hashes(table: pd.DataFrame, columns: Sequence[str] | None = None, seed: int = 0) -> np.ndarray:
    """A 64-bit number per row (N,) that depends on the seed and on what the row holds in ``columns`` (default: all)."""
    names = [c for c in (table.columns if columns is None else columns) if c in table]
    x = pd.util.hash_pandas_object(table[names], index=False, categorize=False).to_numpy(np.uint64)
    x = x ^ np.uint64(derive(seed, "rows"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64 (Steele et al. 2014): every bit counts
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def digest(numbers: np.ndarray) -> int:
    """One 63-bit number for a set of rows, from their hashes; the order does not matter."""
    return int.from_bytes(hashlib.sha256(np.sort(numbers).tobytes()).digest()[:8], "big") >> 1


def withheld(table: pd.DataFrame, share: float, seed: int, stations: Sequence[str] = ()) -> np.ndarray:
    """Bool (N,): rows that are kept out of an analysis to judge it by.

    A row is drawn, with probability ``share``, by a hash of the seed and of its identity (when, where, what, by whom), so
    that neither its value, nor the order of the file, nor rows that arrive later change whether it is.

    Raises:
        UserError: a station that is not in the table.
    """
    chosen = hashes(table, IDENTITY, seed) < np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    if not len(stations):
        return chosen
    if "station" not in table:
        raise UserError("withhold_stations needs a column 'station' in the observation file")
    names, wanted = table["station"].astype(str), set(map(str, stations))
    missing = sorted(wanted - set(names))
    if missing:
        raise UserError(f"withhold_stations: {', '.join(missing)} not in the file; it has {', '.join(sorted(set(names))[:30])}")
    return chosen | names.isin(wanted).to_numpy()


def kinds(table: pd.DataFrame) -> np.ndarray:
    """What each row (N,) is a measurement of and by what: ``variable``, or ``variable type`` where there is a type."""
    if "type" not in table:
        return table["variable"].astype(str).to_numpy(dtype=object)
    types = table["type"].where(table["type"].notna(), "").astype(str)
    return (table["variable"].astype(str) + " " + types).str.strip().to_numpy(dtype=object)
