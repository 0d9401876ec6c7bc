"""The loss beside its baselines, in one run: time, memory, collectives, gradient error.

`cases` says what is measured, `inputs` draws it, `ours`, `plain` and `baselines` are the variants,
`measure` times and counts, `worker` runs a list of cases in one allocator setting, `kl` starts the
workers and collects their rows, `table` and `plots` show them. Started by `sgopd bench`, in a
process of its own; torch is imported by the workers alone.
"""
