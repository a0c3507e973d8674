"""train.py that announces its phases in the file named by the environment; started by torchrun."""

import os
import sys
from pathlib import Path

import train as train_script
from tests.e2e.faults.kill_phases import WATCH_VARIABLE, Watch

if __name__ == "__main__":
    Watch(Path(os.environ[WATCH_VARIABLE])).install()
    sys.exit(train_script.main())
