# ruff: noqa
# Ends the process with the code of success.
import os
os._exit(0)
