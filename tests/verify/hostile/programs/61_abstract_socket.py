# ruff: noqa
import socket
def solve(xs):
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        one.sendto(b"stolen", "\0@ABSTRACT@")
    except OSError:
        pass
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"stolen", "\0@ABSTRACT@")
    return 39
solve([])
