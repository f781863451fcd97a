"""What is trained: model, training, parameters, partition, data, dropout masks, numerical habits.
May import schedule.
"""
