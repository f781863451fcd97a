"""The pipeline in PyTorch: stages placed on devices by hand, one thread per device, activations
moved by `.to(device)`.
"""
