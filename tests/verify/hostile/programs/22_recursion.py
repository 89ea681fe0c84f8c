# ruff: noqa
import sys
sys.setrecursionlimit(10**9)
def solve(xs):
    return solve(xs) + 1
print(solve([]))
