"""What `tf_impl.gpipe_model.GPipeModel` needs to be a Keras model of any layers, with any loss.

Differs: only Keras' users compile, fit, save and load a pipeline: the others have none of this.
"""
