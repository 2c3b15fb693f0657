"""Teachers, cached logits, and the distillation objective."""
