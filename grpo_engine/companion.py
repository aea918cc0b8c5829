"""The command line of a rank that is not the first: it goes along with the run and says nothing."""

from __future__ import annotations

import logging
import threading

from .checkpoint_folder import CheckpointError
from .config import ConfigError
from .control import RunControl
from .distributed import RankLost, Ranks
from .session import Companion
from .trainer import TrainingFailed

log = logging.getLogger(__name__)


def accompany(world: Ranks) -> int:
    """Work this rank's share of whatever the first rank runs; returns the exit code.

    The work is in a thread of its own, so that this one is free to take signals.
    """
    outcome: list[str] = []

    def work() -> None:
        try:
            outcome.append(Companion(world, RunControl()).run())
        except (TrainingFailed, RankLost):  # on every rank at once: the first one says it
            pass
        except (ConfigError, CheckpointError) as error:
            world.watch.fail(str(error))
        except Exception as error:  # the last line of defence: the first rank must hear of it
            log.exception("rank %d failed", world.rank)
            world.watch.fail(f"{type(error).__name__}: {error}")

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join()
    return 0 if outcome else 1
