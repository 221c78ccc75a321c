"""
Answers of servers for the hook `combine`: the server of a model of the catalogue is asked directly, and no pool.

A hook that waited for a second pool while it holds a request of the first could wait for ever: the other pool's hooks
may wait for this one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

from app.catalog.catalog import Catalog
from app.catalog.model import Model
from app.inference.requests import Generated, GenerateRequest
from app.kernel.errors import StepFailure
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from workers.engine.remote.engine import RemoteEngine
from workers.engine.remote.options import RemoteOptions
from workers.hooks.processes import HookBroken, HookTimeout, StopSwitch


@dataclass(slots=True)
class RemoteAnswers:
    """The engines of servers that hooks have asked. Safe for threads."""

    catalog: Callable[[], Catalog]
    settings: Callable[[], Settings]
    secrets: Secrets
    _engines: dict[str, tuple[Model, RemoteEngine]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def model(self, name: str) -> Model:
        """Return the model that is asked. Raises HookBroken where it may not be."""
        found = self.catalog().resolve(name)
        if found is None or found.remote is None:
            raise HookBroken(f"the catalogue has no model {name!r} that a server serves")
        if not found.remote.allowed:
            raise HookBroken(f"the entry of {found.name} does not allow its server: set `allowed = true`")
        return found

    def ask(self, model: Model, request: GenerateRequest, seconds: float, stop: StopSwitch) -> Generated:
        """Return the answer of the server. Raises HookBroken, HookTimeout, CancelledError."""
        ticket = self._engine(model).generate(request)
        stop.stops_by(ticket.cancel)
        try:
            return ticket.result(seconds)
        except TimeoutError:
            ticket.cancel()
            raise HookTimeout(f"{model.name} did not answer within {seconds:g} s") from None
        except CancelledError:
            raise
        except StepFailure as failure:
            # The message may quote the answer of the server, which may quote the prompt.
            raise HookBroken(f"{model.name} failed: {failure.reason}") from None
        finally:
            stop.stops_by(None)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for _, engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def _engine(self, model: Model) -> RemoteEngine:
        with self._lock:
            known = self._engines.get(model.name)
            if known is not None and known[0] == model:
                return known[1]
            if known is not None:
                known[1].close()
            engine = RemoteEngine(RemoteOptions.of(model, self.settings().http.ca_file, self.secrets))
            self._engines[model.name] = (model, engine)
            return engine
