"""The pipeline in PyTorch: stages placed by hand, a thread per device, moves by `.to(device)`."""
