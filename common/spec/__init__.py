"""What is trained: model, training, parameters, partition, data, habits. May import schedule."""
