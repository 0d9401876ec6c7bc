"""The laptop demonstration: a small maths world, its recipes, and the comparison they make."""
