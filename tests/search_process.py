"""One of several processes at a search, to be killed: `python -m tests.search_process DATABASE`.

It begins when it gets a line, takes a moment for each candidate, and then writes one to standard output.
"""

import sys
import time

from ncfm_engine import search as module
from ncfm_engine.spaces import Space

SPACE = Space({"width": (1, 2, 3, 4, 5), "norm": ("a", "b", "c", "d")}, lambda **_: None)
FAILING = {"width": 2, "norm": "c"}
MOMENT = 0.1  # seconds


def value(architecture) -> float:
    return 10.0 * architecture["width"] + "abcd".index(architecture["norm"])


def score(architecture, check):
    time.sleep(MOMENT)
    check(value(architecture))
    print(dict(architecture), flush=True)
    if architecture == FAILING:
        raise ValueError("not to be trained")
    return [value(architecture) - 1, value(architecture) + 1]


def at_work(database: str):
    module.HEARTBEAT_SECONDS, module.GRACE_SECONDS, module.WAIT_SECONDS = 1, 3, 0.1
    study = module.open_study(database, "moments")
    return study, module.search(study, SPACE, list(SPACE), score)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    at_work(sys.argv[1])
