"""All models and data that have a name."""

from __future__ import annotations

from collections.abc import Mapping

from leangen.catalog import clothes, flows, published, zoo
from leangen.catalog.sources import Entry

CATALOG: Mapping[str, Entry] = {
    entry.name: entry
    for entry in (*published.ENTRIES, *zoo.ENTRIES, *clothes.ENTRIES, *flows.ENTRIES)
}
"""Models by name."""
