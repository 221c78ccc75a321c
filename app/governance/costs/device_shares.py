"""The devices of a pool, and how much of each it has reserved, for the prices of its time."""

from __future__ import annotations

from sqlalchemy import text

from app.governance.costs.pricing import DeviceShare
from app.kernel.database import Database

_SHARES = text("""
    SELECT device.id, device.type, device.kind, device.uuid, reservation_device.bytes, device.capacity_bytes
    FROM reservation_device JOIN device ON device.id = device_id
    WHERE reservation_id = CAST(:id AS uuid) ORDER BY device.id
""")


def of_reservation(database: Database, reservation_id: str) -> dict[str, DeviceShare]:
    """Return the shares of a pool's reservation as it is now, by the UUID of the device, or else its id."""
    with database.work() as work:
        return {
            row.uuid or row.id: DeviceShare(row.id, row.type, row.kind, row.bytes, row.capacity_bytes)
            for row in work.rows(_SHARES, {"id": reservation_id})
        }
