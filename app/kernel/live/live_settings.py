"""
The settings of this moment: those with which the process started, under the run-time values of the installation.

A stored value that is not valid here, as after a change of version, is left out and logged; all others hold.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from app.kernel import log
from app.kernel import settings as all_settings
from app.kernel.database import Database
from app.kernel.errors import DatabaseUnreachable, InvalidSettings
from app.kernel.live import versions
from app.kernel.live.notices import ChangeListener, ChangeTopic
from app.kernel.live.versions import SettingVersion
from app.kernel.settings import Settings

_log = log.get(__name__)


class LiveSettings:
    """The settings of this moment. Safe for threads."""

    def __init__(self, base: Settings, on_change: Callable[[Settings], object]) -> None:
        """`on_change` is called with the settings after each change, under a lock."""
        #: The settings with which the process started.
        self.base = base
        self._on_change = on_change
        self._lock = threading.Lock()
        self._level = base.log.level
        #: The version that holds here.
        self.version = SettingVersion()

    def apply(self, version: SettingVersion) -> None:
        """Make a version hold, unless it is older than the one that does."""
        with self._lock:
            if version.version <= self.version.version:
                return
            current = _with_valid(self.base, version.values)
            self.version = version
            if current.log.level != self._level:
                self._level = current.log.level
                log.set_level(current.log)
            self._on_change(current)
        _log.info("settings_changed", version=version.version, keys=sorted(version.changes))

    def refresh(self, database: Database) -> None:
        """Make the newest version hold. While the database does not answer, nothing changes; this is logged."""
        try:
            with database.work() as work:
                found = versions.newest(work)
        except DatabaseUnreachable as error:
            _log.warning("settings_not_read", error=str(error))
            return
        self.apply(found)


def read(base: Settings, database: Database) -> Settings:
    """Return the settings of this moment, without following them. Raises DatabaseUnreachable."""
    with database.work() as work:
        return _with_valid(base, versions.newest(work).values)


def follow(
    base: Settings, database: Database, redis_url: str, on_change: Callable[[Settings], object] = lambda _: None
) -> ChangeListener:
    """Apply the run-time settings of the installation, now and whenever they change, until the listener is closed."""
    live = LiveSettings(base, on_change)
    live.refresh(database)
    listener = ChangeListener(redis_url, {ChangeTopic.SETTINGS: lambda: live.refresh(database)})
    listener.start()
    return listener


def _with_valid(base: Settings, values: Mapping[str, Any]) -> Settings:
    """Return the settings with all values that are valid."""
    able = all_settings.changeable()
    try:
        return all_settings.with_values(base, {key: value for key, value in values.items() if key in able}, "run time")
    except InvalidSettings:
        current = base
    for key, value in values.items():
        if key in able:
            try:
                current = all_settings.with_values(current, {key: value}, "run time")
            except InvalidSettings as error:
                _log.error("setting_not_applied", key=key, error=str(error))
    return current
