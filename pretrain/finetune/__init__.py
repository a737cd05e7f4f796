"""Fine-tuning by the paper's protocol: sweeps of runs."""
