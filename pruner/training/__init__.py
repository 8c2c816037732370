"""Fine-tuning the gates, and calibrating what each layer keeps."""
