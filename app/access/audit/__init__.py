"""The audit log: who has changed what, when, and with which outcome."""
