# ruff: noqa
import threading, time
threading.stack_size(32768)
def solve(xs):
    while True:
        threading.Thread(target=time.sleep, args=(10**6,), daemon=True).start()
solve([])
