"""``runs.db``: everything every run did, and what others ask of it."""

from .connection import StoreError
from .store import Store

__all__ = ["Store", "StoreError"]
