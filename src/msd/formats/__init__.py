"""Formats of published draft heads: what other projects trained is read, checked to the last tensor, and written.

`msd` heads are folders of `msd.drafters.toolkit.checkpoint`; all other folders are recognised by their config and the
names of their tensors (`FORMATS`). docs/published_heads.md lists the formats.
"""

from msd.formats.engines import ENGINES, engine_named
from msd.formats.export import LAYOUTS, export, prepare
from msd.formats.hub import push_to_hub, save_pretrained
from msd.formats.load import Checked, check, drafter, load, method_of, register_folder
from msd.formats.table import FORMATS

__all__ = [
    "ENGINES", "FORMATS", "LAYOUTS", "Checked", "check", "drafter", "engine_named", "export", "load", "method_of",
    "prepare", "push_to_hub", "register_folder", "save_pretrained",
]  # fmt: skip
