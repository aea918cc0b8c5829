"""The program's front door: ``python app.py`` opens the app in a browser."""

from __future__ import annotations

import sys

from ui.serve import main

if __name__ == "__main__":
    sys.exit(main())
