"""`python -m lora_core` is `lora-core`: for a checkout that was never installed."""

from lora_core.cli import main

if __name__ == "__main__":
    main()
