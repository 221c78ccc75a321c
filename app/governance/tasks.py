"""The task names of the jobs of actions, alerts and hand-offs: their import paths."""

#: Carries out actions, and takes them back.
ACTIONS = "workers.governance.actions.run_actions"
#: Writes and delivers notifications of alerts.
ALERTS = "workers.governance.alerts.run_alerts"
#: Sends and confirms messages of hand-offs.
HANDOFFS = "workers.handoffs.job.run_handoffs"
