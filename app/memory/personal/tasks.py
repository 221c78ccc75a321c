"""The task name of the job of the watched folder."""

from __future__ import annotations

#: Imports the files that have changed.
IMPORT_FOLDER = "workers.memory.context_folder.run_import_folder"
