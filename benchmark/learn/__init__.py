"""The one fine-tuning loop, its resume files, LoRA."""
