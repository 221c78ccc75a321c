"""What `arriero init` and `arriero workflows new` write: a commented arriero.toml, and small workflows."""
