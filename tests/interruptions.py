"""Ways to interrupt a run, for the tests of resuming."""

from ncfm_engine.stop import StopRequest


class StopAfter(StopRequest):
    """Requests to stop once it was asked `times` times."""

    def __init__(self, times: int):
        super().__init__()
        self.asked, self.times = 0, times

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked > self.times
