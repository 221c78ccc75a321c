"""The ledger of memory: reservations, their rules, and the session that stores them."""
