# ruff: noqa
# An exception whose own methods attack whoever prints it.
import os, time
class Bad(Exception):
    def __str__(self): time.sleep(10**6)
    def __repr__(self): os._exit(0)
    def __reduce__(self): return (os.system, ("touch @CANARY@/reduce",))
def solve(xs):
    raise Bad
solve([])
