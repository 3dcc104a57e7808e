"""The same as `litlora generate`, from a checkout: python scripts/generate.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litlora.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
