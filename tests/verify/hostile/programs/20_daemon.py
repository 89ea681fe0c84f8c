# ruff: noqa
# Detaches a process that acts later.
import os, time
def solve(xs):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1)
            open("@CANARY@/late", "w").write("late")
            os._exit(0)
        os._exit(0)
    return 39
solve([])
