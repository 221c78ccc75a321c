"""Dependencies that are injected into the endpoints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Request

from app.access.limits.store import CallLimitTable
from app.api.fleet.join_attempts import JoinAttempts
from app.api.telemetry.requests import RequestMetrics
from app.catalog.catalog import Catalog, CatalogSource
from app.catalog.served import ServedCatalog
from app.devices.inventory import Devices
from app.governance.costs.gate import BudgetGate
from app.inference.prediction.service import Predictions
from app.inference.splits.table import SplitTable
from app.kernel import ids
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.live.live_settings import LiveSettings
from app.kernel.settings import Settings
from app.memory.recall.service import Recall
from app.scheduler.operator_commands import OperatorCommands
from app.workflows.runs.service import Runs


@dataclass(slots=True)
class Services:
    """The dependencies of the endpoints, one instance per process."""

    #: The settings of this moment: they are replaced when run-time settings change.
    settings: Settings
    database: Database
    publisher: CeleryPublisher
    runs: Runs
    catalogs: CatalogSource
    devices: Devices
    operator_commands: OperatorCommands
    #: Who answers: an id of this start, so that another API on the same address is not mistaken for this one.
    instance: str = field(default_factory=lambda: str(ids.new_id()))
    #: The run-time settings and the limits on calls, which change while the process runs.
    live: LiveSettings = field(init=False)
    call_limits: CallLimitTable = field(init=False)
    #: Finds what was said; by its words alone until the application has started.
    recall: Recall = field(init=False)
    #: Counts the requests to this process.
    request_metrics: RequestMetrics = field(default_factory=RequestMetrics)
    #: Counts the hosts that try to join at this process.
    join_attempts: JoinAttempts = field(default_factory=JoinAttempts)
    #: The expected times of runs.
    predictions: Predictions = field(init=False)
    #: The splits that divide calls and runs now.
    splits: SplitTable = field(init=False)
    #: Refuses new work whose budget is used up.
    budgets: BudgetGate = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the settings of the start."""
        if not isinstance(self.catalogs, ServedCatalog):
            self.catalogs = ServedCatalog(self.catalogs, self.settings.serving)
        self.live = LiveSettings(self.settings, self._apply)
        self.call_limits = CallLimitTable(self.settings.limits)
        self.recall = Recall(self.database)
        self.predictions = Predictions(self.database, lambda: self.catalog, lambda: self.settings.predictions)
        self.splits = SplitTable(self.database, is_told=True)
        self.budgets = BudgetGate(self.database, lambda: self.settings.costs)
        self.runs = replace(
            self.runs,
            expect=self.predictions.expect,
            assign=self.splits.submission,
            afford=self.budgets.check_run,
        )

    def _apply(self, settings: Settings) -> None:
        self.settings = settings
        self.runs.policy.retention = settings.runs.retention
        self.call_limits.defaults = settings.limits
        assert isinstance(self.catalogs, ServedCatalog)
        self.catalogs.follow(settings)

    @property
    def always_on(self) -> tuple[str, ...]:
        """The models that have a pool at all times."""
        return (*self.settings.pools.models, *self.settings.serving.resident)

    @property
    def catalog(self) -> Catalog:
        """The catalogue of this moment."""
        return self.catalogs.current()


async def _of_app(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


#: The type of an endpoint's argument that receives the services.
InjectedServices = Annotated[Services, Depends(_of_app)]
