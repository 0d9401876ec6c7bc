"""The door to nemo-run, which lives in an environment of its own: `make launch-env`."""
