"""The retrain loop: rounds of mining, training and evaluation, each done once for the same inputs."""
