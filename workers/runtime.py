"""The runtime of a worker process: the dependencies of its tasks, created once when the process starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from celery import Celery

from app.catalog.catalog import Catalog, CatalogSource
from app.catalog.served import ServedCatalog, live_catalog
from app.governance.costs.gate import BudgetGate
from app.inference.hooks.selection import HookTarget
from app.inference.refinement_counters import RefinementCounters
from app.inference.routing.definitions import ModelRouter
from app.inference.routing.fleet import FleetReader
from app.inference.splits.table import SplitTable
from app.kernel import addresses, ids
from app.kernel import database as databases
from app.kernel.activity import Activity
from app.kernel.broker import CeleryPublisher
from app.kernel.database import Database
from app.kernel.live import live_settings
from app.kernel.live.notices import ChangeListener
from app.kernel.security.secrets import Secrets
from app.kernel.settings import Settings
from app.memory.conversations.hot import HotConversations
from app.memory.recall.query_vectors import QueryEmbedder
from app.memory.recall.service import Recall
from app.scheduler.residencies import Residencies
from app.scheduler.wake_up import AgentCalls, WakingPublisher
from app.workflows.runs.changes.transactions import RunPolicy
from app.workflows.runs.recovery import owners
from app.workflows.runs.recovery.overdue import SweepCursor
from app.workflows.runs.service import Runs
from app.workflows.state_machine.outcomes import TokenUsage
from workers.engine import Engine
from workers.hooks.processes import HookProcesses
from workers.hooks.remote_answers import RemoteAnswers
from workers.hooks.session import HookContext, HookSession
from workers.leases import Leases
from workers.memory.counting import TokenCounts
from workers.memory.model_file import LoadedModelFile
from workers.messaging.step_events import StepEvents
from workers.telemetry.charges import Charges
from workers.telemetry.work import WorkFigures
from workers.token_reports import TokenReports
from workers.token_writer import TokenWriter
from workers.tokenizers import Tokenizers


@dataclass(frozen=True, slots=True)
class Resources:
    """The connections to the database and the catalogue of a process."""

    database: Database
    catalogs: CatalogSource

    @property
    def catalog(self) -> Catalog:
        """The catalogue of this moment."""
        return self.catalogs.current()

    @classmethod
    def open(cls, settings: Settings, connections: Callable[[Catalog], int]) -> Resources:
        """
        Read the catalogue, and open the database for as many `connections` as it calls for.

        Raises DatabaseBehind, DatabaseUnreachable: a worker never runs on a schema of another version.
        """
        catalogs = live_catalog(settings)
        url = addresses.of(settings).database_url
        size = connections(catalogs.current())
        database = databases.open_at_head(url, pool_size=size)
        catalogs.apply(live_settings.read(settings, database).serving)
        if (needed := connections(catalogs.current())) > size:
            database.close()
            database = Database(url, pool_size=needed)
        return cls(database, catalogs)

    def close(self) -> None:
        """Close the connections."""
        self.database.close()


@dataclass(slots=True)
class Runtime:
    """The dependencies of the tasks of one process."""

    #: The settings of this moment: they are replaced when run-time settings change.
    settings: Settings
    runs: Runs
    leases: Leases
    #: The engine, in a pool; None in a control worker.
    engine: Engine | None
    #: The secrets that `http` steps may send.
    secrets: Secrets
    catalogs: CatalogSource
    #: Where the scheduled jobs, and the steps, note that something happens.
    activity: Activity
    #: Tells agents what a reconcile pass has changed.
    agents: AgentCalls
    #: The tokens of the texts that this process writes now, for views.
    token_reports: TokenReports = field(default_factory=TokenReports)
    #: The writer of token streams, in a pool; None in a control worker.
    tokens: TokenWriter | None = None
    #: Where the last sweep of this process ended.
    sweep_cursor: SweepCursor = field(default_factory=SweepCursor)
    #: The last messages of conversations in Redis; without it they are read from the record.
    hot: HotConversations | None = None
    #: Tokens of stored messages by the model of this process, in a pool.
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    #: Count tokens for steps that need no pool.
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    #: What Flower shows of the steps; silent until the worker is attached.
    events: StepEvents = field(default_factory=StepEvents)
    #: Counts what this process does, for metrics.
    figures: WorkFigures = field(default_factory=WorkFigures)
    #: The processes of Python hooks.
    hook_processes: HookProcesses = field(default_factory=HookProcesses)
    #: Asks servers for hooks that combine answers.
    remote_answers: RemoteAnswers = field(init=False)
    #: Prices what attempts did.
    charges: Charges = field(default_factory=Charges)
    #: Hears of changed settings; None before `follow_settings`.
    listener: ChangeListener | None = None
    #: Finds what was said; by its words alone until the worker has started.
    recall: Recall = field(init=False)
    #: The file of the embedding model of this process, in a pool that loaded one.
    model_file: LoadedModelFile | None = None
    #: The settings with which the process started.
    base: Settings = field(init=False)
    #: Messages and connections of Redis; None in tests of steps alone.
    broker: CeleryPublisher | None = None
    #: For how long clients want models to stay loaded; None in a pool.
    residencies: Residencies | None = None
    #: Counts refined outputs; None in a pool.
    refinements: RefinementCounters | None = None

    def __post_init__(self) -> None:
        """Without a broker, recall has no vectors of queries."""
        self.base = self.settings
        self.remote_answers = RemoteAnswers(lambda: self.catalog, lambda: self.settings, self.secrets)
        self.recall = Recall(self.runs.database)

    @property
    def catalog(self) -> Catalog:
        """The catalogue of this moment."""
        return self.catalogs.current()

    def priced(self, usage: TokenUsage, model: str | None, device_us: int | None) -> TokenUsage:
        """Return the usage with what it cost, and count that once; `device_us` as in `Charges.priced`."""
        entry = None if model is None else self.catalog.find(model)
        found = self.charges.priced(usage, entry, self.settings.costs, device_us)
        if model is not None:
            self.figures.count_cost(model, found.cost)
        return found

    def begin_device_time(self, model: str | None) -> Callable[[], int | None]:
        """Work with a model begins. Returns what ends it, and then returns its share of the devices' time."""
        if self.engine is None or model is None:
            return lambda: None
        shared, shares = self.charges.time, list[int]()
        mark = shared.begin()

        def end() -> int:
            if not shares:
                shares.append(shared.end(mark))
            return shares[0]

        return end

    def hooks_for(self, model: str | None, workflow: str, namespace: str) -> HookSession:
        """The hooks of an attempt."""
        context = HookContext(self.secrets, self.hook_processes, self.figures.hooks, self.remote_answers)
        target = HookTarget(model or "", workflow, namespace)
        return HookSession.of(context, self.settings.hooks if model else (), self.settings.http, target)

    @property
    def owner(self) -> str:
        """The owner of the leases: the incarnation of this process, which no other process ever has."""
        return self.leases.owner

    def follow_settings(self, redis_url: str) -> None:
        """Apply the run-time settings of the installation, now and whenever they change."""
        self.listener = live_settings.follow(self.settings, self.runs.database, redis_url, self._apply)

    def _apply(self, settings: Settings) -> None:
        self.settings = settings
        self.runs.policy.retention = settings.runs.retention
        if isinstance(self.catalogs, ServedCatalog):
            self.catalogs.follow(settings)
        if self.hot is not None:
            self.hot.settings = settings.conversations

    def close(self) -> None:
        """Stop the renewal of leases and the reports, close the engine, and write the last tokens."""
        if self.listener is not None:
            self.listener.close()
        self.leases.close()
        self.recall.close()
        self.token_reports.close()
        self.tokenizers.close()
        self.activity.close()
        self.agents.close()
        if self.residencies is not None:
            self.residencies.close()
        if self.refinements is not None:
            self.refinements.close()
        if self.engine is not None:
            self.engine.close()
        if self.tokens is not None:
            self.tokens.close()
        self.hook_processes.close()
        self.remote_answers.close()
        self.figures.close()


