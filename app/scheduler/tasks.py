"""The names of the tasks of the scheduler: their import paths. This package publishes by name."""

#: Run a reconcile pass.
RECONCILE = "workers.jobs.run_reconcile"
#: Move idle pools so that models fit that fit nowhere now.
DEFRAGMENT = "workers.jobs.run_defragment"
