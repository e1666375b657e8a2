"""TensorRT engines: planning, building and refitting them."""