def start(
    app: Celery,
    settings: Settings,
    resources: Resources,
    name: str,
    *,
    engine: Engine | None = None,
    incarnation: str | None = None,
) -> Runtime:
    """
    Create the runtime of the process `name`, and start the renewal of leases.

    `incarnation` is an id that the parent gave to this process alone, so that the parent can expire its leases when the
    process dies. Without one a random id is used.
    """
    redis_url = addresses.of(settings).redis_url
    broker = CeleryPublisher(app, redis_url)
    router = ModelRouter(resources.catalogs.current, FleetReader(resources.database).current)
    gate = BudgetGate(resources.database, lambda: runtime.settings.costs)
    splits = SplitTable(resources.database)
    runs = Runs(
        resources.database,
        WakingPublisher(broker),
        RunPolicy.of(settings.runs),
        route=router,
        assign=splits.submission,
        afford=gate.check_run,
    )
    owner = owners.owner_of(name, socket.gethostname(), os.getpid(), incarnation or ids.new_secret()[:8])
    stalled: Callable[[], timedelta] = engine.stalled_for if engine is not None else lambda: timedelta(0)
    leases = Leases(runs, owner, interval=settings.runs.heartbeat, stalled_for=stalled)
    leases.start()
    reports = TokenReports()
    if engine is not None:
        reports.start(broker, owner)
    runtime = Runtime(
        settings,
        runs,
        leases,
        engine,
        Secrets(settings.secrets_dir),
        resources.catalogs,
        Activity(redis_url),
        AgentCalls(redis_url),
        reports,
        None if engine is None else TokenWriter(redis_url),
        residencies=Residencies(redis_url) if engine is None else None,
        hot=HotConversations(resources.database, broker, settings.conversations),
        refinements=RefinementCounters(redis_url) if engine is None else None,
        broker=broker,
    )
    embed = QueryEmbedder(redis_url, lambda: runtime.catalog, lambda: runtime.settings.recall)
    runtime.recall = Recall(resources.database, embed)
    runtime.follow_settings(redis_url)
    runtime.figures.start(resources.database, lambda model: runtime.catalog.find(model) is not None)
    return runtime
