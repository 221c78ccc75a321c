"""The programs of Arriero, one by one or together as the process tree of `arriero up`."""
