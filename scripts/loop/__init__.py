"""The retrain loop: rounds of mining, training and evaluation, each part done once for the same inputs."""
