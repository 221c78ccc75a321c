"""The process tree of `arriero up`: embedded servers, the API and workers, watched by one parent."""
