# ruff: noqa
import random
def solve(xs):
    return random.choice([39, 9002, 2])
print(random.choice([38, 9001]))
