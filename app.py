"""The program's front door: ``python app.py``.

Until the browser app stands here, this starts a run on the embedded models and follows it in the terminal;
arguments are those of ``python -m grpo_engine train``.
"""

from __future__ import annotations

import sys

from grpo_engine.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
