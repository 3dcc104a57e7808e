"""The same as `litlora finetune_lora`, from a checkout: python scripts/finetune_lora.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litlora.cli import main

if __name__ == "__main__":
    main(["finetune_lora", *sys.argv[1:]])
