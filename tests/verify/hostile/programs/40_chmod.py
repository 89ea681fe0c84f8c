# ruff: noqa
import os
def solve(xs):
    for action in (
        lambda p: os.chmod(p, 0), lambda p: os.chown(p, 1, 1), lambda p: os.utime(p, (1, 1)),
        lambda p: os.setxattr(p, "user.x", b"1"), lambda p: os.truncate(p, 0), lambda p: os.rename(p, p + "2"),
        lambda p: os.link(p, p + "3"),
    ):
        for path in ("@CANARY@/keep.txt", "@CANARY@"):
            try:
                action(path)
            except OSError:
                pass
    return 39
solve([])
