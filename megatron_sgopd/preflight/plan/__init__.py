"""Memory per rank and time per step of a recipe on a cluster, worked out without GPU and weights.

Formulae alone: config.json, the recipe and the figures of `hardware` go in. Nothing here imports
torch, so that the answer comes at once. docs/planning.md has the formulae and what checks them.
"""
