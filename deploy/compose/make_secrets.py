"""
Makes the secrets of deploy/compose.yaml: passwords that fit together, each in a file that only its owner may write.

    python3 deploy/compose/make_secrets.py [FOLDER]

What exists is kept: run it again after an update. It needs no package. Containers read these files as another user, and
Compose mounts them as they are, so they are readable for all; their folder is not: only its owner may enter it.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "secrets"


def make(folder: Path) -> list[str]:
    """Write the files that are missing. Returns their names."""
    folder.mkdir(mode=0o700, exist_ok=True)
    made: list[str] = []

    def ensure(name: str, content: str) -> str:
        path = folder / name
        if not path.exists():
            path.touch(mode=0o644)
            path.write_text(content, encoding="utf-8")
            made.append(name)
        return path.read_text(encoding="utf-8").strip()

    postgres = ensure("postgres_password", secrets.token_urlsafe(32))
    valkey = ensure("valkey_password", secrets.token_urlsafe(32))
    ensure("grafana_password", secrets.token_urlsafe(24))
    ensure("metrics_key", "")
    ensure("database_url", f"postgresql://arriero:{postgres}@postgres:5432/arriero")
    ensure("redis_url", f"redis://:{valkey}@valkey:6379/0")
    # Nothing is evicted: the queues are in it.
    settings = f"dir /data\nappendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\nrequirepass {valkey}\n"
    ensure("valkey_conf", settings)
    return made


if __name__ == "__main__":
    here = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    print(f"{here}: {', '.join(make(here)) or 'nothing is missing'}")  # noqa: T201 it is a program
