"""`python -m llmrl`: the command `llmrl`, for where it is not on the PATH."""

from llmrl.cli import main

if __name__ == "__main__":
    main()
