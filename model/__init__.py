"""The trainable HOPE model."""
