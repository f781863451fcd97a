"""The pipeline in PaddlePaddle: one process per stage, through fleet's pipeline API."""
