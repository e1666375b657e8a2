"""The small model of moving handwritten digits: data, training and evaluation."""
