"""Draw from a seed when a soak does what, and keep it as one line of JSON."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

# Seconds that a fault lasts; 0: it is over at once.
KINDS: Mapping[str, float] = {
    "kill_rank": 0,
    "kill_launcher": 0,
    "kill_loader_worker": 0,
    "kill_upload_worker": 0,
    "stop_rank": 20,
    "store_down": 15,
    "store_slow": 20,
    "store_503": 15,
    "store_truncates": 15,
    "disk_full": 15,
    "clock_jump": 25,
}
PLACES = ("loss", "loss_gradient", "gradient", "weight")  # of a NaN
BATCHES_PER_MINUTE = 20
FAULTS_PER_MINUTE = 3
FIRST, LAST = 0.05, 0.7  # of the time, between which faults begin; the rest shows what stays behind
MINUTES_PER_NAN, LEAST_BETWEEN_NANS = 2, 5  # batches: three bad ones in a row are a rollback
MOST_WEIGHTS = 3  # of the NaNs: each cuts the learning rates, and the sixth rollback ends a run


@dataclass(frozen=True)
class Planned:
    """One fault.

    Attributes:
        at: Seconds on the schedule's clock, which runs while the training does, and slowly while it starts.
        kind: Of `KINDS`.
        seconds: Until it is over.
        draw: 0 to 1: which process it hits, and in which way.
    """

    at: float
    kind: str
    seconds: float
    draw: float


@dataclass(frozen=True)
class Nan:
    """A value that is not finite on one rank, each time the run comes to this batch; the first is 0."""

    batch: int
    rank: int
    place: str  # of `PLACES`

    @property
    def is_skipped(self) -> bool:
        """Return whether the guard has only to skip the batch. A weight makes it roll back."""
        return self.place != "weight"


@dataclass(frozen=True)
class Schedule:
    """All faults of one run, in order."""

    seed: int
    minutes: float
    batches: int  # of the whole run
    faults: list[Planned]
    nans: list[Nan]

    def to_json(self) -> str:
        """Return the schedule as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """Return the schedule of `to_json`; ValueError, TypeError or KeyError if it is another text."""
        found = json.loads(text)
        faults = [Planned(**fault) for fault in found["faults"]]
        unknown = {fault.kind for fault in faults} - KINDS.keys()
        if unknown:
            raise ValueError(f"the kinds {sorted(unknown)} are not known: choose from {sorted(KINDS)}")
        return cls(found["seed"], found["minutes"], found["batches"], faults, [Nan(**nan) for nan in found["nans"]])

    def kinds(self) -> Counter[str]:
        """Return how many there are of each kind, the NaNs by their place."""
        return Counter(fault.kind for fault in self.faults) + Counter(f"nan_{nan.place}" for nan in self.nans)


def draw_schedule(seed: int, minutes: float, num_ranks: int = 2) -> Schedule:
    """Draw every kind as often as the others, give or take one, at random times; a NaN of each place, then others."""
    rng = random.Random(seed)
    num_faults = max(len(KINDS), round(FAULTS_PER_MINUTE * minutes))
    kinds = [kind for _ in range(-(-num_faults // len(KINDS))) for kind in rng.sample(list(KINDS), len(KINDS))]
    times = sorted(rng.uniform(FIRST, LAST) * 60 * minutes for _ in range(num_faults))
    faults = [
        Planned(round(at, 2), kind, KINDS[kind], round(rng.random(), 4))
        for at, kind in zip(times, kinds[:num_faults], strict=True)
    ]
    batches = round(BATCHES_PER_MINUTE * minutes)
    num_nans = len(PLACES) + int(minutes / MINUTES_PER_NAN)
    slots = sorted(rng.sample(range(1, max(num_nans + 1, batches // LEAST_BETWEEN_NANS)), num_nans))
    places = [*PLACES, *(rng.choice(PLACES) for _ in range(num_nans - len(PLACES)))]
    weights = [place for place in places if place == "weight"][MOST_WEIGHTS:]
    for _ in weights:  # too many
        places.reverse()
        places[places.index("weight")] = "gradient"
        places.reverse()
    rng.shuffle(places)
    nans = [
        Nan(slot * LEAST_BETWEEN_NANS, rng.randrange(num_ranks), place)
        for slot, place in zip(slots, places, strict=True)
    ]
    return Schedule(seed, minutes, batches, faults, nans)
