"""Bundles: a run in one ``.zip`` file, to be looked at elsewhere without the database it comes from.

    write_bundle(store, "0007-tiny-k3f9", Path("k3f9.zip"))     # a run that has ended
    read_bundle(other_store, Path("k3f9.zip"))                  # becomes a run there, for reading only

What stands in the file says `writer.CONTENTS`, which its ``bundle.json`` repeats; the lines of its tables are
the classes of ``rows.py``. ``archive.py`` and ``contents.py`` keep harm out. Nothing here imports torch, so an
app can show a recorded run before it has loaded anything.
"""

from .archive import BundleError
from .importer import Origin, inspect_bundle, origin, read_bundle
from .writer import Images, write_bundle

__all__ = ["BundleError", "Images", "Origin", "inspect_bundle", "origin", "read_bundle", "write_bundle"]
