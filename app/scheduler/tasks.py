"""The names of the fleet's tasks: their import paths, literally. This package publishes by name."""

#: Bring what is desired of the fleet in line with what is asked of it.
RECONCILE = "workers.jobs.run_reconcile"
#: Move idle pools so that models fit that fit nowhere.
DEFRAGMENT = "workers.jobs.run_defragment"
