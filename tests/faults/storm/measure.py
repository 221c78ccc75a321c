"""What is measured of a storm: the availability of the API, and memory and open files of each process."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx2
import psutil

from tests.faults.installation_chaos import FILES, GROWTH
from tests.faults.storm.site import Site

#: Seconds between two probes, and for the answer to one.
PROBE_EVERY, PROBE_TIMEOUT = 0.25, 2.0
PATHS = ("/healthz", "/v1/runs?limit=1")
#: Seconds between two samples of processes.
_SAMPLE_EVERY = 2.0
#: Seconds of a new process that do not count: it loads modules and opens its connections.
WARM_UP = 30.0
#: Least samples of a process for a fit.
_LEAST = 15


@dataclass
class Availability:
    """The answers to the probes of one path."""

    probes: int = 0
    answered: int = 0
    #: Longest time between two answered probes, in seconds.
    longest_gap: float = 0.0
    seconds: list[float] = field(default_factory=list)
    _last: float = 0.0

    def add(self, at: float, took: float | None) -> None:
        """Count a probe that began then; None: it was not answered."""
        self.probes += 1
        if took is None:
            return
        self.answered += 1
        self.seconds.append(took)
        if self._last:
            self.longest_gap = max(self.longest_gap, at - self._last)
        self._last = max(self._last, at)

    def as_json(self) -> dict[str, float]:
        times = sorted(self.seconds) or [0.0]
        return {
            "probes": self.probes,
            "answered": self.answered,
            "share": round(self.answered / max(1, self.probes), 5),
            "longest_gap_s": round(self.longest_gap, 2),
            "median_s": round(statistics.median(times), 4),
            "p99_s": round(times[min(len(times) - 1, int(0.99 * len(times)))], 3),
        }


class Sample(NamedTuple):
    """Memory in bytes and open files of a process, so many seconds after its first sample."""

    age: float
    rss: int
    files: int


class Growth(NamedTuple):
    """The fitted growth of a kind of process: per hour, with the standard error, and over the time that was seen."""

    processes: int
    samples: int
    span: float
    bytes_per_hour: float
    bytes_error: float
    files_per_hour: float
    files_error: float

    def problems(self, kind: str) -> list[str]:
        """Growth beyond the tolerance, by more than two standard errors, over the time that was seen."""
        hours = self.span / 3600
        found = []
        if (size := (self.bytes_per_hour - 2 * self.bytes_error) * hours) > GROWTH:
            found.append(f"memory of {kind} grew by {size / 2**20:.0f} MiB in {self.span:.0f} s")
        if (files := (self.files_per_hour - 2 * self.files_error) * hours) > FILES:
            found.append(f"open files of {kind} grew by {files:.0f} in {self.span:.0f} s")
        return found


class Measurement:
    """Probes and samples in the background."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self.availability = {path: Availability() for path in PATHS}
        #: By kind and then by process.
        self.samples: defaultdict[str, dict[tuple[int, float], list[Sample]]] = defaultdict(dict)
        self._born: dict[tuple[int, float], float] = {}
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._probe, self._sample)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Measure no more."""
        self._finished.set()
        for thread in self._threads:
            thread.join()

    def forget_samples(self) -> None:
        """Begin anew with the samples."""
        with self._lock:
            self.samples.clear()

    def growth(self) -> dict[str, Growth]:
        """The growth by kind of process."""
        with self._lock:
            found = {kind: fit(processes) for kind, processes in self.samples.items()}
        return {kind: one for kind, one in found.items() if one is not None}

    def most(self) -> dict[str, tuple[int, int]]:
        """By kind, the most memory and the most open files of a process."""
        with self._lock:
            return {
                kind: (
                    max(sample.rss for samples in processes.values() for sample in samples),
                    max(sample.files for samples in processes.values() for sample in samples),
                )
                for kind, processes in self.samples.items()
            }

    def _probe(self) -> None:
        with ThreadPoolExecutor(24) as threads, self._site.client(PROBE_TIMEOUT) as client:
            due = time.monotonic()
            while not self._finished.is_set():
                for path in PATHS:
                    threads.submit(self._ask, client, path)
                due += PROBE_EVERY
                self._finished.wait(max(0.0, due - time.monotonic()))

    def _ask(self, client: httpx2.Client, path: str) -> None:
        began, took = time.monotonic(), None
        with contextlib.suppress(httpx2.HTTPError, httpx2.StreamError):
            if client.get(path).is_success:
                took = time.monotonic() - began
        with self._lock:
            self.availability[path].add(began, took)

    def _sample(self) -> None:
        while not self._finished.wait(_SAMPLE_EVERY):
            for name, pid in self._site.pids().items():
                if name.startswith("requeue"):
                    continue  # it lives for a moment
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    key = pid, process.create_time()
                    now = time.monotonic()
                    sample = Sample(now - self._born.setdefault(key, now), process.memory_info().rss, process.num_fds())
                    with self._lock:
                        self.samples[name.partition(" ")[0]].setdefault(key, []).append(sample)


def fit(processes: Mapping[object, Sequence[Sample]]) -> Growth | None:
    """
    Fit memory and open files of one kind linearly to age, with an intercept for each process (the within estimator).

    None without a process that was seen for long enough.
    """
    warm = [[one for one in samples if one.age > WARM_UP] for samples in processes.values()]
    warm = [samples for samples in warm if len(samples) >= _LEAST]
    if not warm:
        return None
    span = max(samples[-1].age - samples[0].age for samples in warm)
    ages = _centred([[one.age for one in samples] for samples in warm])
    rss = _centred([[one.rss for one in samples] for samples in warm])
    files = _centred([[one.files for one in samples] for samples in warm])
    return Growth(len(warm), len(ages), span, *_slope(ages, rss, len(warm)), *_slope(ages, files, len(warm)))


def _centred(groups: Sequence[Sequence[float]]) -> list[float]:
    """The values of all groups, each less the mean of its group."""
    return [value - statistics.fmean(group) for group in groups for value in group]


def _slope(ages: Sequence[float], values: Sequence[float], groups: int) -> tuple[float, float]:
    """Slope and its standard error per hour, of values and ages that are centred by group."""
    square = sum(age * age for age in ages)
    if square <= 0:
        return 0.0, 0.0
    slope = sum(age * value for age, value in zip(ages, values, strict=True)) / square
    rest = sum((value - slope * age) ** 2 for age, value in zip(ages, values, strict=True))
    error = math.sqrt(rest / max(1, len(ages) - groups - 1) / square)
    return 3600 * slope, 3600 * error
