"""The inspector: `python app.py [--run runs/NAME]`, the same as `python -m hapo_lite.inspect`."""

import sys

from hapo_lite.cli import run_command
from hapo_lite.inspect.__main__ import serve

if __name__ == "__main__":
    sys.exit(run_command(serve))
