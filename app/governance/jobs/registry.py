"""
The scheduled jobs of control workers. A job exists by its entry in `JOBS`, and nowhere else.

Beat, the workers, the validation of messages, `/v1/jobs` and `arriero jobs` all read this list.

To add a job:
1. Write `def run_x(runtime: Runtime) -> Mapping[str, object] | None` in a module of `workers/`. It returns what it
   did, such as `{"removed": 3}`; None or an empty mapping when there was nothing to do. It raises Unavailable while
   Postgres or Valkey is unavailable: the pass is then recorded as postponed, and logged.
   It does a bounded amount of work, and takes an advisory lock if two control workers must not do it together.
   Within one process, two passes of a job never overlap.
2. Give its interval a setting.
3. Add an entry here, whose `task` is literally the import path of the function.

Nothing here reads a clock or a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce

from app.governance.costs.tasks import COSTS
from app.governance.scaler.tasks import SCALER
from app.governance.tasks import ACTIONS, ALERTS, HANDOFFS
from app.inference.batches.tasks import BATCHES
from app.inference.prediction.tasks import PREDICTIONS
from app.inference.shadows.tasks import SHADOWS
from app.inference.splits.tasks import SPLITS
from app.kernel.settings import Settings
from app.memory.consolidation.tasks import CONSOLIDATION
from app.memory.memories.tasks import EXTRACTION
from app.memory.personal.tasks import IMPORT_FOLDER
from app.scheduler.tasks import DEFRAGMENT, RECONCILE


@dataclass(frozen=True, slots=True)
class ScheduledJob:
    """A scheduled job."""

    #: Its name in `/v1/jobs`: lower case, with underscores.
    name: str
    #: The import path of its function, which is the name of its Celery task.
    task: str
    #: What it does, in a sentence without a full stop.
    description: str
    #: The setting that has its interval, such as `runs.sweep_every`.
    setting: str
    #: A setting without which the job does nothing; None: there is none.
    needs: str | None = None
    #: Other processes trigger it too, when there is something to do for it: such a pass is always due.
    is_woken: bool = False

    def every(self, settings: Settings) -> timedelta:
        """Return the interval that the settings give it."""
        found = reduce(getattr, self.setting.split("."), settings)
        assert isinstance(found, timedelta)
        return found

    def is_enabled(self, settings: Settings) -> bool:
        """Whether it has anything to do under these settings."""
        return self.needs is None or bool(reduce(getattr, self.needs.split("."), settings))


SWEEP = "workers.jobs.run_sweep"
EXPIRE = "workers.jobs.run_expire"
SCHEDULES = "workers.jobs.run_schedules"
EXPIRE_CONVERSATIONS = "workers.memory.expiry.run_conversation_expiry"
RECALL = "workers.memory.jobs.run_recall"
EVALUATION = "workers.governance.evaluation.run_evaluation"
ROLL_UP = "workers.governance.evaluation.run_roll_up"
PROBES = "workers.governance.probes.run_probes"

JOBS = (
    ScheduledJob("sweep", SWEEP, "recovers lost steps and messages, and retries what is due", "runs.sweep_every"),
    ScheduledJob("schedules", SCHEDULES, "starts the runs of schedules that are due", "schedules.check_every"),
    ScheduledJob("reconcile", RECONCILE, "places pools by demand", "fleet.reconcile_every", is_woken=True),
    ScheduledJob("defragment", DEFRAGMENT, "moves idle pools so that more models fit", "fleet.defragment_every"),
    ScheduledJob("actions", ACTIONS, "carries out the actions of rules, and takes them back", "actions.check_every"),
    ScheduledJob("alerts", ALERTS, "sends notifications of alerts, and removes old ones", "alerts.check_every"),
    ScheduledJob(
        "handoffs", HANDOFFS, "sends messages of hand-offs, and confirms them", "handoffs.check_every", is_woken=True
    ),
    ScheduledJob("batches", BATCHES, "advances batches: checks, starts, ends and expires them", "batches.check_every"),
    ScheduledJob("expire", EXPIRE, "removes runs, files and audit entries after their retention", "runs.expire_every"),
    ScheduledJob(
        "expire_conversations",
        EXPIRE_CONVERSATIONS,
        "deletes conversations after their retention",
        "conversations.expire_every",
    ),
    ScheduledJob("evaluation", EVALUATION, "reads signals, and evaluates the rules over them", "rules.evaluate_every"),
    ScheduledJob(
        "roll_up", ROLL_UP, "adds signals up to hours, days and groups, and removes old ones", "signals.roll_up_every"
    ),
    ScheduledJob(
        "consolidation",
        CONSOLIDATION,
        "starts and advances consolidations: patterns of what users say again and again",
        "consolidation.check_every",
    ),
    ScheduledJob("memories", EXTRACTION, "extracts memories from conversations", "memories.check_every"),
    ScheduledJob(
        "recall", RECALL, "makes vectors of passages, and new ones for another embedding model", "recall.check_every"
    ),
    ScheduledJob("probes", PROBES, "has every pool write a token now and then", "probes.check_every"),
    ScheduledJob("splits", SPLITS, "reads outcomes of splits, ramps up and rolls back", "splits.check_every"),
    ScheduledJob("shadows", SHADOWS, "begins runs of candidates of shadows, and compares them", "splits.check_every"),
    ScheduledJob("predictions", PREDICTIONS, "learns of ended runs how long runs take", "predictions.learn_every"),
    ScheduledJob("costs", COSTS, "adds up what attempts cost, and samples budgets", "costs.add_up_every"),
    ScheduledJob("scaler", SCALER, "asks for hosts, and gives up hosts that are not needed", "scaler.check_every"),
    ScheduledJob(
        "context_folder",
        IMPORT_FOLDER,
        "imports the files of the watched folder",
        "context.check_every",
        "context.folder",
    ),
)

#: The jobs by name.
BY_NAME: Mapping[str, ScheduledJob] = {job.name: job for job in JOBS}
