"""The fleet: hosts, their devices, the pools on them, and the reservations of their memory."""
