"""The commands of the program `lora-core`, one a file."""
