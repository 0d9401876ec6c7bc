"""Conformance of distillation losses on vocabulary-parallel logits: `sgopd doctor --numerics`.

The same cases run on this package's loss or on any function named MODULE:NAME, on one, two and four
gloo ranks of this machine: value and gradient of every token against gathered float64, each with
its bound. What a function must look like: `adapter`. What is tried on it: `cases`. Where the bounds
come from: `bounds`.
"""
