"""Fine-tuning methods: each file holds a method's configuration and how it starts."""
