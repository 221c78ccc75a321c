"""Signals are written and read."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text

from app.governance.signals import store
from app.governance.signals.names import Statistic
from app.governance.signals.sample import Sample, SignalLabels
from app.governance.signals.store import SignalQuery, SignalStore
from app.kernel.database import Database
from app.kernel.errors import InvalidInput

FIVE_MINUTES = timedelta(minutes=5)


def test_what_is_written_is_read_by_any_of_its_labels(database: Database) -> None:
    signals = SignalStore(database)
    labels = SignalLabels(model="chat", namespace="a")
    signals.write([Sample("error_rate", float(failed), labels) for failed in (1, 0, 0)])
    signals.write([Sample("error_rate", 1, SignalLabels(model="code", namespace="b")), Sample("error_rate", 0, labels)])

    everything = signals.read(SignalQuery("error_rate", FIVE_MINUTES))[""]
    assert (everything.mean, everything.observations) == (2 / 5, 5)
    by_model = signals.read(SignalQuery("error_rate", FIVE_MINUTES, by="model"))
    assert {name: value.mean for name, value in by_model.items()} == {"chat": 1 / 4, "code": 1.0}
    one = signals.read(SignalQuery("error_rate", FIVE_MINUTES, {"namespace": "a"}, by="model"))
    assert set(one) == {"chat"}
    assert signals.read(SignalQuery("queue_wait", FIVE_MINUTES)) == {}


def test_the_mean_of_parts_is_that_of_the_whole(database: Database) -> None:
    """Half of a large device and all of a small one are not three quarters."""
    signals = SignalStore(database)
    big, small = SignalLabels(host="h", device="big"), SignalLabels(host="h", device="small")
    signals.write([Sample("memory_utilisation", 45, big, 90), Sample("memory_utilisation", 10, small, 10)])

    found = signals.read(SignalQuery("memory_utilisation", FIVE_MINUTES))[""]
    assert (found.mean, found.least, found.greatest, found.last) == (0.55, 0.5, 1.0, 0.55)


def test_quantiles_are_kept_over_writes(database: Database) -> None:
    signals = SignalStore(database)
    for start in (1, 51):
        signals.write([Sample("response_time", n / 10) for n in range(start, start + 50)])

    found = signals.read(SignalQuery("response_time", FIVE_MINUTES))[""]
    for statistic, exact in ((Statistic.P50, 5.0), (Statistic.P95, 9.5), (Statistic.P99, 9.9)):
        assert found.statistic(statistic) == pytest.approx(exact, rel=0.05)
    assert found.statistic(Statistic.MAX) == 10.0


def test_beyond_the_limit_of_series_the_totals_stay_right(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_SERIES", 2)
    signals = SignalStore(database)
    for name in ("a", "b", "c", "d"):
        signals.write([Sample("tokens", 10, SignalLabels(model=name))])

    with database.work() as work:
        assert work.rows(text("SELECT count(*) AS n FROM signal_series"))[0].n <= 3
    assert signals.read(SignalQuery("tokens", FIVE_MINUTES))[""].total == 40


@pytest.mark.parametrize(
    ("sample", "named"),
    [(Sample("nonsense", 1), "nonsense"), (Sample("memory_utilisation", 1, SignalLabels(model="m")), "model")],
)
def test_what_no_signal_has_is_refused(database: Database, sample: Sample, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        SignalStore(database).write([sample])
