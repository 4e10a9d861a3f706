"""Training loops: one visible loop and a loss per model."""
